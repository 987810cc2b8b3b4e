"""Composition scores of many heads in blocks: the multiplications, and what is kept of them.

A unit of work is a range of reading heads of one group against every earlier writing head. Units
are independent, so they can be interrupted between, run on several machines, and merged exactly.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from torch import Tensor

from mechinterp_attn.circuits.groups import Composition, HeadGroup
from mechinterp_attn.circuits.null import shape_null
from mechinterp_attn.circuits.streaming import Best, Precision, block_shape, matmul_precision

RankBy = Literal["score", "z"]
BINS = 64
SAMPLE = 16  # the histogram between rank-1 heads looks at every 16th writing head


@dataclass(frozen=True)
class Unit:
    """Reading heads ``first .. last - 1`` of the ``group``-th reading group."""

    group: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that does not change between the units of one call.

    Attributes:
        sources, readers: groups of writing and of reading heads.
        source_starts, reader_starts: number of heads before each group.
        heads_per_unit: at most so many vectors of a reading group are held at a time.
        cache_bytes: how much of the writing side may be held between units.
    """

    sources: tuple[HeadGroup, ...]
    readers: tuple[HeadGroup, ...]
    kind: Composition
    d_model: int
    dtype: torch.dtype
    precision: Precision
    vectors_per_unit: int
    cache_bytes: int
    top_k: int
    rank_by: RankBy
    device: torch.device
    held: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)

    @cached_property
    def source_starts(self) -> list[int]:
        return _starts(self.sources)

    @cached_property
    def reader_starts(self) -> list[int]:
        return _starts(self.readers)

    def units(self) -> list[Unit]:
        """In order; reading groups that no source comes before have none."""
        found = []
        for g, group in enumerate(self.readers):
            if self.earlier(group):
                step = max(1, self.vectors_per_unit // group.rank)
                found += [Unit(g, a, min(a + step, len(group))) for a in range(0, len(group), step)]
        return found

    def earlier(self, reader: HeadGroup) -> list[int]:
        """The source groups that a group reads."""
        return [i for i, source in enumerate(self.sources) if source.writes_at < reader.reads_at]

    def pairs(self, unit: Unit) -> int:
        reader = self.readers[unit.group]
        return (unit.last - unit.first) * sum(len(self.sources[i]) for i in self.earlier(reader))

    def flops(self, unit: Unit) -> int:
        """Multiplications and additions of the products a unit must make."""
        reader = self.readers[unit.group]
        rows = sum(len(self.sources[i]) * self.sources[i].rank for i in self.earlier(reader))
        return 2 * rows * (unit.last - unit.first) * reader.rank * self.d_model

    def null(self, source: int, reader: int) -> tuple[float, float]:
        return shape_null(self.d_model, self.sources[source].rank, self.readers[reader].rank)

    def edges(self) -> Tensor:
        """Edges of the histogram: 64 bins up to 8 / sqrt(d_model), the last one up to 1."""
        edges = torch.linspace(0, 8 / self.d_model**0.5, BINS + 1, dtype=torch.float64)
        edges[-1] = max(1.0, float(edges[-1]))
        return edges

    def blocks(self, unit: Unit) -> Iterator[tuple[int, int, int, Tensor]]:
        """Squared scores of a unit in blocks: (source group, its first head, first reader, block)."""
        reader = self.readers[unit.group]
        rows, columns = block_shape(self.device)
        part = slice(unit.first, unit.last)
        side = reader.reads(self.kind, part, self.dtype).transpose(0, 1).flatten(1).contiguous()
        r2 = reader.rank
        width = max(1, columns // r2) * r2
        buffer: Tensor | None = None
        with matmul_precision(self.precision):
            for i in self.earlier(reader):
                r1 = self.sources[i].rank
                high = max(1, rows // r1)
                for first, stripe in self._stripes(i, high):
                    for a in range(0, side.shape[1], width):
                        columns_of = side[:, a : a + width]
                        shape = (len(stripe), columns_of.shape[1])
                        if buffer is None or buffer.numel() < shape[0] * shape[1]:
                            buffer = stripe.new_empty(shape[0] * shape[1])
                        block = buffer[: shape[0] * shape[1]].view(shape)
                        torch.mm(stripe, columns_of, out=block)
                        yield i, first, unit.first + a // r2, _squared(block, r1, r2)

    def _stripes(self, source: int, heads: int) -> Iterator[tuple[int, Tensor]]:
        """The writing side of a group, ``[heads * rank, d_model]`` at a time."""
        group = self.sources[source]
        size = group.rank * self.d_model * torch.finfo(self.dtype).bits // 8
        for first in range(0, len(group), heads):
            stripe = self.held.get((source, first))
            if stripe is None:
                part = slice(first, min(first + heads, len(group)))
                stripe = group.writes(part, self.dtype).flatten(0, 1)
                held = sum(t.numel() * t.element_size() for t in self.held.values())
                if held + len(stripe) // group.rank * size <= self.cache_bytes:
                    self.held[source, first] = stripe
            yield first, stripe


def _squared(block: Tensor, r1: int, r2: int) -> Tensor:
    """Products of single columns to squared norms per pair of heads, in place where it can be."""
    block = block if block.dtype != torch.bfloat16 else block.float()
    block = block.square_()
    if r1 == r2 == 1:
        return block
    return block.view(len(block) // r1, r1, -1, r2).sum((1, 3))


class Dense:
    """All scores, ``[source, reader]``; NaN where the reader does not read the source."""

    def __init__(self, job: Job):
        size = (sum(map(len, job.sources)), sum(map(len, job.readers)))
        self.scores = torch.full(size, torch.nan, dtype=job.dtype, device=job.device)

    def take(self, job: Job, unit: Unit, source: int, row: int, column: int, block: Tensor) -> None:
        i, j = job.source_starts[source] + row, job.reader_starts[unit.group] + column
        self.scores[i : i + block.shape[0], j : j + block.shape[1]] = block.sqrt()


class Top:
    """The best pairs, and a histogram of scores for every pair of groups."""

    def __init__(self, job: Job):
        self.best = Best(
            job.top_k, job.device, torch.float64 if job.dtype == torch.float64 else torch.float32
        )
        self.histogram = torch.zeros(len(job.sources), len(job.readers), BINS, dtype=torch.int64)
        self.per_score = 1 / float(job.edges()[1])

    def take(self, job: Job, unit: Unit, source: int, row: int, column: int, block: Tensor) -> None:
        alone = job.sources[source].rank == job.readers[unit.group].rank == 1
        sample = block[(-row) % SAMPLE :: SAMPLE] if alone else block
        if sample.numel():
            bins = sample.sqrt().mul_(self.per_score).clamp_(max=BINS - 1).flatten().int()
            self.histogram[source, unit.group] += bins.bincount(minlength=BINS).cpu()
        if job.rank_by == "z":
            mean, spread = job.null(source, unit.group)
            block = block.sqrt_().sub_(mean).div_(spread or 1.0)
        self.best.offer(block, job.source_starts[source] + row, job.reader_starts[unit.group] + column)

    def merge(self, other: Top) -> None:
        self.best.merge(other.best.entries)
        self.histogram += other.histogram


def run_unit(job: Job, unit: Unit, sink: Dense | Top) -> None:
    """Multiply a unit out and give its blocks to a sink."""
    for source, row, column, block in job.blocks(unit):
        sink.take(job, unit, source, row, column, block)


def _starts(groups: Sequence[HeadGroup]) -> list[int]:
    starts, total = [], 0
    for group in groups:
        starts.append(total)
        total += len(group)
    return starts
