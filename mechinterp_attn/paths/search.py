"""The strongest end-to-end paths: token, heads and neurons on the way, logit.

Under the frozen pass a logit is the sum of all its paths. A path read backwards is a rank-one field
on the stream (weights over positions times one vector), so a path is extended by one head at the
cost of one small product, whether that head is an attention head or a neuron. The search goes
best-first by the exact sum of everything that a partial path still carries, and cuts where no
completion can beat the paths already found (norms multiplied along the path bound it).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.goals import Goal, Target, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen, Place, sum_tolerance
from mechinterp_attn.frozen.sublayer import Source
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.paths.replay import Path, Step, path_frame, replay

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Positions = Literal["source", "apart", "summed"]
WIDTH = 1000  # partial paths that one expansion may add to the queue
CHUNK = 4096  # complete paths evaluated at once
ENTRY = 1024  # bytes of a partial path beside its field: Python's own objects
QUEUE = 100_000  # partial paths that wait to be opened


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TopPaths(Result):
    """The paths with the largest contributions to a logit, by absolute value.

    Attributes:
        total: the logit (or difference) itself.
        explained: the sum of the listed paths.
        remainder: what all other paths add up to.
        proven: no path that is not listed is larger than the smallest listed one.
        bound: no path that the search did not look at is larger than this (0 where it looked at all).
        expansions: how many partial paths were opened.
        target, against, position, about: what was explained.
        frame: one row per path, largest first: ``path, order`` (heads on it), ``contribution,
            share``, ``source`` ("embed", "position", or the bias it starts from),
            ``source_position, token``.
    """

    title: ClassVar[str] = "Top paths"
    sort_by: ClassVar[str | None] = "contribution"
    total: float
    explained: float
    remainder: float
    proven: bool
    bound: float
    expansions: int
    target: int
    against: int | None
    position: int
    about: str

    def plot(self, k: int = 20) -> Figure:
        """The ``k`` largest paths as signed bars, and all others as one bar.

        Args:
            k: how many to show.
        """
        return draw(self, k)


def _plan(frozen: Frozen, k: int, positions: Positions, max_expansions: int) -> Plan:
    """What every head holds and can reach; the queue, whose partial paths have a field each; and one
    bank's heads at every position while a partial path is opened.
    """
    model, (pos, d_model), size = frozen.model, frozen.end.shape, frozen.end.element_size()
    places = [(pos if positions == "apart" else 1) * bank.n_heads for bank in model.banks]
    added = max_expansions * sum(min(n, WIDTH) for n in places)  # partial paths, at most
    queue = min(added, 2 * QUEUE + WIDTH * len(places))
    fields = min(queue, max_expansions * len(places))  # those of one opened path share theirs
    held = size * 3 * sum(pos * bank.n_heads * bank.d_head for bank in model.banks)
    most = max(places, default=0)
    opened = size * (6 * pos * max((bank.n_heads for bank in model.banks), default=0))
    opened += size * min(most, CHUNK) * (3 * pos + 2 * d_model)
    result = CELL * TABLE * k
    return plan_runs(
        model,
        f"the {k:,} strongest paths, at most {max_expansions:,} opened",
        runs=max_expansions / pos + k + 2,
        rows=1,
        positions=pos,
        bytes=held + queue * ENTRY + fields * size * (pos + d_model) + opened + 3 * result + ENTRY * k,
        result=result,
        flops=2 * max_expansions * sum(places) * pos,
        chunks=max_expansions,
    )


@plans(_plan)
@torch.no_grad()
def top_paths(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Target | None = None,
    k: int = 20,
    positions: Positions = "source",
    max_expansions: int = 1000,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
) -> TopPaths:
    """Find the ``k`` strongest paths from tokens (and biases) to a logit.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``.
        target: the next token (text of one token, or its id); by default the model's own top one.
        position: where the prediction is made; negative counts from the end.
        against: a second token: explain ``logit(target) - logit(against)``.
        k: how many paths.
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
    goal = resolve_goal(frozen, target=target, against=against, position=position)
    wrong = [
        f"{name}={value}; expected 1 or more"
        for name, value in (("k", k), ("max_expansions", max_expansions))
        if value < 1
    ]
    if positions not in ("source", "apart", "summed"):
        wrong.append(f"positions={positions!r}; expected 'source', 'apart' or 'summed'")
    if wrong:
        raise MechInterpError("; ".join(wrong))
    within(_plan(frozen, k, positions, max_expansions), max_bytes, "a smaller k or a shorter prompt")
    search = _Search(frozen, goal, k, positions)
    with Progress(total=max_expansions, desc="paths", show=progress, stops=True) as bar:
        while search.queue and search.expansions < max_expansions and not bar.stopped:
            search.step()
            bar.update()
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
        total=goal.total,
        explained=explained,
        remainder=goal.total - explained,
        proven=proven,
        bound=search.left_out(),
        expansions=search.expansions,
        target=goal.target,
        against=goal.against,
        position=goal.position,
        about=goal.about,
    )


