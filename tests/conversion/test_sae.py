"""SAEs on the residual stream: their features and error write it anew, and everything still adds up."""

import json

import pytest
import torch
from safetensors.torch import save_file

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge
from tests.conversion.test_dictionary import described, transcoder

KINDS = ("relu", "jumprelu", "topk")
CASES = {
    "sequential": {},
    "RMSNorm, gated": dict(normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "parallel": dict(parallel_attn_mlp=True),
    "attention only": dict(attn_only=True),
}


def attached(plain, kind="jumprelu", layers=(0, 1)):
    model = plain
    for layer in layers:
        model = mia.attach(model, transcoder(16, kind=kind, seed=layer), layer=layer, at="resid_post")
    return model


@pytest.fixture(scope="module")
def plain():
    return mia.convert(tiny_bridge())


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("case", CASES)
def test_features_and_error_are_the_stream(case, kind):
    """Against the SAE written another way, on the source's own streams, in float64."""
    plain = mia.convert(tiny_bridge(**CASES[case]))
    model = attached(plain, kind)
    tokens = random_tokens(plain)
    assert torch.equal(model(tokens), plain(tokens))  # nothing is looked at, so nothing is split
    logits, cache = model.run_with_cache(tokens)
    source, before = plain.run_with_cache(tokens)
    torch.testing.assert_close(logits, source, atol=1e-10, rtol=1e-10)
    for layer in range(2):
        stream = before[f"blocks.{layer}.hook_resid_post"]
        act, out = described(transcoder(16, kind=kind, seed=layer), stream)
        torch.testing.assert_close(cache[f"blocks.{layer}.features.hook_act"], act, atol=1e-10, rtol=0)
        rest = cache[f"blocks.{layer}.error.hook_act"][:, :, 0]
        torch.testing.assert_close(rest, stream - out, atol=1e-10, rtol=0)
    frozen = mia.paths.freeze(model, tokens[0])
    assert frozen.receipt.ok
    for count in ("all", "attention"):
        orders = mia.paths.orders(frozen, count=count)
        torch.testing.assert_close(orders.logits.sum(0), source[0], atol=1e-9, rtol=0)


def test_nothing_passes_the_features_by(plain):
    """Every path into the logits ends in a feature or the error of the last SAE, or in biases behind it;
    the sums of paths, nodes and edges hold without any other.
    """
    model = attached(plain)
    frozen = mia.paths.freeze(model, random_tokens(model)[0])
    found = mia.paths.top_paths(frozen, target=5, position=-1, top_k=400)
    assert found.receipt.ok
    through = [path for path in found.frame["path"] if "L1F" not in path and "L1E" not in path]
    assert all("L1 features bias" in path or "unembed" in path for path in through), through[:3]
    graph = mia.paths.attribution_graph(frozen, target=5, position=-1)
    assert graph.receipt.ok
    into = graph.edges[graph.edges["kind"] == "value"].merge(graph.nodes, left_on="source", right_on="node")
    last = into[into["target"] == graph.nodes["node"].iloc[-1]]
    assert set(last["layer"].dropna()) <= {0, 1}
    assert set(last["kind_y"]) <= {"feature", "error", "bias"}
    importance = mia.paths.term_importance(model, frozen.tokens, heads=4)
    assert importance.receipt.ok
    direct = mia.paths.logit_attribution(frozen, target=5)
    assert direct.receipt.ok
    assert direct.frame.set_index("head")["value"].filter(regex="H").abs().max() == 0


def test_replacement_scores_of_saes(plain):
    """What is left out is counted, and nothing else: a perfect SAE has no error."""
    model = attached(plain)
    tokens = random_tokens(plain)[0]
    found = mia.paths.replacement_scores(model, tokens)
    assert found.receipt.ok
    assert 0 < found.replacement < 1
    eye = torch.eye(16, dtype=torch.float64)
    both = mia.Dictionary(
        torch.cat([eye, -eye], 1), torch.zeros(32).double(), torch.cat([eye, -eye]), eye[0] * 0
    )
    perfect = mia.attach(plain, both, layer=0, at="resid_post")
    found = mia.paths.replacement_scores(perfect, tokens)
    assert found.receipt.ok
    assert found.replacement == pytest.approx(1, abs=1e-9)


def test_cutting_a_feature_takes_what_it_writes_and_nothing_else(plain):
    model = attached(plain, layers=(0,))
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens)
    active = int(cache["blocks.0.features.hook_act"].sum((0, 1)).argmax())
    written = cache["blocks.0.features.hook_act"][..., active, None] * transcoder(16).W_dec[active]

    def cut(z, hook):
        z = z.clone()
        z[..., active] = 0
        return z

    with model.hooks(fwd_hooks=[("blocks.0.features.hook_act", cut)]):
        _, edited = model.run_with_cache(tokens)
    lost = cache["blocks.1.hook_resid_pre"] - edited["blocks.1.hook_resid_pre"]
    torch.testing.assert_close(lost, written, atol=1e-10, rtol=0)
    assert float(lost.abs().max()) > 0.1
    without = plain.run_with_hooks(
        tokens, fwd_hooks=[("blocks.1.hook_resid_pre", lambda x, hook: x - written)]
    )
    torch.testing.assert_close(edited_logits(model, tokens, cut), without, atol=1e-10, rtol=1e-10)


def edited_logits(model, tokens, cut):
    return model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.features.hook_act", cut)])


