"""Composition scores between any heads and any later ones (Elhage et al. 2021, "composition").

``|W_OV1 W_QK2| / (|W_OV1| |W_QK2|)`` for Q, ``W_QK2^T`` for K and ``W_OV2`` for V, Frobenius norms. A
neuron's key is the constant coordinate, which nothing writes: K-composition into a neuron is 0. Between two
neurons Q and V are the cosine of the earlier's output and the later's input direction.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp_attn.circuits.blocks import Dense, Job, RankBy, Top, Unit, run_unit
from mechinterp_attn.circuits.groups import Composition, HeadGroup, Select, groups_of, refuse_non_finite
from mechinterp_attn.circuits.null import mean_and_spread, shape_null
from mechinterp_attn.circuits.plan import Plan, measured_rate
from mechinterp_attn.circuits.state import SavedState
from mechinterp_attn.circuits.streaming import Precision, block_shape
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Check, Receipt, Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_PAIRS = 2_000_000  # that are listed one by one without ``top_k``
SPARE = 32  # pairs searched beyond top_k, so that rounding cannot push one out
SMALL = 1e9  # FLOPs below which float64 is used outright
TOLERANCE = {"float64": 1e-9, "float32": 2e-5, "tf32": 2e-3, "bfloat16": 2e-2}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CompositionScores(Result):
    """Composition of heads with later heads.

    Attributes:
        frame: one row per pair: ``src, dst, kind`` ("Q", "K" or "V"), ``score`` in [0, 1], ``baseline``
            and ``spread`` (mean and standard deviation for random heads of the same shapes), ``z``
            = (score - baseline) / spread, ``z_spectrum`` (the same against these very heads turned at
            random, which allows for their singular values). z is NaN where a head reads or writes
            nothing.
        scores: ``[source, reader]`` with NaN where a pair does not compose; None for a streamed search.
        sources, readers: labels along ``scores``.
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
        """A heatmap of the scores against the random baseline, or the ``k`` strongest pairs."""
        from mechinterp_attn.view.figures.circuits import composition_heatmap, composition_ranking

        return composition_ranking(self, k) if ranking or self.scores is None else composition_heatmap(self)