class _Partial(NamedTuple):
    """The end of a path: a head to enter, and the field behind it. ``step`` None is the target."""

    w: Float[Tensor, " pos"]
    v: Float[Tensor, " d_model"]
    step: Step | None
    tail: tuple[Step, ...]
    bound: float


class _Search:
    """Best-first search over the ends of paths."""

    def __init__(self, frozen: Frozen, goal: Goal, k: int, positions: Positions):
        self.frozen, self.k, self.mode = frozen, k, positions
        self.expansions = 0
        self._best: list[tuple[float, int, Path]] = []  # a heap: the smallest of the k largest first
        self._count = itertools.count()
        self._dropped = 0.0
        self._z_bias = [[bank.z_bias for bank in sublayer.banks] for sublayer in frozen.sublayers]
        self._reach = _reaches(frozen, summed=positions != "apart")
        at = frozen.end.new_zeros(len(frozen.tokens))
        at[goal.position] = 1
        root = _Partial(at, goal.direction, None, (), float("inf"))
        self.queue: list[tuple[float, int, _Partial]] = [(-float("inf"), next(self._count), root)]
        if goal.offset:
            self._add(goal.offset, None, None, ())

    @property
    def threshold(self) -> float:
        """What a path must exceed to be listed."""
        return self._best[0][0] if len(self._best) == self.k else 0.0

    def found(self) -> list[Path]:
        return [path for _, _, path in sorted(self._best, key=lambda entry: (-entry[0], entry[1]))]

    def left_out(self) -> float:
        """No path that was not looked at is larger than this."""
        return max([self._dropped, *(partial.bound for _, _, partial in self.queue)])

    def step(self) -> None:
        """Open the partial path that carries the most."""
        partial = heapq.heappop(self.queue)[2]
        if partial.bound <= self.threshold:  # nothing in it can be listed any more
            self._dropped = max(self._dropped, partial.bound)
            return
        self.expansions += 1
        frozen, tail = self.frozen, partial.tail
        w, v = partial.w, partial.v
        depth = len(frozen.sublayers)
        if partial.step is not None:
            place, position = partial.step
            head = torch.tensor([place.head], device=w.device)
            at = None if position is None else torch.tensor([position], device=w.device)
            w, v = (t[0] for t in _in_front(frozen.bank_at(place), head, at, w[None], v[None]))
            depth, tail = place.depth, (partial.step, *tail)
        for j in range(depth - 1, -1, -1):
            self._add_sources(j + 1, j + 1, w, v, tail)
            w, v = frozen.sublayers[j].carry_rank_one(w, v)
            self._add_sources(j, j + 1, w, v, tail)
            for i in range(len(frozen.sublayers[j].banks)):
                self._extend(j, i, w, v, tail)
        self._add_sources(0, 0, w, v, tail)
        self._shorten()

    def _shorten(self) -> None:
        """Keep the queue bounded: the weakest partial paths are left out, and counted as such."""
        if len(self.queue) <= 2 * QUEUE:
            return
        self.queue.sort()  # a sorted list is a heap
        weakest = max(partial.bound for _, _, partial in self.queue[QUEUE:])
        self._dropped = max(self._dropped, weakest)
        del self.queue[QUEUE:]

    def _extend(self, j: int, i: int, w: Tensor, v: Tensor, tail: tuple[Step, ...]) -> None:
        """All heads of a bank in front of a partial path."""
        bank = self.frozen.sublayers[j].banks[i]
        held = bank.hold(v[None])
        at = w.nonzero()[:, 0]  # behind a neuron one position only
        weights = bank.weigh_out(w)[at, None]  # [at, 1]
        carried = weights * (self.frozen.sublayers[j].held[i][at] * held).sum(-1)  # [at, head]
        own = weights * (self._z_bias[j][i][at] * held).sum(-1)
        bound = w[at].abs()[:, None] * self._reach[j][i][at] * bank.pull_norms(held)
        if self.mode != "apart":
            carried, own, bound = carried.sum(0, True), own.sum(0, True), bound.sum(0, True)
        n_heads = carried.shape[1]

        def step(flat: int) -> Step:
            position = int(at[flat // n_heads]) if self.mode == "apart" else None
            return Step(Place(j, i, flat % n_heads), position)

        largest = own.abs().flatten().topk(min(self.k, own.numel()))
        for size, flat in zip(*(t.tolist() for t in largest), strict=True):
            if size > self.threshold:
                self._add(float(own.flatten()[flat]), None, None, (step(flat), *tail))
        # A bound is a product of rounded norms: rounding must not cut what equals the threshold.
        bound, carried = bound.flatten() * (1 + 1e-4), carried.flatten()
        live = (bound > self.threshold).nonzero()[:, 0]
        if j == 0:
            for chunk in live.split(CHUNK):
                self._finish(bank, chunk, n_heads, at, w, v, lambda flat: (step(flat), *tail))
            return
        if len(live) > WIDTH:
            order = carried[live].abs().argsort(descending=True)
            self._dropped = max(self._dropped, float(bound[live[order[WIDTH:]]].max()))
            live = live[order[:WIDTH]]
        sizes, bounds = carried[live].abs().tolist(), bound[live].tolist()
        for flat, size, limit in zip(live.tolist(), sizes, bounds, strict=True):
            partial = _Partial(w, v, step(flat), tail, limit)
            heapq.heappush(self.queue, (-size, next(self._count), partial))

    def _finish(
        self,
        bank: FrozenBank,
        chosen: Int[Tensor, " n"],
        n_heads: int,
        at: Int[Tensor, " positions"],
        w: Tensor,
        v: Tensor,
        steps: Callable[[int], tuple[Step, ...]],
    ) -> None:
        """Heads that read the start of the stream: their paths are complete, many at once."""
        n = len(chosen)
        position = at[chosen // n_heads] if self.mode == "apart" else None
        ws, vs = _in_front(bank, chosen % n_heads, position, w.expand(n, -1), v.expand(n, -1))
        for origin in self.frozen.sources_at(0, 0):
            values = ws * (vs @ origin.values.T)  # [n, pos]
            values = values.sum(-1, keepdim=True) if self.mode == "summed" else values
            flat = values.flatten()
            largest = flat.abs().topk(min(self.k, len(flat))).indices
            for index, value in zip(largest.tolist(), flat[largest].tolist(), strict=True):
                if abs(value) <= self.threshold:
                    break
                row, source = divmod(index, values.shape[1])
                start = None if self.mode == "summed" else source
                self._add(value, origin, start, steps(int(chosen[row])))

    def _add_sources(self, depth: int, reader: int, w: Tensor, v: Tensor, tail: tuple[Step, ...]) -> None:
        """Complete a path with the sources that join the stream here, at every position or over all."""
        for source in self.frozen.sources_at(depth, reader):
            values = w * (source.values @ v)
            if self.mode == "summed":
                self._add(float(values.sum()), source, None, tail)
                continue
            for position in values.abs().topk(min(self.k, len(values))).indices.tolist():
                self._add(float(values[position]), source, position, tail)

    def _add(
        self, value: float, source: Source | None, position: int | None, steps: tuple[Step, ...]
    ) -> None:
        if abs(value) <= self.threshold or value == 0:
            return
        entry = (abs(value), -next(self._count), Path(value, source, position, steps))
        if len(self._best) == self.k:
            heapq.heapreplace(self._best, entry)
        else:
            heapq.heappush(self._best, entry)


def _in_front(
    bank: FrozenBank, head: Int[Tensor, " n"], position: Int[Tensor, " n"] | None, w: Tensor, v: Tensor
) -> tuple[Float[Tensor, "n pos"], Float[Tensor, "n d_model"]]:
    """The fields in front of heads of one bank, given the fields behind them."""
    if position is not None:
        rows = torch.arange(len(w), device=w.device)
        alone = torch.zeros_like(w)
        alone[rows, position] = w[rows, position]
        w = alone
    return bank.spread(w, head), bank.pull(v, head)


def _reaches(frozen: Frozen, *, summed: bool) -> list[list[Float[Tensor, "pos head"]]]:
    """For every bank: how much of the largest vector that any single path can deliver reaches a head's
    query position. Norms multiply along a path, so this bounds all its completions.
    """

    def largest(depth: int, reader: int, *norms: Tensor) -> Float[Tensor, " pos"]:
        own = [source.values.norm(dim=-1) for source in frozen.sources_at(depth, reader)]
        return torch.stack([*norms, *own]).amax(0)

    m = torch.zeros_like(frozen.end[:, 0])
    reaches = []
    for j, sublayer in enumerate(frozen.sublayers):
        m = largest(j, j, m)
        delivered = [m]
        reaches.append([bank.reach(m, summed=summed) for bank in sublayer.banks])
        for bank, reach in zip(sublayer.banks, reaches[-1], strict=True):
            delivered.append((reach * bank.norms()).amax(1))
            delivered.append(bank.write_norms(bank.z_bias).amax(1))
        m = sublayer.carry_bound(largest(j, j + 1, *delivered))
    return reaches
