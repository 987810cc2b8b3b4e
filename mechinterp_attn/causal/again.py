"""Whether a circuit is found again: on other prompts, and where the same is said in other words."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import numpy as np
import pandas as pd

from mechinterp_attn.causal.circuit import Circuit
from mechinterp_attn.causal.discovery import Discovery, Method, discover
from mechinterp_attn.causal.evaluation import faithfulness
from mechinterp_attn.causal.patches import Patch
from mechinterp_attn.causal.rules import Rules
from mechinterp_attn.causal.runs import MAX_BYTES, plan_prompts
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.causal.wires import edge_name
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.plan import CELL, TABLE, Plan, joined, plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

DRAWS = 10_000  # pairs of random circuits that an overlap is held against


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Overlap(Result):
    """How much circuits overlap that were found on different prompts, and carry on each other's.

    Attributes:
        frame: one row per comparison: ``between``, such as "halves (seed 0)" or a rephrasing's name;
            ``shared``, how many heads or edges both circuits have; ``jaccard``, that out of all that either
            has; ``chance``, the same of random circuits with as many attention heads and neurons each (of
            edges: as many edges), a mean; ``p``, how often those share as many; then, on prompts that the
            circuit was not found on: ``faithfulness`` when it runs alone, ``random``, of as many heads or
            edges at random, and ``removed``, what is left when it alone is held to the counterfactual.
        members: one row per head or edge that is in any of the circuits of halves and rephrasings, with the
            ``share`` of them that have it, largest first (Meinshausen & Bühlmann 2010, "stability
            selection").
        circuit: found on all prompts of the task.
        size: how many heads or edges each circuit has.
        total: how many there are in the model.
    """

    title: ClassVar[str] = "Is the circuit found again?"
    sort_by: ClassVar[str | None] = "jaccard"
    members: pd.DataFrame
    circuit: Circuit
    size: int
    total: int


def _plan(
    model: AttentionOnlyModel,
    task: Task,
    size: int,
    rephrasings: Sequence[Task],
    resamples: int,
    method: Method | Rules,
    units: Literal["heads", "edges"],
    pools: bool,
    draws: int,
    max_bytes: int,
) -> Plan:
    """A ranking for every half, one of all prompts, one for each rephrasing; circuits alone for each."""
    edges = units == "edges"
    each = 4 if edges else 1
    parts = []
    for one in (task, *rephrasings, *([task] * resamples)):  # two halves are as much as the whole
        bound = bound_to(model, one)
        ranking = plan(discover, model, one, method, units, pools=pools, max_bytes=max_bytes)
        parts += [ranking] * (1 if one is task else 2)
        runs: dict[str, Any] = {
            "runs": 5 + each * (3 + draws),
            "together": 1 if edges else 3 + draws,
            "times": each,
        }
        what, result = f"circuits of {units}", CELL * TABLE * size
        parts.append(plan_prompts(model, bound, what, max_bytes, result=result, **runs))
    return joined(f"circuits of {size:,} {units}, found again", parts)


@plans(_plan)
def overlap(
    model: AttentionOnlyModel,
    task: Task,
    size: int,
    *,
    rephrasings: Sequence[Task] = (),
    resamples: int = 3,
    method: Method | Rules = "secant",
    units: Literal["heads", "edges"] = "heads",
    pools: bool = False,
    patch: Patch = "corrupt",
    draws: int = 3,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Overlap:
    """Find a circuit again and again: on halves of the prompts, and on rephrasings of the behaviour.

    Every circuit is the ``size`` heads or edges with the largest scores of ``discover``. For a half, the
    other one is held out; for a rephrasing, the circuit of the whole task runs on the rephrased prompts.

    Args:
        model: the converted model.
        task: the behaviour, with counterfactuals.
        size: how many heads or edges a circuit has.
        rephrasings: the same behaviour in other words, such as ``mia.tasks.ioi(model, wording=k)``.
        resamples: how often the prompts are halved at random.
        method: as for ``discover``, as are units, pools and patch.
        units: "heads" or "edges".
        pools: of edges: whole MLPs are their ends.
        patch: what heads would hold instead, for the ranking.
        draws: how many random circuits run beside each; at least 1.
        seed: of halves and random circuits.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: fewer than 2 prompts, nothing to compare, a size that no ranking reaches; what
            ``discover`` and ``faithfulness`` find.
    """
    bound_to(model, task)
    wrong = _wrong(task, size, rephrasings, resamples, draws)
    if wrong:
        raise MechInterpError(listing("circuits cannot be compared", wrong))
    options: dict[str, Any] = {"method": method, "units": units, "pools": pools}
    made = _plan(model, task, size, rephrasings, resamples, draws=draws, max_bytes=max_bytes, **options)
    within(made, max_bytes, "fewer prompts")
    options |= {"patch": patch, "seed": seed, "max_bytes": max_bytes}
    rows: list[dict[str, Any]] = []
    checks: list[Check] = []
    found: list[Circuit] = []

    def ranked(prompts: Task) -> Circuit:
        made = discover(model, prompts, **options)
        checks.extend(made.receipt.checks)
        found.append(made.circuit(size))
        return found[-1]

    def carried(circuit: Circuit, prompts: Task) -> dict[str, float]:
        made = faithfulness(model, prompts, circuit, [size], draws=draws, seed=seed, max_bytes=max_bytes)
        checks.extend(made.receipt.checks)
        return dict(made.frame.iloc[0][["faithfulness", "random", "removed"]])

    all_of_it = discover(model, task, **options)
    checks.extend(all_of_it.receipt.checks)
    whole = all_of_it.circuit(size)
    chance = _Chance(model, all_of_it, seed)
    for k in range(resamples):
        halves = task.split(seed=seed + k)
        one, two = (ranked(half) for half in halves)
        there = carried(one, halves[1]), carried(two, halves[0])
        both = {name: (there[0][name] + there[1][name]) / 2 for name in there[0]}
        rows.append({"between": f"halves (seed {seed + k})", **chance.of(one, two), **both})
    for number, other in enumerate(rephrasings):
        again = ranked(other)
        name = f"rephrasing {number}" + (f" ({other.name})" if other.name else "")
        rows.append({"between": name, **chance.of(whole, again), **carried(whole, other)})
    notes: dict[str, Any] = {
        "metric": task.about, "method": all_of_it.method, "units": units, "prompts": len(task),
        "circuits": len(found), "seed": seed,
    }  # fmt: skip
    if all_of_it.standing.absent is not None:
        notes["warning"] = all_of_it.standing.absent
    return Overlap(
        frame=pd.DataFrame(rows),
        receipt=Receipt(_worst(checks), notes),
        members=_members(found, units),
        circuit=whole,
        size=size,
        total=all_of_it.total,
    )


def _wrong(task: Task, size: int, rephrasings: Sequence[Task], resamples: int, draws: int) -> list[str]:
    wrong = []
    if resamples < 0 or resamples + len(rephrasings) < 1:
        wrong.append(f"resamples={resamples} and no rephrasings; give at least one of them")
    if resamples > 0 and len(task) < 2:
        wrong.append(f"a task of {len(task)} prompt has no halves; give more prompts, or resamples=0")
    if size < 1 or draws < 1:
        wrong.append(f"size={size}, draws={draws}; expected at least 1")
    return wrong


def names_of(circuit: Circuit) -> list[str]:
    """Its edges, or its heads where there are none."""
    return [edge_name(*edge) for edge in circuit.edges] or list(circuit.heads)


class _Chance:
    """Overlaps of random circuits: heads of every kind are drawn as often as the circuits have them, since
    a few attention heads among thousands of neurons would meet again for no other reason.
    """

    def __init__(self, model: AttentionOnlyModel, ranking: Discovery, seed: int):
        self._edges = ranking.units == "edges"
        kinds = model.heads.frame.set_index("head")["kind"]
        self._kind = {} if self._edges else kinds.to_dict()
        self._of = Counter({"": ranking.total}) if self._edges else Counter(kinds)
        self._seed = seed

    def of(self, one: Circuit, two: Circuit) -> dict[str, Any]:
        mine, theirs = set(names_of(one)), set(names_of(two))
        shared, either = len(mine & theirs), len(mine | theirs)
        counts = [Counter(self._kind.get(name, "") for name in names) for names in (mine, theirs)]
        random = np.random.default_rng(self._seed)
        drawn = np.zeros(DRAWS, dtype=np.int64)
        for kind, n in self._of.items():
            a, b = (count[kind] for count in counts)
            if a and b:
                drawn += random.hypergeometric(a, min(n - a, 10**9 - 1 - a), b, DRAWS)
        both = len(mine) + len(theirs)
        return {
            "shared": shared,
            "jaccard": shared / either,
            "chance": float((drawn / (both - drawn)).mean()),
            "p": (1 + int((drawn >= shared).sum())) / (1 + DRAWS),
        }


def _members(found: Sequence[Circuit], units: str) -> pd.DataFrame:
    seen = Counter(name for circuit in found for name in names_of(circuit))
    frame = pd.DataFrame(seen.most_common(), columns=[units[:-1], "share"])
    frame["share"] /= len(found)
    return frame


def _worst(checks: Sequence[Check]) -> tuple[Check, ...]:
    """Of every kind of check the one that is furthest off."""
    worst: dict[str, Check] = {}
    for check in checks:
        known = worst.get(check.name)
        if known is None or check.error / check.tolerance > known.error / known.tolerance:
            worst[check.name] = check
    return tuple(worst.values())
