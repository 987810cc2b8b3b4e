"""A bank of attention heads on one prompt, as a linear map of the residual stream.

The pattern is that of the run, with the soft cap and window behind it; the norm in front and, where
there is one, the norm behind the heads keep the scales of the run.
"""

from __future__ import annotations

import math
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.frozen.bank import FrozenBank, ScoreSides, freeze_bank
from mechinterp_attn.model.attention import AttentionBank
from mechinterp_attn.model.norm import FrozenNorm, Norm


class FrozenAttention(FrozenBank):
    """``x -> post(sum_h pattern_h @ norm(x) @ W_V_h @ W_O_h)`` with the pattern of one run."""

    bank: AttentionBank

    def __init__(
        self,
        bank: AttentionBank,
        pattern: Float[Tensor, "head query key"],
        norm: FrozenNorm,
        post: FrozenNorm,
    ):
        super().__init__(bank, pattern, norm, post)
        self._W_O = bank.W_O.detach()
        self._W_V = bank.W_V.detach()

    @property
    def z_bias(self) -> Float[Tensor, "pos head d_head"]:
        value = self.bank.b_V.detach().repeat_interleave(self.bank.group, 0)  # [head, d_head]
        return self.pattern.sum(-1).T[..., None] * value

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
            out[own] = z[own] @ self._W_O[head]
        return self._post.at(position).apply(out)

    def pull(self, v: Tensor, index: Tensor) -> Tensor:
        v = self._post.turn_back(v)
        out = torch.empty_like(v)
        for head in index.unique().tolist():
            own = index == head
            out[own] = v[own] @ self._W_O[head].T @ self._W_V[head // self.bank.group].T
        return self._norm.turn_back(out)

    def spread(self, w: Tensor, index: Tensor) -> Tensor:
        w = self.weigh_out(w)
        out = torch.empty_like(w)
        for head in index.unique().tolist():  # no copy of a pattern per row
            own = index == head
            out[own] = w[own] @ self.pattern[head]
        return self._norm.weigh(out)

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
        bank = self.bank
        weights = {name: w.detach() for name, w in bank.weights(index).items()}

        def side(name: str) -> tuple[Tensor, Tensor, FrozenNorm]:
            """Weights, bias and the norm of the queries or keys at the stream ``x``."""
            W, b = weights[f"W_{name}"], weights[f"b_{name}"]
            if not bank.normed:
                return W, b, FrozenNorm(None, centred=False)
            norm: Norm = bank.q_norm if name == "Q" else bank.k_norm
            plain = (bank.W_Q[index], bank.b_Q[index]) if name == "Q" else None
            kv = index // bank.group
            W_raw, b_raw = plain or (bank.W_K[kv], bank.b_K[kv])
            wide = self._norm.apply(x) @ W_raw.detach() + b_raw.detach()
            if norm.kind == "LN":
                wide = wide - wide.mean(-1, keepdim=True)
            scale = (wide.pow(2).mean(-1, keepdim=True) + norm.eps).sqrt()
            return W_raw.detach(), b_raw.detach(), norm.freeze(scale)

        def turned(vectors: Tensor) -> Tensor:
            if bank.rotary is None:
                return vectors
            tables = bank.rotary.tables(torch.arange(len(x), device=x.device)[None], x.dtype)
            return bank.rotary.rotate(vectors.reshape(-1, len(x), 1, bank.d_head), tables).reshape(
                vectors.shape
            )

        W_Q, b_Q, q_norm = side("Q")
        W_K, b_K, k_norm = side("K")
        pos = torch.arange(len(x), device=x.device)
        back = pos[:, None] - pos
        allowed = back >= 0 if bank.causal else torch.ones_like(back, dtype=torch.bool)
        if bank.window is not None:
            allowed = allowed & (back < bank.window)

        def to_pattern(scores: Tensor) -> Tensor:
            if bank.score_cap is not None:
                scores = bank.score_cap * torch.tanh(scores / bank.score_cap)
            return scores.masked_fill(~allowed, -math.inf).softmax(-1)

        return ScoreSides(
            query=lambda x: turned(q_norm.apply(self._norm.apply(x) @ W_Q)) / bank.scale,
            key=lambda x: turned(k_norm.apply(self._norm.apply(x) @ W_K)),
            query_bias=turned(q_norm.apply(b_Q.expand(len(x), -1))) / bank.scale,
            key_bias=turned(k_norm.apply(b_K.expand(len(x), -1))),
            allowed=allowed,
            to_pattern=to_pattern,
        )


@freeze_bank.register
def _(bank: AttentionBank, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm) -> FrozenBank:
    return FrozenAttention(bank, pattern, norm, post)
