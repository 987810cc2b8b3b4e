"""The bank of a block's original attention heads."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.heads import HeadBank, Kind, Side
from mechinterp_attn.model.norm import FrozenNorm, Norm
from mechinterp_attn.model.on_a_run import Cache
from mechinterp_attn.model.rotary import rotary_of
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
    sinks: Tensor | None

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
        self.rotary = rotary_of(spec, layer)
        self.table = spec.rotary(layer)
        self.clip = spec.qkv_clip
        self.growth = spec.query_growth
        self.slopes = torch.tensor(spec.alibi) if spec.positions == "alibi" else None
        self.rounded_slopes = spec.alibi_bfloat16
        self._pos_embed: tuple[nn.Module, ...] = ()  # shortformer; in a tuple: the model registers it
        self.parallel = spec.parallel
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            self.register_parameter(name, nn.Parameter(weights[name]))
        self.register_parameter("sinks", nn.Parameter(weights["sinks"]) if spec.sinks else None)
        self.hook_q = HookPoint()  # [batch, pos, head, d_head]
        self.hook_k = HookPoint()  # [batch, pos, kv_head, d_head]
        self.hook_v = HookPoint()  # [batch, pos, kv_head, d_head]
        self.normed = spec.qk_norm is not None
        if self.normed:
            self.normed_last = spec.qk_norm_last
            self.normed_over = spec.qk_norm_over
            self.q_norm, self.k_norm = (
                Norm(spec.qk_norm, spec.eps, weights[f"{side}_norm.w"], weights.get(f"{side}_norm.b"))
                for side in "qk"
            )
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
        added = self.positions(step.positions[:, step.n_past :])
        if forked is None:
            placed = x if added is None else x + added
            q, k, v = (
                _project(own, W, b) for own, (W, b) in zip((placed, placed, x), weights, strict=True)
            )
        else:
            if added is not None:
                forked = forked[0] + added[:, :, None], forked[1] + added[:, :, None], forked[2]
            read = zip(forked, weights, strict=True)
            q, k, v = (torch.einsum("bphd,hdk->bphk", own, W) + b for own, (W, b) in read)
        q, k, v = self.hook_q(self.clipped(q)), self.hook_k(self.clipped(k)), self.hook_v(self.clipped(v))
        if self.normed and not self.normed_last:
            q, k = self.norm_heads(q, self.q_norm), self.norm_heads(k, self.k_norm)
        if self.rotary is not None and self.table is not None:
            q = self.hook_rot_q(self.rotary.rotate(q, step.rotations[self.table]))
            k = self.hook_rot_k(self.rotary.rotate(k, step.rotations[self.table]))
        if self.normed and self.normed_last:
            q, k = self.norm_heads(q, self.q_norm), self.norm_heads(k, self.k_norm)
        if self.growth is not None:
            q = q * self.grown(step.positions[:, step.n_past :]).to(q.dtype)[:, :, None, None]
        if step.cache is not None:
            k, v = step.cache.extend(self.layer, k, v)
        watched = self.hook_attn_scores.has_hooks() or self.hook_pattern.has_hooks()
        if watched or self.score_cap is not None or self.sinks is not None:
            scores = self.hook_attn_scores(self._scores(q, k, step))
            pattern = self.hook_pattern(self.softmax(scores))
            z = torch.einsum("bhqk,bkhd->bqhd", pattern, self._per_head(v))
        else:  # nobody looks at the pattern: the fused kernel never stores it
            z = self._fused(q, k, v, step)
        z = self.hook_z(z)
        if self.use_result:
            return self.hook_result(torch.einsum("bphd,hde->bphe", z, self.W_O)).sum(2) + self.b_O
        return z.flatten(-2) @ self.W_O.flatten(0, 1) + self.b_O

    def give_positions(self, pos_embed: nn.Module) -> None:
        """The table of learned positions that are added to what queries and keys are read from."""
        self._pos_embed = (pos_embed,)

    def positions(self, at: Int[Tensor, "#batch pos"]) -> Float[Tensor, "#batch pos d_model"] | None:
        """What is added to what queries and keys are read from (shortformer); None in other models."""
        return self._pos_embed[0](at) if self._pos_embed else None

    def clipped(self, x: Tensor) -> Tensor:
        """Queries, keys or values within the bounds of the source."""
        return x if self.clip is None else x.clamp(-self.clip, self.clip)

    def norm_heads(self, x: Float[Tensor, "*batch pos head d_head"], norm: Norm) -> Tensor:
        """Queries or keys through their norm."""
        return norm(x.flatten(-2)).unflatten(-1, x.shape[-2:]) if self.normed_over == "all" else norm(x)

    def grown(self, positions: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos"]:
        """By how much queries grow with their position."""
        if self.growth is None:
            return torch.ones_like(positions, dtype=torch.float32)
        beta, length = self.growth
        return 1 + beta * torch.log(1 + torch.floor(positions / length))

    def distance_score(
        self, queries: Int[Tensor, "*batch query"], keys: Int[Tensor, "*batch key"]
    ) -> Float[Tensor, "*batch head query key"] | None:
        """What the distance adds to each score (ALiBi, Press et al. 2022); None in other models."""
        if self.slopes is None:
            return None
        fallen = [self._fall(p) for p in (queries, keys)]
        return fallen[1][..., None, :] - fallen[0][..., None]

    def _fall(self, positions: Int[Tensor, "*batch pos"]) -> Float[Tensor, "*batch head pos"]:
        """Slope times position, counted from the first token."""
        assert self.slopes is not None
        slopes = self.slopes.to(positions.device)
        if not self.rounded_slopes:
            return (slopes[:, None] * positions[..., None, :]).to(self.W_Q.dtype)
        return (slopes.bfloat16()[:, None] * positions[..., None, :]).to(self.W_Q.dtype) / self.scale

    def softmax(self, scores: Float[Tensor, "*batch head query key"]) -> Tensor:
        """Patterns over the real tokens; what the bias token's score (a sink) takes is left out."""
        if self.sinks is None:
            return scores.softmax(-1)
        sink = self.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:-1], 1)
        return torch.cat([scores, sink], -1).softmax(-1)[..., :-1]

    def _fused(self, q: Tensor, k: Tensor, v: Tensor, step: Step) -> Tensor:
        plain = self.causal and step.is_plain(self.window) and self.slopes is None
        mask = None
        if self.slopes is not None:
            mask = self.distance_score(step.positions[:, step.n_past :], step.positions)
            hidden = ~step.allowed(causal=self.causal, window=self.window)
            mask = cast(Tensor, mask).masked_fill(hidden, -math.inf)
        elif not plain and not (self.window is None and step.is_open(causal=self.causal)):
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
        distance = self.distance_score(step.positions[:, step.n_past :], step.positions)
        scores = scores if distance is None else scores + distance
        if self.score_cap is not None:
            scores = self.score_cap * torch.tanh(scores / self.score_cap)
        if self.window is None and step.is_open(causal=self.causal):
            return scores
        return scores.masked_fill(~step.allowed(causal=self.causal, window=self.window), -math.inf)

    def _per_head(self, x: Float[Tensor, "batch pos kv_head d_head"]) -> Tensor:
        return x.repeat_interleave(self.group, dim=2) if self.group > 1 else x

    def weights(self, index: int) -> dict[str, Tensor]:
        kv = index // self.group
        q, k = self.qk_norm("Q", index), self.qk_norm("K", index)
        return {
            "W_Q": q.turn(self.W_Q[index]),
            "W_K": k.turn(self.W_K[kv]),
            "W_V": self.W_V[kv],
            "W_O": self.W_O[index],
            "b_Q": q.turn(self.b_Q[index]),
            "b_K": k.turn(self.b_K[kv]),
            "b_V": self.b_V[kv],
        }

    def qk_norm(self, side: Side, index: int | slice = slice(None)) -> FrozenNorm:
        """The norm on a head's queries or keys (of all heads in their own number, ``[n, 1, d_head]``): its
        gain and centring. Its scale, one number per position, is left out, and so is a bias behind it.
        """
        if not self.normed:
            return FrozenNorm(None, centred=False)
        norm = self.q_norm if side == "Q" else self.k_norm
        gains = cast(Tensor, norm.w).detach().reshape(-1, 1, self.d_head)
        if isinstance(index, int):
            index = index // (self.group if side == "K" else 1)
            gains = gains[index if len(gains) > 1 else 0, 0]
        return FrozenNorm(None, centred=norm.kind == "LN", gain=gains)

    def _stacked(self, side: Side, heads: slice | Tensor) -> Tensor:
        W = {"Q": self.W_Q, "K": self.W_K, "V": self.W_V, "O": self.W_O}[side].detach()
        if side in "QK":
            W = self.qk_norm(side).turn(W)
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
        """The value bias, where every row of a pattern sums to 1; nothing where a sink may take it all."""
        if self.sinks is not None:
            return torch.zeros_like(self.b_Q.detach())
        return self.b_V.detach().repeat_interleave(self.group, 0)

    @property
    def compares_keys(self) -> bool:
        return self.sinks is None

    @property
    def score_scale(self) -> float:
        return float(self.scale)

    def turned(self, x: Tensor, position: int) -> Tensor:
        if self.rotary is None:
            return x
        if self.normed and self.normed_last:
            raise MechInterpError(
                f"the heads of layer {self.layer} norm queries and keys after turning them, so that "
                "weights alone do not say what positions make of them; use paths.expand_score on a prompt"
            )
        return self.rotary.turn(x, position)

    def by_head(self, z: Tensor) -> Float[Tensor, "*batch pos head d_head"]:
        return z

    def cached_pattern(self, cache: Cache, batch: int) -> Float[Tensor, "head query key"]:
        pattern = cache[f"{self.path}.hook_pattern"]
        return pattern[batch] if pattern.ndim == 4 else pattern

    def dense_pattern(self, pattern: Tensor, index: int) -> Float[Tensor, "query key_plus_bias"]:
        own = pattern[index]
        if self.sinks is None:
            return F.pad(own, (0, 1))
        return torch.cat([own, 1 - own.sum(-1, keepdim=True)], -1)

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
        entropy = torch.special.entr(pattern).sum(-1)
        if self.sinks is not None:
            entropy = entropy + torch.special.entr((1 - pattern.sum(-1)).clamp_min(0))
        return entropy.transpose(1, 2)

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
