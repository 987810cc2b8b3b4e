"""Loadings on a score against matrices by hand, in float64."""

import math

import pytest

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge
from tests.conversion.test_parts import checkpoint


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


def written(model, cache, label):
    """What a head writes, ``[pos, d_model]``, from what it holds in the run."""
    head = model[label]
    (bank,) = (b for b in model.banks if label in b.labels())
    z = cache[bank.hook("z")][0, :, head.index]
    return (z[:, None] if z.ndim == 1 else z) @ head.W_O


def test_loadings_are_dense_products(model):
    """Each source's output through the norm's own scale, W_Q or W_K, and the other side as it was."""
    tokens = random_tokens(model, 1, 8)
    _, cache = model.run_with_cache(tokens)
    q, k, label = 6, 2, "L1H2"
    head = model[label]
    found = mia.causal.head_loadings(model, tokens[0], label, q, k)
    score = float(cache["blocks.1.attn.hook_attn_scores"][0, head.index, q, k])
    assert found.total == pytest.approx(score, abs=1e-9)
    assert found.positions == [(q, k)]
    scale = cache["blocks.1.ln1.hook_scale"][0]
    sides = {
        "query": (q, head.W_Q, cache["blocks.1.attn.hook_k"][0, k, head.index]),
        "key": (k, head.W_K, cache["blocks.1.attn.hook_q"][0, q, head.index]),
    }
    for side, (at, W, other) in sides.items():
        own = found.frame[found.frame["side"] == side].set_index("head")["value"]
        assert float(own.sum()) == pytest.approx(score, abs=1e-9)
        sources = {name: written(model, cache, name) for name in ("L0H0", "L0H3", "L0N0", "L0N17")}
        sources["embed"] = cache["hook_embed"][0]
        for name, stream in sources.items():
            x = stream[at]
            expected = ((x - x.mean()) / scale[at]) @ W @ other / math.sqrt(4)
            assert own[name] == pytest.approx(float(expected), abs=1e-9), (side, name)
    assert found.receipt.ok


@pytest.mark.parametrize("family", ["rotary, shared keys", "alibi", "capped"])
def test_loadings_sum_to_the_score(family):
    """Of every kind of score; over the other keys; in the mean over a task's prompts."""
    more = {
        "rotary, shared keys": dict(
            positional_embedding_type="rotary", n_key_value_heads=2, normalization_type="RMS",
            act_fn="silu", gated_mlp=True,
        ),
        "capped": dict(attn_scores_soft_cap=5.0),
    }  # fmt: skip
    model = mia.convert(checkpoint("alibi") if family == "alibi" else tiny_bridge(**more[family]))
    tokens = random_tokens(model, 3, 7)
    frozen = [mia.paths.freeze(model, row) for row in tokens]
    for against in (None, "others"):
        task = mia.Task(tokens, answer=1)
        found = mia.causal.head_loadings(model, task, "L1H1", 5, 1, against=against)
        expected = [mia.paths.expand_score(f, "L1H1", 5, 1, against=against).total for f in frozen]
        assert found.total == pytest.approx(sum(expected) / 3, abs=1e-9)
        assert found.frame.groupby("side")["value"].sum().tolist() == pytest.approx(
            [found.total] * 2, abs=1e-9
        )
        assert found.receipt.ok


def test_by_default_the_key_that_is_looked_at_most(model):
    tokens = random_tokens(model, 1, 8)
    pattern = model.run_with_cache(tokens)[1]["blocks.1.attn.hook_pattern"][0, 3, 7]
    assert mia.causal.head_loadings(model, tokens[0], "L1H3").positions == [(7, int(pattern.argmax()))]


def test_a_neurons_loadings(model):
    """On its pre-activation: through its one reading vector."""
    tokens = random_tokens(model, 1, 8)
    z = model.run_with_cache(tokens)[1]["blocks.1.neurons.hook_score"][0, 7, 4]
    found = mia.causal.head_loadings(model, tokens[0], "L1N4")
    own = found.frame[found.frame["side"] == "query"]
    assert float(own["value"].sum()) == pytest.approx(float(z), abs=1e-9)
    assert found.total == pytest.approx(float(z), abs=1e-9)


@pytest.mark.usefixtures("as_users_run_it")
def test_refusals(model):
    tokens = random_tokens(model, 1, 8)[0]
    for args, said in (
        (("L0H0 > L1H1",), "virtual head"),
        (("L1H1", 2, 5), "cannot see position 5"),
        (("L1H1", 99), "outside the prompt of 8 tokens"),
        (("L9H1",), "L9H1"),
    ):
        with pytest.raises(mia.MechInterpError, match=said):
            mia.causal.head_loadings(model, tokens, *args)
