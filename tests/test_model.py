"""The converted model as a hooked model: what hooks do, what caches hold, what it refuses."""

import pytest
import torch
from transformer_lens import ActivationCache
from transformer_lens.model_protocol import TransformerLensModel, TransformerLensModelWithWeights

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge

# float64, two layers of width 16: sums of a few dozen terms of order one
EXACT = dict(rtol=0, atol=1e-12)


@pytest.fixture(scope="module")
def bridge():
    return tiny_bridge()


@pytest.fixture(scope="module")
def model(bridge):
    return mia.convert(bridge)


def test_it_satisfies_the_runtime_protocols(model):
    assert isinstance(model, TransformerLensModel)
    assert isinstance(model, TransformerLensModelWithWeights)


def test_the_cache_is_an_activation_cache_equal_to_the_bridges(model, bridge):
    tokens = random_tokens(model)
    logits, cache = model.run_with_cache(tokens)
    expected, theirs = bridge.run_with_cache(tokens)
    assert isinstance(cache, ActivationCache)
    torch.testing.assert_close(logits, expected, **EXACT)
    shared = ["hook_embed", "hook_pos_embed", "ln_final.hook_scale"]
    for layer in range(2):
        shared += [
            f"blocks.{layer}.{name}"
            for name in (
                "hook_resid_pre", "ln1.hook_scale", "attn.hook_q", "attn.hook_k", "attn.hook_v",
                "attn.hook_pattern", "attn.hook_z", "hook_attn_out", "hook_resid_mid",
                "ln2.hook_scale", "mlp.hook_pre", "mlp.hook_post", "hook_mlp_out", "hook_resid_post",
            )
        ]  # fmt: skip
    for name in shared:
        torch.testing.assert_close(
            cache[name], theirs[name], **EXACT, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_activation_cache_methods_add_up(model):
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens)
    last = cache["blocks.1.hook_resid_post"]
    torch.testing.assert_close(cache.decompose_resid(layer=2).sum(0), last, **EXACT)
    torch.testing.assert_close(cache.accumulated_resid(layer=2)[-1], last, **EXACT)
    heads = cache.stack_head_results(layer=2)
    assert heads.shape[0] == 2 * 4
    torch.testing.assert_close(
        heads[:4].sum(0) + model.blocks[0].attn.b_O, cache["blocks.0.hook_attn_out"], **EXACT
    )
    neurons = cache.stack_neuron_results(layer=2)
    assert neurons.shape[0] == 2 * 24
    torch.testing.assert_close(
        neurons[24:].sum(0) + model.blocks[1].mlp.b_out, cache["blocks.1.hook_mlp_out"], **EXACT
    )
    full = cache.get_full_resid_decomposition(layer=2, expand_neurons=True)
    torch.testing.assert_close(full.sum(0), last, **EXACT)
    logits = cache.apply_ln_to_stack(full, layer=2).sum(0) @ model.W_U + model.b_U
    torch.testing.assert_close(logits, model(tokens), **EXACT)


def test_no_neuron_tensor_is_quadratic_in_the_length(model):
    pos = 20
    _, cache = model.run_with_cache(random_tokens(model, batch=1, pos=pos))
    quadratic = [name for name, t in cache.items() if list(t.shape).count(pos) > 1]
    assert quadratic
    assert all(".attn." in name for name in quadratic)
    assert cache["blocks.0.neurons.hook_weight"].shape == (1, pos, 24)


def test_looking_does_not_change_the_logits(model):
    """The fused kernel (nobody looks) and the written-out pattern (a hook looks) agree."""
    tokens = random_tokens(model)
    looked, _ = model.run_with_cache(tokens)
    torch.testing.assert_close(model(tokens), looked, **EXACT)
    everything = [(name, lambda t, hook: None) for name in model.hook_dict]
    torch.testing.assert_close(model.run_with_hooks(tokens, fwd_hooks=everything), looked, **EXACT)


def test_editing_an_attention_pattern_does_what_it_does_in_the_source(model, bridge):
    tokens = random_tokens(model)

    def previous_only(pattern, hook):
        edited = torch.zeros_like(pattern)
        edited[..., 1:, :-1] = torch.eye(pattern.shape[-1] - 1, dtype=pattern.dtype)
        pattern = pattern.clone()
        pattern[:, 1] = edited[:, 1]
        return pattern

    hooks = [("blocks.0.attn.hook_pattern", previous_only)]
    edited = model.run_with_hooks(tokens, fwd_hooks=hooks)
    torch.testing.assert_close(edited, bridge.run_with_hooks(tokens, fwd_hooks=hooks), **EXACT)
    assert (edited - model(tokens)).abs().max() > 1e-3


