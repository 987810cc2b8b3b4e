"""Parts of attention that few families have, one by one, from checkpoints: each exact against a dense model
that is written apart, frozen, expanded, cached, padded, saved, and seen by circuits.
"""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.conversion import reference
from mechinterp_attn.conversion.check import named_lengths
from mechinterp_attn.conversion.reference import run_checkpoint
from mechinterp_attn.core.errors import ConversionError, UnsupportedModelError
from mechinterp_attn.sources.checkpoint import Checkpoint, expected_shapes
from mechinterp_attn.sources.config import spec_from_config

BASE = dict(
    n_layers=2, n_heads=4, n_key_value_heads=2, d_model=16, d_head=4, d_mlp=24, n_ctx=48, d_vocab=37
)
BASE |= dict(act_fn="silu", normalization_type="RMS", positional_embedding_type="rotary")
SLOW, FAST = dict(frequencies=[0.5, 0.01]), dict(frequencies=[1.0, 0.1], factor=1.2)
PARTS = {
    "shortformer": dict(positional_embedding_type="shortformer", normalization_type=None),
    "alibi": dict(positional_embedding_type="alibi", alibi_slopes=[0.5, 0.25, 0.125, 0.0625]),
    "alibi_rounded": dict(
        positional_embedding_type="alibi", alibi_slopes=[0.51, 0.26, 0.13, 0.07], alibi_bfloat16=True
    ),
    "sinks": dict(sinks=True),
    "clip": dict(qkv_clip=0.3, scale_attn_by_inverse_layer_idx=True),
    "growth": dict(query_growth=[0.4, 7]),
    "by_layer": dict(rotaries=[SLOW, FAST], rotary_of=[1, None]),
    "longrope": dict(rotaries=[FAST | dict(until=20, beyond=[0.3, 0.02])]),
    "dynamic": dict(rotaries=[SLOW | dict(until=20, stretch=[10000.0, 3.0])]),
    "norm_of_all": dict(qk_norm="RMS", qk_norm_over="all"),
    "norm_of_each": dict(qk_norm="LN", qk_norm_over="each"),
    "norm_last": dict(qk_norm="RMS", qk_norm_over="each", qk_norm_last=True),
    "norms_behind_only": dict(pre_norm=False, use_normalization_before_and_after=True),
    "norms_on_the_stream": dict(
        stream_norm="LN", embed_norm="LN", final_norm=False, normalization_type="LN",
        positional_embedding_type="standard", act_fn="gelu",
    ),
    "experts": dict(experts=4, experts_used=2, d_expert=5, gated_mlp=True, shared_gate=True, d_mlp=23),
    "experts_renormed": dict(
        experts=4, experts_used=2, d_expert=6, gated_mlp=True, router_renormed=True,
        normalization_type="LN",
    ),
    "everything": dict(
        sinks=True, qkv_clip=0.4, query_growth=[0.4, 7], qk_norm="LN", qk_norm_over="each",
        windows=[5, None], rotaries=[SLOW, FAST], rotary_of=[1, 0],
    ),
}  # fmt: skip


def checkpoint(name: str) -> Checkpoint:
    cfg = BASE | PARTS[name]
    required, optional = expected_shapes(spec_from_config(cfg, name))
    g = torch.Generator().manual_seed(0)
    state = {k: torch.randn(s, generator=g).double() * 0.4 for k, s in required.items()}
    for key, shape in optional.items():
        noise = torch.randn(shape, generator=g).double() * 0.3
        state[key] = 1 + noise if key.endswith(".w") else noise
    return Checkpoint(cfg, state, name=name)


def ids(batch: int = 1, pos: int = 40) -> torch.Tensor:
    return torch.randint(37, (batch, pos), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", params=PARTS)
def part(request):
    return request.param


@pytest.fixture(scope="module")
def model(part):
    return mia.convert(checkpoint(part))


def test_equals_the_dense_model(part, model):
    logits, streams = run_checkpoint(checkpoint(part), ids(2))
    own, cache = model.run_with_cache(ids(2))
    torch.testing.assert_close(own, logits, rtol=0, atol=1e-9)  # float64
    for name, stream in streams.items():
        torch.testing.assert_close(cache[name], stream, rtol=0, atol=1e-9)
    watched = model.run_with_hooks(ids(2), fwd_hooks=[(model.banks[0].hook("pattern"), lambda p, hook: p)])
    torch.testing.assert_close(watched, own, rtol=0, atol=1e-10)  # float64, another order of sums


def test_frozen_and_expanded(part, model):
    frozen = mia.paths.freeze(model, ids())
    assert frozen.receipt.ok, frozen.receipt
    assert mia.paths.orders(frozen).receipt.ok
    for head, key in (("L0H1", 36), ("L1H3", 30)):
        for against in (None, "others"):
            found = mia.paths.expand_score(
                frozen, head, 37, 36 if part == "everything" else key, against=against
            )
            assert found.receipt.ok, found.receipt


def test_cached_and_padded(part, model):
    pos = 18  # below the lengths at which tables change: cached keys keep the table they were turned with
    whole = model(ids(1, pos))
    options = dict(stop_at_eos=False)
    fast = model.generate(ids(1, 12), 4, **options)
    slow = model.generate(ids(1, 12), 4, **options, use_past_kv_cache=False)
    assert torch.equal(fast, slow)
    padded = torch.cat([torch.zeros(1, 5, dtype=torch.long), ids(1, pos)], 1)
    mask = torch.cat([torch.zeros(1, 5), torch.ones(1, pos)], 1)
    got = model(padded, attention_mask=mask)[:, 5:]
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-10)  # float64


