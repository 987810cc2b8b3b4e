"""What is counted on a batch to score heads: sums that add up over batches, texts and machines."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.detect.batches import Batch
from mechinterp_attn.detect.probes import ROLES, pairs_by_role
from mechinterp_attn.heads import Cache
from mechinterp_attn.model import AttentionOnlyModel

HOOKS = ("hook_pattern", "hook_v")  # what ``sums_of`` reads from a cache


@dataclass(frozen=True, eq=False)
class Sums:
    """Sums over queries, in float64, so that the order in which batches come does not show.

    Attributes:
        attention: of attention on the pairs of each role, ``[role, head]``.
        queries: how many queries have a pair, ``[role]``.
        moved: of what is moved along the pairs: attention times the norm of the head's output for
            that key, ``[role, head]``.
        moved_all: of what those same queries get from anywhere, ``[role, head]``.
        entropy: of the entropies of the rows (nats), ``[head]``.
        rows: how many rows that is, ``[1]``.
    """

    attention: Float[Tensor, "role head"]
    queries: Float[Tensor, " role"]
    moved: Float[Tensor, "role head"]
    moved_all: Float[Tensor, "role head"]
    entropy: Float[Tensor, " head"]
    rows: Float[Tensor, " one"]

    def __add__(self, other: Sums) -> Sums:
        return Sums(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def columns(self) -> dict[str, np.ndarray]:
        """The scores: mean attention by role, entropy, and the share of what is moved by role.

        NaN where no query has a pair, and in ``*_weighted`` where the head moved nothing at all.
        """
        attention = self.attention / self.queries[:, None]
        weighted = self.moved / self.moved_all
        scores = {role: attention[i] for i, role in enumerate(ROLES)}
        scores["entropy"] = self.entropy / self.rows
        scores |= {f"{role}_weighted": weighted[i] for i, role in enumerate(ROLES)}
        return {name: score.cpu().numpy() for name, score in scores.items()}


def sums_of(model: AttentionOnlyModel, batch: Batch, cache: Cache) -> Sums:
    """Count one batch, from a cache with ``hook_pattern`` and ``hook_v`` of every bank."""
    pairs = list(pairs_by_role(batch).values())
    queries = [p.any(-1) for p in pairs]
    real = batch.real[:, :, None] & batch.real[:, None, :]
    rows = batch.real.clone()
    rows[:, 0] = False  # the first token has only itself to look at
    parts = []
    for bank in model.banks:
        pattern = cache[f"{bank.path}.hook_pattern"]
        norms = bank.moved(cache)
        on_pairs = [bank.attention_on(pattern, p) for p in pairs]
        along = [bank.attention_on(pattern, p, norms) for p in pairs]
        anywhere = [bank.attention_on(pattern, real & q[:, :, None], norms) for q in queries]
        entropy = (bank.entropy(pattern).double() * rows[:, :, None]).sum((0, 1))
        parts.append([torch.stack(x).double() for x in (on_pairs, along, anywhere)] + [entropy])
    attention, moved, moved_all, entropy = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    count = torch.stack([q.sum() for q in queries]).double()
    return Sums(attention, count, moved, moved_all, entropy, rows.sum().double()[None])
