"""Dictionaries: features as heads, with an error that makes the model what it was."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import save_file

import mechinterp_attn as mia
from mechinterp_attn.sources.zoo import bundled_dictionaries
from tests.conftest import random_tokens, tiny_bridge

KINDS = ("relu", "jumprelu", "topk")


def transcoder(d, n=20, *, kind="jumprelu", skip=False, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def some(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    return mia.Dictionary(
        W_enc=some(d, n),
        b_enc=some(n),
        W_dec=0.3 * some(n, d),
        b_dec=0.3 * some(d),
        threshold=some(n).abs() if kind == "jumprelu" else None,
        k=4 if kind == "topk" else 0,
        W_skip=0.1 * some(d, d) if skip else None,
    )


def described(dictionary, x):
    """The transcoder, written another way."""
    z = torch.einsum("...d,df->...f", x, dictionary.W_enc) + dictionary.b_enc
    act = z.clamp_min(0)
    if dictionary.threshold is not None:
        act = torch.where(z <= dictionary.threshold, 0.0, z)
    if dictionary.k:
        smallest = act.sort(-1, descending=True).values[..., dictionary.k - 1 : dictionary.k]
        act = act * (act >= smallest)
    out = torch.einsum("...f,fd->...d", act, dictionary.W_dec) + dictionary.b_dec
    return act, out if dictionary.W_skip is None else out + x @ dictionary.W_skip


@pytest.fixture(scope="module")
def plain():
    return mia.convert(tiny_bridge())


def attached(model, **options):
    d = model.spec.d_model
    model = mia.attach(model, transcoder(d, **options), layer=0)
    return mia.attach(model, transcoder(d, 12, seed=1, **options), layer=1)


CASES = {
    "sequential": {},
    "RMSNorm, gated": dict(normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "parallel": dict(parallel_attn_mlp=True),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_features_and_error_are_the_transcoder_and_the_rest(case, kind):
    """Against the transcoder written another way, on the activations of the source, in float64."""
    plain = mia.convert(tiny_bridge(**CASES[case]))
    model = attached(plain, kind=kind, skip=True)
    tokens = random_tokens(plain)
    logits, cache = model.run_with_cache(tokens)
    source, before = plain.run_with_cache(tokens)
    assert torch.equal(model(tokens), plain(tokens))  # nothing is looked at, so nothing is split
    torch.testing.assert_close(logits, source, atol=1e-10, rtol=1e-10)
    for layer, n in ((0, 20), (1, 12)):
        dictionary = transcoder(16, n, kind=kind, skip=True, seed=layer)
        norm = "ln1" if plain.spec.parallel else "ln2"
        read = before[f"blocks.{layer}.{norm}.hook_normalized"]
        act, out = described(dictionary, read)
        at = f"blocks.{layer}"
        torch.testing.assert_close(cache[f"{at}.features.hook_act"], act, atol=1e-10, rtol=0)
        rest = before[f"{at}.hook_mlp_out"] - out
        torch.testing.assert_close(cache[f"{at}.error.hook_act"][:, :, 0], rest, atol=1e-10, rtol=0)
        assert bool((act > 0).any())


@pytest.mark.parametrize("kind", KINDS)
def test_every_sum_holds(plain, kind):
    """Frozen, split into orders and paths: float64, so rounding is all that may be left."""
    model = attached(plain, kind=kind, skip=True)
    frozen = mia.paths.freeze(model, random_tokens(model)[0])
    assert frozen.receipt.ok
    for count in ("all", "attention", "mlp"):
        orders = mia.paths.orders(frozen, count=count)
        torch.testing.assert_close(orders.logits.sum(0), frozen.logits, atol=1e-9, rtol=0)
    found = mia.paths.top_paths(frozen, target=5, position=-1, top_k=200)
    assert found.receipt.ok
    assert {"F", "E", "S"} <= {
        letter for path in found.frame["path"] for letter in path if letter.isupper()
    }
    assert mia.paths.attribution_graph(frozen, target=5, position=-1).receipt.ok


@settings(max_examples=8, deadline=None)
@given(seed=st.integers(0, 10_000), kind=st.sampled_from(KINDS), skip=st.booleans(), n=st.integers(4, 30))
def test_any_dictionary_leaves_the_model_what_it_was(plain, seed, kind, skip, n):
    dictionary = transcoder(16, n, kind=kind, skip=skip, seed=seed)
    model = mia.attach(plain, dictionary, layer=1)
    tokens = random_tokens(plain, seed=seed)
    torch.testing.assert_close(model.run_with_cache(tokens)[0], plain(tokens), atol=1e-10, rtol=1e-10)
    orders = mia.paths.orders(mia.paths.freeze(model, tokens[0]))
    torch.testing.assert_close(orders.logits.sum(0), plain(tokens)[0], atol=1e-9, rtol=0)


def test_cutting_a_feature_takes_what_it_writes_and_nothing_else(plain):
    model = attached(plain)
    tokens = random_tokens(model)
    written = {}
    _, cache = model.run_with_cache(tokens)
    active = int(cache["blocks.0.features.hook_act"].sum((0, 1)).argmax())

    def cut(z, hook):
        written["gone"] = z[..., active, None] * transcoder(16).W_dec[active]
        z = z.clone()
        z[..., active] = 0
        return z

    with model.hooks(fwd_hooks=[("blocks.0.features.hook_act", cut)]):
        _, edited = model.run_with_cache(tokens)
    lost = cache["blocks.0.hook_mlp_out"] - edited["blocks.0.hook_mlp_out"]
    torch.testing.assert_close(lost, written["gone"], atol=1e-10, rtol=0)
    assert float(lost.abs().max()) > 0.1


def test_the_callers_model_is_unchanged(plain):
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    labels = list(plain.heads)
    model = attached(plain)
    assert list(plain.heads) == labels
    assert all(torch.equal(tensor, before[name]) for name, tensor in plain.state_dict().items())
    assert [model[label].kind for label in ("L0F3", "L1E0")] == ["feature", "error"]
    assert [len(model[some]) for some in ("L*F*", "feature")] == [32, 32]
    assert [head.label for head in model["error"]] == ["L0E0", "L1E0"]
    with pytest.raises(mia.MechInterpError, match="no head L0N3"):
        model["L0N3"]


@pytest.mark.parametrize("method", ["gradient", "relp", "frozen", "secant"])
def test_discovery_ranks_features_beside_heads(plain, method):
    """The "secant" scores of the inputs add up to the metric's difference: so the error is followed through
    its neurons. TopK has no chord of its own.
    """
    model = attached(plain, skip=True)
    tokens = random_tokens(model, 6)
    task = mia.Task(tokens, corrupt=random_tokens(model, 6, seed=1), answer=[1] * 6, against=[2] * 6)
    found = mia.causal.discover(model, task, method=method)
    assert set(found.frame["kind"]) == {"attention", "feature", "skip", "error"}
    edges = mia.causal.discover(model, task, method=method, units="edges", top_k=300)
    assert any(
        src.startswith("L0F") and dst.startswith("L1") for src, dst in edges.frame[["src", "dst"]].values
    )
    if method == "secant":
        assert found.receipt.checks
        assert found.receipt.ok


def test_exact_effects_of_features_are_the_runs_without_them(plain):
    model = attached(plain, skip=True)
    tokens = random_tokens(model, 4)
    task = mia.Task(tokens, answer=[1] * 4, against=[2] * 4)
    frame = mia.causal.effects(model, task, patch="zero", heads=["L0F3", "L0E0", "L1S0"], exact=3).frame
    for row in frame.itertuples():
        bank, index = model.heads.find(row.head)

        def zero(z, hook, index=index):
            z = z.clone()
            z[:, :, index] = 0
            return z

        with model.hooks(fwd_hooks=[(bank.hook("z"), zero)]):
            without = model(tokens)[:, -1]
        whole = model(tokens)[:, -1]
        effect = float(((whole[:, 1] - whole[:, 2]) - (without[:, 1] - without[:, 2])).mean())
        assert row.effect == pytest.approx(effect, abs=1e-9)  # float64


def test_circuits_read_features_and_not_the_error(plain):
    model = attached(plain, skip=True)
    found = mia.circuits.composition(model, kind="V", top_k=500).frame
    assert {"F", "H", "S"} <= set("".join((*found["src"], *found["dst"])))
    assert not any("E" in label for label in (*found["src"], *found["dst"]))
    assert len(mia.circuits.ov_top(model, "L0F3", top_k=2).frame) == 2
    with pytest.raises(mia.MechInterpError, match="L0E0 is what a dictionary leaves out"):
        mia.circuits.ov_top(model, "L0E0")
    scores = mia.detect.score_heads(model).frame
    assert set(scores["kind"]) == {"attention", "feature", "skip", "error"}


def test_a_saved_model_is_read_back(plain, tmp_path):
    model = attached(plain, kind="topk", skip=True)
    model.save(tmp_path / "model")
    again = mia.load(tmp_path / "model")
    tokens = random_tokens(model)
    assert list(again.heads) == list(model.heads)
    assert torch.equal(again.run_with_cache(tokens)[0], model.run_with_cache(tokens)[0])


def test_half_precision_is_frozen_in_float32(plain):
    model = mia.attach(mia.load("gelu-2l", dtype=torch.bfloat16), transcoder(128), layer=0)
    assert model["L0F0"].W_V.dtype == torch.bfloat16
    assert mia.paths.freeze(model, random_tokens(model)[0]).receipt.ok


def test_a_dictionary_behind_a_gain_is_folded(plain):
    """What it reads in front of the gain is what it read behind it."""
    generator = torch.Generator().manual_seed(3)
    dictionary = transcoder(16, skip=True)
    x, gain, bias = (torch.randn(*shape, generator=generator).double() for shape in ((5, 16), (16,), (16,)))
    for one, two in zip(
        described(dictionary, x * gain + bias), described(dictionary.folded(gain, bias), x), strict=True
    ):
        torch.testing.assert_close(one, two, atol=1e-12, rtol=0)
    with pytest.raises(mia.MechInterpError, match=r"gain has shape \(3,\), expected \[16\]"):
        dictionary.folded(torch.ones(3))


def test_public_files_are_read(tmp_path):
    """Each as its project writes it: circuit-tracer's encoders and skips are [feature, d] and [out, in]."""
    one = transcoder(8, 6, skip=True, dtype=torch.float32)
    one.save(tmp_path / "own")
    tracer = tmp_path / "tracer"
    tracer.mkdir()
    t = {name: x.clone() for name, x in one.tensors.items()}
    save_file(
        {"W_enc": t["W_enc"].T.contiguous(), "W_dec": t["W_dec"], "b_enc": t["b_enc"], "b_dec": t["b_dec"],
         "W_skip": t["W_skip"].T.contiguous(), "activation_function.threshold": t["threshold"]},
        tracer / "layer_3.safetensors",
    )  # fmt: skip
    (tracer / "config.yaml").write_text(
        "feature_input_hook: ln2.hook_normalized\nmodel_kind: transcoder_set\n"
    )
    lens = tmp_path / "lens"
    lens.mkdir()
    save_file(t, lens / "sae_weights.safetensors")
    (lens / "cfg.json").write_text(json.dumps({"architecture": "jumprelu_skip_transcoder"}))
    scope = replace(one, W_skip=None)
    np.savez(tmp_path / "params.npz", **{name: x.numpy() for name, x in scope.tensors.items()})
    for read, whole in (
        (mia.Dictionary.load(tmp_path / "own"), one),
        (mia.Dictionary.load(tracer, 3), one),
        (mia.Dictionary.load(lens), one),
        (mia.Dictionary.load(tmp_path / "params.npz"), scope),
    ):
        assert read.tensors.keys() == whole.tensors.keys()
        assert all(torch.equal(x, whole.tensors[name]) for name, x in read.tensors.items())
    with pytest.raises(mia.MechInterpError, match=r"it has layers \[3\]"):
        mia.Dictionary.load(tracer, 0)
    (tracer / "config.yaml").write_text("activation: topk\n")
    with pytest.raises(mia.MechInterpError, match="topk and k=0, expected how many are active"):
        mia.Dictionary.load(tracer, 3)


