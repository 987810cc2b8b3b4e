"""Whole models by the inductive procedure: the literal model against its source, and under analysis."""

import copy

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn import FailedCheckWarning, MechInterpError
from mechinterp_attn.core.errors import UnsupportedModelError
from mechinterp_attn.theorems import (
    LiteralModel,
    attention_only,
    calibrate_omega,
    mask_sweep,
)
from mechinterp_attn.theorems.whole import inductive_steps
from tests.conftest import random_tokens, tiny_bridge
from tests.conversion.families import FAMILIES, bridge_of

TOL = 1e-11  # float64, of the logit scale


@pytest.fixture(scope="module")
def silu():
    """A practical model with biases, norms, and nothing trivial (float64)."""
    return mia.convert(tiny_bridge(act_fn="silu", n_layers=2))


@pytest.mark.parametrize(
    "config",
    [
        dict(act_fn="silu", n_layers=4),
        dict(act_fn="silu", normalization_type=None),
        dict(act_fn="silu", n_key_value_heads=2),
        dict(attn_only=True),
    ],
    ids=str,
)
def test_after_every_sublayer_the_stream_is_the_sources(config):
    bridge = tiny_bridge(**config)
    literal = attention_only(bridge)
    frame = literal.steps.frame
    sublayers = literal.spec.n_layers * (1 if literal.spec.attn_only else 2)
    assert len(frame) == sublayers + 1
    assert float(frame["relative"].max()) < TOL
    assert float(frame["constant"].max()) == 0.0
    assert float(frame["bias_row"].max()) == 0.0
    tokens = random_tokens(literal, seed=5)
    with torch.no_grad():
        expected = bridge(tokens, return_type="logits")
    scale = float(expected.abs().max())
    with torch.no_grad():
        assert float((literal(tokens) - expected).abs().max()) < TOL * scale
    # The bare construction and the forward pass with its hooks are two paths to one result.
    *_, (_, last) = literal.streams(tokens)
    logits = literal.unembed(literal.ln_final(literal.layout.deaugment(last))).detach()
    assert float((logits - expected).abs().max()) < TOL * scale


def test_rotary_positions_turn_the_original_heads_only():
    # The bridge takes its angles in float32 and so do we; the turning itself is written another way.
    bridge = tiny_bridge(act_fn="silu", positional_embedding_type="rotary")
    literal = attention_only(bridge)
    assert float(literal.steps.frame["relative"].max()) < 1e-6
    heavy = attention_only(bridge, masks="weights")
    assert float(heavy.steps.frame["relative"].max()) < 1e-6


def test_nothing_but_heads(silu):
    literal = attention_only(silu)
    pieces = literal.literal_sublayers()
    assert len(pieces) == 4
    attention, neurons = silu.spec.n_heads, silu.spec.d_mlp
    assert [sublayer.n_heads for _, sublayer in pieces] == [attention + 1, neurons + 1] * 2
    assert all(len(stack.W_V[0].T) == 1 for _, s in pieces[1::2] for stack in s.heads)  # rank 1
    assert literal.n_heads == silu.n_heads  # of the banks; each output bias is one head more


def test_masks_in_weights_stay_under_the_bound_with_slope_minus_one(silu):
    sweep = mask_sweep(silu, random_tokens(silu), range(0, 65, 4))
    assert sweep.receipt.ok, sweep.receipt
    bounded = sweep.frame.dropna()
    assert len(bounded) == 17 * 4
    assert sweep.slope() == pytest.approx(-1.0, abs=0.05)
    logits = sweep.frame[sweep.frame["sublayer"] == "logits"]
    assert float(logits["error"].iloc[-1]) < 1e-12  # the floor of rounding


def test_masks_in_weights_by_default_reach_the_precision_of_masks(silu):
    literal = attention_only(silu, masks="weights")
    assert literal.omega is not None
    assert literal.steps.receipt.ok, literal.steps
    assert "in the weights, omega" in repr(literal)