@pytest.mark.parametrize("method", ["gradient", "relp", "frozen", "secant"])
def test_discovery_ranks_them_beside_heads(plain, method):
    model = attached(plain, layers=(0,))
    n = 6
    task = mia.Task(
        random_tokens(model, n), corrupt=random_tokens(model, n, seed=1), answer=[1] * n, against=[2] * n
    )
    found = mia.causal.discover(model, task, method=method)
    assert set(found.frame["kind"]) == {"attention", "mlp", "feature", "error"}
    if method == "secant":  # features and error, first in line, pass on all that the inputs bring
        assert found.receipt.checks
        assert found.receipt.ok
    curve = mia.causal.faithfulness(model, task, found, sizes=[5, len(found.frame)], draws=0)
    assert curve.receipt.ok
    assert curve.frame["faithfulness"].iloc[-1] == pytest.approx(1, abs=1e-9)
    with pytest.raises(mia.MechInterpError, match=r"describe the residual stream behind layers \[0\]"):
        mia.causal.discover(model, task, method=method, units="edges")


def test_reconstruction_measures_the_stream(plain):
    tokens = random_tokens(plain, 3)
    model = attached(plain)
    found = mia.detect.reconstruction(model, tokens)
    assert found.receipt.ok
    _, cache = plain.run_with_cache(tokens)
    for row in found.frame[found.frame["layer"] >= 0].itertuples():
        stream = cache[f"blocks.{row.layer}.hook_resid_post"][:, 1:]
        act, out = described(transcoder(16, seed=row.layer), stream)
        left = (stream - out).square().sum()
        assert row.fve == pytest.approx(1 - float(left / (stream - stream.mean((0, 1))).square().sum()))
        assert row.l0 == pytest.approx(float((act > 0).double().sum(-1).mean()))


def test_weights_and_files(plain, tmp_path):
    model = attached(plain, kind="topk")
    found = mia.circuits.composition(model, kind="V", top_k=2000).frame
    pairs = set(zip(found["src"].str[:3], found["dst"].str[:3], strict=True))
    assert {("L0F", "L1H"), ("L0H", "L0F"), ("L0N", "L0F")} <= pairs
    assert ("L0F", "L0H") not in pairs
    assert len(mia.circuits.ov_top(model, "L0F3", top_k=2).frame) == 2
    model.save(tmp_path / "model")
    again = mia.load(tmp_path / "model")
    tokens = random_tokens(model)
    assert list(again.heads) == list(model.heads)
    assert torch.equal(again.run_with_cache(tokens)[0], model.run_with_cache(tokens)[0])


def lens(folder, one, **cfg):
    """As SAELens saves an SAE."""
    folder.mkdir()
    save_file(
        {name: x.clone().contiguous() for name, x in one.tensors.items()},
        folder / "sae_weights.safetensors",
    )
    (folder / "cfg.json").write_text(json.dumps(cfg))
    return mia.Dictionary.load(folder)


def test_saelens_saes_are_read(tmp_path):
    """By what SAELens computes: the decoder's bias taken off first; TopK of what features would write."""
    x = torch.randn(7, 8, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    one = transcoder(8, 12, kind="jumprelu")
    read = lens(tmp_path / "a", one, architecture="jumprelu", hook_name="blocks.3.hook_resid_pre")
    assert (read.card["layer"], read.card["at"]) == (2, "resid_post")
    z = (x - one.b_dec) @ one.W_enc + one.b_enc
    expected = (z.relu() * (z > one.threshold)) @ one.W_dec + one.b_dec
    torch.testing.assert_close(described(read, x)[1], expected)

    one = transcoder(8, 12, kind="relu")
    options = dict(architecture="topk", k=3, apply_b_dec_to_input=False, rescale_acts_by_decoder_norm=True)
    read = lens(tmp_path / "b", one, hook_name="blocks.0.hook_resid_post", **options)
    norm = one.W_dec.norm(dim=1)
    z = (x @ one.W_enc + one.b_enc) * norm
    top = z.topk(3, dim=-1)
    act = torch.zeros_like(z).scatter(-1, top.indices, top.values.relu()) / norm
    torch.testing.assert_close(described(read, x)[1], act @ one.W_dec + one.b_dec)


@pytest.mark.usefixtures("as_users_run_it")
def test_what_does_not_fit_is_named(plain, tmp_path):
    one = transcoder(8, 12, kind="relu")
    with pytest.raises(
        mia.MechInterpError, match=r"hook_name='blocks.0.hook_resid_pre', expected the residual"
    ):
        lens(tmp_path / "a", one, architecture="standard", hook_name="blocks.0.hook_resid_pre")
    with pytest.raises(
        mia.MechInterpError, match="architecture='gated', expected a transcoder or standard"
    ):
        lens(tmp_path / "b", one, architecture="gated", hook_name="blocks.0.hook_resid_post")
    with pytest.raises(mia.MechInterpError, match="a linear part, which one on the stream cannot have"):
        mia.attach(plain, transcoder(16, skip=True), layer=0, at="resid_post")
    with pytest.raises(mia.MechInterpError, match="has a dictionary already"):
        mia.attach(attached(plain), transcoder(16), layer=0)
    with pytest.raises(mia.MechInterpError, match="expected 'mlp' or 'resid_post'"):
        mia.attach(plain, transcoder(16), layer=0, at="z")
    post = mia.convert(tiny_bridge(attn_only=True))
    with pytest.raises(mia.MechInterpError, match="this model has no MLPs"):
        mia.attach(post, transcoder(16), layer=0)


def test_a_report_has_features(plain, tmp_path):
    """Of both kinds at once: an SAE behind the first block, a skip-transcoder in the second."""
    model = mia.attach(attached(plain, layers=(0,)), transcoder(16, skip=True), layer=1)
    report = mia.report(model, random_tokens(model)[0])
    report.save(tmp_path / "report.html")
    assert "L0F" in (tmp_path / "report.html").read_text(encoding="utf-8")
