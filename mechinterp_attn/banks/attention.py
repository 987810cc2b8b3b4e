"""The bank of a block's original attention heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.banks.norm import IDENTITY, FrozenNorm, Norm
from mechinterp_attn.banks.rotary import rotate
from mechinterp_attn.banks.step import Step
from mechinterp_attn.heads import Cache, FrozenBank, HeadBank, Kind, ScoreSides, Side
from mechinterp_attn.spec import Spec


class AttentionBank(HeadBank):
    """Softmax attention heads; grouped keys and values (GQA) are stored once.

    Parameters (the norm in front is folded into W_Q, W_K, W_V and their biases):
        W_Q ``[head, d_model, d_head]``, W_K, W_V ``[kv_head, d_model, d_head]``,
        W_O ``[head, d_head, d_model]``, b_Q ``[head, d_head]``, b_K, b_V ``[kv_head, d_head]``,
        b_O ``[d_model]``.
    """

    kind: ClassVar[Kind] = "attention"
    letter: ClassVar[str] = "H"
    part: ClassVar[str] = "attn"
    place: ClassVar[int] = 0
    mixes_positions: ClassVar[bool] = True

    W_Q: Tensor
    W_K: Tensor
    W_V: Tensor
    W_O: Tensor
    b_Q: Tensor
    b_K: Tensor
    b_V: Tensor
    b_O: Tensor

    def __init__(self, spec: Spec, layer: int, weights: Mapping[str, Tensor]):
        super().__init__()
        self.layer = layer
        self.n_heads = spec.n_heads
        self.d_head = spec.d_head
        self.d_model = spec.d_model
        self.group = spec.n_heads // spec.n_kv_heads
        self.causal = spec.causal
        self.window = spec.window(layer)
        self.score_cap = spec.score_cap
        self.scale = spec.attn_scale * (layer + 1 if spec.scale_by_layer else 1)
        self.rotary = spec.positions == "rotary"
        self.adjacent = spec.rotary_adjacent
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            self.register_parameter(name, nn.Parameter(weights[name]))
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.normed = spec.qk_norm is not None
        if self.normed:
            self.q_norm = Norm(spec.qk_norm, spec.eps, w=weights["q_norm.w"])
            self.k_norm = Norm(spec.qk_norm, spec.eps, w=weights["k_norm.w"])
        if self.rotary:
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], step: Step
    ) -> Float[Tensor, "batch pos d_model"]:
        """The sum of the heads' outputs plus b_O for a normalised residual stream ``x``."""
        q = self.hook_q(_project(x, self.W_Q, self.b_Q))
        k = self.hook_k(_project(x, self.W_K, self.b_K))
        v = self.hook_v(_project(x, self.W_V, self.b_V))
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if step.rotation is not None:
            q = self.hook_rot_q(rotate(q, step.rotation, adjacent=self.adjacent))
            k = self.hook_rot_k(rotate(k, step.rotation, adjacent=self.adjacent))
        if step.cache is not None:
            k, v = step.cache.extend(self.layer, k, v)
        watched = self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()
        if watched or self.score_cap is not None:
            scores = self.hook_attn_scores(self._scores(q, k, step))
            pattern = self.hook_pattern(scores.softmax(-1))
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, self._per_head(v))
        else:  # nobody looks at the pattern: the fused kernel never stores it
            z = self._fused(q, k, v, step)
        z = self.hook_z(z)
        return z.flatten(-2) @ self.W_O.flatten(0, 1) + self.b_O

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        plain = self.causal and step.is_plain(self.window)
        mask = None
        if not plain and not (self.window is None and step.is_open(causal=self.causal)):
            mask = step.allowed(causal=self.causal, window=self.window)
        z = F.scaled_dot_product_attention(
            q.transpose(1, 2),
            self._per_head(k).transpose(1, 2),
            self._per_head(v).transpose(1, 2),
            attn_mask=mask,
            is_causal=plain,
            scale=1 / self.scale,
        )
        return z.transpose(1, 2)

    def _scores(self, q: Tensor, k: Tensor, step: Step) -> Float[Tensor, "batch head query key"]:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, self._per_head(k)) / self.scale
        if self.score_cap is not None:
            scores = self.score_cap * torch.tanh(scores / self.score_cap)
        if self.window is None and step.is_open(causal=self.causal):
            return scores
        return scores.masked_fill(~step.allowed(causal=self.causal, window=self.window), -math.inf)

    def _per_head(self, x: Float[Tensor, "batch pos kv_head d_head"]) -> Tensor:
        return x.repeat_interleave(self.group, dim=2) if self.group > 1 else x

    def weights(self, index: int) -> dict[str, Tensor]:
        kv = index // self.group
        # A norm on queries and keys leaves its gain here and its scale, one number per position, out.
        q_gain, k_gain = (self.q_norm.w, self.k_norm.w) if self.normed else (None, None)
        return {
            "W_Q": _gained(self.W_Q[index], q_gain),
            "W_K": _gained(self.W_K[kv], k_gain),
            "W_V": self.W_V[kv],
            "W_O": self.W_O[index],
            "b_Q": _gained(self.b_Q[index], q_gain),
            "b_K": _gained(self.b_K[kv], k_gain),
            "b_V": self.b_V[kv],
        }

    def stacked(self, side: Side, heads: slice | Tensor = slice(None)) -> Tensor:
        W = {"Q": self.W_Q, "K": self.W_K, "V": self.W_V, "O": self.W_O}[side].detach()
        if self.group > 1 and side in "KV":
            heads = torch.arange(self.n_heads, device=W.device)[heads] // self.group
        return W[heads]

    def turned(self, x: Tensor, position: int) -> Tensor:
        return x if self.rotary is None else self.rotary.turn(x, position)

    def cached_pattern(self, cache: Cache, batch: int) -> Float[Tensor, "head query key"]:
        pattern = cache[f"{self.path}.hook_pattern"]
        return pattern[batch] if pattern.ndim == 4 else pattern

    def dense_pattern(self, pattern: Tensor, index: int) -> Float[Tensor, "query key_plus_bias"]:
        return F.pad(pattern[index], (0, 1))

    def attention_on(
        self, pattern: Float[Tensor, "batch head query key"], pairs: Float[Tensor, "query key"]
    ) -> Float[Tensor, " head"]:
        return torch.einsum("bhqk,qk->h", pattern, pairs.to(pattern.dtype)) / pattern.shape[0]

    def query_read(self, index: int, x: Tensor) -> Tensor:
        return x @ self.weights(index)["W_Q"].detach().to(x.dtype)

    def key_read(self, index: int, x: Tensor) -> Tensor:
        return x @ self.weights(index)["W_K"].detach().to(x.dtype)

    def freeze(self, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm = IDENTITY) -> FrozenAttention:
        return FrozenAttention(self, pattern, norm, post)


