"""What changed between two models: which heads, in weights, in what they write, in what it does."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.discovery import Discovery, discover
from mechinterp_attn.causal.grafts import Guests, grafted, guests_of
from mechinterp_attn.causal.head_effects import correlation
from mechinterp_attn.causal.runs import MAX_BYTES, plan_prompts, ready, rows_at_once, run
from mechinterp_attn.causal.same import need_same
from mechinterp_attn.causal.streams import compare_streams
from mechinterp_attn.causal.task import Prompts, Task, bound_to
from mechinterp_attn.circuits.changes import other_changes, rounded, weight_changes
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, TABLE, Plan, joined, plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

EXACT = 16  # heads put into the other model one by one where nobody says how many
DRAWS = 3  # rounded copies that changes are compared with
EDGES = 1000  # that are compared, of each model
EDGES_UP_TO = 2500  # heads of a model whose edges are compared unless asked otherwise
MEASURES = ("OV", "QK", "output")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Diff(Result):
    """What changed from one model to another, head by head.

    Attributes:
        frame: one row per head, ``head, layer, index, kind``; the relative change of its weights (``OV``,
            ``QK``) and of what it writes on the prompts (``output``), reading what the first model's head
            reads there; ``z``, the largest of the three against copies of the first model that were
            rounded and not edited, in standard deviations of theirs; ``gained``, what the metric of the
            first model gains when this head of the second one is put in, and ``lost``, what the second
            one's loses when this head of the first one is put back, with their ``_estimate`` from a
            backward pass. Measured heads first, by the size of the estimates, then the others.
        rest: the relative change of every parameter that belongs to no head: ``part, change``.
        together: the heads with the largest estimates put in together: ``heads`` (how many), ``gained``
            and ``lost``, and both as shares of the change of the metric.
        before, after: the metric of each model on every prompt, ``[n]``.
        edges: ``src, dst, mode, edge, before, after, change``: scores of edges in both models, by the size
            of the change; empty where edges were not asked for.
        circuits: how those scores were found, in the first model and in the second; None without edges.
    """

    title: ClassVar[str] = "What changed between two models"
    sort_by: ClassVar[str | None] = "z"
    rest: pd.DataFrame
    together: pd.DataFrame
    before: Float[Tensor, " n"]
    after: Float[Tensor, " n"]
    edges: pd.DataFrame
    circuits: tuple[Discovery, Discovery] | None

    def circuit(self, n: int) -> dict[str, list[str]]:
        """The circuits of the ``n`` strongest edges of both models: what they share, what only one has.

        Args:
            n: how many edges.

        Returns:
            ``both``, ``only_self`` (the first model), ``only_other`` (the second).

        Raises:
            MechInterpError: edges were not compared, or there are fewer.
        """
        if self.circuits is None:
            raise MechInterpError("edges were not compared; give diff(..., edges=1000)")
        first, second = (found.circuit(n) for found in self.circuits)
        return first.diff(second)


def _plan(
    base: AttentionOnlyModel,
    tuned: AttentionOnlyModel,
    task: Task | Prompts,
    exact: int,
    edges: int | None,
    draws: int,
    max_bytes: int,
) -> Plan:
    """Both models side by side, forward and backward, for each direction and each rounded copy; the edges
    of each.
    """
    behaviour = _task(task)
    bound = bound_to(base, behaviour)
    copied = sum(p.numel() * p.element_size() for bank in base.banks for p in bank.parameters())
    runs = 2 * (exact + len(_sizes(base.n_heads, exact))) + 12 + draws
    made = plan_prompts(
        base, bound, "what changed", max_bytes, runs=2 * runs, backward=True, times=3,
        result=CELL * 3 * TABLE * base.n_heads, kept=2 * copied,
    )  # fmt: skip
    wanted = _edges_of(base, edges)
    if not wanted:
        return made
    found = plan(discover, base, behaviour, **_edge_options(behaviour, wanted), max_bytes=max_bytes)
    return joined(made.what, [made, found, found])


@plans(_plan)
def diff(
    base: AttentionOnlyModel,
    tuned: AttentionOnlyModel,
    task: Task | Prompts,
    *,
    exact: int = EXACT,
    edges: int | None = None,
    rounding: torch.dtype = torch.float32,
    draws: int = DRAWS,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Diff:
    """What changed between two models of one architecture: heads, neurons, edges, circuits.

    Weights are compared as products, which do not depend on the basis a head is written in. What a head
    writes is compared on the first model's own residual streams, so that a head whose input alone has
    changed shows no change. Causes are found by putting heads of one model into the other at their
    outputs, as in cross-model activation patching (Prakash et al. 2024), with the difference that the head
    goes on reading what it meets there: what it carries is due to its own weights.

    Args:
        base: the first model.
        tuned: the second one, such as a fine-tuned copy: the same shapes, rules and tokens.
        task: a behaviour; or a corpus, texts or token ids, whose mean next-token loss is the metric.
        exact: how many heads with the largest estimates are put into the other model one by one, of those
            that changed at all; 0 also leaves out ``together``.
        edges: how many edges with the largest scores are compared (0: none); by default 1000 in models of
            up to 2,500 heads.
        rounding: the dtype in which the null's copies are rounded: that of the coarser checkpoint.
        draws: how many rounded copies, at least 2.
        seed: of their noise.
        max_bytes: memory beyond the models' that may be used, the result included.

    Raises:
        MechInterpError: models that differ in more than weights, with every difference; a task that does
            not fit them.
    """
    need_same(base, tuned)
    if draws < 2 or exact < 0:
        raise MechInterpError(f"draws={draws}, exact={exact}; expected at least 2 draws, and exact >= 0")
    behaviour = _task(task)
    made = _plan(base, tuned, behaviour, exact, edges, draws, max_bytes)
    whole, max_bytes = max_bytes, within(made, max_bytes, "fewer prompts").left(max_bytes)
    bound = ready(base, bound_to(base, behaviour), max_bytes)
    rows = max(1, rows_at_once(base, bound, max_bytes, backward=True) // 3)
    steps = 2 + draws + 2 * (min(exact, base.n_heads) + len(_sizes(base.n_heads, exact)))
    with Progress(desc="comparing models", total=steps) as progress:
        forth = compare_streams(base, guests_of(tuned), bound, rows, gradient=True)
        progress.update()
        back = compare_streams(tuned, guests_of(base), bound, rows, gradient=True)
        progress.update()
        frame = base.heads.frame[["head", "layer", "index", "kind"]]
        found = _weights(base, guests_of(tuned)) | {"output": forth.output}
        null = []
        for draw in range(draws):
            copies = _rounded_copies(base, rounding, seed * draws + draw)
            own = _weights(base, copies)
            null.append(own | {"output": compare_streams(base, copies, bound, rows, gradient=False).output})
            progress.update()
        z, largest = _against(found, null, frame["kind"])
        columns = {name: values.numpy() for name, values in found.items()}
        frame = frame.assign(**columns, z=z.numpy())
        frame["gained_estimate"] = forth.estimate.numpy()
        frame["lost_estimate"] = (-back.estimate).numpy()
        frame = frame.loc[_order(frame)].reset_index(drop=True)
        before, after = forth.plain, back.plain
        was, now = float(before.double().mean()), float(after.double().mean())
        frame["gained"], frame["lost"] = float("nan"), float("nan")
        changed = int((frame[list(MEASURES)] != 0).any(axis=1).sum())
        for row, head in enumerate(frame["head"].head(min(exact, changed))):
            with_theirs, with_ours = _swapped(base, tuned, bound, [head], rows)
            frame.loc[row, ["gained", "lost"]] = [with_theirs - was, now - with_ours]
            progress.update(2)
        together = []
        for size in _sizes(changed, exact):
            with_theirs, with_ours = _swapped(base, tuned, bound, list(frame["head"].head(size)), rows)
            both = with_theirs - was, now - with_ours
            shares = [value / (now - was) if now != was else float("nan") for value in both]
            together.append((size, *both, *shares))
            progress.update(2)
    names = ["heads", "gained", "lost", "gained_share", "lost_share"]
    others = pd.DataFrame(other_changes(base, tuned).items(), columns=["part", "change"])
    others = others.sort_values("change", ascending=False, kind="stable", ignore_index=True)
    wanted = _edges_of(base, edges)
    circuits = _circuits(base, tuned, behaviour, wanted, whole) if wanted else None
    named = str(rounding).removeprefix("torch.")
    notes: dict[str, Any] = {
        "metric": bound.about,
        "prompts": len(bound),
        "before": round(was, 4),
        "after": round(now, 4),
        "compared": len(frame),
        "changed": changed,
        "null": f"{draws} copies of the first model rounded at {named}, not edited",
        "largest z of a rounded copy": round(largest, 2),
        "changed beside heads": int((others["change"] > 0).sum()),
        "edges": f"{wanted:,} of each model" if circuits else "not compared",
        "dtype": str(base.W_E.dtype).removeprefix("torch."),
        "seed": seed,
    }
    notes |= correlation(frame.rename(columns={"gained": "effect", "gained_estimate": "estimate"}))
    checks = tuple(
        Check(f"heads' changes add up to their sublayers' ({way})", part.error, 1e-4)
        for way, part in (("the second model's heads", forth), ("the first model's", back))
    )
    return Diff(
        frame=frame, receipt=Receipt(checks, notes), rest=others,
        together=pd.DataFrame(together, columns=names), before=before, after=after,
        edges=_edges(circuits), circuits=circuits,
    )  # fmt: skip


def _task(task: Task | Prompts) -> Task:
    return task if isinstance(task, Task) else Task(task, metric="loss")


def _weights(base: AttentionOnlyModel, guests: Guests) -> dict[str, Tensor]:
    parts = [weight_changes(bank, guests(bank)) for bank in base.banks]
    return {name: torch.cat([part[name] for part in parts]) for name in ("OV", "QK")}


def _rounded_copies(base: AttentionOnlyModel, dtype: torch.dtype, seed: int) -> Guests:
    """The banks of an unedited copy whose weights were rounded."""
    eps = torch.finfo(dtype).eps
    generator = torch.Generator().manual_seed(seed)
    copies = {}
    for bank in base.banks:
        copies[bank.path] = made = copy.deepcopy(bank)
        for parameter in made.parameters():
            parameter.data = rounded(parameter.data, eps, generator)
    return lambda bank: copies[bank.path]


def _against(
    found: dict[str, Tensor], null: list[dict[str, Tensor]], kinds: pd.Series
) -> tuple[Tensor, float]:
    """The largest standardised change of every head, and the largest one that a rounded copy reaches."""
    z, largest = [], 0.0
    for name in MEASURES:
        draws = torch.stack([one[name] for one in null]).nan_to_num(0)
        own, reached = torch.zeros_like(found[name]), torch.zeros_like(draws)
        for kind in kinds.unique():
            at = torch.tensor((kinds == kind).tolist())
            ratio, ratios = _ratios(found[name][at], draws[:, at])
            spread = float(ratios.std()) or 1.0
            own[at] = (ratio - 1) / spread
            reached[:, at] = (ratios - 1) / spread
        z.append(own)
        largest = max(largest, float(reached.max()))
    return torch.stack(z).nan_to_num(nan=-1.0, posinf=torch.inf).amax(0), largest


def _ratios(value: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Changes over what rounding changes in the same head; of each draw, over the other draws."""
    n = len(draws)
    mean = draws.mean(0)
    floor = max(1e-3 * float(mean.median()), 1e-30)  # heads that hardly write at all
    others = (draws.sum(0) - draws) / (n - 1)
    return value / mean.clamp_min(floor), draws / others.clamp_min(floor)


