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

from mechinterp_attn.banks.norm import FrozenNorm
from mechinterp_attn.banks.rotary import Rotary
from mechinterp_attn.heads import Cache, FrozenBank, HeadBank, Kind
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
        self.scale = spec.attn_scale
        self.rotary = Rotary(spec) if spec.positions == "rotary" else None
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            self.register_parameter(name, nn.Parameter(weights[name]))
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        if self.rotary is not None:
            self.hook_rot_q = HookPoint()
            self.hook_rot_k = HookPoint()
        self.hook_attn_scores = HookPoint()  # [batch, head, query, key]
        self.hook_pattern = HookPoint()  # [batch, head, query, key]
        self.hook_z = HookPoint()  # [batch, pos, head, d_head]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The sum of the heads' outputs plus b_O for a normalised residual stream ``x``."""
        q = self.hook_q(_project(x, self.W_Q, self.b_Q))
        k = self.hook_k(_project(x, self.W_K, self.b_K))
        v = self.hook_v(_project(x, self.W_V, self.b_V))
        if self.rotary is not None:
            q, k = self.hook_rot_q(self.rotary(q)), self.hook_rot_k(self.rotary(k))
        if self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks():
            scores = self.hook_attn_scores(self._scores(q, k))
            pattern = self.hook_pattern(scores.softmax(-1))
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, self._per_head(v))
        else:  # nobody looks at the pattern: the fused kernel never stores it
            z = F.scaled_dot_product_attention(
                q.transpose(1, 2),
                self._per_head(k).transpose(1, 2),
                self._per_head(v).transpose(1, 2),
                is_causal=self.causal,
                scale=1 / self.scale,
            ).transpose(1, 2)
        z = self.hook_z(z)
        return z.flatten(-2) @ self.W_O.flatten(0, 1) + self.b_O

    def _scores(self, q: Tensor, k: Tensor) -> Float[Tensor, "batch head query key"]:
        scores = torch.einsum("bqhd,bkhd->bhqk", q, self._per_head(k)) / self.scale
        if self.causal:
            allowed = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
            scores = scores.masked_fill(~allowed, -math.inf)
        return scores

    def _per_head(self, x: Float[Tensor, "batch pos kv_head d_head"]) -> Tensor:
        return x.repeat_interleave(self.group, dim=2) if self.group > 1 else x

    def weights(self, index: int) -> dict[str, Tensor]:
        kv = index // self.group
        return {
            "W_Q": self.W_Q[index],
            "W_K": self.W_K[kv],
            "W_V": self.W_V[kv],
            "W_O": self.W_O[index],
            "b_Q": self.b_Q[index],
            "b_K": self.b_K[kv],
            "b_V": self.b_V[kv],
        }

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
        return x @ self.W_Q[index].detach().to(x.dtype)

    def key_read(self, index: int, x: Tensor) -> Tensor:
        return x @ self.W_K[index // self.group].detach().to(x.dtype)

    def freeze(self, pattern: Tensor, norm: FrozenNorm) -> FrozenAttention:
        return FrozenAttention(self, pattern, norm)


class FrozenAttention(FrozenBank):
    """``x -> sum_h pattern_h @ norm(x) @ W_V_h @ W_O_h`` with the pattern of one run."""

    bank: AttentionBank

    def __init__(self, bank: AttentionBank, pattern: Float[Tensor, "head query key"], norm: FrozenNorm):
        self.bank = bank
        self.pattern = pattern
        self._norm = norm
        value = bank.b_V.detach().repeat_interleave(bank.group, 0)  # [head, d_head]
        z = pattern.sum(-1)[..., None] * value[:, None]  # [head, query, d_head]
        self.constant = self._write(z)

    def apply(self, x: Tensor) -> Tensor:
        return self._write(self.pattern @ self._values(self._norm.apply(x)))

    def adjoint(self, y: Tensor) -> Tensor:
        bank = self.bank
        z = torch.einsum("...pd,hkd->...hpk", y, bank.W_O.detach())
        v = self.pattern.transpose(-1, -2) @ z
        if bank.group > 1:
            v = v.unflatten(-3, (-1, bank.group)).sum(-3)
        return self._norm.apply(torch.einsum("...hpk,hdk->...pd", v, bank.W_V.detach()))

    def head_outputs_along(self, x: Tensor, position: int, direction: Tensor) -> Tensor:
        values = self._values(self._norm.apply(x))  # [head, pos, d_head]
        values = values + self.bank.b_V.detach().repeat_interleave(self.bank.group, 0)[:, None]
        z = torch.einsum("hk,hkd->hd", self.pattern[:, position], values)
        return torch.einsum("hd,hd->h", z, self.bank.W_O.detach() @ direction)

    def _values(self, x: Tensor) -> Float[Tensor, "*batch head pos d_head"]:
        values = torch.einsum("...pd,hdk->...hpk", x, self.bank.W_V.detach())
        return values.repeat_interleave(self.bank.group, -3) if self.bank.group > 1 else values

    def _write(self, z: Float[Tensor, "*batch head pos d_head"]) -> Tensor:
        return torch.einsum("...hpk,hkd->...pd", z, self.bank.W_O.detach())


def _project(
    x: Float[Tensor, "batch pos d_model"],
    W: Float[Tensor, "head d_model d_head"],
    b: Float[Tensor, "head d_head"],
) -> Float[Tensor, "batch pos head d_head"]:
    """All heads in one matmul; a view, not a copy, where W is stored head by head as [d_head,
    d_model] (as ``convert`` stores it)."""
    return F.linear(x, W.transpose(1, 2).flatten(0, 1), b.flatten()).unflatten(-1, b.shape)
