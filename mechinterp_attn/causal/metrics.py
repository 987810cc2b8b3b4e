"""What a behaviour is measured by: from the logits of a prompt to one number."""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError

Metric = Callable[[Tensor], Tensor]  # logits [n, pos, d_vocab_out] -> [n]

NEEDS_ANSWER = ("logit", "logit_diff", "prob", "prob_diff", "accuracy")
NEEDS_AGAINST = ("prob_diff",)
NAMES = ("logit", "logit_diff", "prob", "prob_diff", "loss", "kl", "accuracy")
NO_GRADIENT = ("accuracy",)
LARGER_IS_WORSE = ("loss", "kl")


def measure(
    name: str,
    logits: Float[Tensor, "n d_vocab_out"],
    answer: Int[Tensor, "n k"],
    against: Int[Tensor, "n j"] | None,
) -> Float[Tensor, " n"]:
    """A named metric at the position of the answer.

    Args:
        name: one of ``NAMES`` but "kl", which compares two runs (``divergence``).
        answer, against: ids of output tokens, -1 where a prompt has fewer than the widest one.

    Returns:
        one number per prompt, in logits, nats or probability.
    """
    if name == "logit":
        return _mean(logits, answer)
    if name == "logit_diff":
        other = logits.mean(-1) if against is None else _mean(logits, against)
        return _mean(logits, answer) - other
    logp = logits.log_softmax(-1)
    if name == "loss":
        return -_logsum(logp, answer)
    if name == "prob":
        return _logsum(logp, answer).exp()
    if name == "prob_diff":
        assert against is not None
        return _logsum(logp, answer).exp() - _logsum(logp, against).exp()
    assert name == "accuracy", name
    return right(logits, answer, against).to(logits.dtype)


def own(metric: Metric, logits: Float[Tensor, "n pos d_vocab_out"]) -> Float[Tensor, " n"]:
    """A function of the logits, held to what it must give.

    Raises:
        MechInterpError: it gave something else than a number for every prompt.
    """
    out = metric(logits)
    if not isinstance(out, Tensor) or out.shape != logits.shape[:1]:
        given = tuple(out.shape) if isinstance(out, Tensor) else type(out).__name__
        raise MechInterpError(
            f"the metric gave {given} for logits {tuple(logits.shape)}; expected one number per prompt, a "
            f"tensor of shape ({len(logits)},)"
        )
    return out


def right(
    logits: Float[Tensor, "n d_vocab_out"], answer: Int[Tensor, "n k"], against: Int[Tensor, "n j"] | None
) -> Tensor:
    """Whether the best answer beats every token it stands against, or all others where none is named."""
    best = _picked(logits, answer, -torch.inf).amax(-1)
    if against is not None:
        return best > _picked(logits, against, -torch.inf).amax(-1)
    return best >= logits.amax(-1)


def divergence(
    logits: Float[Tensor, "n d_vocab_out"], reference: Float[Tensor, "n d_vocab_out"]
) -> Float[Tensor, " n"]:
    """KL divergence (nats) of the logits from the whole model's, ``KL(reference || now)``."""
    whole = reference.log_softmax(-1)
    return (whole.exp() * (whole - logits.log_softmax(-1))).sum(-1)


def sequence_loss(
    logits: Float[Tensor, "n pos d_vocab"], tokens: Int[Tensor, "n pos"], real: Tensor
) -> Float[Tensor, " n"]:
    """Mean next-token loss (nats) of every prompt over its real tokens after the first."""
    logp = logits[:, :-1].log_softmax(-1)
    loss = -logp.gather(-1, tokens[:, 1:, None])[..., 0] * real[:, 1:]
    return loss.sum(-1) / real[:, 1:].sum(-1)


def _picked(x: Tensor, ids: Int[Tensor, "n k"], missing: float) -> Float[Tensor, "n k"]:
    return x.gather(-1, ids.clamp_min(0)).masked_fill(ids < 0, missing)


def _mean(x: Tensor, ids: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    return _picked(x, ids, 0.0).sum(-1) / (ids >= 0).sum(-1)


def _logsum(logp: Tensor, ids: Int[Tensor, "n k"]) -> Float[Tensor, " n"]:
    return _picked(logp, ids, -torch.inf).logsumexp(-1)
