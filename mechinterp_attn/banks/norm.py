"""The norm in front of a sublayer: LayerNorm, RMSNorm or none, its gain folded into the weights."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.spec import NormKind


class Norm(nn.Module):
    """``(x - mean) / scale`` (LN), ``x / scale`` (RMS) or ``x`` (None), without gain or bias.

    The gain, the bias and the centring matrix are folded into the weights that read the result,
    as TransformerLens's LNPre and RMSPre. The scale is taken in float32 or better.
    """

    def __init__(self, kind: NormKind, eps: float):
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model]

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if self.kind is None:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        if self.kind == "LN":
            wide = wide - wide.mean(-1, keepdim=True)
        scale = self.hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        return self.hook_normalized((wide / scale).to(x.dtype))

    def freeze(self, scale: Float[Tensor, "pos 1"] | None) -> FrozenNorm:
        """The norm as a linear map, with the scale it had on one sequence of a cached run."""
        return FrozenNorm(None if self.kind is None else scale, centred=self.kind == "LN")


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm with its scale fixed: linear, and equal to its transpose.

    Attributes:
        scale: ``[pos, 1]``, or None where there is no norm.
        centred: whether the mean over d_model is taken out first (LayerNorm).
    """

    scale: Float[Tensor, "pos 1"] | None
    centred: bool

    def apply(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        if self.scale is None:
            return x
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x / self.scale

    def at(self, position: int) -> FrozenNorm:
        """The same map at one position, for vectors ``[..., d_model]``."""
        return FrozenNorm(None if self.scale is None else self.scale[position], self.centred)