def test_a_neuron_whose_head_looks_away_is_a_neuron_set_to_zero(model, bridge):
    tokens = random_tokens(model)

    def only_the_bias_token(pattern, hook):
        pattern = pattern.clone()
        pattern[..., 5] = 0
        return pattern

    def zero(post, hook):
        post = post.clone()
        post[..., 5] = 0
        return post

    edited = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.neurons.hook_weight", only_the_bias_token)])
    expected = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.mlp.hook_post", zero)])
    torch.testing.assert_close(edited, expected, **EXACT)
    assert (edited - model(tokens)).abs().max() > 1e-3


def test_a_neuron_that_sees_only_itself_is_linear(model, bridge):
    tokens = random_tokens(model)
    ones = [("blocks.1.neurons.hook_weight", lambda pattern, hook: torch.ones_like(pattern))]
    _, cache = bridge.run_with_cache(tokens)
    pre = cache["blocks.1.mlp.hook_pre"]
    linear = [("blocks.1.mlp.hook_post", lambda post, hook: pre)]
    torch.testing.assert_close(
        model.run_with_hooks(tokens, fwd_hooks=ones),
        bridge.run_with_hooks(tokens, fwd_hooks=linear),
        **EXACT,
    )


def test_editing_the_middle_of_a_block_reaches_the_skip_path(model):
    tokens = random_tokens(model)
    push = torch.linspace(-1, 1, 16, dtype=torch.float64)
    out = []
    model.run_with_hooks(
        tokens,
        fwd_hooks=[
            ("blocks.1.hook_resid_mid", lambda x, hook: x + push),
            ("blocks.1.hook_mlp_out", lambda y, hook: torch.zeros_like(y)),
            ("blocks.1.hook_resid_post", lambda x, hook: out.append(x)),
        ],
    )
    _, cache = model.run_with_cache(tokens)
    torch.testing.assert_close(out[0], cache["blocks.1.hook_resid_mid"] + push, **EXACT)


def test_the_source_is_left_as_it_was(bridge):
    before = {name: tensor.clone() for name, tensor in bridge.state_dict().items()}
    calls = []
    bridge.add_hook("blocks.0.hook_resid_post", lambda x, hook: calls.append(x))
    modes = [m.training for m in bridge.modules()]
    model = mia.convert(bridge)
    mia.verify(model, bridge, random_tokens(model))
    assert [m.training for m in bridge.modules()] == modes
    calls.clear()
    bridge(random_tokens(model))
    assert len(calls) == 1
    bridge.reset_hooks()
    model.train()  # from here on weights may change, so those it shares are copied first
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(3.0)
    after = bridge.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)


def test_own_hooks_survive_looking(model):
    calls = []
    model.add_hook("blocks.0.hook_resid_post", lambda x, hook: calls.append(1))
    try:
        model.run_with_cache(random_tokens(model))
        calls.clear()
        model(random_tokens(model))
        assert calls == [1]
    finally:
        model.reset_hooks()


def test_gradients_reach_every_parameter():
    model = mia.convert(tiny_bridge(torch.float32))
    model(random_tokens(model), return_type="loss").backward()
    without = [name for name, p in model.named_parameters() if p.grad is None or not p.grad.abs().sum()]
    # softmax does not see what is added to all keys alike: b_K has no effect, up to rounding
    assert all(name.endswith("b_K") for name in without)


def test_losses(model):
    tokens = random_tokens(model, batch=2, pos=7)
    logits, loss = model(tokens, return_type="both")
    expected = -torch.stack(
        [logits[b, p].log_softmax(0)[tokens[b, p + 1]] for b in range(2) for p in range(6)]
    )
    torch.testing.assert_close(loss, expected.mean(), **EXACT)
    per_token = model(tokens, return_type="loss", loss_per_token=True)
    torch.testing.assert_close(per_token.flatten(), expected, **EXACT)
    with pytest.raises(mia.MechInterpError, match="at least 2 tokens"):
        model(tokens[:, :1], return_type="loss")


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        (torch.zeros(1, 25, dtype=torch.long), r"25 tokens are more than this model's context of 24.*by 1"),
        (torch.zeros(1, 0, dtype=torch.long), "at least one token"),
        (torch.zeros(1, 2, 3, dtype=torch.long), r"shape \(1, 2, 3\); expected \[pos\] or \[batch, pos\]"),
        (torch.tensor([[0, 13]]), r"token id 13 is outside the vocabulary 0\.\.12"),
        (torch.tensor([[-1, 2]]), "token id -1 is outside"),
        (torch.tensor([[0.5]]), "must be integers"),
        ("text", "needs a tokenizer and this model has none"),
    ],
)
def test_unusable_tokens_are_refused(model, tokens, message):
    with pytest.raises(mia.MechInterpError, match=message):
        model(tokens)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_return_type_is_refused(model):
    with pytest.raises(mia.MechInterpError, match="return_type='lossy'; expected 'logits'"):
        model(random_tokens(model), return_type="lossy")
