"""Circuits of a BERT against its Hugging Face tensors, put together by hand in float64.

Norms stand behind the embedding and behind each sublayer: their gains and centrings are part of what a head
reads and writes, and the prediction head's norm is folded into the unembedding.
"""

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import jitter
from tests.folders import SMALL, write_folder

D, K = SMALL["hidden_size"], SMALL["hidden_size"] // SMALL["num_attention_heads"]
P = torch.eye(D, dtype=torch.float64) - 1 / D  # takes the mean out
HEADS = ((0, 1), (1, 2))


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bert")
    source, _ = write_folder("bert", folder)
    jitter(source, seed=3)
    source.save_pretrained(folder)
    return source.double(), mia.load(folder, dtype=torch.float64)


def gain(norm):
    return torch.diag(norm.weight.detach())


def parts(source, layer, head):
    """W_Q, b_Q, W_K and OV of a head; OV ends behind the norm that follows."""
    attention, mine = source.bert.encoder.layer[layer].attention, slice(K * head, K * (head + 1))
    q, k, v = (getattr(attention.self, name) for name in ("query", "key", "value"))
    W_Q, W_K, W_V = (one.weight.detach().T[:, mine] for one in (q, k, v))
    W_O = attention.output.dense.weight.detach().T[mine]
    return W_Q, q.bias.detach()[mine], W_K, W_V @ W_O @ P @ gain(attention.output.LayerNorm)


def rows_centred(table):
    return table - table.mean(1, keepdim=True)


@pytest.mark.parametrize(("layer", "head"), HEADS)
def test_circuits_of_a_bert(both, layer, head):
    source, model = both
    embedding, prediction = source.bert.embeddings, source.cls.predictions
    tokens = embedding.word_embeddings.weight.detach() @ P @ gain(embedding.LayerNorm)
    W_U = P @ gain(prediction.transform.LayerNorm) @ prediction.decoder.weight.detach().T
    W_Q, b_Q, W_K, OV = parts(source, layer, head)
    label = f"L{layer}H{head}"
    found = mia.circuits.ov_circuit(model, label)
    torch.testing.assert_close(  # float64: twelve digits
        rows_centred(found.left() @ found.right()), rows_centred(tokens @ OV @ W_U), rtol=1e-9, atol=1e-12
    )
    read = tokens + embedding.LayerNorm.bias.detach()
    found = mia.circuits.qk_circuit(model, label)
    torch.testing.assert_close(
        rows_centred(found.left() @ found.right()),
        rows_centred((read @ W_Q + b_Q) @ (read @ W_K).T),
        rtol=1e-9,
        atol=1e-12,
    )


def test_composition_of_a_bert(both):
    source, model = both
    first, second = (parts(source, *one)[3] for one in HEADS)
    frame = mia.circuits.composition(model, "V").frame.set_index(["src", "dst"])
    expected = (first @ second).norm() / (first.norm() * second.norm())
    assert frame.loc[("L0H1", "L1H2"), "score"] == pytest.approx(float(expected), rel=1e-9)
    W_Q, _, W_K, _ = parts(source, 1, 2)
    QK = W_Q @ W_K.T
    frame = mia.circuits.composition(model, "Q").frame.set_index(["src", "dst"])
    expected = (first @ QK).norm() / (first.norm() * QK.norm())
    assert frame.loc[("L0H1", "L1H2"), "score"] == pytest.approx(float(expected), rel=1e-9)