def test_omega_is_calibrated_and_too_small_a_one_is_refused(silu):
    tokens = random_tokens(silu)
    found = calibrate_omega(silu, tokens, 1e-6)
    assert found.receipt.ok, found.receipt
    assert found.omega == float(found.frame["least_omega"].max())
    tighter = calibrate_omega(silu, tokens, 1e-9)
    assert tighter.omega - found.omega == pytest.approx(torch.log(torch.tensor(1e3)).item(), abs=1e-4)
    with pytest.raises(MechInterpError, match=r"omega=5 bounds.*the least omega that does is \d+"):
        attention_only(silu, masks="weights", omega=5.0, tolerance=1e-6)
    with pytest.warns(FailedCheckWarning, match="logits against the original"):
        assert attention_only(silu, masks="weights", omega=5.0).omega == 5.0  # no tolerance asked for


def test_refusals(silu):
    half = copy.deepcopy(silu).to(torch.bfloat16)
    with pytest.raises(MechInterpError, match=r"float32 or float64, got bfloat16.*masks='exact'"):
        attention_only(half, masks="weights")
    with pytest.raises(MechInterpError, match="omega and tolerance are for masks='weights'"):
        attention_only(silu, omega=30.0)
    literal = attention_only(silu)
    with pytest.raises(MechInterpError, match="does not accept attention_mask"):
        literal(random_tokens(silu), attention_mask=torch.ones(2, 12))
    with pytest.raises(MechInterpError, match="the literal form is not saved"):
        literal.save("anywhere")
    with pytest.raises(MechInterpError, match="a slope needs two"):
        mask_sweep(silu, random_tokens(silu), [60.0]).slope()


def test_parts_that_are_no_heads_are_all_named(silu):
    model = mia.convert(tiny_bridge(act_fn="solu"))
    object.__setattr__(model.spec, "score_cap", 50.0)
    with pytest.raises(UnsupportedModelError, match=r"(?s)theorems\.solu_heads.*soft-capped"):
        attention_only(model)


# -- whole models whose neurons multiply --------------------------------------------------------


def checkpoint(act_fn, *, gated):
    """Two layers with biases everywhere, RMS norms with gains, windows of one attention layer."""
    D, M, V, H = 8, 10, 11, 2
    state = {"embed.W_E": (V, D), "pos_embed.W_pos": (9, D), "unembed.W_U": (D, V), "unembed.b_U": (V,)}
    for at in ("blocks.0", "blocks.1"):
        state |= {f"{at}.attn.W_{x}": (H, D, 4) for x in "QKV"} | {
            f"{at}.attn.b_{x}": (H, 4) for x in "QKV"
        }
        state |= {f"{at}.attn.W_O": (H, 4, D), f"{at}.attn.b_O": (D,), f"{at}.ln1.w": (D,)}
        state |= {f"{at}.mlp.W_in": (D, M), f"{at}.mlp.b_in": (M,), f"{at}.ln2.w": (D,)}
        state |= {f"{at}.mlp.W_out": (M, D), f"{at}.mlp.b_out": (D,)}
        if gated:
            state |= {f"{at}.mlp.W_gate": (D, M), f"{at}.mlp.b_gate": (M,)}
    state["ln_final.w"] = (D,)
    generator = torch.Generator().manual_seed(0)
    weights = {n: torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for n, s in state.items()}
    cfg = dict(n_layers=2, n_heads=H, d_model=D, d_head=4, d_mlp=M, n_ctx=9, d_vocab=V, act_fn=act_fn)
    return mia.Checkpoint(cfg | dict(normalization_type="RMS", gated_mlp=gated), weights, name="tiny")


@pytest.mark.parametrize(
    ("act_fn", "gated", "exact", "tolerance"),
    [
        ("silu", True, True, 1e-8),  # a product is off by 1e-10 of itself, see gated.product_heads
        ("quick_gelu", True, True, 1e-8),
        ("linear", True, True, 1e-8),
        ("linear", False, True, TOL),
        ("sigmoid", True, True, TOL),  # GLU: one exact head a neuron
        ("gelu", True, False, 0.1),  # the paper's parameters: 0.0203 an activation
        ("relu", True, False, 1e-3),  # of sharpness 1000
        ("relu2", False, False, 1e-3),
        ("relu", False, False, 1e-3),
    ],
)
def test_any_activation_of_the_class_gated_or_not(act_fn, gated, exact, tolerance):
    source = checkpoint(act_fn, gated=gated)
    for masks in ("exact", "weights"):
        literal = attention_only(source, masks=masks)
        frame = literal.steps.frame
        assert literal.exact == exact
        assert literal.steps.receipt.ok is (True if exact else None), literal.steps
        assert float(frame["relative"].max()) < tolerance
        assert float(frame["constant"].max()) == 0.0
        assert float(frame["bias_row"].max()) < (1e-18 if masks == "weights" else 1e-300)
    products = (gated and act_fn != "sigmoid") or act_fn == "relu2"
    assert frame["sublayer"].str.endswith("products").sum() == 2 * products
    assert literal.layout.scratch == 10 * products
    *_, (_, last) = literal.streams(torch.arange(6)[None])
    assert not last[..., literal.layout.scratch_at].any()  # emptied, exactly


