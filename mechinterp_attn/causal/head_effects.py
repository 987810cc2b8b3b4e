"""What a behaviour loses when a head is patched: estimated for all heads, exact for some."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.cuts import Cut, Target, cut_of, cut_of_all, no_rows, remade, targets_of
from mechinterp_attn.causal.gradients import graph, has_gradient
from mechinterp_attn.causal.patches import Fill, Patch, ValueBias, fill_of, some, value_bias_note
from mechinterp_attn.causal.runs import (
    MAX_BYTES,
    Standing,
    head_rows,
    patched,
    plan_prompts,
    ready,
    rows_at_once,
    standing,
    wide,
)
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, TABLE, Plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head

EXACT = 32  # heads patched one by one where nobody says which
Group = Sequence[str | Head]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Effects(Result):
    """How much the metric falls (noising) or recovers (denoising) when a head is patched.

    Attributes:
        frame: one row per head, virtual head, edge or group, and position where they were asked for
            one by one: ``head, layer, index, kind``; ``position``; ``estimate``, from one backward pass
            (NaN for what is no single head); ``effect``, exact, NaN where not measured. Both are means
            over the prompts, in the metric's unit. Sorted by the size of the estimate, measured rows first.
        standing: how the whole model does on the behaviour.
        effects: exact effects of every prompt, ``[row, n]``, of the rows that were measured, in order.
    """

    title: ClassVar[str] = "Effects of patching"
    sort_by: ClassVar[str | None] = "effect"
    standing: Standing
    effects: Float[Tensor, "row n"]


def _plan(
    model: AttentionOnlyModel,
    task: Task,
    heads: str | Head | Sequence[Any] | None,
    positions: str,
    exact: int | Sequence[Any] | None,
    max_bytes: int,
) -> Plan:
    """How the task stands, the estimates' backward pass, and a run for every cut."""
    bound = bound_to(model, task)
    tokens = bound.clean.tokens
    places = tokens.shape[1] if positions == "each" else 1
    every = model.n_heads * places
    if heads is None and (exact is None or isinstance(exact, int)):
        cuts = min(every, EXACT if exact is None else exact)
    else:
        given: Any = heads if heads is not None else exact
        items = list(given) if isinstance(given, Iterable) and not isinstance(given, str) else [given]
        cuts = places * sum(
            len(targets_of(model, [item])) if isinstance(item, str | Head) else 1 for item in items
        )
    result = CELL * ((cuts + 1) * len(tokens) * 2 + 3 * TABLE * (every + cuts))
    return plan_prompts(
        model,
        bound,
        f"{cuts:,} patches",
        max_bytes,
        runs=cuts + 7,
        result=result,
        backward=True,
        together=cuts + 1,
    )


