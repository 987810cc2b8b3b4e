"""The modes, the activations they stand in for, and what they refuse."""

import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

import mechinterp_attn as mia
from mechinterp_attn.core.errors import UnsupportedModelError
from tests.conftest import tiny_bridge

ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": F.gelu,
    "gelu_new": lambda z: 0.5 * z * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3))),
    "gelu_fast": lambda z: F.gelu(z, approximate="tanh"),
    "quick_gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "silu": F.silu,
    "relu2": lambda z: torch.relu(z) ** 2,
    "solu": lambda z: z * z.softmax(-1),
    "solu_ln": lambda z: F.layer_norm(z * z.softmax(-1), z.shape[-1:]),
}
GATED = ("silu", "gelu", "gelu_new", "relu", "sigmoid")
D, M, V = 8, 12, 11


def checkpoint(act_fn: str = "gelu", *, gated: bool = False, seed: int = 0, **cfg) -> mia.Checkpoint:
    """One attention layer and one MLP with biases in every position, RMS norm with gains."""
    shapes = {
        "embed.W_E": (V, D), "pos_embed.W_pos": (9, D), "unembed.W_U": (D, V), "unembed.b_U": (V,),
        "blocks.0.attn.W_Q": (2, D, 4), "blocks.0.attn.W_K": (2, D, 4), "blocks.0.attn.W_V": (2, D, 4),
        "blocks.0.attn.W_O": (2, 4, D), "blocks.0.attn.b_O": (D,), "blocks.0.ln1.w": (D,),
        "blocks.0.mlp.W_in": (D, M), "blocks.0.mlp.W_out": (M, D), "blocks.0.mlp.b_in": (M,),
        "blocks.0.mlp.b_out": (D,), "blocks.0.ln2.w": (D,), "ln_final.w": (D,),
    }  # fmt: skip
    if gated:
        shapes |= {"blocks.0.mlp.W_gate": (D, M), "blocks.0.mlp.b_gate": (M,)}
    if act_fn == "solu_ln":
        shapes |= {"blocks.0.mlp.ln.w": (M,), "blocks.0.mlp.ln.b": (M,)}
    generator = torch.Generator().manual_seed(seed)
    state = {n: torch.randn(s, generator=generator, dtype=torch.float64) * 0.5 for n, s in shapes.items()}
    config = dict(
        n_layers=1, n_heads=2, d_model=D, d_head=4, d_mlp=M, n_ctx=9, d_vocab=V, act_fn=act_fn,
        normalization_type="RMS", gated_mlp=gated,
    )  # fmt: skip
    return mia.Checkpoint(config | cfg, state, name="tiny")


TOKENS = torch.tensor([[0, 3, 5, 1, 10, 2], [4, 4, 1, 0, 7, 9]])


@pytest.mark.parametrize("act_fn", ACTIVATIONS)
def test_every_activation_is_exact(act_fn):
    """Neurons as heads against the activation applied to the pre-activation by hand."""
    source = checkpoint(act_fn)
    model = mia.convert(source)
    _, cache = model.run_with_cache(TOKENS)
    post = ACTIVATIONS[act_fn](cache["blocks.0.mlp.hook_pre"])
    sd = source.state_dict
    if act_fn == "solu_ln":
        post = post * sd["blocks.0.mlp.ln.w"] + sd["blocks.0.mlp.ln.b"]
    expected = post @ sd["blocks.0.mlp.W_out"] + sd["blocks.0.mlp.b_out"]
    torch.testing.assert_close(cache["blocks.0.hook_mlp_out"], expected, rtol=0, atol=1e-12)
    rebuilt = cache["blocks.0.neurons.hook_weight"] * cache["blocks.0.neurons.hook_read"]
    torch.testing.assert_close(rebuilt, cache["blocks.0.neurons.hook_act"], rtol=0, atol=1e-13)
    assert model.provenance["fidelity"]["ok"]