def test_bad_files_are_named(tmp_path):
    with pytest.raises(mia.MechInterpError, match="it holds no dictionary"):
        mia.Dictionary.load(tmp_path)
    (tmp_path / "W_enc_0.safetensors").write_bytes(b"nothing")
    with pytest.raises(
        mia.MechInterpError, match="cross-layer transcoder, whose features write at several"
    ):
        mia.Dictionary.load(tmp_path)
    np.savez(tmp_path / "params.npz", W_enc=np.array([object()]), threshold=np.zeros(1))  # a pickle inside
    with pytest.raises(mia.MechInterpError, match="holds objects, which are not read"):
        mia.Dictionary.load(tmp_path)
    (tmp_path / "params.npz").unlink()
    (tmp_path / "cfg.json").write_text(
        '{"architecture": "standard", "normalize_activations": "layer_norm"}'
    )
    (tmp_path / "sae_weights.safetensors").write_bytes(b"nothing")
    with pytest.raises(mia.MechInterpError, match=r"hook_name=None.*normalize_activations"):
        mia.Dictionary.load(tmp_path)
    (tmp_path / "cfg.json").write_text('{"architecture": "transcoder"}')
    with pytest.raises(mia.MechInterpError, match="damaged or not safetensors"):
        mia.Dictionary.load(tmp_path)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_is_named(plain):
    one = transcoder(16)
    W_enc = one.W_enc.clone()
    W_enc[0, 1] = torch.nan
    with pytest.raises(mia.MechInterpError, match=r"W_dec has shape .*W_enc is not finite at \[0, 1\]"):
        replace(one, W_enc=W_enc, W_dec=one.W_dec[:3])
    with pytest.raises(mia.MechInterpError, match="the dictionary has width 8, the model 16"):
        mia.attach(plain, transcoder(8), layer=0)
    card = {"layer": 1, "model": "another"}
    with pytest.raises(
        mia.MechInterpError, match=r"at='resid_pre'.*card says layer 1, not 0.*model 'another'"
    ):
        mia.attach(plain, replace(one, card=card), layer=0, at="resid_pre")
    with pytest.raises(mia.MechInterpError, match="has a dictionary already"):
        mia.attach(mia.attach(plain, one, layer=0), one, layer=0)
    with pytest.raises(mia.MechInterpError, match="layer=7, expected 0 to 1"):
        mia.attach(plain, one, layer=7)


