"""What neurons read and write against the dense float64 products."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import tiny_bridge

C = mia.circuits


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())  # float64


def dense(model, head):
    """Every token's side values, from the head's own weights."""
    head = model[head]
    logits = head.W_O[0] @ model.W_U
    return {
        "query": model.W_E @ head.W_Q[:, 0] + head.b_Q,
        "value": model.W_E @ head.W_V[:, 0] + head.b_V,
        "raises": logits - logits.mean(),
        "lowers": logits.mean() - logits,
    }


@torch.no_grad()
def agrees(model, heads, sides, top_k=4):
    found = C.reads_and_writes(model, heads, top_k=top_k)
    assert found.receipt.ok
    assert set(found.frame["side"]) == sides
    for (head, side), rows in found.frame.groupby(["head", "side"]):
        expected = dense(model, head)[side].topk(top_k)
        assert rows["token_id"].tolist() == expected.indices.tolist()
        value = expected.values * (-1 if side == "lowers" else 1)
        torch.testing.assert_close(
            torch.tensor(rows["value"].to_numpy()), value, rtol=0, atol=1e-10
        )  # float64
        assert rows["rank"].tolist() == [1, 2, 3, 4]
        assert found.tokens(head, side) == model.to_str_tokens(expected.indices)


def test_neurons_read_and_write_what_their_weights_say(model):
    agrees(model, ["L0N3", "L1N0", model["L1N7"]], {"query", "raises", "lowers"})


def test_a_gated_neuron_reads_two_directions():
    generator = torch.Generator().manual_seed(1)
    cfg = dict(n_layers=1, n_heads=2, d_model=16, d_head=8, n_ctx=8, d_vocab=11, d_mlp=6)
    cfg |= dict(act_fn="silu", normalization_type="RMS", positional_embedding_type="rotary", gated_mlp=True)
    shapes = {"embed.W_E": (11, 16), "unembed.W_U": (16, 11)}
    shapes |= {f"blocks.0.attn.W_{x}": (2, 16, 8) for x in "QKV"} | {"blocks.0.attn.W_O": (2, 8, 16)}
    shapes |= {f"blocks.0.mlp.W_{x}": (16, 6) for x in ("in", "gate")} | {"blocks.0.mlp.W_out": (6, 16)}
    shapes |= {"blocks.0.ln1.w": (16,), "blocks.0.ln2.w": (16,), "ln_final.w": (16,)}
    state = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    model = mia.convert(mia.Checkpoint(cfg, state))
    agrees(model, ["L0N0", "L0N5"], {"query", "value", "raises", "lowers"})


@pytest.mark.parametrize(
    ("heads", "top_k"), [([], 3), (["L0H1", "L0N1"], 3), (["L0N1"], 0), (["L0N1"], 99)]
)
def test_what_it_cannot_read(model, heads, top_k):
    with pytest.raises(MechInterpError, match=r"inner dimension 1|no heads selected"):
        C.reads_and_writes(model, heads, top_k=top_k)
