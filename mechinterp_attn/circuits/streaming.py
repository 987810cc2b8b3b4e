"""The largest entries of a product ``left @ right`` that is too large to hold.

The product is made block by block in one piece of memory, and a block is looked at once: its rows' maxima
(or those of groups of 32 entries) are compared with the smallest value still worth keeping, and only what
beats it is opened. Rows and columns are taken in the order of their norms, largest first: the threshold
rises at once, and where ``|row| |column|`` cannot reach it (Cauchy-Schwarz) nothing is multiplied any more.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.plan import CELL, TABLE, Plan, make_plan
from mechinterp_attn.core.progress import Progress

Precision = Literal["float32", "tf32", "bfloat16"]
GROUP = 32  # entries whose maximum is compared at once
SEED = 128  # rows that are sorted for a first threshold
FIRST = 4  # how many blocks wide the first one of a row is: its best entries keep most others out
# What rounding may add to a product, as a share of |row| |column|.
ROUNDING = {torch.float64: 1e-12, torch.float32: 2e-3, torch.bfloat16: 2e-2}  # float32: TF32 too


class Entries(NamedTuple):
    """Entries of a matrix: ``value[i] = M[row[i], column[i]]``, largest first."""

    row: Int[Tensor, " entry"]
    column: Int[Tensor, " entry"]
    value: Float[Tensor, " entry"]


def block_shape(device: torch.device) -> tuple[int, int]:
    """Rows and columns of a block: 16 MiB of float32 on a CPU, or what a GPU's free memory allows.

    On a CPU larger blocks gain nothing: what reads a block after the product would wait for memory.
    On a GPU a sixteenth of the free memory, at most 16,384 x 16,384 float32 numbers (1 GiB): wide
    enough that the multiplication, not the launch of kernels, takes the time.
    """
    if device.type != "cuda":
        return 2048, 2048
    free, _ = torch.cuda.mem_get_info(device)
    side = int((free / 16 / 4) ** 0.5) // 256 * 256
    side = max(512, min(side, 16384))
    return side, side


def plan_product(
    what: str,
    shape: tuple[int, int, int],
    device: torch.device,
    *,
    times: int = 1,
    each_row: bool = False,
    exact: bool = False,
    listed: int = 0,
) -> Plan:
    """What it costs to look through ``[n, k] @ [k, m]`` for ``(n, k, m) = shape``, some times over.

    Args:
        each_row: for the best of every row, not of the whole.
        listed: how many entries end up in a table.
    """
    n, k, m = shape
    rows, columns = (min(size, most) for size, most in zip((n, m), block_shape(device), strict=True))
    block = rows * min(m, FIRST * columns if each_row else columns)
    result = TABLE * CELL * listed
    return make_plan(
        what=what,
        flops=2 * n * k * m * times,
        # Both factors, once more in order of their norms, and once more while that is made; the entries
        # and their table, and once more while that is made.
        bytes=(8 if exact else 4) * (3 * (n + m) * k + block) + 3 * result,
        result=result,
        chunks=-(-n // rows) * -(-m // columns) * times,
        device=device,
        shape=(rows, k, columns),
        exact=exact,
    )


@contextmanager
def matmul_precision(precision: Precision) -> Iterator[None]:
    """TF32 only where it was asked for, whatever the caller's global setting; restored afterwards.

    By backend where torch can (2.9), since it refuses to read its global setting where a caller has set a
    backend's own.
    """
    torch_backends: Any = torch.backends
    if not hasattr(torch_backends.cuda.matmul, "fp32_precision"):
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high" if precision == "tf32" else "highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(before)
        return
    backends = torch_backends.cuda.matmul, torch_backends.mkldnn.matmul
    own = [backend.fp32_precision for backend in backends]
    for backend in backends:
        backend.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    try:
        yield
    finally:
        for backend, value in zip(backends, own, strict=True):
            backend.fp32_precision = value


def wide(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which products of a dtype are compared."""
    return torch.float32 if dtype in (torch.bfloat16, torch.float16) else dtype


