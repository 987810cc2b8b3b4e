"""The search behind ``top_paths``: best first over the ends of paths, with a bound on what is left out.

A path read backwards is a rank-one field on the stream (weights over positions times one vector), so a
path is extended by one head at the cost of one small product, whether that head is an attention head or a
neuron. The partial path that carries most, in the exact sum of everything that still passes through it, is
opened first, and dropped where no completion can beat the paths already found (norms multiplied along the
path bound it).
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.goals import Goal
from mechinterp_attn.frozen.prompt import Frozen, Place
from mechinterp_attn.frozen.sublayer import Source
from mechinterp_attn.paths.replay import Path, Step

Positions = Literal["source", "apart", "summed"]
WIDTH = 1000  # partial paths that one expansion may add to the queue
CHUNK = 4096  # complete paths evaluated at once
QUEUE = 100_000  # partial paths that wait to be opened
AT_ONCE = 16  # partial paths opened together: the weights of every bank are read once for all of them


@dataclass
class _Waiting:
    """Heads of one bank in front of a partial path, those that carry most first: they wait to be opened.

    Attributes:
        w, v: the field behind the heads, weights over positions times one vector.
        flat: the heads, or (position, head) pairs, as ``Search`` numbers them.
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


class Search:
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
            if j < len(self.frozen.sublayers):  # past its heads, on the way to what it reads
                w = self.frozen.sublayers[j].kept(w)
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
