"""Costs: against published parameter counts, against a count of the model's own tensors, by hand."""

import pytest

import mechinterp_attn as mia
from mechinterp_attn import MechInterpError
from mechinterp_attn.theorems import Shape, costs, public_costs
from mechinterp_attn.theorems.costs import PUBLIC
from tests.conftest import tiny_bridge


@pytest.mark.parametrize("shape", PUBLIC, ids=lambda s: s.name)
def test_parameters_are_the_published_ones(shape):
    found = costs(shape)
    if shape.n_parameters is None:
        assert 174e9 < found.frame["parameters"].iloc[0] < 176e9  # GPT-3's "175 billion"
    else:
        assert found.receipt.ok, found.receipt


def test_heads_and_shares_of_gpt2_small_and_gpt3():
    frame = public_costs().set_index(["model", "form"])
    small = frame.loc["GPT-2 small", "two-key"]
    assert (small["attention_heads"], small["mlp_heads"]) == (144, 36_864)
    assert small["mlp_share"] == pytest.approx(2 * small["attention_share"], rel=2e-3)
    assert small["mlp_head_share"] > 0.99
    large = frame.loc["GPT-3", "two-key"]
    assert large["mlp_heads"] == 512 * large["attention_heads"]
    assert len(frame) == 3 * len(PUBLIC)


def test_forms_differ_as_the_paper_says():
    frame = costs("gpt-2 small", n_tokens=100).frame.set_index("form")
    original, two_key, dense = (frame.loc[form] for form in ("original", "two-key", "dense"))
    assert two_key["flops"] == original["flops"]
    assert dense["mlp_flops"] == pytest.approx((1 + 100 / 768) * original["mlp_flops"])
    assert dense["pattern_bytes"] == 4 * (144 + 36_864) * 100**2
    assert two_key["pattern_bytes"] == 4 * (144 * 100**2 + 36_864 * 100)
    assert original["attention_flops"] == 12 * (2 * 4 * 768**2 + 4 * 100 * 768)


@pytest.mark.parametrize("config", [dict(act_fn="silu"), dict(attn_only=True)], ids=str)
def test_a_models_parameters_are_those_of_its_source(config):
    bridge = tiny_bridge(**config)
    frame = costs(mia.convert(bridge)).frame
    assert frame["parameters"].iloc[0] == sum(p.numel() for p in bridge.parameters())
    assert frame["mlp_heads"].iloc[2] == (0 if "attn_only" in config else 48)


def test_unknown_models_and_lengths():
    with pytest.raises(MechInterpError, match="no public config 'gpt-5'; there are GPT-2 small"):
        costs("gpt-5")
    with pytest.raises(MechInterpError, match="n_tokens=0"):
        costs(Shape(name="x", n_layers=1, d_model=4, n_heads=1, d_mlp=4, d_vocab=5, n_ctx=6), n_tokens=0)
