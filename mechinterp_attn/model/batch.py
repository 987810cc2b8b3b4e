"""Sequences of tokens as equal rows, with what is padding."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from jaxtyping import Bool, Int
from torch import Tensor

Side = Literal["left", "right"]


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of tokens, padded to one length.

    Attributes:
        tokens: ``[batch, pos]``.
        real: which of them are no padding, ``[batch, pos]``.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> Bool[Tensor, "batch pos"] | None:
        """The attention mask, or None where nothing is padding."""
        return None if bool(self.real.all()) else self.real

    @property
    def predicts(self) -> Bool[Tensor, "batch pos_minus_1"]:
        """Which tokens after the first have a loss: real ones that follow a real one."""
        return self.real[:, 1:] & self.real[:, :-1]

    def split(self, rows: int) -> Iterator[Batch]:
        """The batch in parts of at most ``rows`` sequences, each cut to its longest one."""
        for start in range(0, len(self), rows):
            tokens, real = self.tokens[start : start + rows], self.real[start : start + rows]
            used = real.any(0).nonzero()[:, 0]
            columns = slice(int(used[0]), int(used[-1]) + 1)
            yield Batch(tokens[:, columns], real[:, columns])

    def repeat(self, n: int) -> Batch:
        """The whole batch ``n`` times."""
        return Batch(self.tokens.repeat(n, 1), self.real.repeat(n, 1))


def padded(rows: Sequence[Tensor], *, fill: int, side: Side) -> Batch:
    """Rows of tokens of any lengths as one batch."""
    width = max(len(row) for row in rows)
    tokens = torch.full((len(rows), width), fill, dtype=torch.long)
    real = torch.zeros(len(rows), width, dtype=torch.bool)
    for i, row in enumerate(rows):
        at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
        tokens[i, at] = row.cpu()
        real[i, at] = True
    return Batch(tokens, real)
