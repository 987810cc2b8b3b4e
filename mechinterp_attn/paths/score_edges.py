"""Why the heads of an attribution graph look where they look: edges into scores."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.paths.flow import POOL, Nodes, walk
from mechinterp_attn.paths.score import key_weights, pullback

MIN_SHARE = 0.01  # edges below this share of a side's absolute sum are left out


def score_edges(
    frozen: Frozen, kept: Nodes, ids: list[str], gradients: list[Tensor]
) -> tuple[list[tuple[Any, ...]], list[tuple[str, str, str, float]]]:
    """For every kept head that sees several keys: the key it takes the most from, as a score node.

    The score is taken over its mean at the other keys. Query edges hold the key side fixed and key
    edges the query side, so either kind adds up to the score, with the head's own bias and what the
    graph leaves out.
    """
    nodes: list[tuple[Any, ...]] = []
    edges: list[tuple[str, str, str, float]] = []
    tokens, pos = frozen.str_tokens, len(frozen.tokens)
    banks = [(depth, bank) for depth, sub in enumerate(frozen.sublayers) for bank in sub.banks]
    for depth, earlier, outputs, _ in walk(frozen, kept):
        where = torch.cat([kept.position[earlier], torch.arange(pos, device=earlier.device)])
        names = [ids[i] for i in earlier.tolist()] + [f"token@{p}" for p in range(pos)]
        for row in ((kept.depth == depth) & (kept.head != POOL)).nonzero()[:, 0].tolist():
            bank = banks[int(kept.bank[row])][1]
            head, q = int(kept.head[row]), int(kept.position[row])
            x = frozen.sublayers[depth].stream
            sides = bank.score_sides(head, x)
            if int(sides.allowed[q].sum()) < 2:
                continue
            at = torch.zeros_like(x[None, :, 0])
            at[0, q] = 1
            own = torch.tensor([head], device=x.device)
            along = x @ bank.pull(gradients[depth][q][None], own)[0]
            moved = bank.spread(at, own)[0] * along  # from every key, in logits
            key = int(moved.abs().argmax())
            contrast = key_weights(sides, bank.bank.label(head), q, key, "others", frozen)
            query_total = (sides.query(x) + sides.query_bias)[q]
            key_total = contrast @ (sides.key(x) + sides.key_bias)
            node = f"{bank.bank.label(head)}@{q}<-{key}"
            label = f"{bank.bank.label(head)} looks at {tokens[key]!r} ({key})"
            value = float(query_total @ key_total)
            if sides.distance is not None:
                value += float(sides.distance[q] @ contrast)
            layer = bank.bank.layer
            nodes.append((node, label, "score", layer, head, None, q, tokens[q], value, None, 0.0))
            edges.append((node, ids[row], "pattern", float(moved[key])))
            for kind, field in (
                ("query", pullback(sides.query, torch.outer(at[0], key_total), x)),
                ("key", pullback(sides.key, torch.outer(contrast, query_total), x)),
            ):
                into = (outputs * field[where]).sum(-1).double()
                strong = into.abs() >= MIN_SHARE * into.abs().sum()
                edges += [
                    (names[i], node, kind, float(into[i]))
                    for i in strong.nonzero()[:, 0].tolist()
                    if into[i] != 0
                ]
    return nodes, edges
