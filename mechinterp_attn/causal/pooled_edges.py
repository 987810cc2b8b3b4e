"""Scores of the edges between heads and whole MLPs: the granularity of MIB (Mueller et al. 2025)."""

from __future__ import annotations

from collections.abc import Collection

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.edges import Best, chosen_ends, collect
from mechinterp_attn.causal.flow import splits
from mechinterp_attn.causal.patches import Fill, some
from mechinterp_attn.causal.rules import Rules
from mechinterp_attn.causal.wires import Edges
from mechinterp_attn.causal.written import Written, pool_bytes
from mechinterp_attn.model.attention_only import AttentionOnlyModel


def pooled_edge_scores(
    model: AttentionOnlyModel,
    bound: Bound,
    rules: Rules,
    *,
    steps: int,
    fill: Fill,
    top_k: int | None,
    heads: Collection[str] | None = None,
    max_bytes: int,
) -> tuple[pd.DataFrame, int, float]:
    """As ``edge_scores``, with the neurons of an MLP as one end, whose scores are the sums of theirs.

    What each end writes is held, of some prompts at a time, so that all scores of a reader are one product.

    Args:
        top_k: how many are kept; None: all.
        heads: labels of the only heads between which edges are wanted, as for ``edge_scores``.

    Raises:
        MechInterpError: a model with norms behind its sublayers; a part of an MLP's neurons.
    """
    splits(model)
    edges = Edges.of(model, pools=True)
    chosen = chosen_ends(edges, heads)
    total: dict[tuple[int, str], Tensor] = {}  # by bank and mode, [source, reader]
    rows = max(1, max_bytes // (2 * steps * pool_bytes(model, bound.clean.tokens.shape[1])))
    for at, part in bound.split(rows):
        for key, scores in _of_part(model, part, edges, rules, steps, _rows(fill, at, part), max_bytes):
            total[key] = total.get(key, 0) + scores / (len(bound) * steps)
    best = Best(len(edges) if top_k is None else top_k, chosen)
    first = Written(edges, torch.zeros(0, 0)).first
    for (number, mode), scores in total.items():
        dst = None if number < 0 else number
        best.add(scores[:1], None, dst, mode)
        for i in range(_before(edges, number)):
            best.add(scores[first[i] : first[i + 1]], i, dst, mode)
    return best.frame(edges), best.total, best.inputs


def _rows(fill: Fill, at: slice, part: Bound) -> Fill:
    """The patches of some prompts."""
    other = None if fill.other is None else some(fill.other, at, part)
    return Fill(some(fill.base, at, part), other, fill.constant)


def _before(edges: Edges, number: int) -> int:
    """How many banks a bank (-1: the logits) can read."""
    step = float("inf") if number < 0 else edges.banks[number].step
    return sum(bank.step < step for bank in edges.banks)


def _of_part(
    model: AttentionOnlyModel,
    part: Bound,
    edges: Edges,
    rules: Rules,
    steps: int,
    fill: Fill,
    max_bytes: int,
) -> list[tuple[tuple[int, str], Tensor]]:
    """Sums over some prompts, by bank and mode, ``[source, reader]`` in float64."""
    got = collect(model, part, rules, steps, fill, max_bytes)
    written = Written(edges, got.start)
    for number, bank in enumerate(edges.banks):
        written.add(number, got.change[bank.path])
    out = []
    for number, bank in enumerate(edges.banks):
        sources = written.rows[: written.first[_before(edges, number)]].flatten(1)
        for mode in edges.modes(number):
            modes = (mode,) if mode else tuple(bank.reads)
            pooled = edges.pooled(number)  # summed over heads in the product itself: they may be thousands
            rule = "thk,hdk->td" if pooled else "thk,hdk->htd"
            read = [torch.einsum(rule, got.reads[bank.path, m], bank.reads[m]) for m in modes]
            fields = torch.stack(read).sum(0)
            fields = fields[None] if pooled else fields
            fields = got.norms[bank.path](fields).flatten(1)
            out.append(((number, mode), (sources @ fields.T).double()))
    out.append(((-1, ""), (written.rows.flatten(1) @ got.end.flatten()).double()[:, None]))
    return out
