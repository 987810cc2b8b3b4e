"""Composition scores of many heads in blocks: the multiplications, and what is kept of them.

A unit of work is a range of reading heads of one group against every earlier writing head. Units
are independent, so they can be interrupted between, run on several machines, and merged exactly.
Writing heads of one inner dimension stand together, whatever their bank: blocks are then as large as
they can be, and a multiplication is fastest when it is large.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.circuits.chance import Chance
from mechinterp_attn.circuits.groups import Composition, HeadGroup
from mechinterp_attn.circuits.null import mean_and_spread
from mechinterp_attn.circuits.streaming import Best, Precision, matmul_precision, wide

RankBy = Literal["score", "z"]
BINS = 64
SAMPLED = 64  # writing heads of a bank that the histogram between rank-1 heads looks at, about


@dataclass(frozen=True)
class Unit:
    """Reading heads ``first .. last - 1`` of the ``group``-th reading group."""

    group: int
    first: int
    last: int


@dataclass(frozen=True, eq=False)
class Block:
    """Squared scores of some writing heads with some reading heads.

    Attributes:
        rank: inner dimension of the writing heads.
        first: the first one's place among those.
        reader: the reading group.
        column: the first reading head's place in it.
    """

    rank: int
    first: int
    reader: int
    column: int
    squares: Float[Tensor, "source reader"]


@dataclass(frozen=True, eq=False)
class Job:
    """Everything that does not change between the units of one call.

    Attributes:
        sources, readers: groups of writing and of reading heads, in order.
        width: how many dimensions of the residual stream its readers see (``ends.seen_width``).
        norms: what is made of the model's norms, for the receipt.
        block: how many vectors of either side are multiplied at once.
        vectors_per_unit: at most so many vectors of a reading group are held at a time.
        cache_bytes: how much of the writing side may be held between units.
        held: that, by inner dimension and first head.
        scratch: the block that products are made in.
            Fresh memory is slow to touch for the first time: both last from unit to unit.
    """

    sources: tuple[HeadGroup, ...]
    readers: tuple[HeadGroup, ...]
    kind: Composition
    d_model: int
    width: int
    norms: str
    dtype: torch.dtype
    precision: Precision
    block: tuple[int, int]
    vectors_per_unit: int
    cache_bytes: int
    top_k: int
    rank_by: RankBy
    device: torch.device
    held: dict[tuple[int, int], Tensor] = field(default_factory=dict, repr=False)
    scratch: list[Tensor] = field(default_factory=list, repr=False)

    @cached_property
    def source_starts(self) -> list[int]:
        """The number of heads before each source group."""
        return _starts(self.sources)

    @cached_property
    def reader_starts(self) -> list[int]:
        return _starts(self.readers)

    @cached_property
    def by_rank(self) -> dict[int, list[int]]:
        """The source groups of each inner dimension, in order."""
        found: dict[int, list[int]] = {}
        for i, source in enumerate(self.sources):
            found.setdefault(source.rank, []).append(i)
        return found

    @cached_property
    def places(self) -> dict[int, Int[Tensor, " source"]]:
        """The writing heads of each inner dimension, by their index among all of them."""
        return {
            rank: torch.cat(
                [
                    torch.arange(len(self.sources[i]), device=self.device) + self.source_starts[i]
                    for i in groups
                ]
            )
            for rank, groups in self.by_rank.items()
        }

    def units(self) -> list[Unit]:
        """In order; reading groups that no source comes before have none."""
        found = []
        for g, group in enumerate(self.readers):
            if self.earlier(group):
                step = max(1, self.vectors_per_unit // group.reading_rank(self.kind))
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
        return 2 * rows * (unit.last - unit.first) * reader.reading_rank(self.kind) * self.d_model

    def null(self, block: Block) -> tuple[Tensor, Tensor]:
        """Mean and spread of a block's scores with the same heads turned at random: one number where all
        heads of a side have one participation, as all neurons have.
        """
        n, m = block.squares.shape
        p1 = torch.cat([self.spectra[0][i] for i in self.by_rank[block.rank]])[
            block.first : block.first + n
        ]
        p2 = self.spectra[1][block.reader][block.column : block.column + m]
        # Heads that read or write nothing have a score of 0, below any mean.
        p1, p2 = (p.nan_to_num(1.0) for p in (p1, p2))
        p1, p2 = (p[:1] if bool((p == p[0]).all()) else p for p in (p1, p2))
        mean, spread = mean_and_spread(p1[:, None], p2[None], self.width)
        return mean.to(block.squares.dtype), spread.clamp_min(1e-30).to(block.squares.dtype)

    @cached_property
    def spectra(self) -> tuple[list[Tensor], list[Tensor]]:
        """The participations (``null.py``) of the sources' and of the readers' heads, by group; NaN where
        heads read or write nothing.
        """
        dtype, nothing = wide(self.dtype), torch.full((1,), torch.nan, dtype=torch.float64)
        return (
            [group.participation("V", dtype=dtype) for group in self.sources],
            [
                group.participation(self.kind, dtype=dtype)
                if group.reads_stream(self.kind)
                else nothing.to(self.device).expand(len(group))
                for group in self.readers
            ],
        )

    @cached_property
    def chance(self) -> Chance:
        """How large a z is by chance, of all pairs."""
        pairs = [
            (self.spectra[0][i], self.spectra[1][j])
            for j, reader in enumerate(self.readers)
            for i in self.earlier(reader)
        ]
        return Chance(pairs, self.width)

    def edges(self) -> Tensor:
        """Edges of the histogram: 64 bins up to 8 / sqrt(d_model), the last one up to 1."""
        edges = torch.linspace(0, 8 / self.width**0.5, BINS + 1, dtype=torch.float64)
        edges[-1] = max(1.0, float(edges[-1]))
        return edges

    def blocks(self, unit: Unit) -> Iterator[Block]:
        """Squared scores of a unit, block by block, all in one buffer: use one before the next."""
        reader = self.readers[unit.group]
        rows, columns = self.block
        part = slice(unit.first, unit.last)
        side = reader.reads(self.kind, part, self.dtype).transpose(0, 1).flatten(1).contiguous()
        r2 = reader.reading_rank(self.kind)
        width = max(1, columns // r2) * r2
        earlier = set(self.earlier(reader))
        with matmul_precision(self.precision):
            for r1, groups in self.by_rank.items():
                heads = sum(len(self.sources[i]) for i in groups if i in earlier)
                for first, stripe in self._stripes(r1, heads, max(1, rows // r1)):
                    for a in range(0, side.shape[1], width):
                        columns_of = side[:, a : a + width]
                        shape = (len(stripe), columns_of.shape[1])
                        product = self._block(shape)
                        torch.mm(stripe, columns_of, out=product)
                        squares = _squared(product, r1, r2)
                        yield Block(r1, first, unit.group, unit.first + a // r2, squares)

    def release(self) -> None:
        """Give back what was held between units."""
        self.held.clear()
        self.scratch.clear()

    def _block(self, shape: tuple[int, int]) -> Tensor:
        """Memory for a block, the same every time."""
        size = shape[0] * shape[1]
        if not self.scratch or len(self.scratch[0]) < size:
            self.scratch[:] = [torch.empty(size, dtype=self.dtype, device=self.device)]
        return self.scratch[0][:size].view(shape)

    def segments(self, block: Block) -> Iterator[tuple[int, int, slice]]:
        """The groups a block's writing heads belong to: (source, its head in the first row, rows)."""
        yield from self._overlaps(block.rank, block.first, block.first + len(block.squares))

    def _overlaps(self, rank: int, first: int, last: int) -> Iterator[tuple[int, int, slice]]:
        start = 0
        for i in self.by_rank[rank]:
            a, b = max(first, start), min(last, start + len(self.sources[i]))
            if a < b:
                yield i, a - start, slice(a - first, b - first)
            start += len(self.sources[i])

    def _stripes(self, rank: int, heads: int, step: int) -> Iterator[tuple[int, Tensor]]:
        """The writing side of the first ``heads`` of a rank, ``[step * rank, d_model]`` at a time."""
        for first in range(0, heads, step):
            stripe = self.held.get((rank, first))
            if stripe is None:
                parts = [
                    self.sources[i].writes(slice(at, at + rows.stop - rows.start), self.dtype).flatten(0, 1)
                    for i, at, rows in self._overlaps(rank, first, first + step)
                ]
                stripe = torch.cat(parts) if len(parts) > 1 else parts[0]
                held = sum(t.numel() * t.element_size() for t in self.held.values())
                if held + stripe.numel() * stripe.element_size() <= self.cache_bytes:
                    self.held[rank, first] = stripe
            yield first, stripe[: (heads - first) * rank]


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
        self.scores = torch.full(size, torch.nan, dtype=wide(job.dtype), device=job.device)

    def take(self, job: Job, block: Block) -> None:
        rows = job.places[block.rank][block.first : block.first + len(block.squares)]
        j = job.reader_starts[block.reader] + block.column
        self.scores[rows, j : j + block.squares.shape[1]] = block.squares.sqrt()


