"""Runs of parts of a model alone: some heads, or some edges, and the counterfactual everywhere else."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar, cast

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.cuts import Cut
from mechinterp_attn.causal.flow import FIRST, Flow, splits
from mechinterp_attn.causal.runs import hold, patched, rows_at_once, watched
from mechinterp_attn.causal.task import Task
from mechinterp_attn.causal.wires import ARROW, POOL, Edges, Wires, edge_of
from mechinterp_attn.causal.written import pool_bytes
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head


@dataclass(frozen=True, eq=False)
class Parts:
    """Heads or edges by number; with ``rest``, all but these."""

    ids: Int[Tensor, " part"]
    rest: bool = False


@dataclass(frozen=True, eq=False)
class Alone(ABC):
    """A behaviour with some parts of the model alone.

    Attributes:
        order: the ranked heads or edges, by number, the most important first.
        total: how many the model has.
        task: what they were ranked for, where that is known.
    """

    units: ClassVar[str]
    model: AttentionOnlyModel
    bound: Bound
    order: Int[Tensor, " part"]
    total: int
    task: Task | None
    max_bytes: int

    @abstractmethod
    def metric(self, some: list[Parts]) -> Float[Tensor, "run n"]:
        """The metric of every prompt with each of the parts alone, float64."""

    @abstractmethod
    def names(self) -> list[str]:
        """Of the ranked parts, in order."""

    @abstractmethod
    def drawn(self, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``n`` parts of the model at random."""

    def held_out(self, task: Task) -> dict[str, str]:
        """For a receipt: how many of a task's prompts the parts were ranked on, where that is known."""
        if self.task is None:
            return {}
        seen = {repr(prompt) for prompt in self.task.clean}
        same = sum(repr(prompt) in seen for prompt in task.clean)
        if not same:
            return {"held out": "none of the prompts was used to find the ranking"}
        return {"not held out": f"{same} of {len(task)} prompts were used to find the ranking"}


