"""Logits and loss by path order: how many heads a path from the tokens to the logits passes through.

Order 0 is the direct path (embedding, positions and the sublayers' own output biases, straight to
the unembedding), order 1 the single heads, order 2 the virtual heads of two, and so on (Elhage et
al. 2021, "term importance"). MLP-derived heads count as heads. A head's own value bias passes
through that head, so it counts one order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.behaviour import Behaviour, OnPrompt, asked, next_tokens
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.prompt import Frozen, sum_tolerance
from mechinterp_attn.frozen.sublayer import ROWS
from mechinterp_attn.model.cost import plan_runs

Count = Literal["all", "attention", "mlp"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Orders(Result):
    """Logits split by path order.

    Attributes:
        logits: ``[order, pos, d_vocab_out]``; the orders add up to the model's logits. Where
            ``max_order`` cut the list, the last entry holds all higher orders together.
        count: the heads that count: all, or one kind, the other being part of the wires.
        frame: one row per order: ``order, loss`` (mean next-token loss in nats with the paths up to
            this order; NaN in a model without one; with a task ``metric``, its metric), ``change``
            (against one order less), ``logit_norm`` (root mean square, against the average logit, which
            softmax does not see).
    """

    title: ClassVar[str] = "Logits by path order"
    logits: Float[Tensor, "order pos d_vocab"]
    count: Count


def _plan(frozen: Frozen, max_order: int | None, count: Count) -> Plan:
    """The result (twice under a soft cap) with a few copies of one order's logits; the streams while a
    sublayer writes to them; and what the heads of one bank hold.
    """
    n_orders, _ = _n_streams(frozen, max_order, count)
    copies = n_orders * (1 if frozen.cap is None else 2) + 4
    held = max((bank.bank.n_heads * bank.bank.d_head for bank in frozen.banks), default=0)
    size, n = frozen.logits.element_size(), len(frozen.tokens)
    floats = copies * frozen.logits.numel() + 5 * n_orders * frozen.end.numel() + 6 * held * max(n, ROWS)
    return plan_runs(
        frozen.model,
        f"{n_orders} orders x {tuple(frozen.logits.shape)} logits",
        runs=n_orders,
        rows=1,
        positions=n,
        bytes=size * floats,
        result=size * n_orders * frozen.logits.numel(),
    )


@of_prompt
@plans(_plan)
@torch.no_grad()
def orders(
    frozen: Frozen,
    *,
    max_order: int | None = None,
    count: Count = "all",
    task: Behaviour | None = None,
    max_bytes: int = MAX_BYTES,
) -> Orders:
    """Split the logits of a prompt by path order, in one pass over the banks.

    The residual stream is kept as a polynomial: one stream per order, and every bank moves each
    stream one order up. Cost: ``max_order + 2`` frozen passes, whatever the number of paths.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        max_order: the highest order kept apart; by default all (the number of counted sublayers).
        count: "attention" counts attention heads only: paths may pass through any number of
            MLP-derived heads on the way. "mlp" is the reverse.
        task: a behaviour (``mia.Task``) that has this prompt: its metric is measured instead of the loss.
        max_bytes: the largest working memory to take; most of it is the result (order x pos x
            vocabulary).

    Raises:
        MechInterpError: max_order is negative, count is unknown, the task has no such prompt, or the
            work needs more than max_bytes.
    """
    if count not in ("all", "attention", "mlp"):
        raise MechInterpError(f"count={count!r}; expected 'all', 'attention' or 'mlp'")
    if max_order is not None and max_order < 0:
        raise MechInterpError(f"max_order={max_order}; expected 0 or more")
    n_orders, top = _n_streams(frozen, max_order, count)
    within(_plan(frozen, max_order, count), max_bytes, "a smaller max_order, a shorter prompt")
    logits = frozen.read_out(_polynomial(frozen, n_orders, count))
    logits[0] += frozen.offset()
    error = float((logits.sum(0) - frozen.logits).abs().max())
    check = Check("orders sum to the model's logits", error, sum_tolerance(frozen))
    on = next_tokens(frozen) if task is None else asked(frozen, task)
    values = _so_far(on, logits)
    frame = pd.DataFrame(
        {
            "order": order_names(n_orders, top),
            "loss" if task is None else "metric": values,
            "change": [float("nan")] + [b - a for a, b in itertools.pairwise(values)],
            "logit_norm": [float(part.var(-1, correction=0).mean().sqrt()) for part in logits],
        }
    )
    notes = {**frozen.receipt.notes, "counted": count}
    if task is not None:
        notes["metric"] = on.about
    elif frozen.model.spec.no_next_token is not None:
        notes["loss"] = frozen.model.spec.no_next_token
    return Orders(frame=frame, receipt=Receipt((check,), notes), logits=logits, count=count)


def order_names(n_orders: int, top: int) -> list[str]:
    """``0, 1, ..., top`` and, where there is one more stream, ``>top``."""
    return [str(k) for k in range(top + 1)] + [f">{top}"] * (n_orders - top - 1)


def counted(bank: FrozenBank, count: Count) -> bool:
    """Whether passing through this bank adds one to the order of a path."""
    return bank.bank.of(count)


def _n_streams(frozen: Frozen, max_order: int | None, count: Count) -> tuple[int, int]:
    """How many streams to keep, and the highest order that has one of its own."""
    longest = sum(any(counted(bank, count) for bank in sub.banks) for sub in frozen.sublayers)
    top = longest if max_order is None else min(max_order, longest)
    return (top + 1 if top == longest else top + 2), top  # one more for everything above


def _polynomial(frozen: Frozen, n_orders: int, count: Count) -> Float[Tensor, "order pos d_model"]:
    """The last residual stream by path order.

    The last entry holds all orders from ``n_orders - 1`` up.
    """
    streams = frozen.start.new_zeros(n_orders, *frozen.start.shape)
    streams[0] = frozen.start
    for sublayer in frozen.sublayers:
        _, streams = sublayer.graded(streams, lambda bank: int(counted(bank, count)))
    return streams


def _so_far(on: OnPrompt, logits: Float[Tensor, "order pos d_vocab"]) -> list[float]:
    """The metric with the paths up to each order."""
    so_far = torch.zeros_like(logits[0])
    values = []
    for part in logits:
        so_far = so_far + part
        values.append(float(on.measure(so_far)))
    return values