class FrozenAttention(FrozenBank):
    """``x -> sum_h pattern_h @ norm(x) @ W_V_h @ W_O_h`` with the pattern of one run."""

    bank: AttentionBank

    def __init__(
        self,
        bank: AttentionBank,
        pattern: Float[Tensor, "head query key"],
        norm: FrozenNorm,
        post: FrozenNorm,
    ):
        self.bank = bank
        self.pattern = pattern
        self._norm = norm
        self._post = post
        value = bank.b_V.detach().repeat_interleave(bank.group, 0)  # [head, d_head]
        self.z_bias = pattern.sum(-1).T[..., None] * value

    def read(self, x: Tensor) -> Tensor:
        values = torch.einsum("...pd,hdk->...hpk", self._norm.apply(x), self.bank.W_V.detach())
        if self.bank.group > 1:
            values = values.repeat_interleave(self.bank.group, -3)
        return (self.pattern @ values).transpose(-3, -2)

    def unread(self, z: Tensor) -> Tensor:
        values = self.pattern.transpose(-1, -2) @ z.transpose(-3, -2)
        if self.bank.group > 1:
            values = values.unflatten(-3, (-1, self.bank.group)).sum(-3)
        return self._norm.apply(torch.einsum("...hpk,hdk->...pd", values, self.bank.W_V.detach()))

    def write(self, z: Tensor) -> Tensor:
        return z.flatten(-2) @ self.bank.W_O.detach().flatten(0, 1)

    def unwrite(self, y: Tensor) -> Tensor:
        z = y @ self.bank.W_O.detach().flatten(0, 1).T
        return z.unflatten(-1, (self.bank.n_heads, self.bank.d_head))

    def write_at(self, z: Tensor, index: Tensor, position: Tensor) -> Tensor:
        out = z.new_empty(len(z), self.bank.d_model)
        for head in index.unique().tolist():
            own = index == head
            out[own] = z[own] @ self.bank.W_O[head].detach()
        return out

    def pull(self, v: Tensor, index: Tensor) -> Tensor:
        out = torch.empty_like(v)
        for head in index.unique().tolist():
            own = index == head
            W_V = self.bank.W_V[head // self.bank.group].detach()
            out[own] = v[own] @ self.bank.W_O[head].detach().T @ W_V.T
        return self._norm.turn_back(out)

    def spread(self, w: Tensor, index: Tensor) -> Tensor:
        return self._norm.weigh(torch.einsum("nq,nqk->nk", w, self.pattern[index]))

    def reach(self, m: Tensor, *, summed: bool) -> Tensor:
        m = self._norm.weigh(m)
        return ((self.pattern @ m) if summed else (self.pattern * m).amax(-1)).T

    def hold(self, v: Tensor) -> Tensor:
        return torch.einsum("nd,hkd->nhk", v, self.bank.W_O.detach())

    def pull_norms(self, held: Tensor) -> Tensor:
        W_V = self._per_head(self.bank.W_V)
        gram = W_V.transpose(1, 2) @ W_V  # [head, d_head, d_head]; centring only shortens
        return torch.einsum("nhk,hkl,nhl->nh", held, gram, held).clamp_min(0).sqrt()

    def write_norms(self, z: Tensor) -> Tensor:
        gram = self.bank.W_O.detach() @ self.bank.W_O.detach().transpose(1, 2)
        return torch.einsum("phk,hkl,phl->ph", z, gram, z).clamp_min(0).sqrt()

    def norms(self) -> Tensor:
        ov = torch.einsum("hdk,hke->hde", self._per_head(self.bank.W_V), self.bank.W_O.detach())
        return torch.linalg.matrix_norm(ov, 2)

    def score_sides(self, index: int, x: Tensor) -> ScoreSides:
        bank = self.bank
        kv = index // bank.group

        def turned(side: Tensor) -> Tensor:
            if bank.rotary is None:
                return side
            return bank.rotary(side.reshape(-1, len(x), 1, bank.d_head)).reshape(side.shape)

        def query(x: Tensor) -> Tensor:
            return turned(self._norm.apply(x) @ bank.W_Q[index].detach()) / bank.scale

        def key(x: Tensor) -> Tensor:
            return turned(self._norm.apply(x) @ bank.W_K[kv].detach())

        pos = len(x)
        allowed = torch.ones(pos, pos, dtype=torch.bool, device=x.device)
        allowed = allowed.tril() if bank.causal else allowed
        return ScoreSides(
            query=query,
            key=key,
            query_bias=turned(bank.b_Q[index].detach().expand(pos, -1)) / bank.scale,
            key_bias=turned(bank.b_K[kv].detach().expand(pos, -1)),
            allowed=allowed,
            to_pattern=lambda scores: scores.masked_fill(~allowed, -math.inf).softmax(-1),
        )

    def _per_head(self, W: Tensor) -> Tensor:
        return W.detach().repeat_interleave(self.bank.group, 0)


def _project(
    x: Float[Tensor, "batch pos d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """All heads in one matmul; a view, not a copy, where W is stored head by head as [d_head,
    d_model] (as ``convert`` stores it)."""
    return F.linear(x, W.transpose(1, 2).flatten(0, 1), b.flatten()).unflatten(-1, b.shape)


def _gained(W: Float[Tensor, "*d_model d_head"], gain: Tensor | None) -> Tensor:
    return W if gain is None else W * gain