@pytest.mark.parametrize("act_fn", [*GATED, "linear"])
def test_every_gated_mlp_is_exact(act_fn):
    source = checkpoint(act_fn, gated=True)
    model = mia.convert(source)
    _, cache = model.run_with_cache(TOKENS)
    g, u = cache["blocks.0.mlp.hook_pre"], cache["blocks.0.mlp.hook_pre_linear"]
    act = {"sigmoid": torch.sigmoid, "linear": lambda g: g}.get(act_fn) or ACTIVATIONS[act_fn]
    sd = source.state_dict
    expected = (act(g) * u) @ sd["blocks.0.mlp.W_out"] + sd["blocks.0.mlp.b_out"]
    torch.testing.assert_close(cache["blocks.0.hook_mlp_out"], expected, rtol=0, atol=1e-12)
    head = model["L0N5"]
    assert head.W_Q.shape == head.W_V.shape == (D, 1)
    assert not torch.equal(head.W_Q, head.W_V)  # the gate asks, the input moves
    assert mia.paths.freeze(model, TOKENS[0]).receipt.ok


def softmax_heads(model: mia.AttentionOnlyModel, cache) -> torch.Tensor:
    """What the neuron heads write, each a literal softmax over {self, bias} from its own weights."""
    norm, _ = model.norm_of(model.banks[1])
    x = norm(cache["blocks.0.hook_resid_mid"])
    total = model.banks[1].b_O.clone().expand_as(x).clone()
    for label in model.banks[1].labels():
        head = model[label]
        score = x @ head.W_Q + head.b_Q
        weight = torch.stack([score, torch.zeros_like(score)]).softmax(0)[0]
        total += weight * (x @ head.W_V + head.b_V) @ head.W_O
    return total


@pytest.mark.parametrize(
    ("act_fn", "gated", "options"),
    [
        ("silu", False, dict(mlp="exact")),
        ("quick_gelu", False, dict(mlp="silu")),
        ("gelu", False, dict(mlp="silu")),
        ("relu", False, dict(mlp="silu")),
        ("gelu", False, dict(mlp="mixture", components=4)),
        ("gelu_new", False, dict(mlp="mixture", components=3)),
        ("silu", True, dict(mlp="mixture", components=8)),
        ("sigmoid", True, dict(mlp="silu")),
    ],
)
def test_softmax_modes_are_softmax_heads(act_fn, gated, options):
    model = mia.convert(checkpoint(act_fn, gated=gated), **options)
    k = options.get("components", 1)
    assert model.n_heads == 2 + k * M
    plain = model(TOKENS)
    logits, cache = model.run_with_cache(TOKENS)
    torch.testing.assert_close(logits, plain, rtol=0, atol=1e-11)  # hooked and fused ways agree
    torch.testing.assert_close(
        cache["blocks.0.hook_mlp_out"], softmax_heads(model, cache), rtol=0, atol=1e-10
    )
    bank = model.banks[1]
    for side in ("Q", "K", "V", "O"):  # many heads at once are the heads one by one
        single = torch.stack([bank.weights(i)[f"W_{side}"] for i in range(bank.n_heads)]).detach()
        torch.testing.assert_close(bank.stacked(side), single, rtol=0, atol=1e-12)
    pattern = cache["blocks.0.neurons.hook_weight"]
    assert ((pattern >= 0) & (pattern <= 1)).all()
    frozen = mia.paths.freeze(model, TOKENS[0])
    assert frozen.receipt.ok
    if k > 1:
        assert model["L0N7.2"].index == 7 * k + 2
        with pytest.raises(mia.MechInterpError, match=r"L0N7\.0"):
            model["L0N7"]


def test_silu_of_silu_is_exact_and_of_gelu_is_the_papers():
    tokens = TOKENS
    for act_fn, bound in (("silu", 0.0), ("quick_gelu", 0.0), ("gelu", 0.020335), ("gelu_new", 0.020660)):
        source = checkpoint(act_fn)
        _, cache = mia.convert(source, mlp="silu").run_with_cache(tokens)
        z = cache["blocks.0.mlp.hook_pre"]
        error = (cache["blocks.0.mlp.hook_post"] - ACTIVATIONS[act_fn](z)).abs().max()
        assert float(error) <= bound + 1e-12


