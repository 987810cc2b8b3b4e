"""What is counted on a batch to score heads: sums that add up over batches, texts and machines."""

from __future__ import annotations

from dataclasses import dataclass, fields

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch
from mechinterp_attn.detect.probes import ROLES, pairs_by_role
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.on_a_run import Cache
from mechinterp_attn.model.virtual import VirtualHead

SEEN = ("pattern", "v")  # what ``sums_of`` reads from a cache


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
    """Count one batch, from a cache with the patterns and values of every bank."""
    pairs = list(pairs_by_role(batch).values())
    queries = [p.any(-1) for p in pairs]
    real = batch.real[:, :, None] & batch.real[:, None, :]
    rows = batch.real.clone()
    rows[:, 0] = False  # the first token has only itself to look at
    parts = []
    for bank in model.banks:
        pattern = cache[bank.hook("pattern")]
        norms = bank.moved(cache)
        on_pairs = [bank.attention_on(pattern, p) for p in pairs]
        along = [bank.attention_on(pattern, p, norms) for p in pairs]
        anywhere = [bank.attention_on(pattern, real & q[:, :, None], norms) for q in queries]
        entropy = (bank.entropy(pattern).double() * rows[:, :, None]).sum((0, 1))
        parts.append([torch.stack(x).double() for x in (on_pairs, along, anywhere)] + [entropy])
    attention, moved, moved_all, entropy = (torch.cat(x, -1) for x in zip(*parts, strict=True))
    count = torch.stack([q.sum() for q in queries]).double()
    return Sums(attention, count, moved, moved_all, entropy, rows.sum().double()[None])


def hooks_of(model: AttentionOnlyModel, head: VirtualHead) -> set[str]:
    """What ``sums_of_chain`` reads from a cache, besides ``SEEN``."""
    norms = [model.norm_of(one.bank) for one in head.heads[1:]]
    return {_read_at(model, head)} | {f"{path}.hook_scale" for norm, path in norms if norm.kind is not None}


def _read_at(model: AttentionOnlyModel, head: VirtualHead) -> str:
    """The hook of what its first head reads."""
    bank = head.heads[0].bank
    norm, path = model.norm_of(bank)
    return model.stream_of(bank) if norm.kind is None else f"{path}.hook_normalized"


def sums_of_chain(model: AttentionOnlyModel, batch: Batch, cache: Cache, head: VirtualHead) -> Sums:
    """``sums_of`` for one virtual head, from the product of the patterns of its heads.

    What it moves from a key to a query is weighted by that product and by the norms' scales between
    the heads. Where a model has norms behind its heads there is no such product: NaN.
    """
    n = len(batch)
    patterns = torch.stack([head.pattern(cache, b) for b in range(n)]).double()  # [batch, query, key + 1]
    first, *later = head.heads
    flow = torch.stack([first.pattern(cache, b)[:, :-1] for b in range(n)]).double()
    x = cache[_read_at(model, head)].double()
    bias = first.b_V.double() @ first.W_O.double()
    for one in later:
        step = torch.stack([one.pattern(cache, b)[:, :-1] for b in range(n)]).double()
        norm, path = model.norm_of(one.bank)
        if norm.kind is not None:
            step = step / cache[f"{path}.hook_scale"].double().mT
        flow = step @ flow
        bias = bias @ one.W_V.double() @ one.W_O.double()
        sublayer = model.sublayer_of(one.bank)
        if sublayer.out is not None or any(post.kind is not None for post, _ in sublayer.posts):
            flow = flow * torch.nan
    norms = head.bank.seen(x @ head.W_V.double() @ head.W_O.double() + bias).norm(dim=-1)
    flow = flow * norms[:, None, :]
    pairs = list(pairs_by_role(batch).values())
    real = batch.real[:, :, None] & batch.real[:, None, :]
    rows = batch.real.clone()
    rows[:, 0] = False
    entropy = torch.special.entr(patterns).sum(-1)
    entropy = entropy.where((patterns >= 0).all(-1), torch.nan)[rows].sum()
    return Sums(
        torch.stack([(patterns[..., :-1] * p).sum() for p in pairs])[:, None],
        torch.stack([p.any(-1).sum() for p in pairs]).double(),
        torch.stack([(flow * p).sum() for p in pairs])[:, None],
        torch.stack([(flow * (real & p.any(-1)[:, :, None])).sum() for p in pairs])[:, None],
        entropy[None],
        rows.sum().double()[None],
    )
