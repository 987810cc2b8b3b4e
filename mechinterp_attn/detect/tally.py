"""What a pass over a corpus keeps: sums, and the passages where each head writes most.

Tallies of disjoint texts add up, so batches, processes and machines can each make their own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.resume import SavedState
from mechinterp_attn.detect.measures import Sums
from mechinterp_attn.detect.texts import Window

TENSORS = ("loss", "tokens", "cut", "estimate", "written", "positions")


@dataclass(frozen=True, eq=False)
class Best:
    """The passages where each head writes most, largest first; -inf where there are fewer.

    Attributes:
        value: norm of what the head writes, ``[head, rank]``.
        place: document, token in the document (of the window's start), position in the window.
        tokens: the passage around it, -1 outside the window, ``[head, rank, 2 * context + 1]``.
        norms: of what the head writes at each of these tokens, 0 outside the window.
    """

    value: Float[Tensor, "head rank"]
    place: Int[Tensor, "head rank 3"]
    tokens: Int[Tensor, "head rank passage"]
    norms: Float[Tensor, "head rank passage"]

    @classmethod
    def empty(cls, n_heads: int, top: int, context: int) -> Best:
        return cls(
            torch.full((n_heads, top), -torch.inf),
            torch.full((n_heads, top, 3), -1, dtype=torch.int64),
            torch.full((n_heads, top, 2 * context + 1), -1, dtype=torch.int32),
            torch.zeros(n_heads, top, 2 * context + 1),
        )

    def __add__(self, other: Best) -> Best:
        """The best of both; equal values in the order of the corpus, whoever found them first."""
        value, place, tokens, norms = (
            torch.cat([getattr(self, f.name), getattr(other, f.name)], 1) for f in fields(self)
        )
        order = torch.arange(value.shape[1]).expand(len(value), -1)
        for key in (place[..., 2], place[..., 1], place[..., 0]):  # least key first, each sort stable
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        order = order.gather(1, value.gather(1, order).argsort(dim=1, descending=True, stable=True))
        order = order[:, : self.value.shape[1], None]
        return Best(
            value.gather(1, order[..., 0]),
            *(part.gather(1, order.expand(-1, -1, part.shape[2])) for part in (place, tokens, norms)),
        )


@dataclass(frozen=True)
class Place:
    """The last window that was counted, where a pass goes on.

    Attributes:
        document, start, mark, so_far: as in ``Window``; the mark tells whether the texts up to here
            are still the ones that were counted.
    """

    document: int
    start: int
    mark: str
    so_far: int

    @classmethod
    def of(cls, window: Window) -> Place:
        return cls(window.document, window.start, window.mark, window.so_far)


@dataclass(frozen=True, eq=False)
class Tally:
    """Everything counted so far.

    Attributes:
        sums: of attention by role.
        loss: sum of the losses (nats), ``[1]``.
        tokens: how many next tokens that is, ``[1]``.
        cut: sums of the changes by every cut, of the loss, of the right token's logit and of an own metric,
            as far as they are measured, ``[measured, cut]``.
        estimate: sum of the estimated loss changes, ``[head]``, or ``[0]`` where none were asked for.
        written: sum over positions of the norm of what each head writes, ``[head]``.
        positions: how many, ``[1]``.
        best: the passages where each head writes most.
        windows: how many windows of tokens were counted.
        place: the last of them.
    """

    sums: Sums
    loss: Float[Tensor, " one"]
    tokens: Float[Tensor, " one"]
    cut: Float[Tensor, "measured cut"]
    estimate: Float[Tensor, " estimated"]
    written: Float[Tensor, " head"]
    positions: Float[Tensor, " one"]
    best: Best
    windows: int
    place: Place

    def __add__(self, other: Tally) -> Tally:
        """Of two disjoint parts of a corpus, the ``other`` being the later one."""
        parts = {
            f.name: getattr(self, f.name) + getattr(other, f.name)
            for f in fields(self)
            if f.name != "place"
        }
        return Tally(**parts, place=other.place)

    def save(self, state: SavedState) -> None:
        """Write the tally, whole or not at all."""
        tensors = {f"sums.{f.name}": getattr(self.sums, f.name) for f in fields(Sums)}
        tensors |= {f"best.{f.name}": getattr(self.best, f.name) for f in fields(Best)}
        tensors |= {name: getattr(self, name) for name in TENSORS}
        state.store(tensors, {"windows": self.windows, "place": asdict(self.place)})

    @classmethod
    def load(cls, state: SavedState) -> Tally | None:
        """Read what ``save`` wrote; None if there is no file yet.

        Raises:
            MechInterpError: it is no such file, or was made with another model or other settings.
        """
        found = state.load()
        if found is None:
            return None
        tensors, progress = found
        return cls(
            sums=Sums(**{f.name: tensors[f"sums.{f.name}"] for f in fields(Sums)}),
            best=Best(**{f.name: tensors[f"best.{f.name}"] for f in fields(Best)}),
            **{name: tensors[name] for name in TENSORS},
            windows=progress["windows"],
            place=Place(**progress["place"]),
        )