class Best:
    """The ``k`` largest of a stream of values, each with its row and column."""

    def __init__(self, k: int, device: torch.device, dtype: torch.dtype):
        self.k = k
        empty = torch.empty(0, dtype=torch.long, device=device)
        self.entries = Entries(empty, empty, torch.empty(0, dtype=dtype, device=device))
        self.threshold = -torch.inf

    def offer(
        self,
        block: Float[Tensor, "row column"],
        rows: Int[Tensor, " row"],
        columns: Int[Tensor, " column"],
    ) -> None:
        """Look through a block whose rows and columns have these numbers in the whole matrix."""
        if self.threshold == -torch.inf and len(block) > SEED:
            # Sorting takes four times the memory of what is sorted: a few rows give a threshold.
            self.offer(block[:SEED], rows[:SEED], columns)
            self.offer(block[SEED:], rows[SEED:], columns)
            return
        if self.threshold == -torch.inf:
            value, flat = block.flatten().topk(min(self.k, block.numel()))
            row, column = flat // block.shape[1], flat % block.shape[1]
        else:
            row, column, value = above(block, self.threshold)
        if len(value):
            self.merge(Entries(rows[row], columns[column], value))

    def merge(self, found: Entries) -> None:
        joined = Entries(*(torch.cat(pair) for pair in zip(self.entries, found, strict=True)))
        keep = joined.value.topk(min(self.k, len(joined.value))).indices
        self.entries = Entries(*(part[keep] for part in joined))
        if len(keep) == self.k:
            self.threshold = float(self.entries.value[-1])


def above(block: Float[Tensor, "row column"], threshold: float) -> Entries:
    """All entries of a block above a threshold."""
    peaks = block.amax(1)
    if float(peaks.max()) <= threshold:  # as nearly always
        none = torch.empty(0, dtype=torch.long, device=block.device)
        return Entries(none, none, block.new_empty(0))
    row = (peaks > threshold).nonzero().flatten()
    some = block[row]
    hit, column = (some > threshold).nonzero().T
    return Entries(row[hit], column, some[hit, column])


def above_each(block: Float[Tensor, "row column"], threshold: Float[Tensor, "row 1"]) -> Entries:
    """All entries of a block that are at least their row's threshold, row by row."""
    groups = _grouped(block)
    if groups is None:
        row, column = (block >= threshold).nonzero().T
        return Entries(row, column, block[row, column])
    row, group = (groups.amax(1) >= threshold).nonzero().T
    members = groups[row, :, group]  # [hit, 32]
    hit, member = (members >= threshold[row]).nonzero().T
    return Entries(row[hit], member * groups.shape[2] + group[hit], members[hit, member])


