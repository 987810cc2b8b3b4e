"""Causes of one prediction: what becomes of it when heads are cut, on the prompt itself.

A head that is cut holds what it holds on average over the prompt's tokens (or nothing, on prompts too
short for an average), everywhere or at one position. Every number is of a run of the whole model.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.cuts import Cut, cut_of_all, cutting
from mechinterp_attn.causal.head_effects import Effects, effects, estimates_of
from mechinterp_attn.causal.patches import Fill, fill_of
from mechinterp_attn.causal.runs import plan_prompts, rows_at_once, run
from mechinterp_attn.causal.task import Task
from mechinterp_attn.core.plan import MAX_BYTES, Plan, joined, plan

if TYPE_CHECKING:
    from mechinterp_attn.frozen.prompt import Frozen

FEW = 4  # tokens; below, the average over a prompt is the prompt
NEURONS = 24  # measured by cutting, by the size of their estimates
LEAST = 8  # heads of each kind measured by cutting, however large the model
FLOPS = 5e11  # of all those runs together: seconds


class Look(NamedTuple):
    """A head looking from one token at another."""

    head: str
    query: int
    key: int


class Outcome(NamedTuple):
    """A run with something cut.

    Attributes:
        p: probability of the answer.
        weights: of the looks that were watched.
    """

    p: float
    weights: tuple[float, ...] = ()


@dataclass(eq=False)
class Causes:
    """One prediction under cuts.

    Attributes:
        frozen: the prompt.
        target, position: the answer and where it is predicted, from the start.
    """

    frozen: Frozen
    target: int
    position: int

    @cached_property
    def task(self) -> Task:
        """The prediction as a behaviour of one prompt, measured by the answer's loss."""
        return Task(self.frozen.tokens[None], answer=[self.target], position=self.position, metric="loss")

    @property
    def patch(self) -> Literal["mean", "zero"]:
        return "mean" if len(self.frozen.tokens) >= FEW else "zero"

    @property
    def meaning(self) -> str:
        """What a cut is, in words."""
        given = "its average over the prompt's tokens" if self.patch == "mean" else "nothing"
        return f"a head that is cut holds {given} in place of what it holds"

    @cached_property
    def probability(self) -> float:
        """Of the answer, by the model itself."""
        logits = self.frozen.logits[self.position].double()
        return float(logits.softmax(-1)[self.target])

    @cached_property
    def effects(self) -> Effects:
        """Of cutting heads everywhere: estimated for all, exact for attention heads (for the largest
        of them in a large model) and for some neurons.
        """
        model = self.frozen.model
        rough = model.heads.frame.assign(size=self.estimates.sum(1).abs().numpy())
        rough = rough.sort_values("size", ascending=False, kind="stable")
        most = self.measured.items()
        chosen = [label for kind, k in most for label in rough["head"][rough["kind"] == kind][:k]]
        return effects(model, self.task, patch=self.patch, exact=chosen)

    @property
    def measured(self) -> dict[str, int]:
        """How many heads of each kind are measured by cutting."""
        model = self.frozen.model
        cost = 2 * sum(p.numel() for p in model.parameters()) * len(self.frozen.tokens)
        affordable = max(LEAST, int(FLOPS / cost))
        kinds = dict.fromkeys(["attention", "mlp", *(bank.kind for bank in model.banks)])
        most = {kind: affordable if kind == "attention" else min(NEURONS, affordable) for kind in kinds}
        return {kind: min(k, len(model.heads.of(kind))) for kind, k in most.items()}

    def plan(self, cuts: int) -> Plan:
        """The cost of estimates and effects, and of so many runs with something cut.

        Args:
            cuts: how many runs.
        """
        model, options = self.frozen.model, {"patch": self.patch}
        exact = sum(self.measured.values())
        runs = plan_prompts(model, self._bound, f"{cuts:,} cuts", MAX_BYTES, runs=cuts + 1, together=cuts)
        parts = [
            plan(effects, model, self.task, **options, positions="each", exact=0),
            plan(effects, model, self.task, **options, exact=exact),
            runs,
        ]
        return joined("causes", parts)

    @cached_property
    def frame(self) -> pd.DataFrame:
        """By head: ``kind``, ``cut`` (what the answer's log-probability loses when the head is cut, nats;
        NaN where not measured), ``estimate`` of it, and ``p`` when cut.
        """
        found = self.effects.frame.set_index("head")
        frame = pd.DataFrame(
            {"kind": found["kind"], "cut": -found["effect"], "estimate": -found["estimate"]}
        )
        return frame.assign(p=(math.log(self.probability) - frame["cut"]).map(math.exp))

    @cached_property
    def estimates(self) -> Float[Tensor, "head pos"]:
        """What the answer's log-probability would lose if a head were cut at a position alone, for all
        heads from one backward pass.
        """
        return -estimates_of(self.frozen.model, self._bound, self._patch, MAX_BYTES)

    def likeliest(self, labels: Sequence[str], position: int, k: int) -> list[str]:
        """The ``k`` heads whose cuts at a position do most, by these estimates."""
        row = self._rows
        return sorted(labels, key=lambda label: -abs(float(self.estimates[row[label], position])))[:k]

    @cached_property
    def _rows(self) -> dict[str, int]:
        return {label: row for row, label in enumerate(self.frozen.model.heads)}

    @cached_property
    def _bound(self) -> Bound:
        return self.task.bind(self.frozen.model)

    @cached_property
    def _fill(self) -> dict[str, Tensor]:
        return self._patch.of(self.frozen.model, slice(None), self._bound)

    @cached_property
    def _patch(self) -> Fill:
        return fill_of(self.frozen.model, self._bound, self.patch, max_bytes=MAX_BYTES)

    @cached_property
    def patterns(self) -> dict[str, Tensor]:
        """The run's own attention patterns, ``[head, query, key]`` by path."""
        return {f.bank.path: f.pattern for f in self.frozen.banks if f.bank.mixes_positions}

    def weight(self, look: Look) -> float:
        """How much of a head's attention a look is."""
        bank, index = self.frozen.model.heads.find(look.head)
        return float(self.patterns[bank.path][index, look.query, look.key])

    @torch.no_grad()
    def without(
        self,
        groups: Sequence[Sequence[str]],
        at: Sequence[int | None] | int | None = None,
        *,
        watch: Sequence[Look] = (),
        hold: bool = False,
        blind: Sequence[Look] = (),
    ) -> list[Outcome]:
        """Runs without heads, each group in a run of its own.

        Args:
            at: the only position where they are cut, of all groups or of each; None: everywhere.
            watch: looks whose weights are wanted.
            hold: keep all attention patterns as they were in the run without cuts.
            blind: looks that are taken away: their weight is zero, that of others as it was.
        """
        model, bound = self.frozen.model, self._bound
        places = at if isinstance(at, Sequence) else [at] * len(groups)
        cuts = [self._cut(group, place) for group, place in zip(groups, places, strict=True)]
        rows, out = rows_at_once(model, bound, MAX_BYTES), []
        for start in range(0, len(cuts), rows):
            some = cuts[start : start + rows]
            many, seen = bound.repeat(len(some)), {look: torch.empty(0) for look in watch}
            hooks = [*cutting(model, some, self._fill), *self._edits(hold, blind, seen)]
            loss = many.measure(run(model, many, bound.clean.repeat(len(some)), hooks))
            for i, nats in enumerate(loss.double().tolist()):
                out.append(Outcome(math.exp(-nats), tuple(float(seen[look][i]) for look in watch)))
        return out

    @torch.no_grad()
    def patterns_without(self, label: str) -> dict[str, np.ndarray]:
        """Every attention head's pattern with one head cut everywhere, ``[query, key + bias]`` by label."""
        model, bound = self.frozen.model, self._bound
        seen: dict[str, Tensor] = {}

        def hook_of(path: str) -> Callable[..., None]:
            def hook(pattern: Tensor, hook: object) -> None:
                seen[path] = pattern[0].detach()

            return hook

        banks = [bank for bank in model.banks if bank.mixes_positions]
        watching = [(bank.hook("pattern"), hook_of(bank.path)) for bank in banks]
        run(model, bound, bound.clean, [*cutting(model, [self._cut([label], None)], self._fill), *watching])
        return {
            own: bank.dense_pattern(seen[bank.path], i).double().cpu().numpy()
            for bank in banks
            for i, own in enumerate(bank.labels())
        }

    def blinded(self, looks: Sequence[Look]) -> float:
        """The answer's probability with looks taken away."""
        return self.without([[]], blind=looks)[0].p

    def _cut(self, group: Sequence[str], place: int | None) -> Cut:
        cut = cut_of_all(self.frozen.model, list(group), self._bound.clean)
        return cut if place is None else replace(cut, positions=slice(place, place + 1))

    def _edits(
        self, hold: bool, blind: Sequence[Look], seen: dict[Look, Tensor]
    ) -> list[tuple[str, Callable[..., Tensor]]]:
        """Hooks on patterns: held, blinded, watched."""
        model = self.frozen.model
        at = {look: model.heads.find(look.head) for look in (*blind, *seen)}

        def hook_of(path: str) -> Callable[..., Tensor]:
            def hook(pattern: Tensor, hook: object) -> Tensor:
                if hold:
                    pattern = self.patterns[path].to(pattern).expand_as(pattern)
                for look in blind:
                    if at[look][0].path == path:
                        pattern = pattern.clone()
                        pattern[:, at[look][1], look.query, look.key] = 0
                for look in seen:
                    if at[look][0].path == path:
                        seen[look] = pattern[:, at[look][1], look.query, look.key].detach().cpu()
                return pattern

            return hook

        return [(b.hook("pattern"), hook_of(b.path)) for b in model.banks if b.mixes_positions]
