"""Folding and comparing some columns at a time gives what doing all at once gives."""

import pytest
import torch
import torch.nn.functional as F

import mechinterp_attn as mia
from mechinterp_attn.conversion import fidelity
from mechinterp_attn.conversion.fold import fold
from tests.conftest import random_tokens, tiny_bridge


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("shape", [(96, 10_007), (5, 160, 64)])
@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_folding_in_chunks_is_folding_in_float64(dtype, transposed, shape, kind):
    make = torch.Generator().manual_seed(0)
    W = torch.randn(shape, generator=make).to(dtype)
    if transposed:  # as Hugging Face stores linear layers
        W = W.mT.contiguous().mT
    b = torch.randn(*shape[:-2], shape[-1], generator=make).to(dtype)
    gain, beta = torch.randn(2, shape[-2], generator=make).to(dtype)
    given = W.clone()
    W_new, b_new = fold(W, b, gain, beta, kind=kind)

    wide = gain.double()[:, None] * W.double()
    if kind == "LN":
        wide = wide - wide.mean(-2, keepdim=True)
    bias = torch.einsum("d,...do->...o", beta.double(), W.double()) + b.double()
    assert torch.equal(W_new, wide.to(dtype))
    # in float64 the bias is a dot product whose order of summation is BLAS's, not ours
    rounding = 1e-12 if dtype == torch.float64 else 0
    torch.testing.assert_close(b_new, bias.to(dtype), atol=rounding, rtol=0)
    assert torch.equal(W, given)  # float64 weights are not folded in place
    assert W_new.stride() == W.stride()


def test_the_card_is_the_same_however_many_logits_are_compared_at_once(monkeypatch):
    bridge = tiny_bridge()
    other = mia.convert(bridge)
    with torch.no_grad():  # the folded unembedding is the model's own
        make = torch.Generator().manual_seed(1)
        other.unembed.W_U.add_(0.1 * torch.randn(other.W_U.shape, generator=make))
    tokens = random_tokens(other)
    logits, expected = other(tokens).detach().double(), bridge(tokens).detach().double()
    for at_once in (1, 3 * other.spec.d_vocab, 2**30):
        monkeypatch.setattr(fidelity, "_AT_ONCE", at_once)
        card = mia.verify(other, bridge, tokens)
        error = (logits - expected).abs()
        p, q = expected.log_softmax(-1), logits.log_softmax(-1)
        assert card.max_logit_error == float(error.max())
        assert error[card.worst_position].max() == error.max()
        assert card.logit_scale == float(expected.abs().max())
        assert card.top1_agreement == float((logits.argmax(-1) == expected.argmax(-1)).double().mean())
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
        for own, whole in (
            (card.mean_logit_error, error.mean()),
            (card.kl, F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean()),
            (card.loss_model, loss),
        ):
            assert own == pytest.approx(float(whole), rel=1e-12)  # float64, another order of summation
