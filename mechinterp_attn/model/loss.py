"""The two losses of a model's logits: of the next tokens, and of labels as Hugging Face gives them."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError


def next_token_loss(
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    *,
    per_token: bool = False,
    attention_mask: Tensor | None = None,
) -> Tensor:
    """Cross-entropy (nats) of every next token: the mean over real tokens, or all ``[batch, pos - 1]``.

    Raises:
        MechInterpError: there is no next token.
    """
    if tokens.shape[1] < 2:
        raise MechInterpError("a loss needs at least 2 tokens, got 1: there is no next token")
    # Rows of logits as they lie in memory: over a strided vocabulary torch sums naively, and a mean
    # loss of 2.8 nats over 49,152 tokens is 1e-4 off in float32.
    following = tokens[:, 1:]
    loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), following.flatten(), reduction="none")
    loss = loss.view(following.shape)
    if per_token:
        return loss
    if attention_mask is None:
        return loss.mean()
    mask = torch.as_tensor(attention_mask).to(loss.device).bool()
    real = mask[:, 1:] & mask[:, :-1]
    return (loss * real).sum() / real.sum()


def labelled_loss(logits: Float[Tensor, "batch pos d_vocab"], labels: Tensor, *, causal: bool) -> Tensor:
    """Hugging Face's loss; -100 asks nothing.

    Args:
        causal: position i predicts label i + 1; otherwise its own label.
    """
    labels = labels.to(logits.device)
    if causal:
        logits, labels = logits[:, :-1], labels[:, 1:]
    return F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), ignore_index=-100)
