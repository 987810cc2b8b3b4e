"""LayerNorm, RMSNorm or none: in front of a sublayer, behind it, or over the stream."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.model.spec import NormKind


class Norm(nn.Module):
    """``(x - mean) / scale`` (LN), ``x / scale`` (RMS) or ``x`` (None), then gain and bias if it has any.

    In front of a sublayer the gain, the bias and the centring matrix are folded into the weights
    that read the result (TransformerLens's LNPre and RMSPre), so those norms have no parameters.
    The scale is taken in float32 or better.
    """

    w: Tensor | None
    b: Tensor | None

    def __init__(self, kind: NormKind, eps: float, w: Tensor | None = None, b: Tensor | None = None):
        super().__init__()
        self.kind = kind
        self.eps = eps
        self.register_parameter("w", None if w is None else nn.Parameter(w))
        self.register_parameter("b", None if b is None else nn.Parameter(b))
        self.hook_scale = HookPoint()  # [batch, pos, 1]
        self.hook_normalized = HookPoint()  # [batch, pos, d_model], before gain and bias

    def forward(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        return self._normed(x, self.hook_scale, self.hook_normalized)

    def plain(self, x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch d"]:
        """``forward`` without its hooks."""
        return self._normed(x, nn.Identity(), nn.Identity())

    def _normed(self, x: Tensor, hook_scale: nn.Module, hook_normalized: nn.Module) -> Tensor:
        if self.kind is None:
            return x
        wide = x if x.dtype == torch.float64 else x.float()
        if self.kind == "LN":
            wide = wide - wide.mean(-1, keepdim=True)
        scale = hook_scale((wide.pow(2).mean(-1, keepdim=True) + self.eps).sqrt())
        out = hook_normalized((wide / scale).to(x.dtype))
        if self.w is not None:
            out = out * self.w
        return out if self.b is None else out + self.b

    def freeze(self, scale: Float[Tensor, "pos 1"] | None) -> FrozenNorm:
        """The norm as a linear map, with the scale it had on one sequence of a cached run."""
        gain = None if self.w is None else self.w.detach()
        if gain is not None and scale is not None:
            gain = gain.to(scale.dtype)  # half precision under a wider stream
        return FrozenNorm(None if self.kind is None else scale, centred=self.kind == "LN", gain=gain)


@dataclass(frozen=True, eq=False)
class FrozenNorm:
    """A norm with its scale fixed: a linear map. Without a gain it is its own transpose.

    Attributes:
        scale: ``[pos, 1]``, or None where there is no norm.
        centred: whether the mean over d_model is taken out first (LayerNorm).
        gain: ``[d_model]`` (or one for each of n vectors), where it is not folded into the weights behind
            the norm.
    """

    scale: Float[Tensor, "*pos 1"] | None
    centred: bool
    gain: Float[Tensor, "*n d_model"] | None = None

    def apply(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        return self.turn(x) if self.scale is None else self.turn(x) / self.scale

    def adjoint(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transpose of ``apply``."""
        return self.turn_back(y) if self.scale is None else self.turn_back(y) / self.scale

    def turn(self, x: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """``apply`` without the scale: the part that is the same at every position."""
        if self.centred:
            x = x - x.mean(-1, keepdim=True)
        return x if self.gain is None else x * self.gain

    def turn_back(self, y: Float[Tensor, "*batch d_model"]) -> Float[Tensor, "*batch d_model"]:
        """The transpose of ``turn``."""
        if self.gain is not None:
            y = y * self.gain
        return y - y.mean(-1, keepdim=True) if self.centred else y

    def weigh(self, w: Float[Tensor, "*batch pos"]) -> Float[Tensor, "*batch pos"]:
        """Numbers over positions divided by the scale there."""
        return w if self.scale is None else w / self.scale[:, 0]

    def at(self, position: int | Int[Tensor, " n"]) -> FrozenNorm:
        """The same map at one position, for vectors ``[..., d_model]``, or at n of them."""
        scale = None if self.scale is None else self.scale[position]
        return FrozenNorm(scale, self.centred, self.gain)


IDENTITY = FrozenNorm(None, centred=False)