def _order(frame: pd.DataFrame) -> pd.Index:
    size = frame[["gained_estimate", "lost_estimate"]].abs().max(axis=1)
    changed = (frame[list(MEASURES)] != 0).any(axis=1)
    keys = pd.DataFrame({"changed": changed, "size": size.fillna(0), "z": frame["z"]})
    return keys.sort_values(["changed", "size", "z"], ascending=False, kind="stable").index


def _sizes(n: int, exact: int) -> list[int]:
    """Of groups of heads that are put in together: 1, 2, 4, ... and all."""
    if exact == 0 or n == 0:
        return []
    return [*(2**i for i in range(8) if 2**i < n), n]


@torch.no_grad()
def _swapped(
    base: AttentionOnlyModel, tuned: AttentionOnlyModel, bound: Bound, heads: Sequence[str], rows: int
) -> tuple[float, float]:
    """The mean metric of each model with these heads of the other one."""
    at: dict[str, list[int]] = {}
    for head in heads:
        bank, index = base.heads.find(head)
        at.setdefault(bank.path, []).append(index)
    out = []
    for host, guest in ((base, tuned), (tuned, base)):
        total = 0.0
        with grafted(host, guests_of(guest), at) if at else nullcontext():
            for _, part in bound.split(rows):
                total += float(part.measure(run(host, part, part.clean)).double().sum())
        out.append(total / len(bound))
    return out[0], out[1]


