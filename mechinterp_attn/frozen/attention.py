"""A bank of attention heads on one prompt, as a linear map of the residual stream.

The pattern is that of the run, with the soft cap and window behind it; the norm in front and, where
there is one, the norm behind the heads keep the scales of the run.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.frozen.bank import FrozenBank, ScoreSides, freeze_bank
from mechinterp_attn.model.attention import AttentionBank
from mechinterp_attn.model.norm import FrozenNorm


class FrozenAttention(FrozenBank):
    """``x -> post(sum_h pattern_h @ norm(x) @ W_V_h @ W_O_h)`` with the pattern of one run."""

    bank: AttentionBank

    def __init__(
        self,
        bank: AttentionBank,
        pattern: Float[Tensor, "head query key"],
        norm: FrozenNorm,
        post: FrozenNorm,
        stream: Float[Tensor, "pos d_model"],
    ):
        super().__init__(bank, pattern, norm, post)
        self._stream = stream

    @property
    def _W_O(self) -> Float[Tensor, "head d_head d_model"]:
        return self.wide(self.bank.W_O)

    @property
    def _W_V(self) -> Float[Tensor, "kv_head d_model d_head"]:
        return self.wide(self.bank.W_V)

    @property
    def most_terms(self) -> int:
        return self.bank.n_heads

    @property
    def z_bias(self) -> Float[Tensor, "pos head d_head"]:
        value = self.wide(self.bank.b_V).repeat_interleave(self.bank.group, 0)  # [head, d_head]
        held = self.pattern.sum(-1).T[..., None] * value
        if self.bank.clip is None:
            return held
        # What clamping took away from each value on this prompt is a constant of the prompt.
        read = torch.einsum("pd,hdk->phk", self._norm.apply(self._stream), self._W_V)
        read = read + self.wide(self.bank.b_V)
        lost = (self.bank.clipped(read) - read).repeat_interleave(self.bank.group, 1)
        return held + torch.einsum("hqk,khd->qhd", self.pattern, lost)

    @property
    def values(self) -> Float[Tensor, "pos head d_head"]:
        """What each head moves from each position: ``z`` is the pattern times this."""
        read = torch.einsum("pd,hdk->phk", self._norm.apply(self._stream), self._W_V)
        return self.bank.clipped(read + self.wide(self.bank.b_V)).repeat_interleave(self.bank.group, 1)

    def read(self, x: Tensor) -> Tensor:
        values = torch.einsum("...pd,hdk->...hpk", self._norm.apply(x), self._W_V)
        if self.bank.group > 1:
            values = values.repeat_interleave(self.bank.group, -3)
        return (self.pattern @ values).transpose(-3, -2)

    def unread(self, z: Tensor) -> Tensor:
        values = self.pattern.transpose(-1, -2) @ z.transpose(-3, -2)
        if self.bank.group > 1:
            values = values.unflatten(-3, (-1, self.bank.group)).sum(-3)
        return self._norm.adjoint(torch.einsum("...hpk,hdk->...pd", values, self._W_V))

    def write(self, z: Tensor) -> Tensor:
        return self._post.apply(z.flatten(-2) @ self._W_O.flatten(0, 1))

    def unwrite(self, y: Tensor) -> Tensor:
        z = self._post.adjoint(y) @ self._W_O.flatten(0, 1).T
        return z.unflatten(-1, (self.bank.n_heads, self.bank.d_head))

    def write_at(self, z: Tensor, index: Tensor, position: Tensor) -> Tensor:
        out = z.new_empty(len(z), self.bank.d_model)
        for head in index.unique().tolist():
            own = index == head
            out[own] = z[own] @ self.wide(self.bank.W_O[head])
        return self._post.at(position).apply(out)

    def pull(self, v: Tensor, index: Tensor) -> Tensor:
        v = self._post.turn_back(v)
        out = torch.empty_like(v)
        for head in index.unique().tolist():
            own = index == head
            out[own] = (
                v[own]
                @ self.wide(self.bank.W_O[head]).T
                @ self.wide(self.bank.W_V[head // self.bank.group]).T
            )
        return self._norm.turn_back(out)

    def spread(self, w: Tensor, index: Tensor) -> Tensor:
        w = self.weigh_out(w)
        out = torch.empty_like(w)
        for head in index.unique().tolist():  # no copy of a pattern per row
            own = index == head
            out[own] = w[own] @ self.pattern[head]
        return self._norm.weigh(out)

    def write_groups(self, z: Tensor, position: Tensor) -> Tensor:
        return self._post.at(position).apply(z.flatten(1) @ self._W_O.flatten(0, 1))

    def read_groups(self, y: Tensor, position: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group, head = members.nonzero(as_tuple=True)
        at = y.new_zeros(len(group), self.pattern.shape[-1])
        at[torch.arange(len(group), device=y.device), position[group]] = 1
        return group, self.spread(at, head), self.pull(y[group], head)

    def reach(self, m: Tensor, *, summed: bool) -> Tensor:
        m = self._norm.weigh(m)
        reached = (self.pattern @ m) if summed else (self.pattern * m).amax(-1)
        return self.weigh_out(reached).T

    def hold(self, v: Tensor) -> Tensor:
        return torch.einsum("nd,hkd->nhk", self._post.turn_back(v), self._W_O)

    @cached_property
    def _value_gram(self) -> Float[Tensor, "head d_head d_head"]:
        """Asked for once per path opened."""
        return (self._W_V.mT @ self._W_V).repeat_interleave(self.bank.group, 0)

    def pull_norms(self, held: Tensor) -> Tensor:  # centring only shortens
        return torch.einsum("nhk,hkl,nhl->nh", held, self._value_gram, held).clamp_min(0).sqrt()

    def write_norms(self, z: Tensor) -> Tensor:
        written = self._post.turn(self._W_O)
        gram = written @ written.transpose(1, 2)
        norms = torch.einsum("phk,hkl,phl->ph", z, gram, z).clamp_min(0).sqrt()
        return self.weigh_out(norms.T).T

    def norms(self) -> Tensor:
        written = self._post.turn(self._W_O)
        values = self._W_V.repeat_interleave(self.bank.group, 0)
        # The largest singular value of values @ written, from their triangular factors: d_head wide.
        left, right = torch.linalg.qr(values).R, torch.linalg.qr(written.mT).R
        return torch.linalg.matrix_norm(left @ right.mT, 2)

    def score_sides(self, index: int, x: Tensor) -> ScoreSides:
        bank, at = self.bank, torch.arange(len(x), device=x.device)
        query, query_bias = self._side("Q", index, x)
        key, key_bias = self._side("K", index, x)
        grown = (bank.grown(at).to(x.dtype) / bank.scale)[:, None]
        back = at[:, None] - at
        allowed = back >= 0 if bank.causal else torch.ones_like(back, dtype=torch.bool)
        if bank.window is not None:
            allowed = allowed & (back < bank.window)
        every = bank.distance_score(at, at)
        distance = None if every is None else every[index].to(x.dtype)
        sink = None if bank.sinks is None else self.wide(bank.sinks[index])

        def to_pattern(scores: Tensor) -> Tensor:
            scores = scores if distance is None else scores + distance
            if bank.score_cap is not None:
                scores = bank.score_cap * torch.tanh(scores / bank.score_cap)
            scores = scores.masked_fill(~allowed, -math.inf)
            if sink is None:
                return scores.softmax(-1)
            return torch.cat([scores, sink.expand(len(scores), 1)], -1).softmax(-1)[:, :-1]

        return ScoreSides(
            query=lambda x: query(x) * grown,
            key=key,
            query_bias=query_bias * grown,
            key_bias=key_bias,
            allowed=allowed,
            to_pattern=to_pattern,
            distance=distance,
        )

    def _side(
        self, side: Literal["Q", "K"], index: int, x: Tensor
    ) -> tuple[Callable[[Tensor], Tensor], Tensor]:
        """A head's queries or keys as an affine map of the residual stream around ``x``: the scale of
        their norm, their rotation and what clamping took away are as they are there.
        """
        bank, at = self.bank, torch.arange(len(x), device=x.device)
        stored = (bank.W_Q, bank.b_Q) if side == "Q" else (bank.W_K, bank.b_K)
        W_all, b_all = (self.wide(part) for part in stored)
        own = index // (1 if side == "Q" else bank.group)
        W, added = W_all[own], bank.positions(at[None])
        bias = b_all.expand(len(x), *b_all.shape)  # [pos, head, d_head]
        if added is not None:
            bias = bias + torch.einsum("pd,hdk->phk", added[0].detach(), W_all)
        raw = torch.einsum("pd,hdk->phk", self._norm.apply(x), W_all) + bias
        bias = bias + bank.clipped(raw) - raw

        def turned(vectors: Tensor) -> Tensor:
            if bank.rotary is None:
                return vectors
            tables = bank.rotary.tables(at[None], x.dtype, len(x))
            return bank.rotary.rotate(vectors.reshape(-1, len(x), 1, bank.d_head), tables).reshape(
                vectors.shape
            )

        if not bank.normed:
            return lambda y: turned(self._norm.apply(y) @ W), turned(bias[:, own])
        norm = bank.q_norm if side == "Q" else bank.k_norm
        read = bank.clipped(raw)
        if bank.normed_last:
            read = torch.stack([turned(read[:, h]) for h in range(read.shape[1])], 1)
        over = read.flatten(-2) if bank.normed_over == "all" else read[:, own]
        if norm.kind == "LN":
            over = over - over.mean(-1, keepdim=True)
        scale = (over.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
        gained = bank.qk_norm(side, index)
        behind = self.wide(norm.b).reshape(-1, bank.d_head) if norm.b is not None else None
        behind = None if behind is None else behind[own if len(behind) > 1 else 0]

        def through(vectors: Tensor) -> Tensor:
            if bank.normed_last:
                return gained.turn(turned(vectors)) / scale
            return turned(gained.turn(vectors) / scale)

        constant = through(bias[:, own])
        if behind is not None:
            wide = behind.expand(len(x), -1)
            constant = constant + (wide if bank.normed_last else turned(wide))
        return lambda y: through(self._norm.apply(y) @ W), constant


@freeze_bank.register
def _(
    bank: AttentionBank, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm, stream: Tensor
) -> FrozenBank:
    return FrozenAttention(bank, pattern, norm, post, stream)
