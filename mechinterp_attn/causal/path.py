"""What a behaviour loses when a change flows along one path, and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.flow import FIRST, Flow, splits
from mechinterp_attn.causal.patches import Fill, Patch, ValueBias, fill_of, some, value_bias_note
from mechinterp_attn.causal.runs import (
    MAX_BYTES,
    Standing,
    plan_prompts,
    ready,
    rows_at_once,
    run,
    standing,
    watched,
)
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.causal.wires import EMBED, LOGITS, Edge, Edges, Wires, edge_name, steps_of
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, TABLE, Plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PathEffects(Result):
    """How much the metric falls (noising) or recovers (denoising) when single paths are patched.

    Attributes:
        frame: one row per path: ``path``; ``effect``, exact, a mean over the prompts in the metric's unit;
            ``share`` of the metric's whole difference between prompts and counterfactuals (NaN without
            counterfactuals).
        standing: how the whole model does on the behaviour.
        effects: of every path on every prompt, ``[path, n]``.
    """

    title: ClassVar[str] = "Effects along paths"
    sort_by: ClassVar[str | None] = "effect"
    standing: Standing
    effects: Float[Tensor, "path n"]


@dataclass(frozen=True, eq=False)
class Route:
    """A path in the model's terms.

    Attributes:
        first: the head where the change starts; None for the embedding.
        last: the head where the path ends, whose change then goes everywhere; None at the logits.
    """

    name: str
    wires: Wires
    first: tuple[HeadBank, int] | None
    last: tuple[HeadBank, int] | None


def _plan(model: AttentionOnlyModel, task: Task, path: str | Sequence[str], max_bytes: int) -> Plan:
    """A run for every path, with a stream for each change."""
    bound = bound_to(model, task)
    routes = len(_routes(model, [path] if isinstance(path, str) else list(path)))
    result = CELL * ((routes + 1) * len(bound) * 2 + TABLE * routes)
    return plan_prompts(
        model,
        bound,
        f"{routes:,} paths",
        max_bytes,
        runs=6 + 4 * (routes + 1),
        result=result,
        times=4,
    )


@plans(_plan)
def path_patch(
    model: AttentionOnlyModel,
    task: Task,
    path: str | Sequence[str],
    patch: Patch = "corrupt",
    *,
    direction: Literal["noising", "denoising"] = "noising",
    value_bias: ValueBias = "cut",
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> PathEffects:
    """Patch what flows along a path, exactly (Wang et al. 2022; Goldowsky-Dill et al. 2023).

    The first head of the path is given its patch. The second one reads the change, and it alone, through
    the norm in front of it, with its queries, keys or values alone as the arrow says; what it then
    holds differently goes to the third, and so on. All other heads hold what they hold in the plain run.

    Args:
        model: the converted model.
        task: the behaviour; ``patch="corrupt"`` needs its counterfactuals.
        path: such as ``"L0H2 -K-> L1H3 -> logits"``, or several. Stations are heads of any kind, "embed" at
            the start and "logits" at the end, or patterns and kinds (``"L0H* -K-> L1H3 -> logits"``), of
            which every combination is a path. An arrow without Q, K or V stands for all of them at once.
            A path that ends in a head ends the isolation there: the rest of the model sees its change.
        patch: what the first head is given, as for ``effects``; "corrupt" for "embed".
        direction: "noising": the clean run is patched; "denoising": the counterfactual run.
        value_bias: of "zero", as for ``effects``.
        seed: of "resample".
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: what is no path of this model, with every reason; norms behind sublayers; what
            ``effects`` finds.
    """
    splits(model)
    made = _plan(model, task, path, max_bytes)
    max_bytes = within(made, max_bytes, "fewer prompts or paths").left(max_bytes)
    bound = ready(model, bound_to(model, task), max_bytes)
    routes = _routes(model, [path] if isinstance(path, str) else list(path))
    fill = fill_of(
        model, bound, patch, direction=direction, value_bias=value_bias, seed=seed, max_bytes=max_bytes
    )
    if fill.other is None and any(route.first is None for route in routes):
        raise MechInterpError(f"a path from 'embed' needs other prompts, and patch={patch!r} has none")
    found = standing(model, bound, max_bytes)
    metric, plain = _measured(model, bound, fill, routes, max_bytes)
    sign = 1.0 if direction == "noising" else -1.0
    effects = sign * (plain - metric)
    frame = pd.DataFrame({"path": [route.name for route in routes], "effect": effects.mean(1).tolist()})
    whole = float("nan") if found.corrupt is None else float((found.clean - found.corrupt).mean())
    frame["share"] = frame["effect"] / whole
    words = "what the metric loses" if direction == "noising" else "what the metric regains"
    notes: dict[str, Any] = {
        "metric": bound.about, "effect": f"{words}, mean over prompts", "patch": patch, **found.notes,
        "dtype": str(model.W_E.dtype).removeprefix("torch."),
    }  # fmt: skip
    notes |= value_bias_note(patch, value_bias)
    expected = found.clean if direction == "noising" else found.corrupt
    assert expected is not None
    scale = max(1.0, float(expected.abs().max()))
    error = float((plain - expected).abs().max())
    check = Check("a run in which nothing flows is the plain run", error, 1e-4 * scale)
    return PathEffects(frame=frame, receipt=Receipt((check,), notes), standing=found, effects=effects)


@torch.no_grad()
def _measured(
    model: AttentionOnlyModel, bound: Bound, fill: Fill, routes: list[Route], max_bytes: int
) -> tuple[Float[Tensor, "path n"], Float[Tensor, " n"]]:
    """The metric with a change flowing along each path, and with none."""
    edges = Edges.of(model)
    still = Wires(edges, torch.zeros(0, dtype=torch.long))
    out = torch.zeros(len(routes), len(bound), dtype=torch.float64)
    plain = torch.zeros(len(bound), dtype=torch.float64)
    rows = max(1, rows_at_once(model, bound, max_bytes) // 4)
    with Progress(desc="patching paths", total=len(routes) * len(bound)) as progress:
        for at, part in bound.split(rows):
            base = some(fill.base, at, part)
            seen, held = watched(model, part, base, {FIRST})
            embed, other = None, fill.of(model, at, part)
            if fill.other is not None:
                far = watched(model, part, some(fill.other, at, part), {FIRST})[0][FIRST]
                embed = far - seen[FIRST]
            plain[at] = part.measure(Flow(model, part, base, held, edges, still).logits).double().cpu()
            for row, route in enumerate(routes):
                start: dict[str, Any] = {"embed": embed}
                if route.first is not None:
                    bank, index = route.first
                    own = held[bank.path]
                    change = other[bank.path].to(own.dtype) - own  # averages are taken in float64
                    start = {"sources": {bank.path: _at(change, bank, index)}}
                flow = Flow(model, part, base, held, edges, route.wires, **start)
                logits = flow.logits
                if route.last is not None:
                    bank, _ = route.last
                    change = flow.changes[bank.path]
                    logits = run(model, part, base, [(bank.hook("z"), _moved(change))])
                out[row, at] = part.measure(logits).double().cpu()
                progress.update(len(part))
    return out, plain


def _at(change: Tensor, bank: HeadBank, index: int) -> Tensor:
    """The change of one head alone."""
    out = torch.zeros_like(change)
    own = (slice(None), slice(None), index)
    out[own] = change[own]
    return out


def _moved(change: Tensor) -> Any:
    return lambda z, hook: z + change.reshape(z.shape)


def _routes(model: AttentionOnlyModel, paths: list[str]) -> list[Route]:
    """Paths, with patterns spelt out.

    Raises:
        MechInterpError: everything that is wrong with any of them.
    """
    edges, found, wrong = Edges.of(model), [], []
    for text in paths:
        try:
            stations, modes = steps_of(text)
            every = [[s] if s in (EMBED, LOGITS) else model.heads.labels(s) for s in stations]
            found += _combined(model, edges, list(product(*every)), modes)
        except MechInterpError as error:
            wrong.append(f"{text!r}: {error}")
    if wrong or not found:
        raise MechInterpError("; ".join(wrong) or "no paths; give one such as 'L0H2 -K-> L1H3 -> logits'")
    return found


def _combined(model: AttentionOnlyModel, edges: Edges, every: list[Any], modes: list[str]) -> list[Route]:
    """The combinations of a pattern in which every station reads what the one before writes.

    Raises:
        MechInterpError: there is none; says why the first is none.
    """
    found, errors = [], []
    for stations in every:
        try:
            found.append(_route(model, edges, stations, modes))
        except MechInterpError as error:
            errors.append(error)
    if not found:
        raise errors[0]
    return found


def _route(model: AttentionOnlyModel, edges: Edges, stations: Sequence[str], modes: list[str]) -> Route:
    chosen: list[Edge] = []
    names = [stations[0]]
    for (src, dst), mode in zip(pairwise(stations), modes, strict=True):
        reads = [""] if dst == LOGITS else [mode] if mode else list(model.heads.find(dst)[0].reads)
        chosen += [(src, dst, one) for one in reads]
        names.append(edge_name("", dst, mode).strip())
    ids = edges.ids(chosen)
    ends = [
        None if end in (EMBED, LOGITS) else model.heads.find(end) for end in (stations[0], stations[-1])
    ]
    return Route(" ".join(names), Wires(edges, ids), ends[0], ends[-1])
