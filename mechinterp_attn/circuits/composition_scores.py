"""Composition scores between any heads and any later ones (Elhage et al. 2021, "composition").

``|W_OV1 W_QK2| / (|W_OV1| |W_QK2|)`` for Q, ``W_QK2^T`` for K and ``W_OV2`` for V, Frobenius norms. A
neuron's key is the constant coordinate, which nothing writes: K-composition into a neuron is 0. Between two
neurons Q and V are the cosine of the earlier's output and the later's input direction.
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.blocks import SAMPLED, Dense, Job, RankBy, Top, Unit, run_unit
from mechinterp_attn.circuits.ends import norms_note, seen_width
from mechinterp_attn.circuits.groups import Composition, HeadGroup, Select, groups_of, refuse_non_finite
from mechinterp_attn.circuits.lifted import lifted_cost, lifted_scores, lifts
from mechinterp_attn.circuits.null import mean_and_spread
from mechinterp_attn.circuits.state import SearchState
from mechinterp_attn.circuits.streaming import Precision, block_shape
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, make_plan, plans
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_PAIRS = 2_000_000  # that are listed one by one without ``top_k``
PAIR = 20 * CELL  # of a pair in the table, and of what the table is made from
SPARE = 32  # pairs searched beyond top_k, so that rounding cannot push one out
LEAST = 256  # vectors of a block, however little memory there is
SMALL = 1e9  # FLOPs below which float64 is used outright
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "tf32": 2e-3, "bfloat16": 2e-2}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CompositionScores(Result):
    """Composition of heads with later heads.

    Attributes:
        kind: "Q", "K" or "V".
        frame: one row per pair: ``src, dst, kind`` ("Q", "K" or "V"), ``score`` in [0, 1], ``baseline``
            and ``spread`` (mean and standard deviation with these very heads, their singular values,
            turned against each other at random), ``z`` = (score - baseline) / spread, and
            ``by_chance``: how many of all the pairs that were compared would be expected to reach
            this z if all were turned at random (below 1: fewer than one). NaN where a head reads
            or writes nothing.
        scores: ``[source, reader]`` with NaN where a pair does not compose; None for a streamed search.
        sources, readers: labels along ``scores``; empty for a streamed search.
        histograms: of a streamed search: ``src`` and ``dst`` (banks), ``left, right`` (edges of a bin
            of scores) and ``share`` of the pairs; None for a dense one.
    """

    title: ClassVar[str] = "Composition scores"
    sort_by: ClassVar[str | None] = "score"
    kind: Composition
    scores: Float[Tensor, "source reader"] | None
    sources: tuple[str, ...] = field(repr=False)
    readers: tuple[str, ...] = field(repr=False)
    histograms: pd.DataFrame | None = field(repr=False)

    def plot(self, *, ranking: bool = False, k: int = 20) -> Figure:
        """A heatmap of the scores against the random baseline, or the ``k`` strongest pairs.

        Args:
            ranking: the strongest pairs as bars, not the heatmap.
            k: how many to show.
        """
        return draw(self, ranking=ranking, k=k)


def _plan(
    model: AttentionOnlyModel,
    kind: Composition,
    src: Select,
    dst: Select,
    top_k: int | None,
    rank_by: RankBy,
    max_bytes: int,
    precision: Precision,
) -> Plan:
    job, units, n_pairs = _search(model, kind, src, dst, top_k, rank_by, max_bytes, precision)
    dense = top_k is None
    lifted = dense and lifts(job, units, max_bytes - _result_bytes(job, n_pairs))
    return _cost(job, units, n_pairs, dense=dense, lifted=lifted)


def _workers(engine: str) -> int | None:
    """What ``engine="local"`` and ``engine="ray"`` were."""
    return None if engine == "local" else os.cpu_count()


@renamed_arguments(engine=("workers", _workers))
@plans(_plan, option=True)
@torch.no_grad()
def composition(
    model: AttentionOnlyModel,
    kind: Composition = "K",
    src: Select = None,
    dst: Select = None,
    *,
    top_k: int | None = None,
    rank_by: RankBy = "score",
    max_bytes: int = MAX_BYTES,
    resume: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    precision: Precision = "float32",
) -> CompositionScores:
    """How much of what a head writes a later head reads, for all pairs of two sets of heads.

    Args:
        model: the converted model.
        kind: whether the later head's queries ("Q"), keys ("K") or values ("V") read it.
        src, dst: earlier and later heads: labels or heads (virtual ones too), "attention", "mlp", or
            None for all. Pairs in which the later one does not read the earlier are left out.
        top_k: list only the strongest pairs, streaming over all; None lists every pair.
        rank_by: what top_k ranks by. Scores of heads of different singular values scatter
            differently at random; "z" compares each pair with its own scatter.
        max_bytes: memory beyond the model's that may be used, the scores and their table included.
        resume: a file that keeps the state of a streamed search. It is written as the search goes
            on; an interrupted search starts again where it stopped.
        workers: let so many Ray workers share a streamed search (extra ``ray``; a running cluster is
            used, or a local one is started). The result is the one of this process alone.
        precision: of the search; "tf32" and "bfloat16" only where asked for here. Listed pairs of a
            streamed search are computed again in float64.

    Raises:
        MechInterpError: no such head, no pair that composes, non-finite weights, top_k out of range,
            max_bytes too small (the message says what is enough), a state file of another search, or
            workers below 1 or without top_k.
    """
    if workers is not None and (workers < 1 or top_k is None):
        raise MechInterpError(
            f"workers={workers}, top_k={top_k}; expected at least 1 worker and a top_k, since only a "
            "search for the strongest pairs is shared out, or workers=None for this process"
        )
    job, units, n_pairs = _search(model, kind, src, dst, top_k, rank_by, max_bytes, precision)
    if top_k is None and n_pairs > MAX_PAIRS:
        raise MechInterpError(
            f"{n_pairs:,} pairs are too many to list; give top_k= (up to {MAX_PAIRS:,} pairs are listed)"
        )
    least = _least_bytes(job, n_pairs, dense=top_k is None)
    if max_bytes < least:
        raise MechInterpError(f"max_bytes={max_bytes:,} is too small; {least:,} is the least that works")
    refuse_non_finite(model, (group.bank for group in (*job.sources, *job.readers)))
    if top_k is None:
        return _dense(job, units, lifts(job, units, max_bytes - _result_bytes(job, n_pairs)))
    return _streamed(job, units, n_pairs, top_k, resume, workers)


def _search(
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
    job = _job(model, kind, sources, readers, top_k or 0, rank_by, max_bytes, precision)
    units = job.units()
    n_pairs = sum(job.pairs(unit) for unit in units)
    if not n_pairs:
        raise MechInterpError("none of the dst heads reads what a src head writes; src must come earlier")
    if top_k is not None and not 1 <= top_k <= n_pairs:
        raise MechInterpError(f"top_k={top_k} is out of range; expected 1 to {n_pairs} (all pairs)")
    return job, units, n_pairs


def _job(
    model: AttentionOnlyModel,
    kind: Composition,
    sources: Sequence[HeadGroup],
    readers: Sequence[HeadGroup],
    top_k: int,
    rank_by: RankBy,
    max_bytes: int,
    precision: Precision,
) -> Job:
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


def _dense(job: Job, units: list[Unit], lifted: bool) -> CompositionScores:
    if lifted:
        scores = lifted_scores(job).double()
    else:
        sink = Dense(job)
        for unit in units:
            run_unit(job, unit, sink)
        scores = sink.scores.double()
    row, column = scores.isfinite().nonzero().T
    frame = _frame(job, row, column, scores[row, column])
    probe = torch.linspace(0, len(row) - 1, min(8, len(row)), device=row.device).round().long()
    again = _exact(job, row[probe], column[probe])
    error = float((again - scores[row[probe], column[probe]]).abs().max())
    check = Check("sampled pairs computed one by one in float64", error, TOLERANCE[_used(job)])
    return _result(job, frame, check, scores=scores, histograms=None)


def _streamed(
    job: Job,
    units: list[Unit],
    n_pairs: int,
    top_k: int,
    resume: str | os.PathLike[str] | None,
    workers: int | None,
) -> CompositionScores:
    saved = SearchState(resume, job, len(units)) if resume is not None else None
    sink = Top(job)
    done = saved.load(sink) if saved is not None else set()
    left = [i for i in range(len(units)) if i not in done]
    flops = [job.flops(unit) for unit in units]
    plan = _cost(job, [units[i] for i in left], n_pairs)
    bar = Progress(
        total=sum(flops) / 1e9,
        initial=sum(flops[i] for i in done) / 1e9,
        desc=f"{job.kind}-composition, {n_pairs:,} pairs, {plan.bytes / 2**20:,.0f} MiB",
        unit="GFLOP",
        unit_scale=True,
        stops=True,
    )
    if plan.seconds >= 2:
        bar.remark(str(plan))
    try:
        with bar:
            if workers is not None:
                from mechinterp_attn.circuits.distributed import units_on_ray

                finished = units_on_ray(job, [(i, units[i]) for i in left], workers)
            else:
                finished = ((i, _unit_alone(job, units[i], sink)) for i in left)
            for i, part in finished:
                sink.merge(part)
                done.add(i)
                bar.update(flops[i] / 1e9)
                if saved is not None:
                    saved.store(sink, done)
                if bar.stopped:
                    break
    finally:
        job.release()
        if saved is not None and done:
            saved.store(sink, done, now=True)
    found = sink.best.entries
    exact = _exact(job, found.row, found.column)
    frame = _frame(job, found.row, found.column, exact)
    measured = frame["z" if job.rank_by == "z" else "score"].to_numpy()
    seen = found.value if job.rank_by == "z" else found.value.clamp_min(0).sqrt()
    raw = seen.double().cpu().numpy()
    error = float(np.nanmax(np.abs(raw - measured))) if len(measured) else 0.0
    scale = 1 / frame["spread"].min() if job.rank_by == "z" else 1.0
    check = Check("listed pairs computed one by one in float64", error, TOLERANCE[_used(job)] * scale)
    by = "z" if job.rank_by == "z" else "score"
    order = frame.assign(_row=found.row.cpu().numpy(), _column=found.column.cpu().numpy()).sort_values(
        [by, "_row", "_column"], ascending=[False, True, True], kind="stable"
    )
    frame = order.drop(columns=["_row", "_column"]).head(top_k).reset_index(drop=True)
    return _result(
        job, frame, check, scores=None, histograms=_histograms(job, sink), pairs=n_pairs, stopped=bar.notes
    )


def _unit_alone(job: Job, unit: Unit, so_far: Top) -> Top:
    part = Top(job)
    part.best.threshold = so_far.best.threshold  # what is below it cannot be listed any more
    run_unit(job, unit, part)
    return part


def _exact(job: Job, row: Tensor, column: Tensor) -> Float[Tensor, " pair"]:
    """Scores of chosen pairs in float64, each product made on its own."""
    values = row.new_empty(len(row), dtype=torch.float64)
    i, source = _group_of(job.source_starts, row)
    j, reader = _group_of(job.reader_starts, column)
    for a in source.unique().tolist():
        for b in reader[source == a].unique().tolist():
            pairs = ((source == a) & (reader == b)).nonzero().flatten()
            first, then = job.sources[a], job.readers[b]
            size = job.d_model * (first.rank + then.reading_rank(job.kind))
            for part in pairs.split(max(1, 2**22 // size)):
                products = first.writes(i[part]) @ then.reads(job.kind, j[part])
                values[part] = torch.linalg.matrix_norm(products)
    return values


def _group_of(starts: Sequence[int], heads: Tensor) -> tuple[Tensor, Tensor]:
    """Places inside their group, and the group, of heads counted through all groups."""
    first = torch.tensor(starts, device=heads.device)
    group = torch.searchsorted(first, heads, right=True) - 1
    return heads - first[group], group


def _frame(job: Job, row: Tensor, column: Tensor, score: Tensor) -> pd.DataFrame:
    src, dst = _labels(job.sources, job.source_starts, row), _labels(job.readers, job.reader_starts, column)
    p1, p2 = (torch.cat(side)[at] for side, at in zip(job.spectra, (row, column), strict=True))
    mean, spread = mean_and_spread(p1, p2, job.width)
    # A K-composition into the constant key is 0 whatever the weights: no null either (p2 is NaN).
    spread = spread.masked_fill((p1 + p2).isnan(), torch.nan)
    score, mean, spread = (x.double().cpu() for x in (score, mean, spread))
    z = (score - mean) / spread
    return pd.DataFrame(
        {
            "src": src,
            "dst": dst,
            "kind": job.kind,
            "score": score.numpy(),
            "baseline": mean.numpy(),
            "spread": spread.numpy(),
            "z": z.numpy(),
            "by_chance": job.chance.above(z).numpy(),
        }
    )


def _labels(groups: Sequence[HeadGroup], starts: Sequence[int], heads: Tensor) -> np.ndarray:
    """Labels of heads counted through all groups; each made once."""
    some, back = heads.unique(return_inverse=True)
    place, group = _group_of(starts, some)
    where = zip(group.tolist(), place.tolist(), strict=True)
    labels = np.array([groups[g].label(i) for g, i in where], dtype=object)
    return labels[back.cpu().numpy()]


def _histograms(job: Job, sink: Top) -> pd.DataFrame:
    edges = job.edges().tolist()
    rows = []
    for i, source in enumerate(job.sources):
        for j, reader in enumerate(job.readers):
            counts = sink.histogram[i, j]
            if total := int(counts.sum()):
                shares = (counts.double() / total).tolist()
                rows += [
                    (source.name, reader.name, edges[b], edges[b + 1], share)
                    for b, share in enumerate(shares)
                ]
    return pd.DataFrame(rows, columns=["src", "dst", "left", "right", "share"])


def _result(
    job: Job,
    frame: pd.DataFrame,
    check: Check,
    *,
    scores: Tensor | None,
    histograms: pd.DataFrame | None,
    pairs: int | None = None,
    stopped: dict[str, str] | None = None,
) -> CompositionScores:
    notes: dict[str, Any] = {
        "null": "the same heads turned at random, closed form",
        **job.chance.notes(),
        "dtype": _used(job) if scores is not None else f"values float64, search {_used(job)}",
        "norms": job.norms,
        "biases": "left out: a score is about what the earlier head writes",
    }
    if histograms is not None:
        notes |= {
            "pairs searched": pairs,
            **(stopped or {}),
            "histograms": f"exact; between rank-1 heads about {SAMPLED} writing heads of a bank",
        }
    return CompositionScores(
        frame=frame,
        receipt=Receipt((check,), notes),
        kind=job.kind,
        scores=scores,
        sources=() if scores is None else tuple(label for group in job.sources for label in group.labels),
        readers=() if scores is None else tuple(label for group in job.readers for label in group.labels),
        histograms=histograms,
    )


def _used(job: Job) -> str:
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


def _least_bytes(job: Job, n_pairs: int, *, dense: bool) -> int:
    size = torch.finfo(job.dtype).bits // 8
    ranks = [g.rank for g in job.sources] + [g.reading_rank(job.kind) for g in job.readers]
    least = max(LEAST, *ranks) * job.d_model * (8 + size) * 2 + 6 * LEAST**2 * size
    return least + (_result_bytes(job, n_pairs) if dense else 0)


def _result_bytes(job: Job, n_pairs: int) -> int:
    """All scores, twice while they are made, and the table of the pairs."""
    return 2 * CELL * sum(map(len, job.sources)) * sum(map(len, job.readers)) + PAIR * n_pairs


def _cost(job: Job, units: list[Unit], n_pairs: int, *, dense: bool = False, lifted: bool = False) -> Plan:
    listed = n_pairs if dense else job.top_k
    result = CELL * (8 * listed + (sum(map(len, job.sources)) * sum(map(len, job.readers)) if dense else 0))
    flops, needed = sum(job.flops(unit) for unit in units), _bytes(job, units)
    if lifted:
        flops, needed = lifted_cost(job)
    needed += _result_bytes(job, n_pairs) if dense else PAIR * listed
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
