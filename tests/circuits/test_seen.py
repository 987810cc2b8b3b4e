"""What softmax and norms see is in the circuits, and nothing else is.

Query biases, norms behind a sublayer or the embedding, neurons at the end of a chain: against what the
model itself computes, or dense float64 products. The symmetries are in ``tests/test_invariance.py``.
"""

import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.circuits import bugs
from mechinterp_attn.model.select import resolve_head
from tests.circuits import dense
from tests.circuits.test_composition import random_model

C = mia.circuits


def biased(seed: int = 0, **changes):
    """A random model in which every bias is there."""
    model = random_model(seed, **changes)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_a_head_that_asks_with_its_bias_alone():
    """W_Q = 0 and b_Q along the key of token 7: every query attends to token 7 most."""
    model = random_model(d_vocab=20, d_head=16)
    bank = model.banks[0]
    with torch.no_grad():
        keys = model.W_E @ bank.W_K[1]
        keys = keys / keys.norm(dim=1, keepdim=True)
        bank.W_K[1] = torch.linalg.pinv(model.W_E) @ keys
        bank.W_Q[1] = 0
        bank.b_Q[1] = (model.W_E @ bank.W_K[1])[7]
    found = C.qk_top(model, "L0H1", over="rows", top_k=1).frame
    assert found["token_id"].tolist() == [7] * 20
    trigrams = C.skip_trigrams(model, "L0H1", sources=[7], top_k=1).frame
    assert (trigrams["qk"] > 0).all()


def test_qk_circuits_say_what_a_trained_model_attends_to():
    """attn-1l, 12 queries and 120 keys at one pair of positions: rank correlation with the real scores,
    against the circuit without the query's bias. What is missing to 1 are the norm's scales."""
    model = mia.load("attn-1l")
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randperm(model.spec.d_vocab, generator=generator)[:n] for n in (120, 12))
    pairs = torch.cartesian_prod(queries, keys)
    _, cache = model.run_with_cache(pairs.flip(1))  # the key stands before the query
    for h in range(4):
        real = cache["blocks.0.attn.hook_attn_scores"][:, h, 1, 0].view(12, 120)
        table = C.qk_circuit(model, f"L0H{h}").block(queries.tolist(), keys.tolist()).values
        head = model[f"L0H{h}"]
        rows, columns = (model.W_E.detach()[ids].double() for ids in (queries, keys))
        plain = rows @ dense.qk(head) @ columns.T
        rho, without = (
            pd.DataFrame(real.T.numpy()).corrwith(pd.DataFrame(t.T.numpy()), method="spearman").mean()
            for t in (table, plain)
        )
        assert rho > 0.6
        assert rho > without + 0.2


def test_neurons_and_heads_are_read_with_one_meaning():
    model = biased(d_mlp=6)
    x = model.W_E.detach()
    for label in ("L0H1", "L1N4", "L0H1 > L1H2"):
        head = resolve_head(model, label)
        torch.testing.assert_close(head.query_read(x), x @ head.W_Q + head.b_Q)


@pytest.mark.parametrize("label", ["L0H2 > L1N3", "L0H1 > L0N2 > L1N3", "L0N2 > L1H0 > L1N3"])
def test_a_neuron_at_the_end_of_a_chain_fires_on_what_was_moved_to_it(label):
    """Its pre-activation on the query token with the key token moved there, one pair at a time."""
    model = biased(1, d_mlp=6)
    *before, last = (model[part] for part in label.split(" > "))
    x = model.W_E.detach()
    moved = x
    for head in before:
        moved = moved @ head.W_V @ head.W_O
    expected = ((x[:, None] + moved) @ last.W_Q + last.b_Q)[..., 0]
    head = resolve_head(model, label)
    assert head.mixes_positions
    table = C.qk_circuit(model, label).block(list(range(20)), list(range(20))).values
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-9)
    found = C.qk_top(model, label, top_k=5).frame
    assert found["value"].to_numpy() == pytest.approx(expected.flatten().topk(5).values.numpy())
    assert C.factoring_bugs(model, label, top_k=2).receipt.ok
    assert C.skip_trigrams(model, label, top_k=3).receipt.ok


def test_neurons_one_after_the_other_see_their_own_token():
    model = biased(2, d_mlp=6)
    one, two = model["L0N2"], model["L1N3"]
    x = model.W_E.detach()
    z = (x + x @ one.W_V @ one.W_O) @ two.W_Q + two.b_Q
    found = C.qk_top(model, "L0N2 > L1N3", top_k=4).frame
    assert found["value"].to_numpy() == pytest.approx(z[:, 0].topk(4).values.numpy())
    assert (found["source_id"] == found["token_id"]).all()
    with pytest.raises(mia.MechInterpError, match="sees only its own token"):
        C.factoring_bugs(model, "L0N2 > L1N3")


def test_bugs_are_checked_against_the_circuits(monkeypatch):
    """The receipt turns red when a half is wrong, which no product of the same halves could show."""
    model = random_model(d_vocab=12)
    assert C.factoring_bugs(model, "L0H0").receipt.ok
    right = bugs.halves_of

    def wrong(*args):
        query, key, read, write = right(*args)
        return 1.01 * query, key, read, write

    monkeypatch.setattr(bugs, "halves_of", wrong)
    with pytest.warns(mia.FailedCheckWarning):
        assert not C.factoring_bugs(model, "L0H0").receipt.ok
