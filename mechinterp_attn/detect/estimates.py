"""What cutting each head would do to the loss, for all heads from one backward pass.

To first order, putting something else in the place of what a head holds at a position (``z``) changes
the loss by ``c = (replacement - z) . dL/dz``. At the end of training that says little: the loss is
nearly flat in the size of every head's output, so the ``c`` of different tokens cancel. What is left is
of second order, and there the curvature is, on average, the square of the gradient (the Fisher
information; Theis et al. 2018, "Fisher pruning", after LeCun et al. 1990). So the estimate is the sum of
``c + c^2 / 2`` over positions, both from the same pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch
from mechinterp_attn.causal.cuts import next_token
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank


def estimated_changes(
    model: AttentionOnlyModel,
    batch: Batch,
    counted: Bool[Tensor, "batch pos_minus_1"],
    *,
    replacement: Mapping[str, Tensor] | None = None,
    keep_patterns: bool = False,
) -> Float[Tensor, " head"]:
    """The estimated change of the sum of the counted losses (nats) for every head, float64, CPU.

    Args:
        counted: which next tokens' losses to add up.
        replacement: what heads would hold instead, ``[head, ...]`` by path of their bank; None: zero.
        keep_patterns: take patterns as constants.
    """
    held: dict[str, Tensor] = {}

    def hooks_of(bank: HeadBank) -> list[tuple[str, Any]]:
        def keep(z: Tensor, hook: Any) -> None:
            held[bank.path] = z

        fixed = [(bank.hook("pattern"), lambda p, hook: p.detach())] if keep_patterns else []
        return [(bank.hook("z"), keep), *fixed]

    hooks = [pair for bank in model.banks for pair in hooks_of(bank)]
    hooks.append(("hook_embed", lambda x, hook: x if x.requires_grad else x.requires_grad_()))
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
        loss, _ = next_token(model(batch.tokens, **padded), batch)
        total = (loss * counted.to(loss.device)).sum()
    paths = [bank.path for bank in model.banks]
    gradients = torch.autograd.grad(total, [held[path] for path in paths])
    sums = []
    for bank, gradient in zip(model.banks, gradients, strict=True):
        path = bank.path
        z = held[path].detach()
        other = -z if replacement is None else replacement[path].to(z.dtype) - z
        change = bank.by_head((other * gradient).double()).sum(-1)  # [batch, pos, head]
        sums.append((change + change.square() / 2).sum((0, 1)))
    return torch.cat(sums).cpu()


def rank_correlation(frame: pd.DataFrame) -> dict[str, float]:
    """For a receipt: of ``estimate`` and ``loss_change``, over the heads that have both."""
    both = frame.dropna(subset=["loss_change", "estimate"])
    if len(both) < 3:
        return {}
    rank = both["loss_change"].rank().corr(both["estimate"].rank())
    return {"rank correlation of estimate and exact": round(float(rank), 4)}