def test_products_in_weights_stay_under_the_bound_too():
    sweep = mask_sweep(checkpoint("silu", gated=True), torch.arange(9)[None], range(16, 44, 2))
    assert sweep.receipt.ok, sweep.receipt
    assert sweep.slope(floor=1e-9) == pytest.approx(-1.0, abs=0.05)


def test_products_need_digits():
    source = mia.convert(tiny_bridge(act_fn="silu", gated_mlp=True)).to(torch.bfloat16)
    with pytest.raises(MechInterpError, match="products as heads need float32 or float64, got bfloat16"):
        attention_only(source)


def test_edits_of_gated_neurons_through_hooks_have_the_same_effect():
    practical = mia.convert(tiny_bridge(act_fn="silu", gated_mlp=True))
    mixture = mia.convert(
        tiny_bridge(act_fn="silu", gated_mlp=True), mlp="mixture", components=6, check=False
    )
    points = ("neurons.hook_score", "neurons.hook_read", "neurons.hook_weight", "neurons.hook_act")
    points += ("mlp.hook_pre", "mlp.hook_pre_linear", "mlp.hook_post", "hook_mlp_out")
    for model, tolerance in ((practical, 1e-7), (mixture, 1e-10)):
        tokens = random_tokens(model)
        literal, heavy = attention_only(model), attention_only(model, masks="weights")
        for point in points:
            hooks = [(f"blocks.0.{point}", lambda x, hook: 1.5 * x)]
            expected = model.run_with_hooks(tokens, fwd_hooks=hooks)
            assert not torch.allclose(expected, model(tokens), atol=1e-3), point
            for own in (literal, heavy):
                assert torch.allclose(
                    own.run_with_hooks(tokens, fwd_hooks=hooks), expected, atol=tolerance
                ), point


def test_float32_too(silu):
    single = copy.deepcopy(silu).float()
    assert attention_only(single).steps.receipt.ok
    heavy = attention_only(single, masks="weights")
    assert heavy.steps.receipt.ok, heavy.steps


def test_gelu_by_the_papers_parameters_errs_and_says_so():
    bridge = tiny_bridge(act_fn="gelu")
    literal = attention_only(bridge)
    assert not literal.exact
    assert literal.steps.receipt.checks == ()
    # The first MLP is off by no more than the bound of the activation, over its neurons.
    bound = 0.020336 * float(literal.banks[1].W_out.detach().abs().sum(0).max())
    first = literal.steps.frame["max_error"].iloc[1]
    assert 1e-4 < first <= bound
    # An approximation asked for is what runs: the same numbers as the practical form of that mode.
    mixture = mia.convert(bridge, mlp="mixture", components=4, check=False)
    fine = attention_only(mixture)
    assert fine.exact
    assert fine.steps.receipt.ok
    assert fine.n_heads == mixture.n_heads
    with pytest.warns(FailedCheckWarning, match="logits against the original"):
        against_source = inductive_steps(fine, bridge, random_tokens(fine))
    assert against_source.max_logit_error < literal.steps.max_logit_error / 50


def test_the_model_and_its_hooks_are_left_alone(silu):
    before = {name: t.clone() for name, t in silu.state_dict().items()}
    seen = []
    silu.hook_dict["blocks.0.hook_resid_pre"].add_hook(lambda x, hook: seen.append(1))
    attention_only(silu, masks="weights")
    silu.reset_hooks()
    assert all(torch.equal(t, before[name]) for name, t in silu.state_dict().items())


