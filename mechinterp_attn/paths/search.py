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
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar, Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.behaviour import Behaviour
from mechinterp_attn.frozen.goals import Goal, Target, Token, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen, Place, sum_tolerance
from mechinterp_attn.frozen.sublayer import Source
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.paths.replay import Path, Step, path_frame, replay

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Positions = Literal["source", "apart", "summed"]
WIDTH = 1000  # partial paths that one expansion may add to the queue
CHUNK = 4096  # complete paths evaluated at once
ENTRY = 4096  # bytes of the partial paths behind one field, beside 40 for each: Python's own objects
QUEUE = 100_000  # partial paths that wait to be opened
AT_ONCE = 16  # partial paths opened together: the weights of every bank are read once for all of them


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
        frozen: the frozen prompt, from ``paths.freeze``.
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
    wrong = [
        f"{name}={value}; expected 1 or more"
        for name, value in (("top_k", top_k), ("max_expansions", max_expansions))
        if value < 1
    ]
    if positions not in ("source", "apart", "summed"):
        wrong.append(f"positions={positions!r}; expected 'source', 'apart' or 'summed'")
    if wrong:
        raise MechInterpError("; ".join(wrong))
    within(
        _plan(frozen, top_k, positions, max_expansions), max_bytes, "a smaller top_k or a shorter prompt"
    )
    search = _Search(frozen, goal, top_k, positions)
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


@dataclass
class _Waiting:
    """Heads of one bank in front of a partial path, those that carry most first: they wait to be opened.

    Attributes:
        w, v: the field behind the heads, weights over positions times one vector.
        flat: the heads, or (position, head) pairs, as ``_Search`` numbers them.
        size: what each carries, in absolute value;  bound: what no path through it exceeds.
        most: the largest bound from each on.
        steps: what the path consists of with a head in front, given its number.
        next: the first one that still waits.
    """

    w: Float[Tensor, " pos"]
    v: Float[Tensor, " d_model"]
    flat: Int[Tensor, " n"]
    size: Float[Tensor, " n"]
    bound: Float[Tensor, " n"]
    most: Float[Tensor, " n"]
    steps: Callable[[int], tuple[Step, ...]]
    next: int = 0

    def left(self) -> int:
        return len(self.flat) - self.next


class _Partial(NamedTuple):
    """The end of a path: its steps, the field in front of them, and the sublayer whose stream it reads."""

    w: Float[Tensor, " pos"]
    v: Float[Tensor, " d_model"]
    steps: tuple[Step, ...]
    depth: int


