"""How the loss falls along the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch, Input, as_batch, plan_sequences, rows_within
from mechinterp_attn.causal.cuts import loss_dtype, next_token
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.model.attention_only import AttentionOnlyModel

EARLY, LATE = 50, 500  # Olsson et al. 2022, in contexts of 512


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class InContextLearning(Result):
    """Loss by position.

    Attributes:
        early: the position the loss starts from.
        late: the position it ends at.
        frame: one row per position: ``position`` (of the predicted token, from 1), ``loss`` (mean,
            nats), ``error`` (standard error of the mean), ``count``.
        score: loss at position ``late`` minus loss at ``early``: below zero where context helps.
        losses: every token's loss, ``[batch, pos - 1]``, zero on padding.
        counted: which of them are real.
    """

    title: ClassVar[str] = "Loss by position"
    score: float
    early: int
    late: int
    losses: Float[Tensor, "batch pos_minus_1"]
    counted: Bool[Tensor, "batch pos_minus_1"]


def _plan(model: AttentionOnlyModel, tokens: Input, max_bytes: int) -> Plan:
    batch = as_batch(model, tokens)
    kept = 6 * CELL * batch.tokens.numel()  # the losses, and what their means and spreads are made from
    return plan_sequences(model, "losses by position", batch, max_bytes, result=kept)


@plans(_plan)
@torch.no_grad()
def in_context_learning(
    model: AttentionOnlyModel,
    tokens: Input,
    *,
    early: int | None = None,
    late: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> InContextLearning:
    """Loss by position, and the in-context-learning score (Olsson et al. 2022).

    Args:
        model: the converted model.
        tokens: tokens ``[batch, pos]``, a text, or texts; many, for the mean to mean something.
        early, late: positions of the score; 50 and 500, in shorter contexts the same shares of them.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: positions outside the tokens, or a model that does not predict next tokens.
    """
    model.spec.need_next_tokens("the loss by position")
    batch = as_batch(model, tokens)
    made = within(_plan(model, tokens, max_bytes), max_bytes, "fewer or shorter sequences")
    losses = token_losses(model, batch, max_bytes=max_bytes - made.result)
    last = losses.shape[1]
    if early is None:
        early = max(1, min(EARLY, round(EARLY / 512 * (last + 1))))
    if late is None:
        late = min(LATE, last, round(LATE / 512 * (last + 1)))
    if not 1 <= early < late <= last:
        raise MechInterpError(f"early={early} and late={late}; expected 1 <= early < late <= {last}")
    counted = batch.predicts.cpu()
    count = counted.sum(0)
    mean = losses.sum(0) / count
    spread = (((losses - mean) ** 2 * counted).sum(0) / (count - 1).clamp_min(1) / count).sqrt()
    frame = pd.DataFrame(
        {
            "position": range(1, last + 1),
            "loss": mean.double().numpy(),
            "error": spread.double().numpy(),
            "count": count.numpy(),
        }
    )
    score = float(mean[late - 1] - mean[early - 1])
    notes = {"score": round(score, 4), "early": early, "late": late, "sequences": len(batch)}
    return InContextLearning(
        frame=frame,
        receipt=Receipt((_check(model, batch, losses),), notes),
        score=score,
        early=early,
        late=late,
        losses=losses,
        counted=counted,
    )


def _check(model: AttentionOnlyModel, batch: Batch, losses: Tensor) -> Check:
    """The first and the last sequence again, each alone and without padding, in float64 from the logits."""
    error = 0.0
    for row in {0, len(batch) - 1}:
        tokens = batch.tokens[row, batch.real[row]]
        right = model(tokens[None])[0, :-1].double().log_softmax(-1).gather(1, tokens[1:, None])[:, 0]
        again = torch.zeros_like(losses[row]).double()
        again[batch.predicts[row].cpu()] = -right.cpu()
        error = max(error, float((losses[row] - again).abs().max()))
    tolerance = TOLERANCE[model.W_E.dtype] * max(1.0, float(losses.max()))
    return Check("losses of the first and last sequence, alone and in float64", error, tolerance)


@torch.no_grad()
def token_losses(
    model: AttentionOnlyModel, batch: Batch, *, max_bytes: int
) -> Float[Tensor, "batch pos_minus_1"]:
    """Every next token's loss (nats), zero on padding, on the CPU."""
    rows = rows_within(model, batch.tokens.shape[1], max_bytes)
    width = max(batch.tokens.shape[1] - 1, 0)
    losses = torch.zeros(len(batch), width, dtype=loss_dtype(model.W_E.dtype))
    for at, part in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
        logits = model(part.tokens) if part.mask is None else model(part.tokens, attention_mask=part.mask)
        loss, _ = next_token(logits, part)
        losses[at : at + len(part), : loss.shape[1]] = loss.cpu()
    return losses
