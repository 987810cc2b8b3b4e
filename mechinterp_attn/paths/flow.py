"""The flow behind an attribution graph: which nodes carry a target, the edges among them, what matters.

A node is a head or neuron at a position, or a pool: all the others of one bank at a position, as one
node that is their sum. Everything here is read off two things: what every bank holds on the prompt,
and the target's gradient at every stream (``Frozen.backward``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.goals import Goal
from mechinterp_attn.frozen.prompt import Frozen

POOL = -1  # the head of a node that is a pool
CHUNK = 128  # nodes that read or write at once: memory is bounded by it, whatever they hold


@dataclass(frozen=True, eq=False)
class Nodes:
    """(bank, head, position) triples in the order of the forward pass.

    Attributes:
        bank: the bank's number in ``frozen.banks``.
        depth: its sublayer.
        head: the head's number in the bank, or ``POOL``: all heads of the bank that have no node of
            their own at this position.
        value: the node's contribution to the target through all paths.
    """

    bank: Int[Tensor, " n"]
    depth: Int[Tensor, " n"]
    head: Int[Tensor, " n"]
    position: Int[Tensor, " n"]
    value: Float[Tensor, " n"]

    def __len__(self) -> int:
        return len(self.bank)

    def select(self, chosen: Tensor) -> Nodes:
        return Nodes(*(getattr(self, f)[chosen] for f in Nodes.__dataclass_fields__))

    def of(self, number: int) -> Int[Tensor, " own"]:
        """Which nodes are of one bank."""
        return (self.bank == number).nonzero()[:, 0]

    def members(self, own: Int[Tensor, " own"], n_heads: int) -> Bool[Tensor, "own head"]:
        """Which heads each of some nodes of one bank consists of."""
        head, position = self.head[own], self.position[own]
        members = torch.zeros(len(own), n_heads, dtype=torch.bool, device=own.device)
        single = head != POOL
        members[single, head[single]] = True
        members[~single] = True
        if len(own):  # the pools' rows by position, and out of them what stands alone there
            apart = ((self.bank == self.bank[own[0]]) & (self.head != POOL)).nonzero()[:, 0]
            row = torch.full((int(self.position.max()) + 1,), -1, device=own.device)
            row[position[~single]] = (~single).nonzero()[:, 0]
            row, head = row[self.position[apart]], self.head[apart]
            members[row[row >= 0], head[row >= 0]] = False
        return members

    def covered(self, number: int, n_heads: int, pos: int) -> Bool[Tensor, "pos head"]:
        """Which heads of a bank stand in a node, at every position."""
        found = torch.zeros(pos, n_heads, dtype=torch.bool, device=self.bank.device)
        head, position = self.head[self.of(number)], self.position[self.of(number)]
        found[position[head != POOL], head[head != POOL]] = True
        found[position[head == POOL]] = True  # with those that stand alone: all
        return found


@dataclass(frozen=True, eq=False)
class Flow:
    """Edges into every node and into the target. Sources: the nodes, then a token per position.

    Attributes:
        weights: ``[n + 1, n + pos]``, row n is the target.
        bias: what comes in from biases, ``[n + 1]``.
        pruned: what comes in from nodes that are not listed, ``[n + 1]``.
        error: the largest difference between what a node reads of the whole stream and what it
            contributes.
    """

    weights: Float[Tensor, "targets sources"]
    bias: Float[Tensor, " targets"]
    pruned: Float[Tensor, " targets"]
    error: float


def largest_nodes(
    frozen: Frozen, gradients: list[Tensor], max_nodes: int, *, pools: int = 0
) -> tuple[Nodes, int]:
    """The single nodes with the largest contributions over all paths, pools of all others, and how many
    heads and neurons at positions there are.

    Args:
        max_nodes: how many single nodes.
        pools: how many pools at most: those whose members contribute the most, signs aside.
    """
    singles, sums, sizes = [], [], []
    n_all, number = 0, 0
    for depth, sublayer in enumerate(frozen.sublayers):
        for bank, held in zip(sublayer.banks, frozen.held[depth], strict=True):
            values = (held * bank.unwrite(gradients[depth])).sum(-1)
            n_all += values.numel()
            n_heads = bank.bank.n_heads
            best = values.abs().flatten().topk(min(max_nodes, values.numel())).indices
            singles.append(_nodes(number, depth, best % n_heads, best // n_heads, values.flatten()[best]))
            at = torch.arange(len(values), device=best.device)
            sums.append(_nodes(number, depth, torch.full_like(at, POOL), at, values.sum(-1)))
            sizes.append(values.abs().sum(-1))
            number += 1
    every = _joined(singles)
    best = every.value.abs().topk(min(max_nodes, len(every))).indices
    chosen, rest = every.select(best), _joined(sums)
    size = torch.cat(sizes)
    pos = len(frozen.tokens)
    place = chosen.bank * pos + chosen.position
    size = size.index_add(0, place, -chosen.value.abs())
    left = torch.cat([torch.full((pos,), bank.bank.n_heads) for bank in frozen.banks]).to(place.device)
    left = left.index_add(0, place, -torch.ones_like(place))
    value = rest.value.index_add(0, place, -chosen.value)
    rest = Nodes(rest.bank, rest.depth, rest.head, rest.position, value)
    size = torch.where(left > 0, size, -1.0)
    kept = size.topk(min(pools, int((left > 0).sum()))).indices
    return in_order(_joined([chosen, rest.select(kept)])), n_all


def _nodes(bank: int, depth: int, head: Tensor, position: Tensor, value: Tensor) -> Nodes:
    return Nodes(torch.full_like(head, bank), torch.full_like(head, depth), head, position, value)


def _joined(parts: list[Nodes]) -> Nodes:
    return Nodes(*(torch.cat([getattr(p, name) for p in parts]) for name in Nodes.__dataclass_fields__))


def in_order(nodes: Nodes) -> Nodes:
    """Nodes by bank and position, a pool behind the others there."""
    span = int(nodes.position.max()) + 1 if len(nodes) else 1
    heads = int(nodes.head.max()) + 2 if len(nodes) else 1
    head = torch.where(nodes.head == POOL, heads - 1, nodes.head)
    return nodes.select((((nodes.bank * span) + nodes.position) * heads + head).argsort())


def regrouped(candidates: Nodes, chosen: Int[Tensor, " kept"]) -> Nodes:
    """Some of the candidates; those left out go back into their pool where it is kept."""
    kept = candidates.select(chosen)
    out = torch.ones(len(candidates), dtype=torch.bool, device=chosen.device)
    out[chosen] = False
    lost = candidates.select((out & (candidates.head != POOL)).nonzero()[:, 0])
    span = int(candidates.position.max()) + 1
    pools = (kept.head == POOL).nonzero()[:, 0]
    row = torch.full((int(candidates.bank.max() + 1) * span,), -1, device=chosen.device)
    row[kept.bank[pools] * span + kept.position[pools]] = pools
    row = row[lost.bank * span + lost.position]
    value = kept.value.index_add(0, row[row >= 0], lost.value[row >= 0])
    return Nodes(kept.bank, kept.depth, kept.head, kept.position, value)


def edge_flow(frozen: Frozen, goal: Goal, nodes: Nodes, gradients: list[Tensor]) -> Flow:
    """All edges among some nodes, the tokens, the biases and the target."""
    n, pos = len(nodes), len(frozen.tokens)
    weights = frozen.end.new_zeros(n + 1, n + pos)
    bias, whole = frozen.end.new_zeros(n + 1), frozen.end.new_zeros(n + 1)
    values = torch.cat([nodes.value, nodes.value.new_tensor([goal.total])])
    for depth, earlier, outputs, biases in walk(frozen, nodes):
        positions = torch.cat([nodes.position[earlier], torch.arange(pos, device=earlier.device)])
        columns = torch.cat([earlier, n + torch.arange(pos, device=earlier.device)])
        for rows, own, group, w, v in _readings(frozen, goal, nodes, gradients, depth):
            into = w.new_zeros(len(rows), len(columns))
            weights[rows[:, None], columns] = into.index_add(0, group, (v @ outputs.T) * w[:, positions])
            for sums, stream in ((bias, biases), (whole, frozen.residuals[depth])):
                sums[rows] = own.index_add(0, group, ((w @ stream) * v).sum(-1))
    error = float((whole - values).abs().max())
    return Flow(weights, bias, values - weights.sum(-1) - bias, error)


def walk(frozen: Frozen, nodes: Nodes) -> Iterator[tuple[int, Tensor, Tensor, Tensor]]:
    """For each sublayer, then the end: which nodes are earlier, what they and the tokens wrote as it is
    in the stream read there ``[sources, d_model]``, and the biases ``[pos, d_model]``.
    """
    earlier = nodes.bank[:0]
    outputs = frozen.end.new_zeros(0, frozen.end.shape[-1])
    tokens, biases = frozen.start, torch.zeros_like(frozen.start)
    number = 0
    for depth, sublayer in enumerate(frozen.sublayers):
        yield depth, earlier, torch.cat([outputs, tokens]), biases
        outputs, tokens, biases = map(sublayer.kept, (outputs, tokens, biases))
        for bank, held in zip(sublayer.banks, sublayer.held, strict=True):
            own = nodes.of(number)
            written = [_written(bank, held, nodes, chunk) for chunk in own.split(CHUNK)]
            earlier, outputs = torch.cat([earlier, own]), torch.cat([outputs, *written])
            number += 1
        outputs = sublayer.carry_at(outputs, nodes.position[earlier])
        tokens, biases = sublayer.carry(tokens), sublayer.carry(biases) + sublayer.beside
    yield len(frozen.sublayers), earlier, torch.cat([outputs, tokens]), biases


def _written(
    bank: FrozenBank, held: Float[Tensor, "pos head d_head"], nodes: Nodes, own: Int[Tensor, " n"]
) -> Float[Tensor, "n d_model"]:
    """What some nodes of a bank write."""
    position = nodes.position[own]
    members = nodes.members(own, bank.bank.n_heads)
    return bank.write_groups(held[position] * members[..., None], position)


def _readings(
    frozen: Frozen, goal: Goal, nodes: Nodes, gradients: list[Tensor], depth: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]:
    """What the nodes of one sublayer (or the target, behind the last) read: their rows and what their own
    biases give; then, term by term, which of these rows it belongs to, weights over positions and the
    vector that it reads along.
    """
    pos = len(frozen.tokens)
    if depth == len(frozen.sublayers):
        at = frozen.end.new_zeros(1, pos)
        at[0, goal.position] = 1
        row = torch.tensor([len(nodes)], device=at.device)
        yield row, at.new_tensor([goal.offset]), torch.zeros_like(row), at, goal.direction[None]
        return
    number = sum(len(sublayer.banks) for sublayer in frozen.sublayers[:depth])
    for i, bank in enumerate(frozen.sublayers[depth].banks, start=number):
        biases = (bank.z_bias * bank.unwrite(gradients[depth])).sum(-1)  # [pos, head]
        for rows in nodes.of(i).split(CHUNK):
            position = nodes.position[rows]
            members = nodes.members(rows, bank.bank.n_heads)
            own = (biases[position] * members).sum(-1)
            yield rows, own, *bank.read_groups(gradients[depth][position], position, members)


def influence_of(flow: Flow) -> Float[Tensor, " sources"]:
    """Share of the target's input, by absolute size, that passes through every node and token."""
    targets = len(flow.weights)
    size = flow.weights.abs()
    size = size / (size.sum(-1) + flow.bias.abs() + flow.pruned.abs()).clamp_min(1e-30)[:, None]
    influence = size[-1].clone()
    for row in range(targets - 2, -1, -1):  # nodes stand in the order of the pass
        influence += influence[row] * size[row]
    return influence


