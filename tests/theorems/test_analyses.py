"""Circuits, paths and detectors on the literal model: the answers of the practical form."""

import numpy as np
import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.theorems import LiteralModel, attention_only
from tests.conftest import random_tokens, tiny_bridge

CONFIGS = {
    "silu": (dict(act_fn="silu"), {}, {}, 1e-10),
    "masks in weights": (dict(act_fn="silu"), {}, dict(masks="weights"), 1e-10),
    "mixture": (dict(act_fn="gelu"), dict(mlp="mixture", components=4), {}, 1e-10),
    # Products are off by 1e-10 of themselves; scores and shares of small terms magnify it.
    "gated": (dict(act_fn="silu", gated_mlp=True, normalization_type="RMS"), {}, {}, 1e-6),
    "gated mixture": (
        dict(act_fn="silu", gated_mlp=True, n_key_value_heads=2),
        dict(mlp="mixture", components=6, check=False),
        {},
        1e-10,
    ),
}


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    config, mode, options, tolerance = CONFIGS[request.param]
    practical = mia.convert(tiny_bridge(**config), **mode)
    return attention_only(practical, **options), practical, tolerance


CIRCUITS = {
    "bigrams": lambda m: mia.circuits.bigrams(m, top_k=3),
    "ov_top": lambda m: mia.circuits.ov_top(m, m.heads[-1], top_k=5),
    "qk_top": lambda m: mia.circuits.qk_top(m, "L1H2", top_k=5),
    "ov_circuit": lambda m: mia.circuits.ov_circuit(m, m.heads[-2]).statistics(),
    "skip_trigrams": lambda m: mia.circuits.skip_trigrams(m, "L0H1", top_k=5),
    "factoring_bugs": lambda m: mia.circuits.factoring_bugs(m, "L1H1", top_k=5),
    "copying_scores": mia.circuits.copying_scores,
    "singular_directions": lambda m: mia.circuits.singular_directions(m, "L1H0", components=3),
    "Q-composition": lambda m: mia.circuits.composition(m, "Q"),
    "K-composition": lambda m: mia.circuits.composition(m, "K", top_k=20),
    "V-composition": lambda m: mia.circuits.composition(m, "V", top_k=20),
    "virtual_heads": lambda m: mia.circuits.virtual_heads(m),
    "position_circuit": lambda m: mia.circuits.position_circuit(m, "L0H2"),
    "token_positions": lambda m: mia.circuits.token_positions(m, "L0H2"),
}
PATHS = {
    "orders": mia.paths.orders,
    "logit_attribution": lambda f: mia.paths.logit_attribution(f, target=3),
    "top_paths": lambda f: mia.paths.top_paths(f, target=3, top_k=12, max_expansions=40),
    "expand_score": lambda f: mia.paths.expand_score(f, "L1H2", 6, 3, against="others"),
    "expand_score of a neuron": lambda f: mia.paths.expand_score(f, f.model.banks[3].label(5), 6),
    "attribution_graph": lambda f: mia.paths.attribution_graph(f, target=3, against=1, scores=True),
    "virtual_head": lambda f: mia.paths.virtual_head(f, "L0H1", f.model.banks[3].label(2), target=3),
}
DETECTORS = {
    "term_importance": lambda m, t: mia.paths.term_importance(m, t, heads=40),
    "score_heads": lambda m, t: mia.detect.score_heads(m, tokens=t),
    "score_weights": lambda m, t: mia.detect.score_weights(m, draws=2),
    "induction": lambda m, t: mia.detect.induction(m, draws=2),
    "ablate": lambda m, t: mia.detect.ablate(m, t, exact=6),
    "ablate together": lambda m, t: mia.detect.ablate(
        m, t, ["L0H1", m.banks[3].label(2)], together=True, replace="mean", keep_patterns=True
    ),
}


def agree(own: pd.DataFrame, expected: pd.DataFrame, tolerance: float) -> None:
    """The same rows in the same order, numbers within a tolerance of the largest of their column."""
    assert list(own.columns) == list(expected.columns)
    for column in own:
        a, b = own[column], expected[column]
        if pd.api.types.is_float_dtype(b):
            a, b = a.to_numpy(), b.to_numpy()
            scale = max([1.0, *np.abs(b[np.isfinite(b)])])
            assert np.allclose(a, b, rtol=0, atol=tolerance * scale, equal_nan=True), column
        else:
            assert a.astype(str).tolist() == b.astype(str).tolist(), column


@pytest.mark.parametrize("name", CIRCUITS)
def test_circuits(pair, name):
    literal, practical, tolerance = pair
    own, expected = (CIRCUITS[name](model).frame for model in (literal, practical))
    assert len(own)
    agree(own, expected, tolerance)


@pytest.fixture(scope="module")
def frozen(pair):
    literal, practical, tolerance = pair
    tokens = random_tokens(practical)[0, :8]
    both = [mia.paths.freeze(model, tokens) for model in (literal, practical)]
    assert both[0].receipt.ok, both[0].receipt
    assert torch.allclose(both[0].logits, both[1].logits, rtol=0, atol=tolerance)
    return *both, tolerance


@pytest.mark.parametrize("name", PATHS)
def test_paths(frozen, name):
    *both, tolerance = frozen
    own, expected = (PATHS[name](f) for f in both)
    assert own.receipt.ok, own.receipt
    agree(own.frame, expected.frame, tolerance)
    if name == "orders":
        assert torch.allclose(own.logits, expected.logits, rtol=0, atol=tolerance)
    if name == "attribution_graph":
        agree(own.nodes, expected.nodes, tolerance)


@pytest.mark.parametrize("name", DETECTORS)
def test_detectors(pair, name):
    literal, practical, tolerance = pair
    tokens = random_tokens(practical)[0]
    own, expected = (DETECTORS[name](model, tokens).frame for model in (literal, practical))
    agree(own, expected, tolerance)


def test_its_heads_are_heads_with_the_same_weights(pair):
    literal, practical, _ = pair
    assert isinstance(literal, LiteralModel)
    assert list(literal.heads) == list(practical.heads)
    for label in ("L0H1", literal.banks[3].label(7)):
        own, expected = literal[label], practical[label]
        assert isinstance(own, mia.Head)
        for part in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            assert torch.equal(getattr(own, part), getattr(expected, part))
        bank, index = literal.heads.find(label)
        written, d = literal.heads_of(bank)[index].W_OV.dense(), literal.spec.d_model
        if literal.products_of(bank):  # the head that weighs a product reads it from scratch
            assert not written[:d].any()
            at = literal.layout.scratch_at[index]
            assert torch.allclose(written[at, :d], own.W_O[0], atol=1e-15)
        else:
            assert torch.allclose(written[:d, :d], own.OV.dense(), atol=1e-15)