def test_the_fits_have_the_errors_they_state():
    """Each stored mixture on a fine grid, written another way: tanh instead of sigmoids."""
    table = mia.mixtures()
    for row in table.itertuples():
        r = 20.0 if row.kind == "plain" else row.range
        z = torch.linspace(-r, r, 20001, dtype=torch.float64)
        total = sum(
            c * 0.5 * (1 + torch.tanh((a * z + b) / 2))
            for c, a, b in zip(row.values, row.slopes, row.offsets, strict=True)
        )
        got = total if row.kind == "gated" else z * total
        error = float((got - ACTIVATIONS[row.act_fn](z)).abs().max())
        assert error <= row.max_error * 1.001 + 1e-12, row
        assert error >= row.max_error * 0.8, row
        assert row.max_error_float32 < 2 * row.max_error + 1e-5  # float32 does not destroy it


def test_the_fits_reach_their_targets():
    plain = mia.mixtures().query("kind == 'plain'").set_index(["act_fn", "components"])["max_error"]
    for act_fn in ("gelu", "gelu_new"):
        assert plain[act_fn, 4] < 4.05e-5
        assert plain[act_fn, 8] < 2e-6


@settings(max_examples=40, deadline=None)
@given(z=st.floats(-1e4, 1e4), k=st.sampled_from([1, 2, 4, 8]))
def test_mixtures_are_right_far_outside_the_grid(z, k):
    """The tails: 0 on the left, z on the right, wherever z is."""
    row = mia.mixtures().query(f"kind == 'plain' and act_fn == 'gelu' and components == {k}").iloc[0]
    t = torch.tensor(z, dtype=torch.float64)
    heads = zip(row["values"], row["slopes"], row["offsets"], strict=True)
    got = sum(c * torch.sigmoid(a * t + b) for c, a, b in heads)
    assert float((t * got - F.gelu(t)).abs()) <= row["max_error"] * 1.001 + 1e-11 * abs(z)


def test_more_heads_are_closer():
    source = checkpoint("gelu")
    errors = []
    for k in (1, 2, 4, 8):
        model = mia.convert(source, mlp="mixture", components=k)
        errors.append(model.provenance["fidelity"]["max_logit_error"])
        assert not model.provenance["fidelity"]["ok"] or k == 8
    assert errors == sorted(errors, reverse=True)
    assert errors[0] > 1000 * errors[-1]


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        (dict(act_fn="silu", gated=True), dict(mlp="silu"), "grows at most linearly"),
        (dict(act_fn="relu2"), dict(mlp="mixture"), "not bounded"),
        (dict(act_fn="gelu"), dict(mlp="mixture", components=5), "there are fits with 1, 2, 3, 4, 6, 8"),
        (dict(act_fn="gelu"), dict(mlp="softmax"), "use 'exact', 'silu', 'mixture'"),
        (dict(act_fn="gelu"), dict(mlp="mixture", components=0), "expected a positive integer"),
        (dict(act_fn="sigmoid"), dict(), "outside a gated MLP"),
        (dict(act_fn="made_up"), dict(), "activation 'made_up' .supported: .*gelu"),
    ],
)
def test_what_cannot_be_is_refused(source, options, message):
    with pytest.raises(mia.MechInterpError, match=message):
        mia.convert(checkpoint(**source), **options)


def test_all_reasons_at_once():
    source = checkpoint(
        "mish", num_experts=4, positional_embedding_type="relative", attention_dir="sideways"
    )
    with pytest.raises(UnsupportedModelError) as caught:
        mia.convert(source)
    text = str(caught.value)
    for part in ("mish", "mixture of experts (num_experts=4)", "'relative'", "'sideways'"):
        assert part in text
    assert len(caught.value.reasons) == 4


def test_attention_only_models_have_nothing_to_approximate():
    bridge = tiny_bridge(attn_only=True)
    assert mia.convert(bridge, mlp="mixture").provenance["fidelity"]["ok"]


def test_modes_survive_saving(tmp_path):
    model = mia.convert(checkpoint("gelu"), mlp="mixture", components=4)
    model.save(tmp_path / "m")
    again = mia.load(tmp_path / "m")
    assert torch.equal(again(TOKENS), model(TOKENS))
    assert again.mode == "mixture"
    assert again.provenance["components"] == 4
    assert list(again.heads) == list(model.heads)