@pytest.mark.parametrize("layer", [0, 1])
def test_bundled_dictionaries_are_what_their_cards_say(layer):
    """Measured again on some of the held-out text; the cards are over all of it."""
    model, dictionary = mia.load("gelu-2l"), mia.Dictionary.load("gelu-2l", layer=layer)
    attached = mia.attach(model, dictionary, layer=layer)
    found = mia.detect.reconstruction(attached, mia.held_out()[::4])
    assert found.receipt.ok
    row, card = found.frame.iloc[0], dictionary.card
    assert row["fve"] == pytest.approx(card["fve"], abs=0.02)
    assert row["l0"] == pytest.approx(card["l0"], rel=0.1)
    assert row["loss_recovered"] == pytest.approx(card["loss_recovered"], abs=0.03)
    assert card["fve"] > 0.8
    assert card["loss_recovered"] > 0.65
    assert card["dead"] < 0.05
    assert dictionary.n_features > model.spec.d_mlp
    for key in ("data", "licence", "command", "recipe", "kl", "minutes"):
        assert card[key], key
    losses = " / ".join(f"{card[name]:.3f}" for name in ("loss", "loss_without_error", "loss_ablated"))
    numbers = f"{card['l0']:.1f} | {card['fve']:.3f} | {card['dead']:.1%} | {losses} |"
    recovered = f"{card['loss_recovered']:.3f} | {card['kl']:.3f} |"
    page = (Path(__file__).parents[2] / "docs" / "features.md").read_text(encoding="utf-8")
    assert f"| {layer} | {dictionary.n_features:,} | {numbers} {recovered}" in page
    with pytest.raises(mia.MechInterpError, match=f"card says layer {layer}, not {1 - layer}"):
        mia.attach(model, dictionary, layer=1 - layer)
    with pytest.raises(mia.MechInterpError, match="card says model 'gelu-2l', not 'silu-2l'"):
        mia.attach(mia.load("silu-2l"), dictionary, layer=layer)


