"""A circuit: the heads and edges that are said to carry a behaviour."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired

from typing_extensions import TypedDict

from mechinterp_attn.causal.evaluation import Faithfulness, faithfulness
from mechinterp_attn.causal.minimal import Minimality, minimality
from mechinterp_attn.causal.task import Task
from mechinterp_attn.causal.wires import ENDS, POOL, Edge, edge_name
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.fields import wrong_fields
from mechinterp_attn.core.files import write_text
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.reading import read_json
from mechinterp_attn.model.attention_only import AttentionOnlyModel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


class _Saved(TypedDict):
    heads: list[str]
    edges: list[Edge]
    scores: NotRequired[list[float]]


@dataclass(frozen=True, eq=False)
class Circuit:
    """A set of heads, and of edges between them, that is claimed to carry a behaviour.

    Attributes:
        heads: labels, the most important first.
        edges: ``(from, to, mode)`` with mode "Q", "K" or "V"; from "embed" and to "logits" (mode "") are
            allowed, and whole MLPs such as "L3N*" (which read with mode ""). Empty where only heads are
            known: then every edge between them is meant.
        task: the behaviour; None where it is not known.
        scores: of the heads, or of the edges where there are edges.
    """

    heads: tuple[str, ...]
    edges: tuple[Edge, ...] = ()
    task: Task | None = None
    scores: tuple[float, ...] = ()

    @classmethod
    def of_edges(
        cls, edges: Sequence[Edge], *, task: Task | None = None, scores: Sequence[float] = ()
    ) -> Circuit:
        """A circuit of edges; its heads are their ends.

        Args:
            edges: source, destination and mode of each.
            task: what the circuit does.
            scores: one per edge, in the same order.
        """
        ends = dict.fromkeys(end for src, dst, _ in edges for end in (src, dst) if end not in ENDS)
        return cls(tuple(ends), tuple(edges), task, tuple(scores))

    def __len__(self) -> int:
        """How many edges, or heads where there are no edges."""
        return len(self.edges) or len(self.heads)

    def spec(self) -> dict[str, Any]:
        """The circuit as ``detect.assert_circuit`` takes it: its heads as members and the edges between
        them; not those of whole MLPs, of which it makes no claim.
        """
        found: dict[str, Any] = {"heads": dict.fromkeys(self.heads, "member")}
        edges = [
            edge_name(src, dst, mode)
            for src, dst, mode in self.edges
            if mode and src not in ENDS and not src.endswith(POOL)
        ]
        if edges:
            found["edges"] = edges
        return found

    def diff(self, other: Circuit) -> dict[str, list[str]]:
        """What two circuits share and what only one has.

        Args:
            other: the circuit to compare with.

        Returns:
            ``both``, ``only_self``, ``only_other``: edges by name where both have edges, else heads.
        """
        by_edges = bool(self.edges and other.edges)
        mine, theirs = (
            [edge_name(*edge) for edge in c.edges] if by_edges else list(c.heads) for c in (self, other)
        )
        return {
            "both": [name for name in mine if name in set(theirs)],
            "only_self": [name for name in mine if name not in set(theirs)],
            "only_other": [name for name in theirs if name not in set(mine)],
        }

    def faithfulness(
        self, model: AttentionOnlyModel, task: Task | None = None, **options: Any
    ) -> Faithfulness:
        """How much of the behaviour the circuit carries alone, and what is left without it.

        Args:
            model: the converted model.
            task: prompts, best others than it was found on; by default the circuit's own.
            options: of ``causal.faithfulness``; with ``sizes``, the circuit's first heads or edges.

        Raises:
            MechInterpError: neither task is there; what ``causal.faithfulness`` finds.
        """
        return faithfulness(model, self._task(task), self, **({"sizes": [len(self)]} | options))

    def minimality(self, model: AttentionOnlyModel, task: Task | None = None, **options: Any) -> Minimality:
        """What each of its heads or edges is worth in it; arguments and errors as for ``faithfulness``.

        Args:
            model: the converted model.
            task: prompts; by default the circuit's own.
            options: of ``causal.minimality``.
        """
        return minimality(model, self._task(task), self, **options)

    def draw(self) -> Figure:
        """A plotly figure: heads by layer, edges in the colours of their modes."""
        return draw(self)

    def _task(self, task: Task | None) -> Task:
        own = self.task if task is None else task
        if own is None:
            raise MechInterpError(
                "this circuit has no task, since a file cannot hold one; give one: "
                "circuit.faithfulness(model, task=...)"
            )
        return own

    def save(self, path: str | Path) -> Path:
        """Write JSON; the task is not part of it (``Task.save``).

        Args:
            path: of the file.
        """
        path = Path(path)
        data = {"heads": self.heads, "edges": self.edges, "scores": self.scores}
        write_text(path, json.dumps(data, indent=1))
        return path

    @classmethod
    def load(cls, path: str | Path, *, task: Task | None = None) -> Circuit:
        """Read what ``save`` wrote.

        Args:
            path: of the file.
            task: what the circuit does, if it is known.

        Raises:
            MechInterpError: the file is no circuit.
        """
        data = read_json(path)
        if wrong := wrong_fields(_Saved, data):
            raise MechInterpError(listing(f"{path} is not a circuit", wrong))
        edges = tuple((src, dst, mode) for src, dst, mode in data["edges"])
        return cls(tuple(data["heads"]), edges, task, tuple(data.get("scores", ())))

    def __repr__(self) -> str:
        edges = f", {len(self.edges)} edges" if self.edges else ""
        about = "" if self.task is None else f" for {self.task.name or 'a task'}"
        shown = ", ".join(self.heads[:8]) + (", ..." if len(self.heads) > 8 else "")
        return f"Circuit({len(self.heads)} heads{edges}{about}: {shown})"
