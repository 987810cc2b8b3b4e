"""What stands beside the heads of a trained model: its norms and its rotary positions.

The paper's sublayers have neither. Both leave its constructions as they are: the norm acts on the
original coordinates and the added ones bypass it; rotary positions turn the queries and keys of the
original heads and the neuron heads bypass them.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.model.norm import Norm
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.theorems.stream import Layout


@dataclass(frozen=True, eq=False)
class PartialNorm:
    """The norm of the original coordinates; constant, scratch and positions pass it by.

    The bias token's row is normed too, by the same rule: zero stays zero.

    Attributes:
        norm: the original model's.
        layout: how the stream is laid out.
    """

    norm: Norm
    layout: Layout

    def __call__(self, X: Float[Tensor, "*batch row width"]) -> Float[Tensor, "*batch row width"]:
        if self.norm.kind is None:
            return X
        front, width = self.layout.persistent, self.layout.d_model
        rows = [self._plain(X[..., :front, :width]), self.norm(X[..., front:, :width])]
        return torch.cat([torch.cat(rows, dim=-2), X[..., width:]], dim=-1)

    def _plain(self, x: Tensor) -> Tensor:
        """The same norm without hooks: those are for real tokens."""
        wide = x if x.dtype == torch.float64 else x.float()
        if self.norm.kind == "LN":
            wide = wide - wide.mean(-1, keepdim=True)
        scale = (wide.pow(2).mean(-1, keepdim=True) + self.norm.eps).sqrt()
        return (wide / scale.clamp_min(torch.finfo(wide.dtype).tiny)).to(x.dtype)


@dataclass(frozen=True, eq=False)
class RotaryTurn:
    """Turns the first ``rotary_dim`` coordinates of queries and keys of real rows by position.

    The first real row has position 0 and the bias token, which no original head sees, is not turned.
    Angles are in float32, as in the models.
    """

    spec: Spec

    def __call__(self, x: Float[Tensor, "*batch head row rank"]) -> Float[Tensor, "*batch head row rank"]:
        spec, dim = self.spec, self.spec.rotary_dim
        if spec.rotaries:
            table, factor = spec.rotaries[0].frequencies, spec.rotaries[0].factor
            frequency = torch.tensor(table, device=x.device)
        else:
            even, factor = torch.arange(0, dim, 2, device=x.device).float(), 1.0
            frequency = 1.0 / (spec.rotary_base ** (even / dim))
        position = torch.arange(x.shape[-2] - 1, device=x.device).float()
        angle = torch.outer(position, frequency)
        wide = x.dtype if x.dtype == torch.float64 else torch.float32
        cos, sin = (factor * f(angle).to(wide) for f in (torch.cos, torch.sin))
        turned = x[..., 1:, :dim].to(wide)
        pairs = turned.unflatten(-1, (-1, 2) if spec.rotary_adjacent else (2, -1))
        a, b = pairs.unbind(-1 if spec.rotary_adjacent else -2)
        at = -1 if spec.rotary_adjacent else -2
        turned = torch.stack([a * cos - b * sin, a * sin + b * cos], dim=at).flatten(-2)
        real = torch.cat([turned.to(x.dtype), x[..., 1:, dim:]], dim=-1)
        return torch.cat([x[..., :1, :], real], dim=-2)
