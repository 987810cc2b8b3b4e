"""How much of a behaviour a circuit carries alone, at many sizes: the protocol of MIB."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.alone import Alone, Parts, alone_of
from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.runs import MAX_BYTES, Standing, plan_prompts, ready, standing
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

SHARES = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0)  # of MIB
DRAWS = 1000  # of the bootstrap


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Faithfulness(Result):
    """How much of a behaviour is carried by circuits of increasing size.

    The faithfulness of a circuit is ``(m(circuit) - m(nothing)) / (m(model) - m(nothing))``: its metric
    with everything else held to the counterfactual, between that of the counterfactual and that of the
    whole model, each a mean over the prompts. 1 is the whole behaviour.

    Attributes:
        frame: one row per size: ``share`` of all heads or edges, ``size``, how many; ``faithfulness``, with
            ``low`` and ``high``, its bootstrap interval over prompts (95 %); ``random``, the same of as
            many drawn at random (mean over draws); ``reverse``, of the ranking's last ones (NaN where
            the ranking does not hold all); ``removed``, what is left when the circuit alone is held to
            the counterfactual: 0 for a complete one.
        cmd: area between the curve and 1, over shares (circuit-model distance; 0 is best); NaN of one size.
        cmd_interval: its bootstrap interval.
        cpr: area below the curve (circuit performance ratio).
        cmd_random, cpr_random: of random rankings (mean over draws).
        cmd_reverse: of the reverse ranking.
        standing: how the whole model does on the behaviour.
        metric: of every size's circuit on every prompt, ``[size, n]``.
        units: "heads" or "edges".
        total: how many there are in the model.
    """

    title: ClassVar[str] = "Faithfulness"
    cmd: float
    cpr: float
    cmd_interval: tuple[float, float]
    cmd_random: float
    cpr_random: float
    cmd_reverse: float
    standing: Standing
    metric: Float[Tensor, "size n"]
    units: str
    total: int


def plan_of_circuits(
    model: AttentionOnlyModel, task: Task, alone: Alone, runs: int, max_bytes: int
) -> Plan:
    """So many circuits, each run alone; each edge has a stream of its own."""
    n, edges = len(task), alone.units == "edges"
    ids = CELL * runs * min(alone.total, 4 * len(alone.order))
    result = CELL * (2 * runs * n + DRAWS * (n + runs))
    each = 4 if edges else 1
    return plan_prompts(
        model, bound_to(model, task), f"{runs:,} circuits of {alone.units}", max_bytes,
        runs=5 + each * runs, result=result, kept=ids, together=1 if edges else runs, times=each,
    )  # fmt: skip


def _plan(
    model: AttentionOnlyModel,
    task: Task,
    ranking: Any,
    sizes: Sequence[float | int] | None,
    draws: int,
    max_bytes: int,
) -> Plan:
    alone = alone_of(model, bound_to(model, task), ranking, max_bytes)
    counts = _counts(sizes, len(alone.order), alone.total, alone.units)
    curves = 1 + (1 + (len(alone.order) == alone.total) + draws if draws else 0)
    return plan_of_circuits(model, task, alone, curves * len(counts), max_bytes)


@plans(_plan)
def faithfulness(
    model: AttentionOnlyModel,
    task: Task,
    ranking: Any,
    sizes: Sequence[float | int] | None = None,
    *,
    draws: int = 3,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Faithfulness:
    """Run circuits of increasing size, with everything outside them set to the counterfactual.

    The protocol is that of MIB (Mueller et al. 2025). A head that is not in the circuit holds what it
    holds in the counterfactual prompt; one that is reads the stream as it then is. An edge that is not in
    the circuit brings what it brings in the counterfactual; each reader has a stream of its own.

    Args:
        model: the converted model.
        task: the prompts, with counterfactuals: others than the ranking was found on (``task.split``);
            the receipt says how many are the same.
        ranking: what ``causal.discover`` gives; a ``Circuit``; a table with ``head`` (or ``src, dst,
            mode``) and ``score``, ranked by its size; or heads (labels, kinds, patterns) or edges
            (``"L0H1 -K-> L1H2"``), the most important first.
        sizes: shares of all heads or edges (floats up to 1) or counts (integers); by default MIB's ten
            shares from 0.1 to 100 %, as far as the ranking goes. Each is at least one.
        draws: how many random rankings stand beside it; 0 leaves out ``random``, ``reverse`` and
            ``removed``, and with them most of the runs.
        seed: of random rankings and of the bootstrap.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: no counterfactuals, no such heads or edges, sizes that the ranking does not reach,
            edges in a model with norms behind its sublayers, a behaviour without a difference to explain.
    """
    if draws < 0:
        raise MechInterpError(f"draws={draws}; expected 0 or more")
    made = _plan(model, task, ranking, sizes, draws, max_bytes)
    max_bytes = within(made, max_bytes, "fewer prompts").left(max_bytes)
    bound = ready(model, bound_to(model, task), max_bytes)
    bound.counterfactual("faithfulness")
    alone = alone_of(model, bound, ranking, max_bytes)
    counts = _counts(sizes, len(alone.order), alone.total, alone.units)
    found, ends = ends_of(model, bound, max_bytes)
    generator = torch.Generator().manual_seed(seed)
    top = [Parts(alone.order[:n]) for n in counts]
    curves = {"faithfulness": top}
    if draws:
        curves["removed"] = [Parts(parts.ids, rest=True) for parts in top]
        if len(alone.order) == alone.total:
            curves["reverse"] = [Parts(alone.order.flip(0)[:n]) for n in counts]
        for k in range(draws):
            ids = alone.drawn(max(counts), generator)
            curves[f"random {k}"] = [Parts(ids[:n]) for n in counts]
    metric = _measured(alone, curves)
    shares = [n / alone.total for n in counts]
    rows = torch.randint(len(bound), (DRAWS, len(bound)), generator=generator)
    boot = faithful(metric["faithfulness"], ends, rows)  # [draw, size]
    values = {name: faithful(m, ends)[0] for name, m in metric.items()}
    random = [v for name, v in values.items() if name.startswith("random")]
    frame = pd.DataFrame({"share": shares, "size": counts, "faithfulness": values["faithfulness"].tolist()})
    for name, q in (("low", 0.025), ("high", 0.975)):
        frame[name] = boot.quantile(q, dim=0).tolist()
    none = torch.full((len(counts),), torch.nan)
    frame["random"] = (torch.stack(random).mean(0) if random else none).tolist()
    for name in ("reverse", "removed"):
        frame[name] = values.get(name, none).tolist()
    cmd = _area(shares, (1 - boot).abs())
    areas = [(_area(shares, (1 - v).abs()), _area(shares, v)) for v in random]
    notes: dict[str, Any] = {
        "metric": bound.about, "units": f"{alone.units}, {alone.total:,} in the model",
        **found.notes, **alone.held_out(task), "random rankings": draws, "seed": seed,
        "dtype": str(model.W_E.dtype).removeprefix("torch."),
    }  # fmt: skip
    return Faithfulness(
        frame=frame,
        receipt=Receipt((whole_check(alone, ends),), notes),
        cmd=float(_area(shares, (1 - values["faithfulness"]).abs())),
        cpr=float(_area(shares, values["faithfulness"])),
        cmd_interval=(float(cmd.quantile(0.025)), float(cmd.quantile(0.975))),
        cmd_random=_mean([float(a) for a, _ in areas]),
        cpr_random=_mean([float(b) for _, b in areas]),
        cmd_reverse=float(_area(shares, (1 - values.get("reverse", none.double())).abs())),
        standing=found,
        metric=metric["faithfulness"],
        units=alone.units,
        total=alone.total,
    )


def ends_of(
    model: AttentionOnlyModel, bound: Bound, max_bytes: int
) -> tuple[Standing, Float[Tensor, "two n"]]:
    """How the model stands, and the metric of counterfactuals and of prompts.

    Raises:
        MechInterpError: there is no difference to explain.
    """
    found = standing(model, bound, max_bytes)
    assert found.corrupt is not None
    ends = torch.stack([found.corrupt, found.clean]).double()
    whole = float((ends[1] - ends[0]).mean())
    spread = float((ends[1] - ends[0]).abs().max())
    if abs(whole) < 1e-3 * spread:
        raise MechInterpError(
            f"over the prompts, counterfactuals change the metric {bound.about} by {whole:.3g} on average "
            f"and by up to {spread:.3g} on one: there is no share of such a difference; give "
            "counterfactuals that all point the same way"
        )
    return found, ends


def _measured(alone: Alone, curves: dict[str, list[Parts]]) -> dict[str, Float[Tensor, "size n"]]:
    """The metric of everything in the curves, all in one go over the prompts."""
    metric = alone.metric([parts for curve in curves.values() for parts in curve])
    sizes = [len(curve) for curve in curves.values()]
    return dict(zip(curves, metric.split(sizes), strict=True))


def whole_check(alone: Alone, ends: Float[Tensor, "two n"]) -> Check:
    """The circuit of everything is the model, in the very way in which circuits are run."""
    nothing = torch.zeros(0, dtype=torch.long)
    whole = alone.metric([Parts(nothing, rest=True)])[0]
    scale = max(1.0, float(ends.abs().max()))
    return Check("everything as a circuit is the model", float((whole - ends[1]).abs().max()), 1e-4 * scale)


def faithful(
    metric: Float[Tensor, "size n"], ends: Float[Tensor, "two n"], rows: Tensor | None = None
) -> Float[Tensor, "draw size"]:
    """Ratios of means over prompts: all of them, or those of every draw."""
    rows = torch.arange(metric.shape[1])[None] if rows is None else rows
    nothing, model = ends[:, rows].mean(-1)  # [draw]
    circuit = metric.double()[:, rows].mean(-1).T
    return (circuit - nothing[:, None]) / (model - nothing)[:, None]


def _area(shares: list[float], values: Float[Tensor, "*draw size"]) -> Float[Tensor, "*draw"]:
    """Below a curve, by trapezoids; NaN of a single size."""
    if len(shares) < 2:
        return torch.full(values.shape[:-1], torch.nan)
    return torch.trapezoid(values.double(), torch.tensor(shares, dtype=torch.float64))


def _mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else float("nan")


def _counts(sizes: Any, known: int, total: int, units: str) -> list[int]:
    """How many heads or edges each circuit has, smallest first, each once."""
    if sizes is None:
        counts = [max(1, round(share * total)) for share in SHARES]
        counts = [n for n in counts if n <= known] or [known]
    else:
        wrong = [
            repr(size) for size in sizes
            if isinstance(size, bool) or not isinstance(size, int | float) or size <= 0
            or (isinstance(size, float) and size > 1)
        ]  # fmt: skip
        if wrong or not len(sizes):
            raise MechInterpError(
                f"sizes {', '.join(wrong) or 'are empty'}; expected shares (floats above 0 and up to 1) or "
                "counts (integers from 1)"
            )
        counts = [max(1, round(s * total)) if isinstance(s, float) else int(s) for s in sizes]
    if max(counts) > known:
        raise MechInterpError(
            f"a circuit of {max(counts):,} {units} was asked for and the ranking holds {known:,} of "
            f"{total:,}; give smaller sizes, such as sizes=[10, 100, {known}], or a longer ranking "
            "(top_k= of discover)"
        )
    return sorted(set(counts))
