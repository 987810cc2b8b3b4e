"""Edited runs against the source model edited by its own hooks, in float64."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal import Edit, intervene
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge

ATTENTION, NEURON = "blocks.0.attn.hook_z", "blocks.1.mlp.hook_post"


@pytest.fixture(scope="module")
def bridge():
    return tiny_bridge()


@pytest.fixture(scope="module")
def model(bridge):
    return mia.convert(bridge)


def test_edits_are_those_of_the_source_by_hooks(bridge, model):
    """A head turned round at one position, a neuron doubled everywhere, and heads of another prompt."""
    own, other = random_tokens(model, 2, 9)
    seen = {}
    with bridge.hooks(fwd_hooks=[(ATTENTION, lambda z, hook: seen.__setitem__("z", z.clone()))]):
        bridge(other[None])

    def turned(z, hook):
        z = z.clone()
        z[:, 4, 2] *= -1
        z[:, :, 1] = seen["z"][:, :, 1] * 0.5
        z[:, :, 3] = 0
        return z

    def doubled(post, hook):
        post = post.clone()
        post[..., 7] *= 2
        return post

    edits = [
        Edit("L0H2", scale=-1, position=4),
        Edit("L0H1", scale=0.5, source=other),
        Edit("L0H3"),
        Edit("L1N7", scale=2),
    ]
    found = intervene(model, own, edits, position=-2, top_k=13)
    plain = bridge(own[None])[0, -2]
    with bridge.hooks(fwd_hooks=[(ATTENTION, turned), (NEURON, doubled)]):
        edited = bridge(own[None])[0, -2]
    for ours, theirs in ((found.logits_before, plain), (found.logits_after, edited)):
        # logits are compared as the softmax sees them: conversion may shift them all alike
        assert torch.allclose(ours.log_softmax(-1), theirs.log_softmax(-1), atol=1e-9)  # float64
    by_id = found.frame.set_index("token_id")
    expected = (edited.log_softmax(-1) - plain.log_softmax(-1))[by_id.index.tolist()]
    assert by_id["change"].tolist() == pytest.approx(expected.tolist(), abs=1e-9)
    assert by_id["after"].sum() == pytest.approx(1)
    assert float(expected.abs().max()) > 0.05  # the edits did something
    assert found.receipt.ok


def test_later_edits_stand_on_earlier_ones(model):
    tokens = random_tokens(model, 1, 6)[0]
    twice = intervene(model, tokens, [Edit("L0H*", scale=2), Edit("L0H*", scale=3)])
    once = intervene(model, tokens, Edit("L0H*", scale=6))
    assert torch.allclose(twice.logits_after, once.logits_after, atol=1e-12)  # float64


def test_a_source_gives_what_heads_hold_there(model):
    """All heads of the last layer, and the stream of the last position is the source's but for what came
    before: cutting their own contribution first changes nothing."""
    own, other = random_tokens(model, 2, 7, seed=3)
    patched = intervene(model, own, Edit("L1H*", source=other))
    after_cut = intervene(model, own, [Edit("L1H*"), Edit("L1H*", source=other)])
    assert torch.equal(patched.logits_after, after_cut.logits_after)
    assert not torch.allclose(patched.logits_after, patched.logits_before, atol=1e-3)


def test_the_caller_keeps_a_model_without_hooks(model):
    tokens = random_tokens(model, 1, 6)[0]
    before = model(tokens[None])
    intervene(model, tokens, Edit("L0H1"))
    assert torch.equal(model(tokens[None]), before)


def test_the_receipt_turns_red(model, monkeypatch):
    """Hooks that change what they should leave alone are noticed."""
    from mechinterp_attn.causal import intervention

    editing = intervention._editing

    def careless(bank, changes):
        made = editing(bank, changes)
        return lambda z, hook: made(z, hook) + 0.1

    monkeypatch.setattr(intervention, "_editing", careless)
    with pytest.warns(mia.FailedCheckWarning, match="scaled by 1"):
        assert not intervene(model, [1, 2, 3], Edit("L0H1")).receipt.ok


@pytest.mark.parametrize(
    ("edits", "options", "message"),
    [
        ([], {}, "there are no edits"),
        ("L0H1", {}, r"'L0H1' is not an edit; give mia.causal.Edit\('L0H1'\)"),
        (Edit("L7H0"), {}, "no head L7H0"),
        (Edit("L0H1 > L1H0"), {}, "virtual head"),
        (Edit("L0H1", position=9), {"top_k": 0}, "top_k=0; .* position 9 is outside the prompt of 6"),
        (Edit("L0H1", scale=float("inf")), {}, "not finite"),
        (Edit("L0H1", source=[1, 2]), {}, "the source has 2 tokens, the prompt 6"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_said(as_users_run_it, model, edits, options, message):
    with pytest.raises(MechInterpError, match=message):
        intervene(model, random_tokens(model, 1, 6)[0], edits, **options)
