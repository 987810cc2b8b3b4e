"""Composition scores between any heads and any later ones (Elhage et al. 2021, "composition").

``|W_OV1 W_QK2| / (|W_OV1| |W_QK2|)`` for Q, ``W_QK2^T`` for K and ``W_OV2`` for V, Frobenius norms. A
neuron's key is the constant coordinate, which nothing writes: K-composition into a neuron is 0. Between two
neurons Q and V are the cosine of the earlier's output and the later's input direction.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.blocks import SAMPLED, Dense, Job, RankBy, Top, Unit, run_unit
from mechinterp_attn.circuits.groups import Composition, Select, refuse_non_finite
from mechinterp_attn.circuits.lifted import lifted_scores, lifts
from mechinterp_attn.circuits.pair_search import (
    TOLERANCE,
    least_bytes,
    pair_search,
    result_bytes,
    search_cost,
    used_dtype,
)
from mechinterp_attn.circuits.pair_tables import exact_scores, pair_frame, pair_histograms
from mechinterp_attn.circuits.state import SearchState
from mechinterp_attn.circuits.streaming import Precision
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


MAX_PAIRS = 2_000_000  # that are listed one by one without ``top_k``


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CompositionScores(Result):
    """Composition scores of heads with later heads.

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
    job, units, n_pairs = pair_search(model, kind, src, dst, top_k, rank_by, max_bytes, precision)
    dense = top_k is None
    lifted = dense and lifts(job, units, max_bytes - result_bytes(job, n_pairs))
    return search_cost(job, units, n_pairs, dense=dense, lifted=lifted)


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
    job, units, n_pairs = pair_search(model, kind, src, dst, top_k, rank_by, max_bytes, precision)
    if top_k is None and n_pairs > MAX_PAIRS:
        raise MechInterpError(
            f"{n_pairs:,} pairs are too many to list; give top_k= (up to {MAX_PAIRS:,} pairs are listed)"
        )
    least = least_bytes(job, n_pairs, dense=top_k is None)
    if max_bytes < least:
        raise MechInterpError(f"max_bytes={max_bytes:,} is too small; {least:,} is the smallest that works")
    refuse_non_finite(model, (group.bank for group in (*job.sources, *job.readers)))
    if top_k is None:
        return _dense(job, units, lifts(job, units, max_bytes - result_bytes(job, n_pairs)))
    return _streamed(job, units, n_pairs, top_k, resume, workers)


def _dense(job: Job, units: list[Unit], lifted: bool) -> CompositionScores:
    if lifted:
        scores = lifted_scores(job).double()
    else:
        sink = Dense(job)
        for unit in units:
            run_unit(job, unit, sink)
        scores = sink.scores.double()
    row, column = scores.isfinite().nonzero().T
    frame = pair_frame(job, row, column, scores[row, column])
    probe = torch.linspace(0, len(row) - 1, min(8, len(row)), device=row.device).round().long()
    again = exact_scores(job, row[probe], column[probe])
    error = float((again - scores[row[probe], column[probe]]).abs().max())
    check = Check("sampled pairs computed one by one in float64", error, TOLERANCE[used_dtype(job)])
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
    plan = search_cost(job, [units[i] for i in left], n_pairs)
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
    exact = exact_scores(job, found.row, found.column)
    frame = pair_frame(job, found.row, found.column, exact)
    measured = frame["z" if job.rank_by == "z" else "score"].to_numpy()
    seen = found.value if job.rank_by == "z" else found.value.clamp_min(0).sqrt()
    raw = seen.double().cpu().numpy()
    error = float(np.nanmax(np.abs(raw - measured))) if len(measured) else 0.0
    scale = 1 / frame["spread"].min() if job.rank_by == "z" else 1.0
    check = Check("listed pairs computed one by one in float64", error, TOLERANCE[used_dtype(job)] * scale)
    by = "z" if job.rank_by == "z" else "score"
    order = frame.assign(_row=found.row.cpu().numpy(), _column=found.column.cpu().numpy()).sort_values(
        [by, "_row", "_column"], ascending=[False, True, True], kind="stable"
    )
    frame = order.drop(columns=["_row", "_column"]).head(top_k).reset_index(drop=True)
    return _result(
        job,
        frame,
        check,
        scores=None,
        histograms=pair_histograms(job, sink),
        pairs=n_pairs,
        stopped=bar.notes,
    )


def _unit_alone(job: Job, unit: Unit, so_far: Top) -> Top:
    part = Top(job)
    part.best.threshold = so_far.best.threshold  # what is below it cannot be listed any more
    run_unit(job, unit, part)
    return part


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
        "dtype": used_dtype(job) if scores is not None else f"values float64, search {used_dtype(job)}",
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