def test_bundled_dictionaries_are_found_by_name():
    with pytest.raises(mia.MechInterpError, match=r"it has layers \[0, 1\]: give layer="):
        mia.Dictionary.load("gelu-2l")
    with pytest.raises(
        mia.MechInterpError, match=r"no dictionary is bundled for it; there are some for \['gelu-2l'\]"
    ):
        mia.Dictionary.load("attn-2l", layer=0)
    files = list(bundled_dictionaries("gelu-2l").rglob("*"))
    assert sum(file.stat().st_size for file in files if file.is_file()) <= 3_000_000


def test_two_models_with_dictionaries_are_compared(plain):
    """A feature that writes something else is found, and nothing is found where nothing is different."""
    one = attached(plain)
    weights = {name: tensor.clone() for name, tensor in one.state_dict().items()}
    _, cache = one.run_with_cache(random_tokens(one, 6))
    active = int(cache["blocks.0.features.hook_act"].sum((0, 1)).argmax())
    weights["blocks.0.features.W_out"][active] += 1.0
    two = mia.AttentionOnlyModel(one.spec, weights)
    task = mia.Task(
        random_tokens(one, 6), corrupt=random_tokens(one, 6, seed=1), answer=[1] * 6, against=[2] * 6
    )
    found = mia.causal.diff(one, two, task, draws=2)
    assert found.frame["head"].iloc[0] in (
        f"L0F{active}",
        "L0E0",
    )  # what it no longer writes, the error does
    same = mia.causal.diff(one, one, task, draws=2).frame
    changed = same[["OV", "QK", "output", "gained_estimate", "lost_estimate"]]
    assert float(changed.abs().max().max()) < 1e-9


def test_the_literal_construction_refuses_features(plain):
    with pytest.raises(mia.MechInterpError, match="the features of a dictionary"):
        mia.theorems.attention_only(attached(mia.convert(tiny_bridge(act_fn="silu"))))
