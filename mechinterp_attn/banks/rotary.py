"""Rotary position embeddings: queries and keys are turned by an angle that grows with position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from mechinterp_attn.spec import Spec


class Rotary(nn.Module):
    """Turns the first ``rotary_dim`` coordinates of queries and keys, pair by pair.

    The tables are computed in float32 whatever the model's dtype, as the sources do, so that a
    float64 model and its source turn by the very same angles.
    """

    cos: Tensor
    sin: Tensor

    def __init__(self, spec: Spec):
        super().__init__()
        dim = spec.rotary_dim
        self.dim = dim
        self.adjacent = spec.rotary_adjacent
        if spec.rotary_frequencies:
            frequency = torch.tensor(spec.rotary_frequencies)
        else:
            frequency = 1.0 / (spec.rotary_base ** (torch.arange(0, dim, 2).float() / dim))
        angle = torch.outer(torch.arange(spec.n_ctx).float(), frequency)  # [pos, dim / 2]
        angle = angle.repeat_interleave(2, -1) if self.adjacent else torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos() * spec.rotary_factor, persistent=False)
        self.register_buffer("sin", angle.sin() * spec.rotary_factor, persistent=False)

    def forward(
        self, x: Float[Tensor, "batch pos head d_head"], positions: Int[Tensor, "batch pos"]
    ) -> Float[Tensor, "batch pos head d_head"]:
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        cos = self.cos[positions][:, :, None].to(x.dtype)
        sin = self.sin[positions][:, :, None].to(x.dtype)
        return torch.cat([turned * cos + self._quarter_turn(turned) * sin, rest], dim=-1)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """(x0, x1) -> (-x1, x0) for every pair."""
        if self.adjacent:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