def _edges_of(model: AttentionOnlyModel, edges: int | None) -> int:
    """How many edges are compared, where nobody says so: none in large models."""
    if edges is not None:
        return edges
    return EDGES if model.n_heads <= EDGES_UP_TO else 0


def _edge_options(task: Task, edges: int) -> dict[str, Any]:
    how: dict[str, Any] = {} if task.corrupt is not None else {"method": "gradient", "patch": "mean"}
    return {"units": "edges", "top_k": edges, **how}


def _circuits(
    base: AttentionOnlyModel, tuned: AttentionOnlyModel, task: Task, edges: int, max_bytes: int
) -> tuple[Discovery, Discovery]:
    options = _edge_options(task, edges)
    first, second = (discover(model, task, max_bytes=max_bytes, **options) for model in (base, tuned))
    return first, second


def _edges(circuits: tuple[Discovery, Discovery] | None) -> pd.DataFrame:
    """Both models' scores side by side; an edge that only one of them keeps has 0 in the other, whose own
    score is smaller than all that it keeps.
    """
    on = ["src", "dst", "mode", "edge"]
    if circuits is None:
        return pd.DataFrame(columns=[*on, "before", "after", "change"])
    one, two = (
        found.frame.rename(columns={"score": name})
        for found, name in zip(circuits, ("before", "after"), strict=True)
    )
    frame = one.merge(two, on=on, how="outer").fillna({"before": 0.0, "after": 0.0})
    frame["change"] = frame["after"] - frame["before"]
    order = frame["change"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)
