"""The bank of a block's original attention heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Shaped
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.model.heads import Cache, HeadBank, Kind, Side
from mechinterp_attn.model.norm import Norm
from mechinterp_attn.model.rotary import Rotary
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.model.step import Step

# A normalised stream of its own for each head's query, key and value: ``[batch, pos, head, d_model]`` each.
ForkedInput = tuple[Tensor, Tensor, Tensor]


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
    sides: ClassVar[tuple[Side, ...]] = ("Q", "K", "V")

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
        self.rotary = Rotary(spec) if spec.positions == "rotary" else None
        self.parallel = spec.parallel
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            self.register_parameter(name, nn.Parameter(weights[name]))
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.normed = spec.qk_norm is not None
        if self.normed:
            self.q_norm = Norm(spec.qk_norm, spec.eps, w=weights["q_norm.w"])
            self.k_norm = Norm(spec.qk_norm, spec.eps, w=weights["k_norm.w"])
        if self.rotary is not None:
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]
        self.use_result = False
        self.hook_result = HookPoint()  # [batch, pos, head, d_model], where use_result asks for it

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], step: Step, forked: ForkedInput | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The sum of the heads' outputs plus b_O for a normalised residual stream ``x``.

        Args:
            step: what the banks share in this pass.
            forked: a normalised stream of its own for every head's query, key and value, instead of ``x``.
        """
        weights = (self.W_Q, self.b_Q), (self.W_K, self.b_K), (self.W_V, self.b_V)
        if forked is None:
            q, k, v = (_project(x, W, b) for W, b in weights)
        else:
            read = zip(forked, weights, strict=True)
            q, k, v = (torch.einsum("bphd,hdk->bphk", own, W) + b for own, (W, b) in read)
        q, k, v = self.hook_q(q), self.hook_k(k), self.hook_v(v)
        if self.normed:
            q, k = self.q_norm(q), self.k_norm(k)
        if self.rotary is not None and step.rotation is not None:
            q = self.hook_rot_q(self.rotary.rotate(q, step.rotation))
            k = self.hook_rot_k(self.rotary.rotate(k, step.rotation))
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
        if self.use_result:
            return self.hook_result(torch.einsum("bphd,hde->bphe", z, self.W_O)).sum(2) + self.b_O
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

    def _stacked(self, side: Side, heads: slice | Tensor) -> Tensor:
        W = {"Q": self.W_Q, "K": self.W_K, "V": self.W_V, "O": self.W_O}[side].detach()
        if self.normed and side in "QK":
            W = W * cast(Tensor, (self.q_norm if side == "Q" else self.k_norm).w).detach()
        if self.group > 1 and side in "KV":
            heads = torch.arange(self.n_heads, device=W.device)[heads] // self.group
        return W[heads]

    @property
    def reads(self) -> dict[str, Float[Tensor, "head d_model d_head"]]:
        """As they are in front of a norm on queries and keys."""
        shared = {"K": self.W_K.detach(), "V": self.W_V.detach()}
        wide = {side: W.repeat_interleave(self.group, 0) for side, W in shared.items()}
        return {"Q": self.W_Q.detach(), **wide}

    @property
    def z_constant(self) -> Float[Tensor, "head d_head"]:
        """The value bias: every row of a pattern sums to 1."""
        return self.b_V.detach().repeat_interleave(self.group, 0)

    @property
    def score_scale(self) -> float:
        return float(self.scale)

    def turned(self, x: Tensor, position: int) -> Tensor:
        return x if self.rotary is None else self.rotary.turn(x, position)

    def by_head(self, z: Tensor) -> Float[Tensor, "*batch pos head d_head"]:
        return z

    def cached_pattern(self, cache: Cache, batch: int) -> Float[Tensor, "head query key"]:
        pattern = cache[f"{self.path}.hook_pattern"]
        return pattern[batch] if pattern.ndim == 4 else pattern

    def dense_pattern(self, pattern: Tensor, index: int) -> Float[Tensor, "query key_plus_bias"]:
        return F.pad(pattern[index], (0, 1))

    def attention_on(
        self,
        pattern: Float[Tensor, "batch head query key"],
        pairs: Shaped[Tensor, "*batch query key"],
        moved: Float[Tensor, "batch key head"] | None = None,
    ) -> Float[Tensor, " head"]:
        pairs = pairs.to(pattern.dtype).expand(len(pattern), -1, -1)
        if moved is None:
            return torch.einsum("bhqk,bqk->h", pattern, pairs)
        return torch.einsum("bhqk,bqk,bkh->h", pattern, pairs, moved.to(pattern.dtype))

    def entropy(self, pattern: Float[Tensor, "batch head query key"]) -> Tensor:
        return torch.special.entr(pattern).sum(-1).transpose(1, 2)

    def moved(self, cache: Cache) -> Tensor:
        return self._norms(self._per_head(cache[f"{self.path}.hook_v"]))

    def written(self, cache: Cache) -> Tensor:
        return self._norms(cache[f"{self.path}.hook_z"])

    def _norms(self, z: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head"]:
        """Norms of ``z @ W_O``."""
        squares = torch.einsum("bphd,hde->bphe", z, self.gram("O").to(z.dtype)) * z
        return squares.sum(-1).clamp_min(0).sqrt()


def _project(
    x: Float[Tensor, "batch pos d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """All heads in one matmul; a view, not a copy, where W is stored head by head as [d_head,
    d_model] (as ``convert`` stores it).
    """
    return F.linear(x, W.transpose(1, 2).flatten(0, 1), b.flatten()).unflatten(-1, b.shape)


def _gained(W: Float[Tensor, "*d_model d_head"], gain: Tensor | None) -> Tensor:
    return W if gain is None else W * gain
