"""Weight decay and attention dropout on a converted model (float64)."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn import MechInterpError
from mechinterp_attn.theorems import attention_dropout, attention_only, decay
from tests.conftest import random_tokens, tiny_bridge


@pytest.fixture(scope="module")
def literal():
    return attention_only(tiny_bridge(act_fn="silu"), masks="weights", omega=60.0)


def test_decayed_omega_is_a_smaller_omega(literal):
    tokens = random_tokens(literal)
    exact = literal(tokens)
    half = decay(literal, 0.5, only=["omega"])
    assert half.omega == 30.0
    assert literal.omega == 60.0  # the model given is left alone
    both = decay(literal, 0.5**0.5, only=["positions"])
    assert torch.allclose(half(tokens), both(tokens), atol=1e-12)  # each score reads positions twice
    small = float((half(tokens) - exact).detach().abs().max())
    smaller = float((decay(literal, 0.4, only=["omega"])(tokens) - exact).abs().max())
    assert 0 < small < smaller
    assert decay(literal, 0.5, only=[]).omega == 60.0  # exempt


def test_a_decayed_constant_shrinks_every_bias(literal):
    tokens = random_tokens(literal)
    gone = decay(literal, 1e-12, only=["constant"])
    model = mia.convert(tiny_bridge(act_fn="silu"))
    for bank in model.banks:
        for name in ("b_Q", "b_K", "b_V", "b_O", "b_in", "b_out"):
            if name in dict(bank.named_parameters()):
                getattr(bank, name).data.zero_()
        if bank.kind == "mlp":  # the key is the constant too: scores of 0, half the weight on itself
            bank.rule = type(bank.rule)(lambda z: 0.5 + 0 * z, (1.0,), (0.0,), (1.0,), True)
    assert torch.allclose(gone(tokens), model(tokens), atol=1e-9)


def test_attention_dropout_on_neuron_heads_is_neuron_dropout(literal):
    tokens, rate = random_tokens(literal), 0.3
    hooks = attention_dropout(literal, rate, torch.Generator().manual_seed(0))
    neurons = [hook for hook in hooks if ".neurons." in hook[0]]
    dropped = literal.run_with_hooks(tokens, fwd_hooks=neurons)
    generator = torch.Generator().manual_seed(0)

    def neuron_dropout(post, hook):
        return post * (torch.rand(post.shape, generator=generator) >= rate) / (1 - rate)

    points = [(f"blocks.{layer}.mlp.hook_post", neuron_dropout) for layer in range(2)]
    model = mia.convert(tiny_bridge(act_fn="silu"))
    assert torch.allclose(dropped, model.run_with_hooks(tokens, fwd_hooks=points), atol=1e-10)
    assert len(hooks) == 4


def test_bad_factors_rates_and_parts(literal):
    with pytest.raises(MechInterpError, match=r"only=\['Omega'\], factor=0.5; expected parts out of"):
        decay(literal, 0.5, only=["Omega"])
    with pytest.raises(MechInterpError, match=r"factor=0\.0"):
        decay(literal, 0.0)
    with pytest.raises(MechInterpError, match="masks are masks"):
        decay(attention_only(tiny_bridge(act_fn="silu")), 0.5)
    with pytest.raises(MechInterpError, match=r"rate=1\.0"):
        attention_dropout(literal, 1.0, torch.Generator())