class AloneHeads(Alone):
    """Heads; all others hold what they hold in the counterfactual. The embedding is always there."""

    units = "heads"

    def names(self) -> list[str]:
        labels = list(self.model.heads)
        return [labels[i] for i in self.order]

    def drawn(self, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        return torch.randperm(self.total, generator=generator)[:n]

    @torch.no_grad()
    def metric(self, some: list[Parts]) -> Float[Tensor, "run n"]:
        cuts = [self._cut(parts) for parts in some]
        out = torch.zeros(len(cuts), len(self.bound), dtype=torch.float64)
        most = rows_at_once(self.model, self.bound, self.max_bytes)
        rows = min(most, len(self.bound))
        together = max(1, most // rows)
        with Progress(desc="circuits alone", total=len(cuts) * len(self.bound)) as progress:
            for at, part in self.bound.split(rows):
                other = part.counterfactual("faithfulness")
                held, _ = hold(self.model, part, other)
                for start in range(0, len(cuts), together):
                    chosen = cuts[start : start + together]
                    metric = patched(self.model, part, part.clean, chosen, held)
                    out[start : start + len(chosen), at] = metric.double()
                    progress.update(len(chosen) * len(part))
        return out

    def _cut(self, parts: Parts) -> Cut:
        """Takes out all other heads."""
        out = torch.ones(self.total, dtype=torch.bool)
        out[parts.ids] = False
        out = ~out if parts.rest else out
        sizes = [bank.n_heads for bank in self.model.banks]
        whole = {
            bank.path: own.nonzero()[:, 0].tolist()
            for bank, own in zip(self.model.banks, out.split(sizes), strict=True)
        }
        return Cut("circuit", whole=whole)


@dataclass(frozen=True, eq=False)
class AloneEdges(Alone):
    """Edges; all others bring what they bring in the counterfactual."""

    units = "edges"
    edges: Edges

    def names(self) -> list[str]:
        return self.edges.names(self.order)

    def drawn(self, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        return self.edges.drawn(n, generator)

    @torch.no_grad()
    def metric(self, some: list[Parts]) -> Float[Tensor, "run n"]:
        edges = self.edges
        wires = [Wires(edges, parts.ids, rest=parts.rest) for parts in some]
        out = torch.zeros(len(wires), len(self.bound), dtype=torch.float64)
        rows = max(1, rows_at_once(self.model, self.bound, self.max_bytes) // 4)
        if edges.pools:
            width = self.bound.clean.tokens.shape[1]
            rows = max(1, min(rows, self.max_bytes // (2 * pool_bytes(self.model, width))))
        with Progress(desc="circuits alone", total=len(wires) * len(self.bound)) as progress:
            for at, part in self.bound.split(rows):
                other = part.counterfactual("faithfulness")
                seen, held = watched(self.model, part, other, {FIRST})
                embed = watched(self.model, part, part.clean, {FIRST})[0][FIRST] - seen[FIRST]
                for row, own in enumerate(wires):
                    flow = Flow(self.model, part, other, held, edges, own, embed=embed)
                    out[row, at] = part.measure(flow.logits).double().cpu()
                    progress.update(len(part))
        return out


def alone_of(model: AttentionOnlyModel, bound: Bound, ranking: Any, max_bytes: int) -> Alone:
    """The behaviour, and a ranking in numbers.

    Raises:
        MechInterpError: the ranking is none, or names what the model has not.
    """
    task = getattr(ranking, "task", None)
    units, order = _order(ranking)
    if not order:
        raise MechInterpError("the ranking is empty; give heads or edges, the most important first")
    if units == "edges":
        splits(model)
        edges = Edges.of(model, pools=any(end.endswith(POOL) for edge in order for end in edge[:2]))
        return AloneEdges(model, bound, _once(edges.ids(order)), len(edges), task, max_bytes, edges)
    place = {label: number for number, label in enumerate(model.heads)}
    labels = order if set(order) <= place.keys() else model.heads.labels(order)
    virtual = [label for label in labels if label not in place]
    if virtual:
        raise MechInterpError(
            f"{', '.join(virtual[:3])}: a circuit has heads, or edges such as 'L0H1 -V-> L1H2', and no "
            "virtual heads"
        )
    ids = torch.tensor([place[label] for label in labels])
    return AloneHeads(model, bound, _once(ids), len(place), task, max_bytes)


def _once(ids: Tensor) -> Tensor:
    return torch.tensor(list(dict.fromkeys(ids.tolist())), dtype=torch.long)


def _order(ranking: Any) -> tuple[str, list[Any]]:
    """Heads or edges in order, from what a user may give."""
    frame = getattr(ranking, "frame", ranking)
    if isinstance(frame, pd.DataFrame):
        edges = {"src", "dst", "mode"} <= set(frame.columns)
        if not edges and "head" not in frame:
            raise MechInterpError(
                f"a table with columns {list(frame.columns)} is not a ranking; expected 'head', or 'src', "
                "'dst' and 'mode', and 'score'"
            )
        if "score" in frame:
            frame = frame.loc[frame["score"].abs().sort_values(ascending=False, kind="stable").index]
        if edges:
            return "edges", list(frame[["src", "dst", "mode"]].itertuples(index=False, name=None))
        return "heads", list(dict.fromkeys(frame["head"]))
    if hasattr(ranking, "heads") and hasattr(ranking, "edges"):  # a Circuit
        return ("edges", list(ranking.edges)) if ranking.edges else ("heads", list(ranking.heads))
    given = [ranking] if isinstance(ranking, str | Head) else list(ranking)
    if given and all(_is_edge(one) for one in given):
        return "edges", [edge_of(cast(Any, one)) for one in given]
    return "heads", given


def _is_edge(one: Any) -> bool:
    if isinstance(one, str):
        return bool(ARROW.search(one))
    return isinstance(one, tuple) and len(one) == 3 and one[2] in ("Q", "K", "V", "")