def most_influential(
    influence: Float[Tensor, " n"], share: float, most: int | None = None
) -> Int[Tensor, " kept"]:
    """The fewest entries that hold a share of the sum, at ``most`` so many, in their old order."""
    order = influence.argsort(descending=True, stable=True)
    so_far = influence[order].cumsum(0)
    enough = len(order) if share >= 1 else int((so_far < share * so_far[-1:]).sum()) + 1
    return order[:enough][:most].sort().values


def share_of(influence: Tensor, chosen: Tensor) -> float:
    """The share of all influence that the chosen nodes have; 1 where there is none."""
    whole = float(influence.sum())
    return float(influence[chosen].sum()) / whole if whole else 1.0


def prune_edges(flow: Flow, influence: Tensor, threshold: float) -> Tensor:
    """The weights with the least influential edges set to zero."""
    size = flow.weights.abs()
    size = size / (size.sum(-1) + flow.bias.abs() + flow.pruned.abs()).clamp_min(1e-30)[:, None]
    reach = torch.cat([influence[: len(size) - 1], influence.new_ones(1)])
    kept = most_influential((size * reach[:, None]).flatten(), threshold)
    weights = torch.zeros_like(flow.weights)
    weights.view(-1)[kept] = flow.weights.reshape(-1)[kept]
    return weights


def inside(frozen: Frozen, goal: Goal, nodes: Nodes) -> float:
    """The target by paths through the given nodes only: a frozen pass with all others silent."""
    x = frozen.start
    number = 0
    for sublayer in frozen.sublayers:
        held = []
        for z in sublayer.holds(x):
            held.append(z * nodes.covered(number, z.shape[1], len(z))[..., None])
            number += 1
        x = sublayer.after(x, held)
    return goal.value(x)
