"""Circuits over data: every prompt's own scores of heads, groups of prompts, and what resampling leaves."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.discovery import Method, complete, rules_of
from mechinterp_attn.causal.grouping import adjusted_rand, grouped, shuffled, silhouette
from mechinterp_attn.causal.passes import scores_by_prompt
from mechinterp_attn.causal.patches import Patch, fill_of
from mechinterp_attn.causal.rules import Rules
from mechinterp_attn.causal.runs import MAX_BYTES, head_rows, plan_prompts, ready, standing
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.plan import CELL, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

NULLS = 20  # shuffles that a grouping is compared with


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptClusters(Result):
    """Prompts in groups, by what their metric goes through.

    Attributes:
        frame: one row per prompt: ``prompt`` (its number), ``task``, ``cluster`` (from 0, the largest
            first), ``closeness`` (cosine of its circuit with its group's mean), ``margin`` (less the same
            of the nearest other group).
        centres: one row per head, one column per group: the head's share in the group's mean circuit.
        silhouette: how much nearer prompts are to their own group than to the next one (Rousseeuw 1987),
            from -1 to 1.
        silhouette_null: the 95th percentile of the same where every head's scores are shuffled among the
            prompts: what grouping makes of noise.
        adjusted_rand: agreement with the tasks that the prompts are from (Hubert and Arabie 1985): 1 for
            the same groups, 0 for chance; NaN of a single task.
    """

    title: ClassVar[str] = "Prompts by their circuits"
    centres: pd.DataFrame = field(repr=False)
    silhouette: float
    silhouette_null: float
    adjusted_rand: float


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Stability(Result):
    """How much of a circuit other prompts of the same kind would have given.

    Attributes:
        frame: one row per head that is among the largest in any resample: ``head, layer, index, kind,
            score`` (mean over all prompts), ``kept`` (share of the resamples in which it is among the
            largest).
        overlap: the share of the largest heads that a resample has too, mean over resamples.
        random: the same of as many heads drawn at random.
        size: how many heads are compared.
    """

    title: ClassVar[str] = "Stability of a circuit"
    sort_by: ClassVar[str | None] = "kept"
    overlap: float
    random: float
    size: int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PromptCircuits(Result):
    """What the metric of every prompt goes through.

    Attributes:
        frame: one row per head: ``head, layer, index, kind, score`` (mean over prompts; largest first),
            ``spread`` (standard deviation over prompts).
        scores: of every prompt, in the metric's unit, heads in the model's order, ``[prompt, head]``.
        tasks: the name of the task that each prompt is from.
        method: how.
    """

    title: ClassVar[str] = "Circuits of single prompts"
    sort_by: ClassVar[str | None] = "score"
    scores: Float[Tensor, "prompt head"]
    tasks: tuple[str, ...]
    method: str

    def clusters(self, k: int = 2, *, seed: int = 0) -> PromptClusters:
        """Put the prompts into groups by their circuits (spherical k-means; Dhillon and Modha 2001).

        A prompt's circuit is taken as how its scores are spread over heads: each head's share of their
        absolute sum. Two circuits are as near as their Bhattacharyya coefficient, the sum of the square
        roots of the shares' products, which is 1 for the same circuit and 0 for two without a common head.

        Args:
            k: how many groups.
            seed: of the starts, of which the best is kept, and of the shuffles that it is compared with.

        Raises:
            MechInterpError: fewer than two groups, more than prompts, or a prompt all of whose scores are
                0.
        """
        n, generator = len(self.scores), torch.Generator().manual_seed(seed)
        wrong = [] if 2 <= k <= n else [f"k={k}, expected 2 to the number of prompts, {n}"]
        nothing = (self.scores.abs().sum(1) == 0).nonzero()[:, 0].tolist()
        wrong += [f"prompt {i} has scores of 0 for every head: it has no direction" for i in nothing[:3]]
        if wrong:
            raise MechInterpError(listing("these prompts cannot be grouped", wrong))
        spread = self.scores.abs().sqrt()  # of length 1 after division: roots of shares
        own, centres = grouped(spread, k, generator)
        cosines = torch.nn.functional.normalize(spread, dim=1) @ centres.T
        closeness = cosines.gather(1, own[:, None])[:, 0]
        other = cosines.scatter(1, own[:, None], -torch.inf).amax(1)
        null = []
        for _ in range(NULLS):
            noise = shuffled(spread, generator)
            null.append(silhouette(noise, grouped(noise, k, generator)[0]))
        frame = pd.DataFrame(
            {
                "prompt": range(n),
                "task": self.tasks,
                "cluster": own.tolist(),
                "closeness": closeness.tolist(),
                "margin": (closeness - other).tolist(),
            }
        )
        heads = self.frame.sort_index()["head"].tolist()
        several = len(set(self.tasks)) > 1
        found = silhouette(spread, own)
        limit = float(torch.tensor(null).quantile(0.95))
        short = max(0.0, limit - found)
        check = Check("clusters are farther apart than in shuffled scores (short by)", short, 0.0)
        return PromptClusters(
            frame=frame,
            receipt=Receipt(
                (check,), {"method": self.method, "groups": k, "seed": seed, "shuffles": NULLS}
            ),
            centres=pd.DataFrame(centres.T.square().numpy(), columns=range(k))
            .assign(head=heads)
            .set_index("head"),
            silhouette=found,
            silhouette_null=limit,
            adjusted_rand=adjusted_rand(own.tolist(), self.tasks) if several else float("nan"),
        )

    def stability(self, size: int = 20, *, draws: int = 100, seed: int = 0) -> Stability:
        """Draw the prompts anew, with replacement, and see which heads are among the largest again.

        Args:
            size: how many heads, by the size of their mean score.
            draws: how many resamples.
            seed: of the draws.

        Raises:
            MechInterpError: a size outside the model, or no draw.
        """
        n, n_heads = self.scores.shape
        wrong = [] if 1 <= size <= n_heads else [f"size={size}, expected 1 to {n_heads:,}"]
        wrong += [] if draws >= 1 else [f"draws={draws}, expected at least 1"]
        if wrong:
            raise MechInterpError(listing("the circuit's stability cannot be measured", wrong))
        rows = torch.randint(n, (draws, n), generator=torch.Generator().manual_seed(seed))
        means = torch.stack([self.scores[row].mean(0) for row in rows])
        drawn = torch.zeros(draws, n, dtype=means.dtype).scatter_add(
            1, rows, torch.ones_like(rows).double()
        )
        off = float((drawn @ self.scores / n - means).abs().max())
        scale = float(self.scores.abs().max())
        check = Check("resampled means from how often each prompt was drawn", off, 1e-9 * max(1.0, scale))
        among = torch.zeros(draws, n_heads, dtype=torch.bool)
        among.scatter_(1, means.abs().topk(size, 1).indices, True)
        top = self.scores.mean(0).abs().topk(size).indices
        kept = among.double().mean(0)
        frame = self.frame.sort_index().drop(columns="spread").assign(kept=kept.numpy())
        frame = frame[frame["kept"] > 0].sort_values("kept", ascending=False, kind="stable")
        notes = {"method": self.method, "prompts": n, "resamples": draws, "seed": seed}
        return Stability(
            frame=frame.reset_index(drop=True),
            receipt=Receipt((check,), notes),
            overlap=float(kept[top].mean()),
            random=size / n_heads,
            size=size,
        )


def _tasks(tasks: Task | Sequence[Task]) -> list[Task]:
    every: list[Any] = list(tasks) if isinstance(tasks, list | tuple) else [tasks]
    if not every:
        raise MechInterpError("there are no tasks; give a mia.Task, or several")
    return every


def _plan(
    model: AttentionOnlyModel,
    tasks: Task | Sequence[Task],
    method: Method | Rules,
    steps: int,
    max_bytes: int,
) -> Plan:
    every = _tasks(tasks)
    largest = max((bound_to(model, task) for task in every), key=lambda bound: bound.clean.tokens.numel())
    passes = {"eap-ig": steps, "eap-ig-activations": steps * len(model.sublayers())}.get(str(method), 1)
    prompts = sum(map(len, every))
    several = f" for {len(every)} tasks, the largest" if len(every) > 1 else ""
    return plan_prompts(
        model, largest, f"scores of heads{several}", max_bytes,
        runs=(5 + 4 * passes) * prompts / len(largest), result=2 * CELL * prompts * model.n_heads,
        backward=True, times=2,
    )  # fmt: skip


@plans(_plan)
def prompt_circuits(
    model: AttentionOnlyModel,
    tasks: Task | Sequence[Task],
    method: Method | Rules = "secant",
    *,
    patch: Patch = "corrupt",
    steps: int = 5,
    max_bytes: int = MAX_BYTES,
) -> PromptCircuits:
    """Score heads of every kind on every prompt by itself: ``discover`` without the mean.

    ``.clusters(k)`` of the result groups prompts by their circuits, ``.stability(size)`` says how much of
    the mean circuit depends on which prompts were drawn.

    Args:
        model: the converted model.
        tasks: a behaviour, or several, whose prompts are looked at together.
        method: as for ``discover``, but for "exact".
        patch: as for ``discover``.
        steps: of "eap-ig".
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: no tasks, or everything in which one of them does not fit the model or the choices.
    """
    if method == "exact":
        raise MechInterpError("method='exact' patches heads on all prompts; see causal.effects")
    every = _tasks(tasks)
    rules, name = rules_of(method, steps, patch), method if isinstance(method, str) else str(method)
    max_bytes = within(_plan(model, every, method, steps, max_bytes), max_bytes, "fewer prompts").left(
        max_bytes
    )
    found: list[Tensor] = []
    checks: list[Check] = []
    notes: dict[str, Any] = {"method": name, "patch": patch, "prompts": sum(map(len, every))}
    for number, task in enumerate(every):
        bound = ready(model, bound_to(model, task), max_bytes)
        bound.differentiable(f"method={name!r}")
        fill = fill_of(model, bound, patch, max_bytes=max_bytes)
        inputs = torch.zeros(len(bound), dtype=torch.float64)
        for at, scores, own in scores_by_prompt(model, bound, fill, rules, name, steps, max_bytes):
            found.append(scores.sum(-1))
            inputs[at] = own
        state = standing(model, bound, max_bytes)
        label = task.name or f"task {number}"
        notes[label] = f"{len(task)} prompts, metric {bound.about}"
        own_notes: dict[str, Any] = {}
        checks += complete(model, state, rules, patch, inputs, own_notes)
        notes |= {f"{label}: {key}": value for key, value in own_notes.items()}
    scores = torch.cat(found)
    frame = head_rows(model).assign(
        score=scores.mean(0).numpy(), spread=scores.std(0, correction=0).numpy()
    )
    order = frame["score"].abs().sort_values(ascending=False, kind="stable").index
    return PromptCircuits(
        frame=frame.loc[order],
        receipt=Receipt(tuple(checks), notes),
        scores=scores,
        tasks=tuple(task.name or f"task {i}" for i, task in enumerate(every) for _ in range(len(task))),
        method=name,
    )
