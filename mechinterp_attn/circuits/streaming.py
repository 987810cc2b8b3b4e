"""The largest entries of a product ``left @ right`` that is too large to hold."""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

CHUNK_BYTES = 32 * 2**20  # of the product held at a time


class Entries(NamedTuple):
    """Entries of a matrix: ``value[i] = M[row[i], column[i]]``, largest first."""

    row: Int[Tensor, " entry"]
    column: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]


def top_entries(
    left: Float[Tensor, "row rank"], right: Float[Tensor, "rank column"], k: int, *, sign: int = 1
) -> Entries:
    """The ``k`` largest entries of ``left @ right`` (the smallest for ``sign=-1``)."""
    n_columns = right.shape[1]
    best = Entries(
        *(torch.empty(0, dtype=torch.long, device=left.device) for _ in range(2)), left.new_empty(0)
    )
    for start, block in _row_blocks(left, right, sign):
        value, flat = block.flatten().topk(min(k, block.numel()))
        row = torch.cat([best.row, start + flat // n_columns])
        column = torch.cat([best.column, flat % n_columns])
        value = torch.cat([best.value, value])
        keep = value.topk(min(k, len(value))).indices
        best = Entries(row[keep], column[keep], value[keep])
    return best._replace(value=best.value * sign)


def top_of_rows(
    left: Float[Tensor, "row rank"], right: Float[Tensor, "rank column"], k: int, *, sign: int = 1
) -> Entries:
    """The ``k`` largest entries of every row of ``left @ right``, row by row."""
    values, columns = [], []
    for _, block in _row_blocks(left, right, sign):
        value, column = block.topk(min(k, block.shape[1]))
        values.append(value * sign)
        columns.append(column)
    value, column = torch.cat(values), torch.cat(columns)
    row = torch.arange(len(value), device=left.device)[:, None].expand_as(column)
    return Entries(row.flatten(), column.flatten(), value.flatten())


def _row_blocks(left: Tensor, right: Tensor, sign: int):  # type: ignore[no-untyped-def]
    rows = max(1, CHUNK_BYTES // (right.shape[1] * right.element_size()))
    for start in range(0, len(left), rows):
        yield start, (sign * left[start : start + rows]) @ right
