"""The flow behind an attribution graph: which nodes carry a target, the edges among them, what matters.

Nodes are (head or neuron, position). Everything here is read off two things: what every bank holds on
the prompt, and the target's gradient at every stream (``stream_fields``).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.frozen.goals import Goal
from mechinterp_attn.frozen.prompt import Frozen


@dataclass(frozen=True, eq=False)
class Nodes:
    """(bank, head, position) triples in the order of the forward pass.

    Attributes:
        bank: the bank's number in ``frozen.banks``.
        depth: its sublayer.
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


def largest_nodes(frozen: Frozen, gradients: list[Tensor], max_nodes: int) -> tuple[Nodes, int]:
    """The nodes with the largest contributions over all paths, and how many nodes there are."""
    found = []
    n_all, number = 0, 0
    for depth, sublayer in enumerate(frozen.sublayers):
        for bank, held in zip(sublayer.banks, frozen.held[depth], strict=True):
            values = (held * bank.unwrite(gradients[depth])).sum(-1).flatten()
            n_all += values.numel()
            best = values.abs().topk(min(max_nodes, len(values))).indices.sort().values
            n_heads = bank.bank.n_heads
            same = torch.full_like(best, number)
            found.append(
                Nodes(same, torch.full_like(best, depth), best % n_heads, best // n_heads, values[best])
            )
            number += 1
    merged = Nodes(*(torch.cat([getattr(f, name) for f in found]) for name in Nodes.__dataclass_fields__))
    best = merged.value.abs().topk(min(max_nodes, len(merged))).indices.sort().values
    return merged.select(best), n_all


def edge_flow(frozen: Frozen, goal: Goal, nodes: Nodes, gradients: list[Tensor]) -> Flow:
    """All edges among some nodes, the tokens, the biases and the target."""
    n, pos = len(nodes), len(frozen.tokens)
    weights = frozen.end.new_zeros(n + 1, n + pos)
    bias = frozen.end.new_zeros(n + 1)
    values = torch.cat([nodes.value, nodes.value.new_tensor([goal.total])])
    error = 0.0
    for depth, earlier, outputs, biases in walk(frozen, nodes):
        positions = torch.cat([nodes.position[earlier], torch.arange(pos, device=earlier.device)])
        columns = torch.cat([earlier, n + torch.arange(pos, device=earlier.device)])
        for rows, w, v, own in _readings(frozen, goal, nodes, gradients, depth):
            weights[rows[:, None], columns] = (v @ outputs.T) * w[:, positions]
            bias[rows] = own + torch.einsum("tp,pd,td->t", w, biases, v)
            whole = own + torch.einsum("tp,pd,td->t", w, frozen.residuals[depth], v)
            error = max([error, *(whole - values[rows]).abs().tolist()])
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
        for bank, held in zip(sublayer.banks, sublayer.held, strict=True):
            own = (nodes.bank == number).nonzero()[:, 0]
            head, position = nodes.head[own], nodes.position[own]
            written = bank.write_at(held[position, head], head, position)
            earlier, outputs = torch.cat([earlier, own]), torch.cat([outputs, written])
            number += 1
        outputs = sublayer.carry_at(outputs, nodes.position[earlier])
        tokens, biases = sublayer.carry(tokens), sublayer.carry(biases) + sublayer.beside
    yield len(frozen.sublayers), earlier, torch.cat([outputs, tokens]), biases


def _readings(
    frozen: Frozen, goal: Goal, nodes: Nodes, gradients: list[Tensor], depth: int
) -> Iterator[tuple[Tensor, Tensor, Tensor, Tensor]]:
    """What the nodes of one sublayer (or the target, behind the last) read: their rows, weights over
    positions, the vector they read along, and what their own bias gives.
    """
    pos = len(frozen.tokens)
    if depth == len(frozen.sublayers):
        at = frozen.end.new_zeros(1, pos)
        at[0, goal.position] = 1
        row = torch.tensor([len(nodes)], device=at.device)
        yield row, at, goal.direction[None], at.new_tensor([goal.offset])
        return
    number = sum(len(sublayer.banks) for sublayer in frozen.sublayers[:depth])
    for i, bank in enumerate(frozen.sublayers[depth].banks, start=number):
        rows = (nodes.bank == i).nonzero()[:, 0]
        head, position = nodes.head[rows], nodes.position[rows]
        at = frozen.end.new_zeros(len(rows), pos)
        at[torch.arange(len(rows), device=at.device), position] = 1
        y = gradients[depth]
        own = (bank.z_bias * bank.unwrite(y)).sum(-1)[position, head]
        yield rows, bank.spread(at, head), bank.pull(y[position], head), own


def influence_of(flow: Flow) -> Float[Tensor, " sources"]:
    """Share of the target's input, by absolute size, that passes through every node and token."""
    targets = len(flow.weights)
    size = flow.weights.abs()
    size = size / (size.sum(-1) + flow.bias.abs() + flow.pruned.abs()).clamp_min(1e-30)[:, None]
    influence = size[-1].clone()
    for row in range(targets - 2, -1, -1):  # nodes stand in the order of the pass
        influence += influence[row] * size[row]
    return influence


def most_influential(influence: Float[Tensor, " n"], share: float) -> Int[Tensor, " kept"]:
    """The fewest entries that hold a share of the sum, in their old order."""
    order = influence.argsort(descending=True, stable=True)
    so_far = influence[order].cumsum(0)
    enough = len(order) if share >= 1 else int((so_far < share * so_far[-1:]).sum()) + 1
    return order[:enough].sort().values


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
            own = nodes.bank == number
            head, position = nodes.head[own], nodes.position[own]
            kept = torch.zeros_like(z)
            kept[position, head] = z[position, head]
            held.append(kept)
            number += 1
        x = sublayer.after(x, held)
    return goal.value(x)