def test_saved_and_read_again(part, model, tmp_path):
    model.save(tmp_path / part)
    again = mia.load(tmp_path / part)
    assert again.spec == model.spec
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name]), name
    torch.testing.assert_close(again(ids()), model(ids()), rtol=0, atol=1e-12)  # float64, other strides


def test_circuits_take_the_heads(part, model):
    if part == "norm_last":
        with pytest.raises(mia.MechInterpError, match="after turning them"):
            mia.circuits.position_circuit(model, "L0H0")
    elif part != "by_layer":
        assert mia.circuits.position_circuit(model, "L0H0").receipt.ok
    assert mia.circuits.qk_top(model, "L1H2", top_k=3).receipt.ok
    assert mia.circuits.composition(model, "Q", top_k=4).receipt.ok


def test_a_sink_is_the_bias_tokens_score():
    """Its column is what the real tokens do not get, and its entropy counts."""
    model = mia.convert(checkpoint("sinks"))
    _, cache = model.run_with_cache(ids())
    bank, head = model.banks[0], model["L0H2"]
    scores = cache[bank.hook("attn_scores")][0, 2]
    expected = torch.cat([scores, bank.sinks[2].expand(40, 1)], 1).softmax(-1)
    torch.testing.assert_close(head.pattern(cache), expected, rtol=0, atol=1e-12)  # float64
    entropy = bank.entropy(cache[bank.hook("pattern")])[0, :, 2]
    torch.testing.assert_close(entropy, torch.special.entr(expected).sum(-1), rtol=0, atol=1e-12)
    assert head.compares_keys is False  # what all keys share counts against the sink
    assert not bank.z_constant.any()  # a head may look at nothing


def test_experts_are_one_bank():
    """Only the experts that a token is sent to write, whether or not a hook makes all of them run."""
    model = mia.convert(checkpoint("experts"))
    bank, label = model.banks[1], "L0N2.3"
    assert model[label].index == 2 * 5 + 3
    assert bank.label(20) == "L0N4.0"  # the shared expert
    routed = model(ids())
    every, cache = model.run_with_cache(ids())
    torch.testing.assert_close(every, routed, rtol=0, atol=1e-11)  # float64, other sums
    router = cache[bank.hook("router")][0]
    assert (router.count_nonzero(-1) == 2).all()
    norm, _ = model.norm_of(bank)
    x = norm(cache["blocks.0.hook_resid_mid"])[0]
    head = model[label]
    gate = torch.nn.functional.silu(x @ head.W_Q + head.b_Q)[:, 0]
    weight = cache[bank.hook("pattern")][0, :, head.index]
    torch.testing.assert_close(weight, router[:, 2] * gate, rtol=0, atol=1e-12)  # float64
    assert bool((weight == 0).any())
    with pytest.raises(UnsupportedModelError, match="a mixture of experts"):
        mia.convert(checkpoint("experts"), mlp="mixture")


def test_alibi_by_distance():
    model = mia.convert(checkpoint("alibi"))
    found = mia.circuits.position_circuit(model, "L0H1", n_positions=20)
    torch.testing.assert_close(found.scores, -0.25 * torch.arange(20.0).double())
    frozen = mia.paths.freeze(model, ids())
    terms = mia.paths.expand_score(frozen, "L0H1", 30, 20).frame.set_index("query_term")
    assert terms.loc["distance", "value"] == pytest.approx(-2.5)
    with pytest.raises(mia.MechInterpError, match="no positions"):
        mia.circuits.position_circuit(model, "L0N1")


def test_the_check_runs_past_every_length(monkeypatch):
    """A part that begins late is seen: without the long prompt the conversion would pass."""
    late = checkpoint("growth")
    late = Checkpoint(late.cfg | dict(n_ctx=200, query_growth=[0.4, 100]), late.state_dict, name="late")
    model = mia.convert(late)
    assert named_lengths(model.spec, late) == [100]
    card = model.provenance["fidelity"]
    assert (card["longest"], card["unreached"]) == (108, [])
    monkeypatch.setattr("mechinterp_attn.conversion.check._MOST_WORK", 10)
    assert mia.convert(late).provenance["fidelity"]["unreached"] == [100]
    monkeypatch.undo()
    grown = type(model.banks[0]).grown
    monkeypatch.setattr(type(model.banks[0]), "grown", lambda self, at: grown(self, at).clamp(max=1))
    with pytest.raises(ConversionError, match="on 108 tokens"):
        mia.convert(late)


def test_the_reference_knows_its_activations(monkeypatch):
    monkeypatch.delitem(reference._ACT, "silu")
    with pytest.raises(UnsupportedModelError, match="activation 'silu' is not written there"):
        run_checkpoint(checkpoint("clip"), ids())