def _grouped(block: Tensor) -> Tensor | None:
    """``[row, 32, group]``: a group is every (columns / 32)-th column; None where 32 does not divide."""
    rows, columns = block.shape
    return None if columns % GROUP else block.view(rows, GROUP, columns // GROUP)


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
    best = Best(k, left.device, wide(left.dtype))
    product = _Product(left, right, sign)
    rows, columns = block_shape(left.device)
    longest, reach = product.sizes[::rows].tolist(), product.reach[::columns].tolist()
    for size, a in zip(longest, product.stripes(rows, progress), strict=True):
        if size * reach[0] <= best.threshold:
            break  # no later row is longer
        for b in range(0, len(product.reach), columns):
            if size * reach[b // columns] <= best.threshold:
                break
            block = product.block(a, rows, b, columns)
            best.offer(block, product.rows[a : a + rows], product.columns[b : b + columns])
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
    product = _Product(left, right, sign)
    rows, columns = block_shape(left.device)
    value = left.new_empty(len(left), k, dtype=wide(left.dtype))
    column_ids = torch.empty(len(left), k, dtype=torch.long, device=left.device)
    for a in product.stripes(rows, progress):
        best = _RowBest(k)
        b, width = 0, FIRST * columns
        while b < len(product.reach) and not best.complete(product.sizes[a : a + rows], product.reach[b]):
            best.offer(product.block(a, rows, b, width), b)
            b, width = b + width, columns
        best.merge()
        assert best.value is not None
        assert best.column is not None
        value[product.rows[a : a + rows]] = best.value
        column_ids[product.rows[a : a + rows]] = product.columns[best.column]
    row = torch.arange(len(value), device=left.device)[:, None].expand_as(column_ids)
    return Entries(row.flatten(), column_ids.flatten(), value.flatten() * sign)


class _Product:
    """``left @ right`` with rows and columns in the order of their norms, made block by block in one
    reused buffer.

    Attributes:
        rows, columns: the numbers they had.
        sizes: norms of the rows.
        reach: norms of the columns, with what rounding may add.
    """

    def __init__(self, left: Tensor, right: Tensor, sign: int):
        kind = wide(left.dtype)
        self.sizes, self.rows = torch.linalg.vector_norm(left.to(kind), dim=1).sort(descending=True)
        reach, self.columns = torch.linalg.vector_norm(right.to(kind), dim=0).sort(descending=True)
        self.reach = reach * (1 + ROUNDING[left.dtype])
        self.left, self.right = left[self.rows] * sign, right[:, self.columns]
        self.kind = kind
        self.buffer: Tensor | None = None

    def stripes(self, rows: int, progress: str | None) -> Iterator[int]:
        starts = range(0, len(self.left), rows)
        return iter(Progress(starts, desc=progress or "", unit="stripe", show=progress is not None))

    def block(self, a: int, rows: int, b: int, columns: int) -> Tensor:
        stripe, part = self.left[a : a + rows], self.right[:, b : b + columns]
        n, m = len(stripe), part.shape[1]
        if self.buffer is None:
            self.buffer = stripe.new_empty(n * m)
        out = self.buffer[: n * m].view(n, m)
        return torch.mm(stripe, part, out=out).to(self.kind)


class _RowBest:
    """The ``k`` largest of every row of one stripe, column block after column block."""

    def __init__(self, k: int):
        self.k = k
        self.value: Tensor | None = None  # [row, <= k], largest first
        self.column: Tensor | None = None
        self.waiting: list[Entries] = []
        self.seen = self.merged = 0

    def complete(self, sizes: Tensor, reach: Tensor) -> bool:
        """Whether no column of this reach can enter any row's list."""
        if self.value is None or self.value.shape[1] < self.k:
            return False
        return bool((sizes * reach < self.value[:, -1]).all())

    def offer(self, block: Tensor, first_column: int) -> None:
        if self.value is None or self.value.shape[1] < self.k:
            self._begin(block, first_column)
        else:
            row, column, value = above_each(block, self.value[:, -1:])
            self.waiting.append(Entries(row, column + first_column, value))
            # Between two merges about k entries per row arrive each time the columns double.
            if self.seen >= 2 * self.merged:
                self.merge()
        self.seen += block.shape[1]
        self.merged = self.merged or self.seen

    def _begin(self, block: Tensor, first_column: int) -> None:
        """The first blocks: where there are enough groups, the k-th largest of their maxima bounds
        the k-th largest entry, and sorting those is much less work.
        """
        groups = _grouped(block)
        if self.value is None and groups is not None and groups.shape[2] >= self.k:
            limit = groups.amax(1).topk(self.k).values[:, -1:]
            self.value, self.column = block.new_empty(len(block), 0), self._none(block)
            row, column, value = above_each(block, limit)
            self.waiting.append(Entries(row, column, value))
            self.merge()
        else:
            value, column = block.topk(min(self.k, block.shape[1]))
            self._take(value, column + first_column)

    def _none(self, block: Tensor) -> Tensor:
        return torch.empty(len(block), 0, dtype=torch.long, device=block.device)

    def merge(self) -> None:
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
