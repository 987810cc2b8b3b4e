"""Logits and loss by path order: how many heads a path from the tokens to the logits passes through.

Order 0 is the direct path (embedding, positions and the sublayers' own output biases, straight to
the unembedding), order 1 the single heads, order 2 the virtual heads of two, and so on (Elhage et
al. 2021, "term importance"). MLP-derived heads count as heads. A head's own value bias passes
through that head, so it counts one order.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.paths.frozen import Frozen, sum_tolerance
from mechinterp_attn.results import Check, Receipt, Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Orders(Result):
    """Logits split by path order.

    Attributes:
        logits: ``[order, pos, d_vocab_out]``; the orders add up to the model's logits. Where
            ``max_order`` cut the list, the last entry holds all higher orders together.
        frame: one row per order: ``order, loss`` (mean next-token loss in nats with the paths up to
            this order), ``change`` (against one order less), ``logit_norm`` (root mean square).
    """

    title: ClassVar[str] = "Logits by path order"
    logits: Float[Tensor, "order pos d_vocab"]

    def plot(self) -> Figure:
        """Loss with the paths up to each order."""
        from mechinterp_attn.view.figures.paths import loss_by_order

        return loss_by_order(self)


@torch.no_grad()
def orders(frozen: Frozen, *, max_order: int | None = None) -> Orders:
    """Split the logits of a prompt by path order, in one pass over the banks.

    The residual stream is kept as a polynomial: one stream per order, and every bank moves each
    stream one order up. Cost: ``max_order + 2`` frozen passes, whatever the number of paths.

    Args:
        max_order: the highest order kept apart; by default all (the number of banks).

    Raises:
        MechInterpError: max_order is negative.
    """
    n_banks = len(frozen.banks)
    if max_order is not None and max_order < 0:
        raise MechInterpError(f"max_order={max_order}; expected 0 or more")
    top = n_banks if max_order is None else min(max_order, n_banks)
    n_streams = top + 1 if top == n_banks else top + 2  # one more for everything above
    streams = frozen.start.new_zeros(n_streams, *frozen.start.shape)
    streams[0] = frozen.start
    for reached, bank in enumerate(frozen.banks):
        filled = min(reached + 1, n_streams)  # orders above are still zero
        moved = bank.apply(streams[:filled])
        streams[1 : filled + 1] += moved[: n_streams - 1]
        if filled == n_streams:  # the last stream holds all higher orders
            streams[-1] += moved[-1]
        streams[0] += bank.bank.b_O.detach()
        streams[min(1, n_streams - 1)] += bank.constant
    logits = frozen.read_out(streams)
    logits[0] += frozen.model.b_U.detach()
    error = float((logits.sum(0) - frozen.logits).abs().max())
    check = Check("orders sum to the model's logits", error, sum_tolerance(frozen))
    losses = _losses(frozen, logits)
    names = [str(k) for k in range(top + 1)] + [f">{top}"] * (n_streams - top - 1)
    frame = pd.DataFrame(
        {
            "order": names,
            "loss": losses,
            "change": [float("nan")] + [b - a for a, b in itertools.pairwise(losses)],
            "logit_norm": logits.pow(2).mean((1, 2)).sqrt().tolist(),
        }
    )
    return Orders(frame=frame, receipt=Receipt((check,), frozen.receipt.notes), logits=logits)


def _losses(frozen: Frozen, logits: Tensor) -> list[float]:
    """Loss with the paths up to each order; NaN for a single token, which has no next one."""
    if len(frozen.tokens) < 2:
        return [float("nan")] * len(logits)
    return [float(loss) for loss in frozen.loss(logits.cumsum(0))]
