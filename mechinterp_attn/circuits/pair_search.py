"""A search over pairs of heads, cut into units of work, and what it costs."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from mechinterp_attn.circuits.blocks import Job, RankBy, Unit
from mechinterp_attn.circuits.ends import norms_note, seen_width
from mechinterp_attn.circuits.groups import Composition, HeadGroup, Select, groups_of
from mechinterp_attn.circuits.lifted import lifted_cost
from mechinterp_attn.circuits.streaming import Precision, block_shape
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, Plan, make_plan
from mechinterp_attn.model.attention_only import AttentionOnlyModel

PAIR = 20 * CELL  # of a pair in the table, and of what the table is made from
SPARE = 32  # pairs searched beyond top_k, so that rounding cannot push one out
LEAST = 256  # vectors of a block, however little memory there is
SMALL = 1e9  # FLOPs below which float64 is used outright
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "tf32": 2e-3, "bfloat16": 2e-2}


def pair_search(
    model: AttentionOnlyModel,
    kind: Composition,
    src: Select,
    dst: Select,
    top_k: int | None,
    rank_by: RankBy,
    max_bytes: int,
    precision: Precision,
) -> tuple[Job, list[Unit], int]:
    """The work of a search, cut into units, and its number of pairs.

    Raises:
        MechInterpError: arguments that name no search.
    """
    if kind not in ("Q", "K", "V"):
        raise MechInterpError(f"kind={kind!r}; expected 'Q', 'K' or 'V'")
    if rank_by not in ("score", "z") or precision not in TOLERANCE:
        raise MechInterpError(
            f"rank_by={rank_by!r}, precision={precision!r}; expected 'score' or 'z', and 'float32', 'tf32' "
            "or 'bfloat16'"
        )
    sources = groups_of(model, src)
    readers = sources if src is None and dst is None else groups_of(model, dst)
    job = search_job(model, kind, sources, readers, top_k or 0, rank_by, max_bytes, precision)
    units = job.units()
    n_pairs = sum(job.pairs(unit) for unit in units)
    if not n_pairs:
        raise MechInterpError("none of the dst heads reads what a src head writes; src must come earlier")
    if top_k is not None and not 1 <= top_k <= n_pairs:
        raise MechInterpError(f"top_k={top_k} is out of range; expected 1 to {n_pairs} (all pairs)")
    return job, units, n_pairs


def search_job(
    model: AttentionOnlyModel,
    kind: Composition,
    sources: Sequence[HeadGroup],
    readers: Sequence[HeadGroup],
    top_k: int,
    rank_by: RankBy,
    max_bytes: int,
    precision: Precision,
) -> Job:
    """The arithmetic, the blocks and the memory of a search between given groups of heads."""
    d, device = model.spec.d_model, model.W_E.device
    vectors = [sum(len(g) * g.rank for g in side) for side in (sources, readers)]
    small = 2 * vectors[0] * vectors[1] * d < SMALL and precision == "float32"
    exact = model.W_E.dtype == torch.float64 or small
    dtype = torch.float64 if exact else torch.bfloat16 if precision == "bfloat16" else torch.float32
    size = torch.finfo(dtype).bits // 8
    block = _block(device, size, max_bytes)
    free = max_bytes - 3 * block[0] * block[1] * size
    # A quarter of what is left for the readers of a unit (float64 while they are made), half to keep
    # the writing side; at least one reader.
    widest = max(g.reading_rank(kind) for g in readers)
    vectors_per_unit = max(widest, min(16384, free // 4 // (d * (8 + size))))
    return Job(
        sources=tuple(sources),
        readers=tuple(readers),
        kind=kind,
        d_model=d,
        width=seen_width(model),
        norms=norms_note(model),
        dtype=dtype,
        precision=precision,
        block=block,
        vectors_per_unit=vectors_per_unit,
        cache_bytes=max(0, free // 2),
        top_k=top_k + SPARE,
        rank_by=rank_by,
        device=device,
    )


def _block(device: torch.device, size: int, max_bytes: int) -> tuple[int, int]:
    """Vectors of either side that are multiplied at once: the larger, the faster, up to a point."""
    rows, columns = block_shape(device)
    while rows > LEAST and 3 * rows * columns * size > max_bytes // 2:
        rows, columns = max(LEAST, rows // 2), max(LEAST, columns // 2)
    return rows, columns


def used_dtype(job: Job) -> str:
    """The precision of the products, as receipts name it."""
    return "float64" if job.dtype == torch.float64 else job.precision


def _bytes(job: Job, units: list[Unit]) -> int:
    """Memory that a run takes beyond the model's and beside its result."""
    size = torch.finfo(job.dtype).bits // 8
    written = sum(len(g) * g.rank for g in job.sources) * job.d_model * size
    widest = max((u.last - u.first) * job.readers[u.group].reading_rank(job.kind) for u in units)
    sides = (
        sum(len(g) * g.rank for g in job.sources),
        sum(len(g) * g.reading_rank(job.kind) for g in job.readers),
    )
    blocks = 3 * size * math.prod(min(n, most) for n, most in zip(sides, job.block, strict=True))
    return min(written, job.cache_bytes) + widest * job.d_model * (8 + size) + blocks


def least_bytes(job: Job, n_pairs: int, *, dense: bool) -> int:
    """The smallest ``max_bytes`` that a search can do with."""
    size = torch.finfo(job.dtype).bits // 8
    ranks = [g.rank for g in job.sources] + [g.reading_rank(job.kind) for g in job.readers]
    least = max(LEAST, *ranks) * job.d_model * (8 + size) * 2 + 6 * LEAST**2 * size
    return least + (result_bytes(job, n_pairs) if dense else 0)


def result_bytes(job: Job, n_pairs: int) -> int:
    """All scores, twice while they are made, and the table of the pairs."""
    return 2 * CELL * sum(map(len, job.sources)) * sum(map(len, job.readers)) + PAIR * n_pairs


def search_cost(
    job: Job, units: list[Unit], n_pairs: int, *, dense: bool = False, lifted: bool = False
) -> Plan:
    """What the units of a search cost, their table included.

    Args:
        dense: every pair is listed, not the strongest alone.
        lifted: by whole matrices (``lifted.py``).
    """
    listed = n_pairs if dense else job.top_k
    result = CELL * (8 * listed + (sum(map(len, job.sources)) * sum(map(len, job.readers)) if dense else 0))
    flops, needed = sum(job.flops(unit) for unit in units), _bytes(job, units)
    if lifted:
        flops, needed = lifted_cost(job)
    needed += result_bytes(job, n_pairs) if dense else PAIR * listed
    return make_plan(
        what=f"{job.kind}-composition of {n_pairs:,} pairs",
        flops=flops,
        bytes=needed,
        result=result,
        chunks=len(units),
        device=job.device,
        shape=(job.block[0], job.d_model, job.block[1]),
        exact=job.dtype == torch.float64,
    )
