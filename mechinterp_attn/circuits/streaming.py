"""The largest entries of a product ``left @ right`` that is too large to hold.

The product is made block by block, each small enough to stay in the processor's cache. A block is
looked at once: the maxima of groups of 16 columns are compared with the smallest value still worth
keeping, and only groups that beat it are opened. That threshold rises quickly, so almost all the
time goes into the multiplication itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor
from tqdm.auto import tqdm

Precision = Literal["float32", "tf32", "bfloat16"]
GROUP = 16  # columns whose maximum is compared at once


class Entries(NamedTuple):
    """Entries of a matrix: ``value[i] = M[row[i], column[i]]``, largest first."""

    row: Int[Tensor, " entry"]
    column: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]


def block_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block: what a CPU's cache holds, or what a GPU's free memory allows.

    On a GPU a sixteenth of the free memory, at most 16,384 x 16,384 float32 numbers (1 GiB): wide
    enough that the multiplication, not the launch of kernels, takes the time.
    """
    if device.type != "cuda":
        return 512, 2048
    free, _ = torch.cuda.mem_get_info(device)
    side = int((free / 16 / 4) ** 0.5) // 256 * 256
    side = max(512, min(side, 16384))
    return side, side


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """TF32 only where it was asked for, whatever the caller's global setting; restored afterwards."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class Best:
    """The ``k`` largest of a stream of values, each with its row and column."""

    def __init__(self, k: int, device: torch.device, dtype: torch.dtype):
        self.k = k
        empty = torch.empty(0, dtype=torch.long, device=device)
        self.entries = Entries(empty, empty, torch.empty(0, dtype=dtype, device=device))
        self.threshold = -torch.inf

    def offer(self, block: Float[Tensor, "row column"], first_row: int, first_column: int) -> None:
        """Look through a block whose upper left corner stands at the given place."""
        if self.threshold == -torch.inf:
            value, flat = block.flatten().topk(min(self.k, block.numel()))
            row, column = flat // block.shape[1], flat % block.shape[1]
        else:
            row, column, value = above(block, self.threshold)
        if len(value):
            self.merge(Entries(first_row + row, first_column + column, value))

    def merge(self, found: Entries) -> None:
        joined = Entries(*(torch.cat(pair) for pair in zip(self.entries, found, strict=True)))
        keep = joined.value.topk(min(self.k, len(joined.value))).indices
        self.entries = Entries(*(part[keep] for part in joined))
        if len(keep) == self.k:
            self.threshold = float(self.entries.value[-1])


def above(block: Float[Tensor, "row column"], threshold: float | Tensor) -> Entries:
    """All entries of a block above a threshold: one number, or one per row ``[row, 1]``."""
    rows, columns = block.shape
    if columns % GROUP:
        row, column = (block > threshold).nonzero().T
        return Entries(row, column, block[row, column])
    groups = block.view(rows, GROUP, columns // GROUP)  # a group is every (columns / 16)-th column
    peaks = groups.amax(1)
    if not isinstance(threshold, Tensor) and float(peaks.max()) <= threshold:
        nothing = torch.empty(0, dtype=torch.long, device=block.device)
        return Entries(nothing, nothing, block.new_empty(0))
    row, group = (peaks > threshold).nonzero().T
    members = groups[row, :, group]  # [hit, 16]
    limit = threshold[row] if isinstance(threshold, Tensor) else threshold
    hit, member = (members > limit).nonzero().T
    return Entries(row[hit], member * (columns // GROUP) + group[hit], members[hit, member])


@torch.no_grad()
def top_entries(
    left: Float[Tensor, "row rank"],
    right: Float[Tensor, "rank column"],
    k: int,
    *,
    sign: int = 1,
    progress: str | None = None,
) -> Entries:
    """The ``k`` largest entries of ``left @ right`` (the smallest for ``sign=-1``).

    Args:
        progress: what to call the progress bar; None shows none.
    """
    best = Best(k, left.device, _wide(left.dtype))
    for start, column, block in _blocks(left * sign, right, progress):
        best.offer(block, start, column)
    return best.entries._replace(value=best.entries.value * sign)


@torch.no_grad()
def top_of_rows(
    left: Float[Tensor, "row rank"],
    right: Float[Tensor, "rank column"],
    k: int,
    *,
    sign: int = 1,
    progress: str | None = None,
) -> Entries:
    """The ``k`` largest entries of every row of ``left @ right``, row by row."""
    values: list[Tensor] = []
    columns: list[Tensor] = []
    best: _RowBest | None = None
    for start, column, block in _blocks(left * sign, right, progress):
        if best is None or start != best.start:
            if best is not None:
                best.finish(values, columns)
            best = _RowBest(k, start)
        best.offer(block, column)
    assert best is not None
    best.finish(values, columns)
    value, column_ids = torch.cat(values), torch.cat(columns)
    row = torch.arange(len(value), device=left.device)[:, None].expand_as(column_ids)
    return Entries(row.flatten(), column_ids.flatten(), value.flatten() * sign)


class _RowBest:
    """The ``k`` largest of every row of one stripe, column block after column block."""

    def __init__(self, k: int, start: int):
        self.k, self.start = k, start
        self.value: Tensor | None = None  # [row, <= k], largest first
        self.column: Tensor | None = None
        self.waiting: list[Entries] = []
        self.seen = self.merged = 0

    def offer(self, block: Tensor, first_column: int) -> None:
        if self.value is None or self.value.shape[1] < self.k:
            value, column = block.topk(min(self.k, block.shape[1]))
            self._take(value, column + first_column)
        else:
            row, column, value = above(block, self.value[:, -1:])
            self.waiting.append(Entries(row, column + first_column, value))
            # Between two merges about k entries per row arrive each time the columns double.
            if self.seen >= 2 * self.merged:
                self._merge()
        self.seen += block.shape[1]
        self.merged = self.merged or self.seen

    def finish(self, values: list[Tensor], columns: list[Tensor]) -> None:
        self._merge()
        assert self.value is not None
        assert self.column is not None
        values.append(self.value)
        columns.append(self.column)

    def _merge(self) -> None:
        self.merged = self.seen
        if not self.waiting:
            return
        assert self.value is not None
        row, column, value = (torch.cat(parts) for parts in zip(*self.waiting, strict=True))
        self.waiting = []
        if not len(row):
            return
        order = row.argsort(stable=True)
        row, column, value = row[order], column[order], value[order]
        counts = row.bincount(minlength=len(self.value))
        place = torch.arange(len(row), device=row.device) - (counts.cumsum(0) - counts)[row]
        padded = self.value.new_full((len(self.value), int(counts.max())), -torch.inf)
        ids = torch.zeros_like(padded, dtype=torch.long)
        padded[row, place] = value
        ids[row, place] = column
        self._take(padded, ids)

    def _take(self, value: Tensor, column: Tensor) -> None:
        if self.value is not None:
            assert self.column is not None
            value = torch.cat([self.value, value], 1)
            column = torch.cat([self.column, column], 1)
        self.value, keep = value.topk(min(self.k, value.shape[1]))
        self.column = column.gather(1, keep)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


def _blocks(left: Tensor, right: Tensor, progress: str | None) -> Iterator[tuple[int, int, Tensor]]:
    """``left @ right`` in blocks, all in one reused buffer: (first row, first column, block)."""
    rows, columns = block_shape(left.device)
    wide = _wide(left.dtype)
    buffer = torch.empty(
        min(rows, len(left)) * min(columns, right.shape[1]), dtype=left.dtype, device=left.device
    )
    starts = range(0, len(left), rows)
    for start in tqdm(starts, desc=progress, unit="stripe", disable=progress is None):
        stripe = left[start : start + rows]
        for first in range(0, right.shape[1], columns):
            part = right[:, first : first + columns]
            block = buffer[: len(stripe) * part.shape[1]].view(len(stripe), part.shape[1])
            torch.mm(stripe, part, out=block)
            yield start, first, block.to(wide)