@plans(_plan)
def effects(
    model: AttentionOnlyModel,
    task: Task,
    heads: str | Head | Sequence[Any] | None = None,
    patch: Patch = "corrupt",
    *,
    positions: Literal["all", "each"] = "all",
    exact: int | Sequence[Any] | None = None,
    direction: Literal["noising", "denoising"] = "noising",
    value_bias: ValueBias = "cut",
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Effects:
    """Measure how much a behaviour depends on each head, attention head or neuron, by patching it.

    The estimate is attribution patching (Nanda 2023), ``(z - patch) . dm/dz`` summed over positions, for
    all heads from one forward and backward pass per prompt. The exact effect runs the model with the
    patch in place. The receipt has their correlation.

    Args:
        model: the converted model.
        task: the behaviour; ``patch="corrupt"`` needs its counterfactuals.
        heads: what to patch exactly, each in runs of its own: labels, heads, virtual heads (``"L0H1 >
            L1H2"``), edges (``"L0H1 -K-> L1H2"``), or groups: a list of them is patched together. None:
            all heads by the estimate, and some exactly.
        patch: what a head is given: "corrupt", what it holds in the counterfactual; "zero"; "mean", over
            prompts and positions; "resample", what it holds in another prompt. What a chain or an edge
            brings is taken out, whatever the patch: ``causal.path_patch`` puts the counterfactual's there.
        positions: patch a head everywhere, or at each position alone (prompts of one length only).
        exact: without ``heads``: how many with the largest estimates are measured (32; all heads of a model
            of up to 32), or which ones.
        direction: "noising": the clean run loses the head; "denoising": the counterfactual run regains it.
        value_bias: what "zero" means for an attention head: it writes nothing ("cut"), or goes on writing
            its value bias ("kept"), as in TransformerLens after folding value biases.
        seed: of "resample".
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: everything in which the task does not fit the model or the choices; no such heads.
    """
    if positions not in ("all", "each"):
        raise MechInterpError(f"positions={positions!r}; expected 'all' or 'each'")
    made = _plan(model, task, heads, positions, exact, max_bytes)
    max_bytes = within(made, max_bytes, "fewer prompts or heads").left(max_bytes)
    bound = ready(model, bound_to(model, task), max_bytes)
    if positions == "each" and not bound.aligned:
        raise MechInterpError("positions='each' compares positions, so all prompts must be equally long")
    fill = fill_of(
        model, bound, patch, direction=direction, value_bias=value_bias, seed=seed, max_bytes=max_bytes
    )
    found = standing(model, bound, max_bytes)
    each = positions == "each"
    if heads is not None:  # groups stay together; kinds and patterns are spelt out
        given = list(heads) if isinstance(heads, Iterable) and not isinstance(heads, str) else [heads]
        named = [targets_of(model, [item]) if isinstance(item, str | Head) else [item] for item in given]
        heads = [one for some_heads in named for one in some_heads]
    estimates = estimates_of(model, bound, fill, max_bytes, direction)
    estimates = estimates if each else estimates.sum(1)
    frame = head_rows(model, bound if each else None).assign(estimate=estimates.flatten().numpy())
    order = frame["estimate"].abs().fillna(-1).sort_values(ascending=False, kind="stable").index
    frame = frame.loc[order].reset_index(drop=True)
    if heads is not None:
        cuts = _cuts(model, bound, list(heads), each)
    elif exact is None or isinstance(exact, int):
        count = (
            (EXACT if exact is None else exact) if len(frame) > EXACT or exact is not None else len(frame)
        )
        at = frame["position"].head(count) if each else [None] * min(count, len(frame))
        cuts = [_cut(model, bound, head, p) for head, p in zip(frame["head"].head(count), at, strict=True)]
    else:
        cuts = _cuts(model, bound, list(exact), each)
    brought = any(cut.parts for cut in cuts)
    if brought and direction == "denoising":
        raise MechInterpError(
            "what a chain or an edge brings can be taken out of the clean run, not put into the "
            "counterfactual one; give direction='noising', or use causal.path_patch"
        )
    measured, plain = _exact(model, bound, fill, cuts, max_bytes, direction)
    frame = _joined(frame, cuts, measured, every=heads is None, each=each)
    sign = "what the metric loses" if direction == "noising" else "what the metric regains"
    notes: dict[str, Any] = {
        "metric": bound.about, "effect": f"{sign}, mean over prompts", "patch": patch, **found.notes,
        "dtype": str(model.W_E.dtype).removeprefix("torch."),
    }  # fmt: skip
    if brought and patch != "zero":
        notes["chains and edges"] = "what they bring is taken out, not replaced: causal.path_patch does"
    notes |= value_bias_note(patch, value_bias)
    notes |= correlation(frame)
    whole = found.clean if direction == "noising" else found.corrupt
    assert whole is not None
    scale = max(1.0, float(whole.abs().max()))
    check = Check(
        "a run with nothing patched is the plain run", float((plain - whole).abs().max()), 1e-4 * scale
    )
    return Effects(frame=frame, receipt=Receipt((check,), notes), standing=found, effects=measured)


def correlation(frame: pd.DataFrame) -> dict[str, Any]:
    """For a receipt: of estimate and exact effect, where a row has both."""
    both = frame.dropna(subset=["effect", "estimate"])
    if len(both) < 3 or both["effect"].std() == 0 or both["estimate"].std() == 0:
        return {}
    return {
        "correlation of estimate and exact": round(float(both["effect"].corr(both["estimate"])), 4),
        "measured": len(both),
    }


def estimates_of(
    model: AttentionOnlyModel, bound: Bound, fill: Fill, max_bytes: int, direction: str = "noising"
) -> Float[Tensor, "head pos"]:
    """Of patching every head at every position, float64, mean over prompts; NaN where the metric has no
    gradient.
    """
    width = bound.clean.tokens.shape[1]
    total = torch.zeros(len(model.heads), width, dtype=torch.float64)
    if not has_gradient(model, bound):
        return total.fill_(torch.nan)
    rows = rows_at_once(model, bound, max_bytes, backward=True)
    sign = 1.0 if direction == "noising" else -1.0
    for at, part in bound.split(rows):
        base = some(fill.base, at, part)
        passed = graph(model, part, base).backward()
        other = fill.of(model, at, part)
        one = 0
        for bank in model.banks:
            z, gradient = passed.z[bank.path], passed.gradient[bank.path]
            change = wide((z - other[bank.path].to(z.dtype)) * gradient).double().sum(-1)
            change = change * base.real[..., None]
            n = bank.n_heads
            total[one : one + n, : change.shape[1]] += sign * change.sum(0).T.cpu()
            one += n
    return total / len(bound)


def _cut(model: AttentionOnlyModel, bound: Bound, target: Any, position: int | None = None) -> Cut:
    cut = (
        cut_of_all(model, list(target), no_rows(bound.clean))
        if isinstance(target, list)
        else cut_of(model, target, no_rows(bound.clean))
    )
    return cut if position is None else replace(cut, positions=slice(int(position), int(position) + 1))


def _cuts(
    model: AttentionOnlyModel, bound: Bound, targets: Sequence[Target | Group], each: bool
) -> list[Cut]:
    places = range(bound.clean.tokens.shape[1]) if each else [None]
    return [_cut(model, bound, target, place) for target in targets for place in places]


def _exact(
    model: AttentionOnlyModel, bound: Bound, fill: Fill, cuts: list[Cut], max_bytes: int, direction: str
) -> tuple[Float[Tensor, "cut n"], Float[Tensor, " n"]]:
    """Effects of every cut on every prompt, and the metric with nothing cut."""
    runs = [Cut("nothing"), *cuts]
    out = torch.zeros(len(runs), len(bound), dtype=torch.float64)
    most = rows_at_once(model, bound, max_bytes)
    rows = min(most, len(bound))
    at_a_time = max(1, most // rows)
    with Progress(desc="patching heads", total=len(runs) * len(bound)) as progress:
        for at, part in bound.split(rows):
            base, other = some(fill.base, at, part), fill.of(model, at, part)
            for start in range(0, len(runs), at_a_time):
                chosen = [remade(model, cut, part.clean) for cut in runs[start : start + at_a_time]]
                out[start : start + len(chosen), at] = patched(model, part, base, chosen, other).double()
                progress.update(len(chosen) * len(part))
    change = out[0] - out[1:]
    return (change if direction == "noising" else -change), out[0]


def _joined(
    frame: pd.DataFrame, cuts: list[Cut], measured: Tensor, *, every: bool, each: bool
) -> pd.DataFrame:
    """What was measured first, in order, then with ``every`` all other heads."""
    rows = [{"head": cut.name, "layer": cut.layer, "index": cut.index, "kind": cut.kind} for cut in cuts]
    exact = pd.DataFrame(rows, columns=["head", "layer", "index", "kind"])
    on = ["head"]
    if each:
        exact["position"] = [cut.positions.start if cut.positions is not None else 0 for cut in cuts]
        on = ["head", "position"]
    exact["effect"] = measured.double().mean(1).numpy() if len(cuts) else []
    known = frame[[*on, "estimate"]]
    exact = exact.merge(known, on=on, how="left")
    out = exact
    if every:
        rest = frame.merge(exact[on], on=on, how="left", indicator=True)
        rest = rest[rest["_merge"] == "left_only"].drop(columns="_merge")
        rest["effect"] = float("nan")
        out = pd.concat([exact, rest], ignore_index=True) if len(exact) else rest.reset_index(drop=True)
    columns = ["head", "layer", "index", "kind", *(["position"] if each else []), "estimate", "effect"]
    return out[columns].astype({"layer": "Int64", "index": "Int64", "effect": float})