# -- the same answers as on the practical form -------------------------------------------------


@pytest.mark.parametrize("masks", ["exact", "weights"])
def test_caches_agree_hook_by_hook(silu, masks):
    literal = attention_only(silu, masks=masks)
    tokens = random_tokens(silu)
    _, own = literal.run_with_cache(tokens)
    _, expected = silu.run_with_cache(tokens)
    assert set(own) == set(expected)
    for name in expected:
        if name.endswith("hook_attn_scores") and masks == "weights":
            continue  # forbidden scores are -omega there, not minus infinity
        a, b = own[name], expected[name]
        assert a.shape == b.shape, name
        close = torch.isclose(a, b, rtol=0, atol=1e-10) | (a == b)
        assert bool(close.all()), name


def test_edits_through_hooks_have_the_same_effect(silu):
    literal = attention_only(silu)
    tokens = random_tokens(silu)

    def double(x, hook):
        return 2 * x

    def halve(x, hook):
        return x / 2

    names = {
        "blocks.0.hook_resid_mid": double,
        "blocks.1.attn.hook_pattern": halve,
        "blocks.1.attn.hook_q": double,
        "blocks.1.attn.hook_z": double,
        "blocks.0.neurons.hook_weight": halve,
        "blocks.0.neurons.hook_score": double,
        "blocks.1.neurons.hook_read": double,
        "blocks.1.mlp.hook_pre": double,
        "blocks.1.mlp.hook_post": halve,
        "blocks.1.hook_mlp_out": double,
        "blocks.1.ln1.hook_scale": halve,
    }
    for name, edit in names.items():
        own, expected = (m.run_with_hooks(tokens, fwd_hooks=[(name, edit)]) for m in (literal, silu))
        assert torch.allclose(own, expected, rtol=0, atol=1e-10), name
        assert not torch.allclose(own, literal(tokens), atol=1e-3), name


# -- families ---------------------------------------------------------------------------------

REFUSED = {
    "qwen3": "norms on queries and keys",
    "gemma2": "norms on what sublayers write",
    "bert": "norms over the stream",
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_is_literal_or_refused_with_the_reason(family):
    """Norms of both kinds, rotary in all its forms, windows, shared keys, parallel blocks, gates."""
    model = mia.convert(bridge_of(family), check=False)
    if family in REFUSED:
        with pytest.raises(UnsupportedModelError, match=REFUSED[family]):
            attention_only(model)
        return
    literal = attention_only(model)
    assert literal.steps.receipt.ok is (True if literal.exact else None), literal.steps
    assert float(literal.steps.frame["relative"].max()) < (1e-8 if literal.exact else 0.2)


# -- trained models ---------------------------------------------------------------------------


def bundled(name):
    return mia.load(name, dtype=torch.float64)


@pytest.mark.parametrize("name", ["silu-2l", "attn-2l"])
def test_trained_models_literally(name):
    literal = attention_only(bundled(name))
    assert isinstance(literal, LiteralModel)
    assert literal.steps.receipt.ok, literal.steps
    assert float(literal.steps.frame["max_error"].max()) < TOL  # absolute, logits and streams


def test_a_trained_llama_shape_literally():
    """RMS norms, rotary positions, shared keys and SwiGLU: one sublayer of products more per block."""
    literal = attention_only(bundled("swiglu-4l"))
    assert literal.steps.receipt.ok, literal.steps
    assert len(literal.literal_sublayers()) == 3 * literal.spec.n_layers
    assert float(literal.steps.frame["relative"].max()) < 1e-8  # products, see PRODUCT_TOLERANCE


def test_masks_in_the_weights_of_a_trained_model():
    model = bundled("silu-2l")
    sweep = mask_sweep(model, random_tokens(model, batch=1, pos=16), range(0, 57, 8))
    assert sweep.receipt.ok, sweep.receipt
    assert sweep.slope() == pytest.approx(-1.0, abs=0.05)


def test_trained_gelu_is_as_far_off_as_the_activation_lets_it():
    model = bundled("gelu-2l")
    literal = attention_only(model)
    assert not literal.exact
    assert literal.steps.max_logit_error > 1e-2  # the paper's parameters: 0.0203 a neuron
