"""The strongest end-to-end paths: token, heads and neurons on the way, logit.

In the frozen pass a logit is the sum of all its paths. They are too many to list, so they are searched
(``best_first``), each that is listed is run forward by itself, and what is left out is bounded.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch

from mechinterp_attn.core.errors import MechInterpError, below_one
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.frozen.behaviour import Behaviour
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.goals import Target, Token, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen, sum_tolerance
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.paths.best_first import AT_ONCE, CHUNK, QUEUE, WIDTH, Positions, Search
from mechinterp_attn.paths.explanation import Explanation, Parts
from mechinterp_attn.paths.replay import path_frame, replay

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ENTRY = 4096  # bytes of the partial paths behind one field, beside 40 for each: Python's own objects


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TopPaths(Parts):
    """The paths with the largest contributions to a logit, by absolute value.

    Attributes:
        explained: the sum of the listed paths; ``explained_share``, of the total.
        remainder: what all other paths add up to.
        proven: no path that is not listed is larger than the smallest listed one.
        bound: no path that the search did not look at is larger than this (0 where it looked at all).
        expansions: how many partial paths were opened.
        total, target, against, position, about: what is explained, as in ``Explanation``.
        frame: one row per path, largest first: ``path, order`` (heads on it), ``contribution,
            share``, ``source`` ("embed", "position", or the bias it starts from),
            ``source_position, token``.
    """

    title: ClassVar[str] = "Top paths"
    sort_by: ClassVar[str | None] = "contribution"
    remainder: float
    proven: bool
    bound: float
    expansions: int

    def plot(self, k: int = 20) -> Figure:
        """The ``k`` largest paths as signed bars, and all others as one bar.

        Args:
            k: how many to show.
        """
        return draw(self, k)


def _plan(frozen: Frozen, top_k: int, positions: Positions, max_expansions: int) -> Plan:
    """What every head holds and can reach; the queue, whose partial paths have a field each; and one
    bank's heads at every position while a partial path is opened.
    """
    model, (pos, d_model), size = frozen.model, frozen.end.shape, frozen.end.element_size()
    places = [(pos if positions == "apart" else 1) * bank.n_heads for bank in model.banks]
    added = max_expansions * sum(min(n, WIDTH) for n in places)  # partial paths, at most
    queue = min(added, 2 * QUEUE + WIDTH * len(places))
    fields = min(queue, max_expansions * len(places))  # those of one opened path share theirs
    held = size * 3 * sum(pos * bank.n_heads * bank.d_head for bank in model.banks)
    most, at_once = max(places, default=0), 1 if positions == "apart" else AT_ONCE
    widest = max((bank.n_heads * bank.d_head for bank in model.banks), default=0)
    opened = size * at_once * (3 * widest + 8 * most + pos + d_model)
    opened += size * min(at_once * most, CHUNK) * (3 * pos + 2 * d_model)
    result = CELL * TABLE * top_k
    return plan_runs(
        model,
        f"the {top_k:,} strongest paths, at most {max_expansions:,} opened",
        runs=max_expansions / pos + top_k + 2,
        rows=1,
        positions=pos,
        bytes=held
        + queue * 40
        + fields * (ENTRY + size * (pos + d_model))
        + opened
        + 3 * result
        + ENTRY * top_k,
        result=result,
        flops=2 * max_expansions * sum(places) * pos,
        chunks=max_expansions,
    )


@renamed_arguments(k="top_k")
@of_prompt
@plans(_plan)
@torch.no_grad()
def top_paths(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Token | None = None,
    task: Behaviour | None = None,
    top_k: int = 20,
    positions: Positions = "source",
    max_expansions: int = 1000,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
) -> TopPaths:
    """Find the ``top_k`` strongest paths from tokens (and biases) to a logit.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        target: the next token (text of one token, or its id); by default the model's own top one.
        position: where the prediction is made; negative counts from the end.
        against: a second token: explain ``logit(target) - logit(against)``.
        task: a behaviour (``mia.Task``) that has this prompt, in place of target, position and against; its
            metric is explained, by its gradient where it is no sum of logits.
        top_k: how many paths.
        positions: "source" tells paths apart by their heads and the position they start at,
            "apart" also by the position of every head on the way, "summed" by their heads only.
        max_expansions: how many partial paths to open. If the search ends before, the list is proven;
            if not, ``proven`` and ``bound`` say what it is worth.
        max_bytes: memory beyond the model's and the frozen prompt's that may be used, the result included.
        progress: show a progress bar.

    Raises:
        MechInterpError: the target or position does not exist, an option is out of range, or it needs
            more than max_bytes.
    """
    goal = resolve_goal(frozen, target=target, against=against, position=position, task=task)
    wrong = below_one(top_k=top_k, max_expansions=max_expansions)
    if positions not in ("source", "apart", "summed"):
        wrong.append(f"positions={positions!r}; expected 'source', 'apart' or 'summed'")
    if wrong:
        raise MechInterpError("; ".join(wrong))
    within(
        _plan(frozen, top_k, positions, max_expansions), max_bytes, "a smaller top_k or a shorter prompt"
    )
    search = Search(frozen, goal, top_k, positions)
    with Progress(total=max_expansions, desc="paths", show=progress, stops=True) as bar:
        while search.unfinished and search.expansions < max_expansions and not bar.stopped:
            bar.update(search.step(max_expansions - search.expansions))
    found = search.found()
    explained = sum(path.value for path in found)
    error = max((abs(replay(frozen, goal, path) - path.value) for path in found), default=0.0)
    proven = search.left_out() <= search.threshold
    notes = {
        **frozen.receipt.notes,
        "share explained": f"{explained / goal.total:.3f}" if goal.total else "undefined",
        **bar.notes,
        "top k": "proven" if proven else f"heuristic: a path left out may reach {search.left_out():.3g}",
    }
    check = Check("listed paths, run forward one by one", error, sum_tolerance(frozen))
    return TopPaths(
        frame=path_frame(frozen, goal, found),
        receipt=Receipt((check,), notes),
        **Explanation.of(goal),
        explained=explained,
        remainder=goal.total - explained,
        proven=proven,
        bound=search.left_out(),
        expansions=search.expansions,
    )