class _Search:
    """Best-first search over the ends of paths, a few opened at once."""

    def __init__(self, frozen: Frozen, goal: Goal, k: int, positions: Positions):
        self.frozen, self.k, self.mode = frozen, k, positions
        self.expansions = 0
        self.queue: list[tuple[float, int, _Waiting]] = []
        self._best: list[tuple[float, int, Path]] = []  # a heap: the smallest of the k largest first
        self._count = itertools.count()
        self._dropped = 0.0
        self._waiting = 0
        self._z_bias = [[bank.z_bias for bank in sublayer.banks] for sublayer in frozen.sublayers]
        self._reach = _reaches(frozen, summed=positions != "apart")
        at = frozen.end.new_zeros(len(frozen.tokens))
        at[goal.position] = 1
        self._root: _Partial | None = _Partial(at, goal.direction, (), len(frozen.sublayers))
        if goal.offset:
            self._add(goal.offset, None, None, ())

    @property
    def threshold(self) -> float:
        """What a path must exceed to be listed."""
        return self._best[0][0] if len(self._best) == self.k else 0.0

    @property
    def unfinished(self) -> bool:
        return self._root is not None or bool(self.queue)

    def found(self) -> list[Path]:
        return [path for _, _, path in sorted(self._best, key=lambda entry: (-entry[0], entry[1]))]

    def left_out(self) -> float:
        """No path that was not looked at is larger than this."""
        if self._root is not None:
            return float("inf")
        return max([self._dropped, *(float(group.most[group.next]) for _, _, group in self.queue)])

    def step(self, most: int) -> int:
        """Open the partial paths that carry the most, at ``most`` so many; how many they were."""
        # Where positions are apart, each partial path has its own, and many heads at each.
        chosen = list(
            itertools.islice(self._strongest(), min(most, 1 if self.mode == "apart" else AT_ONCE))
        )
        self.expansions += len(chosen)
        if chosen:
            self._open(chosen)
            self._shorten()
        return len(chosen)

    def _strongest(self) -> Iterator[_Partial]:
        """Partial paths as they are taken from the queue."""
        if self._root is not None:
            root, self._root = self._root, None
            yield root
            return
        while self.queue:
            group = heapq.heappop(self.queue)[2]
            i, group.next = group.next, group.next + 1
            self._waiting -= 1
            if group.left():
                heapq.heappush(self.queue, (-float(group.size[group.next]), next(self._count), group))
            if float(group.bound[i]) <= self.threshold:  # nothing in it can be listed any more
                self._dropped = max(self._dropped, float(group.bound[i]))
                continue
            steps = group.steps(int(group.flat[i]))
            place, position = steps[0]
            head = torch.tensor([place.head], device=group.w.device)
            at = None if position is None else torch.tensor([position], device=group.w.device)
            bank = self.frozen.bank_at(place)
            w, v = (t[0] for t in _in_front(bank, head, at, group.w[None], group.v[None]))
            yield _Partial(w, v, steps, place.depth)

    def _open(self, partials: list[_Partial]) -> None:
        """Walk back from the ends of paths through all earlier sublayers, those that end late first."""
        partials = sorted(partials, key=lambda one: -one.depth)
        rows: list[_Partial] = []
        w, v = (
            partials[0].w.new_zeros(0, len(partials[0].w)),
            partials[0].v.new_zeros(0, len(partials[0].v)),
        )
        for j in range(partials[0].depth, -1, -1):
            joining = [one for one in partials if one.depth == j]
            if joining:
                rows += joining
                w = torch.cat([w, torch.stack([one.w for one in joining])])
                v = torch.cat([v, torch.stack([one.v for one in joining])])
            self._add_sources(j, j, w, v, rows)
            if j == 0:
                return
            w, v = self.frozen.sublayers[j - 1].carry_rank_one(w, v)
            self._add_sources(j - 1, j, w, v, rows)
            for i in range(len(self.frozen.sublayers[j - 1].banks)):
                self._extend(j - 1, i, w, v, rows)

    def _shorten(self) -> None:
        """Keep the queue bounded: the weakest partial paths are left out, and counted as such."""
        if self._waiting <= 2 * QUEUE:
            return
        sizes = torch.cat([group.size[group.next :] for _, _, group in self.queue])
        least = float(sizes.topk(QUEUE).values[-1])
        kept = []
        for _, number, group in self.queue:
            end = max(group.next, int((group.size >= least).sum()))
            if end < len(group.flat):
                self._dropped = max(self._dropped, float(group.most[end]))
            if end > group.next:
                group.most = group.bound[:end].flip(0).cummax(0).values.flip(0)
                group.flat, group.size, group.bound = group.flat[:end], group.size[:end], group.bound[:end]
                kept.append((-float(group.size[group.next]), number, group))
        self.queue = kept
        heapq.heapify(self.queue)
        self._waiting = sum(group.left() for _, _, group in self.queue)

    def _extend(self, j: int, i: int, w: Tensor, v: Tensor, rows: list[_Partial]) -> None:
        """All heads of a bank in front of some partial paths."""
        bank = self.frozen.sublayers[j].banks[i]
        n_heads = bank.bank.n_heads
        hold = bank.hold(v)  # [row, head, d_head]
        weights = bank.weigh_out(w)
        held, z_bias, reach = self.frozen.sublayers[j].held[i], self._z_bias[j][i], self._reach[j][i]
        if self.mode == "apart":  # one row
            at = w[0].nonzero()[:, 0]  # behind a neuron one position only
            carried, own = (weights[0, at, None] * (z[at] * hold).sum(-1) for z in (held, z_bias))
            bound = w[0, at].abs()[:, None] * reach[at] * bank.pull_norms(hold)
            carried, own, bound = carried.flatten()[None], own.flatten()[None], bound.flatten()[None]
        else:
            carried, own = (
                ((weights @ z.flatten(1)).unflatten(-1, (n_heads, -1)) * hold).sum(-1)
                for z in (held, z_bias)
            )
            bound = (w.abs() @ reach) * bank.pull_norms(hold)
        positions = at.tolist() if self.mode == "apart" else [None]

        def steps(row: int, flat: int) -> tuple[Step, ...]:
            position, head = divmod(flat, n_heads)
            return (Step(Place(j, i, head), positions[position]), *rows[row].steps)

        for row, flat, value in self._largest(own):
            self._add(value, None, None, steps(row, flat))
        # A bound is a product of rounded norms: rounding must not cut what equals the threshold.
        bound = bound * (1 + 1e-4)
        live = bound > self.threshold
        if j == 0:
            for chunk in live.nonzero().split(CHUNK):
                self._finish(bank, chunk, positions, w, v, steps)
            return
        best = torch.where(live, carried.abs(), -1.0).topk(min(WIDTH, carried.shape[1]), dim=1)
        bounds = bound.gather(1, best.indices)
        for row, n in enumerate(live.sum(1).tolist()):
            if n > WIDTH:
                beyond = torch.where(live[row], bound[row], 0.0).index_fill(0, best.indices[row], 0.0)
                self._dropped = max(self._dropped, float(beyond.max()))
                n = WIDTH
            if not n:
                continue
            own_bounds = bounds[row, :n].clone()  # no view that keeps the other rows
            group = _Waiting(
                w[row],
                v[row],
                best.indices[row, :n].clone(),
                best.values[row, :n].clone(),
                own_bounds,
                own_bounds.flip(0).cummax(0).values.flip(0),
                partial(steps, row),
            )
            self._waiting += n
            heapq.heappush(self.queue, (-float(group.size[0]), next(self._count), group))

    def _largest(self, values: Float[Tensor, "row n"]) -> list[tuple[int, int, float]]:
        """The entries that may be listed: row, column and value."""
        flat = values.flatten()
        largest = flat.abs().topk(min(self.k, len(flat))).indices
        found = zip(largest.tolist(), flat[largest].tolist(), strict=True)
        return [(*divmod(i, values.shape[1]), value) for i, value in found if abs(value) > self.threshold]

    def _finish(
        self,
        bank: FrozenBank,
        chosen: Int[Tensor, "n 2"],
        positions: list[int | None],
        w: Tensor,
        v: Tensor,
        steps: Callable[[int, int], tuple[Step, ...]],
    ) -> None:
        """Heads that read the start of the stream: their paths are complete, many at once."""
        row, flat = chosen[:, 0], chosen[:, 1]
        n_heads = bank.bank.n_heads
        at = None
        if self.mode == "apart":
            at = torch.tensor(positions, device=flat.device)[flat // n_heads]
        ws, vs = _in_front(bank, flat % n_heads, at, w[row], v[row])
        for origin in self.frozen.sources_at(0, 0):
            values = ws * (vs @ origin.values.T)  # [n, pos]
            values = values.sum(-1, keepdim=True) if self.mode == "summed" else values
            for i, source, value in self._largest(values):
                start = None if self.mode == "summed" else source
                self._add(value, origin, start, steps(int(row[i]), int(flat[i])))

    def _add_sources(self, depth: int, reader: int, w: Tensor, v: Tensor, rows: list[_Partial]) -> None:
        """Complete paths with the sources that join the stream here, at every position or over all."""
        for source in self.frozen.sources_at(depth, reader):
            values = w * (v @ source.values.T)
            values = values.sum(-1, keepdim=True) if self.mode == "summed" else values
            for row, position, value in self._largest(values):
                self._add(value, source, None if self.mode == "summed" else position, rows[row].steps)

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
