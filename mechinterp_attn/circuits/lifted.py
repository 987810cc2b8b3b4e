"""Composition of heads of large inner dimension, each head taken as one symmetric matrix.

``|W R|^2`` is the inner product of ``W^T W`` with ``R R^T``: d_model^2 / 2 multiplications a pair of heads
instead of ``d_model r1 r2``, five times fewer in GPT-2 small, and the symmetric matrices are made once a
head. They are made in strips of rows, so that few numbers are held and those stay in cache.

A square that is rounded leaves half of its digits to a small score, so small ones are made again from
the product ``W R`` itself.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.blocks import Job, Unit
from mechinterp_attn.circuits.groups import HeadGroup

STRIP_NUMBERS = 2**22  # of either side that are held at once, about
UNSURE = 1e-4  # a squared score whose float32 rounding (some 1e-9) would show in the score
AT_ONCE = 64  # pairs of heads multiplied out together


def lifts(job: Job, units: list[Unit], max_bytes: int) -> bool:
    """Whether all pairs of a job take less work this way, and the memory allows it. Only in float32:
    float64 is for small models and for checks, where the products themselves are taken.
    """
    flops, needed = lifted_cost(job)
    plain = job.dtype == torch.float32 and job.precision == "float32"
    return plain and flops < sum(job.flops(unit) for unit in units) and needed <= max_bytes


def lifted_cost(job: Job) -> tuple[int, int]:
    """FLOPs and bytes of ``lifted_scores``, the scores themselves left out."""
    sources, readers = _taking_part(job)
    heads = [sum(map(len, side)) for side in (sources, readers)]
    vectors = sum(len(g) * g.rank for g in sources)
    vectors += sum(len(g) * g.reading_rank(job.kind) for g in readers)
    d = job.d_model
    strip = max(STRIP_NUMBERS, max(heads) * d)
    return d * d * (vectors + heads[0] * heads[1]), 4 * (vectors * d + 2 * strip)


def lifted_scores(job: Job) -> Float[Tensor, "source reader"]:
    """All scores; NaN where the reader does not read the source."""
    sources, readers = _taking_part(job)
    writes = [group.squared(None, job.dtype) for group in sources]
    reads = [group.squared(job.kind, job.dtype) for group in readers]
    n, m = (sum(map(len, side)) for side in (sources, readers))
    squares = torch.zeros(n, m, dtype=job.dtype, device=job.device)
    rows = max(1, STRIP_NUMBERS // (max(n, m) * job.d_model))
    sides = [squares.new_empty(heads * rows * job.d_model) for heads in (n, m)]
    for a in range(0, job.d_model, rows):
        b = min(a + rows, job.d_model)
        left, right = (_strip(x, a, b, buffer) for x, buffer in zip((writes, reads), sides, strict=True))
        right[:, :, : b - a] /= 2  # what stands right of the diagonal block stands below it too
        squares.addmm_(left.flatten(1), right.flatten(1).T, alpha=2)
    steps = [
        torch.tensor([getattr(g, at) for g in side for _ in range(len(g))])
        for side, at in ((job.sources, "writes_at"), (job.readers, "reads_at"))
    ]
    reaches = (steps[0][:, None] < steps[1]).to(job.device)
    made = reaches[reaches.any(1)][:, reaches.any(0)]
    _again(squares, made & (squares < UNSURE), job, sources, readers)
    scores = squares.new_full(reaches.shape, torch.nan)
    scores[reaches] = squares[made].clamp_min_(0).sqrt_()
    return scores


def _taking_part(job: Job) -> tuple[list[HeadGroup], list[HeadGroup]]:
    """The groups that some reader reads, and those that read some: the last layer's heads are in none
    of the first kind, the first layer's in none of the second.
    """
    earlier = [job.earlier(reader) for reader in job.readers]
    return (
        [job.sources[i] for i in sorted(set().union(*earlier))],
        [reader for reader, some in zip(job.readers, earlier, strict=True) if some],
    )


def _strip(
    side: list[tuple[Tensor, Tensor]], a: int, b: int, buffer: Tensor
) -> Float[Tensor, "head row column"]:
    """Rows a to b of every head's symmetric matrix, from the diagonal on."""
    counts = [len(X) for X, _ in side]
    shape = (sum(counts), b - a, side[0][0].shape[1] - a)
    out = buffer[: shape[0] * shape[1] * shape[2]].view(shape)
    for part, (X, M) in zip(out.split(counts), side, strict=True):
        torch.bmm((M @ X[:, a:b].mT).mT, X[:, a:].mT, out=part)
    return out


def _again(
    squares: Tensor, small: Tensor, job: Job, sources: list[HeadGroup], readers: list[HeadGroup]
) -> None:
    """Some squares from the products themselves, in place."""
    reads: dict[int, Tensor] = {}
    first = 0
    for source in sources:
        rows = slice(first, first := first + len(source))
        if not bool(small[rows].any()):
            continue
        W = source.writes(dtype=job.dtype)
        then = 0
        for k, reader in enumerate(readers):
            columns = slice(then, then := then + len(reader))
            row, column = small[rows, columns].nonzero().T
            if not len(row):
                continue
            if k not in reads:
                reads[k] = reader.reads(job.kind, dtype=job.dtype)
            for i, j in zip(row.split(AT_ONCE), column.split(AT_ONCE), strict=True):
                squares[rows.start + i, columns.start + j] = (W[i] @ reads[k][j]).square_().sum((1, 2))