@torch.no_grad()
def composition(
    model: AttentionOnlyModel,
    kind: Composition = "K",
    src: Select = None,
    dst: Select = None,
    *,
    top_k: int | None = None,
    rank_by: RankBy = "score",
    max_bytes: int = 2**30,
    resume: str | os.PathLike[str] | None = None,
    engine: Literal["local", "ray"] = "local",
    precision: Precision = "float32",
    plan: bool = False,
) -> CompositionScores | Plan:
    """How much of what a head writes a later head reads, for all pairs of two sets of heads.

    Args:
        kind: whether the later head's queries ("Q"), keys ("K") or values ("V") read it.
        src, dst: earlier and later heads: labels or heads (virtual ones too), "attention", "mlp", or
            None for all. Pairs in which the later one does not read the earlier are left out.
        top_k: list only the strongest pairs, streaming over all; None lists every pair.
        rank_by: what top_k ranks by. Scores of pairs of different shapes have different random
            means; "z" compares each with its own.
        max_bytes: memory beyond the model's that may be used.
        resume: a file that keeps the state of a streamed search. It is written as the search goes
            on; an interrupted search starts again where it stopped.
        engine: "ray" runs the blocks on the workers of a Ray cluster (the ``ray`` extra).
        precision: of the search; "tf32" and "bfloat16" only where asked for here. Listed pairs of a
            streamed search are computed again in float64.
        plan: say what it would cost instead of doing it.

    Raises:
        MechInterpError: no such head, no pair that composes, non-finite weights, top_k out of range,
            max_bytes too small (the message says what is enough), or a state file of another search.
    """
    if kind not in ("Q", "K", "V"):
        raise MechInterpError(f"kind={kind!r}; expected 'Q', 'K' or 'V'")
    if rank_by not in ("score", "z") or precision not in TOLERANCE or engine not in ("local", "ray"):
        raise MechInterpError(
            f"rank_by={rank_by!r}, precision={precision!r}, engine={engine!r}; expected 'score' or 'z', "
            "'float32', 'tf32' or 'bfloat16', 'local' or 'ray'"
        )
    sources, readers = groups_of(model, src), groups_of(model, dst)
    job = _job(model, kind, sources, readers, top_k or 0, rank_by, max_bytes, precision)
    units = job.units()
    n_pairs = sum(job.pairs(unit) for unit in units)
    if not n_pairs:
        raise MechInterpError("none of the dst heads reads what a src head writes; src must come earlier")
    if top_k is not None and not 1 <= top_k <= n_pairs:
        raise MechInterpError(f"top_k={top_k} is out of range; expected 1 to {n_pairs} (all pairs)")
    if top_k is None and n_pairs > MAX_PAIRS and not plan:
        raise MechInterpError(
            f"{n_pairs:,} pairs are too many to list; give top_k= (up to {MAX_PAIRS:,} pairs are listed)"
        )
    needed = _bytes(job, units, dense=top_k is None)
    if plan:
        return _plan(job, units, n_pairs, needed)
    least = _least_bytes(job, dense=top_k is None)
    if max_bytes < least:
        raise MechInterpError(f"max_bytes={max_bytes:,} is too small; {least:,} is the least that works")
    refuse_non_finite([*sources, *readers])
    if top_k is None:
        return _dense(job, units)
    return _streamed(job, units, n_pairs, top_k, resume, engine)


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
    rows, columns = block_shape(device)
    free = max_bytes - 3 * rows * columns * size
    # A quarter of what is left for the readers of a unit (float64 while they are made), half to keep
    # the writing side; at least a block's worth of readers.
    widest = max(g.rank for g in readers)
    vectors_per_unit = max(widest, min(16384, free // 4 // (d * (8 + size))))
    return Job(
        sources=tuple(sources),
        readers=tuple(readers),
        kind=kind,
        d_model=d,
        dtype=dtype,
        precision=precision,
        vectors_per_unit=vectors_per_unit,
        cache_bytes=max(0, free // 2),
        top_k=top_k + SPARE,
        rank_by=rank_by,
        device=device,
    )


def _dense(job: Job, units: list[Unit]) -> CompositionScores:
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
    engine: str,
) -> CompositionScores:
    saved = SavedState(resume, job, len(units)) if resume is not None else None
    sink = Top(job)
    done = saved.load(sink) if saved is not None else set()
    left = [i for i in range(len(units)) if i not in done]
    flops = [job.flops(unit) for unit in units]
    plan = _plan(job, [units[i] for i in left], n_pairs, _bytes(job, units, dense=False))
    bar = tqdm(
        total=sum(flops) / 1e9,
        initial=sum(flops[i] for i in done) / 1e9,
        desc=f"{job.kind}-composition, {n_pairs:,} pairs, {plan.bytes / 2**20:,.0f} MiB",
        unit="GFLOP",
        unit_scale=True,
        disable=plan.seconds < 2,
    )
    if plan.seconds >= 2:
        bar.write(str(plan))
    try:
        with bar:
            if engine == "ray":
                from mechinterp_attn.circuits.distributed import run_on_ray

                finished = run_on_ray(job, [(i, units[i]) for i in left])
            else:
                finished = ((i, _unit_alone(job, units[i], sink)) for i in left)
            for i, part in finished:
                sink.merge(part)
                done.add(i)
                bar.update(flops[i] / 1e9)
                if saved is not None:
                    saved.store(sink, done)
    finally:
        job.held.clear()
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
    return _result(job, frame, check, scores=None, histograms=_histograms(job, sink), pairs=n_pairs)


def _unit_alone(job: Job, unit: Unit, so_far: Top) -> Top:
    part = Top(job)
    part.best.threshold = so_far.best.threshold  # what is below it cannot be listed any more
    run_unit(job, unit, part)
    return part


def _exact(job: Job, row: Tensor, column: Tensor) -> Float[Tensor, " pair"]:
    """Scores of chosen pairs in float64, each product made on its own."""
    values = row.new_empty(len(row), dtype=torch.float64)
    for source, reader, pairs in _by_groups(job, row, column):
        for part in pairs.split(max(1, 2**22 // (job.d_model * (source[0].rank + reader[0].rank)))):
            writes = source[0].writes(row[part] - source[1])
            reads = reader[0].reads(job.kind, column[part] - reader[1])
            values[part] = torch.linalg.matrix_norm(writes @ reads)
    return values


def _by_groups(
    job: Job, row: Tensor, column: Tensor
) -> Iterator[tuple[tuple[HeadGroup, int], tuple[HeadGroup, int], Tensor]]:
    """Pairs of global indices by their two groups: each group with its start, and which pairs."""
    sources = torch.tensor([*job.source_starts, 2**62], device=row.device)
    readers = torch.tensor([*job.reader_starts, 2**62], device=row.device)
    i = torch.searchsorted(sources, row, right=True) - 1
    j = torch.searchsorted(readers, column, right=True) - 1
    for a, b in torch.stack([i, j], 1).unique(dim=0).tolist():
        source = job.sources[a], job.source_starts[a]
        reader = job.readers[b], job.reader_starts[b]
        yield source, reader, ((i == a) & (j == b)).nonzero().flatten()


def _frame(job: Job, row: Tensor, column: Tensor, score: Tensor) -> pd.DataFrame:
    labels = [
        np.array([label for g in side for label in g.labels], dtype=object)
        for side in (job.sources, job.readers)
    ]
    null = score.new_empty(4, len(row), dtype=torch.float64)  # means and spreads
    for source, reader, pairs in _by_groups(job, row, column):
        own = source[0].rank, reader[0].rank
        null[:2, pairs] = null.new_tensor(shape_null(job.d_model, *own))[:, None]
        p1 = _participation(source[0], "V", row[pairs] - source[1])
        p2 = _participation(reader[0], job.kind, column[pairs] - reader[1])
        null[2, pairs], null[3, pairs] = mean_and_spread(p1, p2, job.d_model)
        # A K-composition into the constant key is 0 whatever the weights: no null either.
        dead = (p1 + p2).isnan() | (not reader[0].reads_stream(job.kind))
        null[1::2, pairs] = null[1::2, pairs].masked_fill(dead, torch.nan)
    score, null = score.double().cpu(), null.cpu()
    return pd.DataFrame(
        {
            "src": labels[0][row.cpu().numpy()],
            "dst": labels[1][column.cpu().numpy()],
            "kind": job.kind,
            "score": score.numpy(),
            "baseline": null[0].numpy(),
            "spread": null[1].numpy(),
            "z": ((score - null[0]) / null[1]).numpy(),
            "z_spectrum": ((score - null[2]) / null[3]).numpy(),
        }
    )


def _participation(group: HeadGroup, kind: Composition, heads: Tensor) -> Tensor:
    some, back = heads.unique(return_inverse=True)
    return group.participation(kind, some)[back]


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
) -> CompositionScores:
    notes: dict[str, Any] = {
        "null": "random heads of the same shapes, closed form",
        "dtype": _used(job) if scores is not None else f"values float64, search {_used(job)}",
        "norms": "gains folded, scales left out",
    }
    if histograms is not None:
        notes |= {
            "pairs searched": pairs,
            "histograms": "exact; between rank-1 heads every 16th writing head",
        }
    return CompositionScores(
        frame=frame,
        receipt=Receipt((check,), notes),
        kind=job.kind,
        scores=scores,
        sources=tuple(label for group in job.sources for label in group.labels),
        readers=tuple(label for group in job.readers for label in group.labels),
        histograms=histograms,
    )


def _used(job: Job) -> str:
    return "float64" if job.dtype == torch.float64 else job.precision


def _bytes(job: Job, units: list[Unit], *, dense: bool) -> int:
    """Memory that a run takes beyond the model's."""
    size = torch.finfo(job.dtype).bits // 8
    rows, columns = block_shape(job.device)
    written = sum(len(g) * g.rank for g in job.sources) * job.d_model * size
    widest = max((u.last - u.first) * job.readers[u.group].rank for u in units) if units else 0
    total = min(written, job.cache_bytes) + widest * job.d_model * (8 + size) + 3 * rows * columns * size
    return total + (_scores_bytes(job) if dense else 0)


def _least_bytes(job: Job, *, dense: bool) -> int:
    size = torch.finfo(job.dtype).bits // 8
    rows, columns = block_shape(job.device)
    vectors = max(rows, max(g.rank for g in (*job.sources, *job.readers)))
    least = vectors * job.d_model * (8 + size) * 2 + 3 * rows * columns * size
    return least + (_scores_bytes(job) if dense else 0)


def _scores_bytes(job: Job) -> int:
    return 16 * sum(map(len, job.sources)) * sum(map(len, job.readers))


def _plan(job: Job, units: list[Unit], n_pairs: int, needed: int) -> Plan:
    rows, columns = block_shape(job.device)
    flops = sum(job.flops(unit) for unit in units)
    rate = measured_rate(job.device, (rows, job.d_model, columns))
    rate /= 2 if job.dtype == torch.float64 else 1
    what = f"{job.kind}-composition of {n_pairs:,} pairs"
    return Plan(what, flops, needed, len(units), flops / rate)