class Top:
    """The best pairs, and a histogram of scores for every pair of groups."""

    def __init__(self, job: Job):
        self.best = Best(job.top_k, job.device, wide(job.dtype))
        self.histogram = torch.zeros(len(job.sources), len(job.readers), BINS, dtype=torch.int64)
        self.per_score = 1 / float(job.edges()[1])

    def take(self, job: Job, block: Block) -> None:
        squares, reader = block.squares, job.readers[block.reader]
        alone = block.rank == reader.reading_rank(job.kind) == 1
        for source, at, rows in job.segments(block):
            step = max(1, len(job.sources[source]) // SAMPLED) if alone else 1
            sample = squares[rows][(-at) % step :: step]  # the same heads wherever blocks begin
            if sample.numel():
                bins = sample.sqrt().mul_(self.per_score).clamp_(max=BINS - 1).flatten().int()
                self.histogram[source, block.reader] += bins.bincount(minlength=BINS).cpu()
        if job.rank_by == "z":
            mean, spread = job.null(block)
            squares = squares.sqrt_().sub_(mean).div_(spread)
        first = job.reader_starts[block.reader] + block.column
        columns = torch.arange(first, first + squares.shape[1], device=job.device)
        places = job.places[block.rank][block.first : block.first + len(squares)]
        self.best.offer(squares, places, columns)

    def merge(self, other: Top) -> None:
        self.best.merge(other.best.entries)
        self.histogram += other.histogram


def run_unit(job: Job, unit: Unit, sink: Dense | Top) -> None:
    """Multiply a unit out and give its blocks to a sink."""
    for block in job.blocks(unit):
        sink.take(job, block)


def _starts(groups: Sequence[HeadGroup]) -> list[int]:
    starts, total = [], 0
    for group in groups:
        starts.append(total)
        total += len(group)
    return starts
