"""Rotary position embeddings: queries and keys are turned by an angle that grows with position."""

import torch
from jaxtyping import Float
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
        frequency = 1.0 / (spec.rotary_base ** (torch.arange(0, dim, 2).float() / dim))
        angle = torch.outer(torch.arange(spec.n_ctx).float(), frequency)  # [pos, dim / 2]
        angle = angle.repeat_interleave(2, -1) if self.adjacent else torch.cat([angle, angle], -1)
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, x: Float[Tensor, "batch pos head d_head"]) -> Float[Tensor, "batch pos head d_head"]:
        turned, rest = x[..., : self.dim], x[..., self.dim :]
        cos = self.cos[: x.shape[1], None].to(x.dtype)
        sin = self.sin[: x.shape[1], None].to(x.dtype)
        return torch.cat([turned * cos + self._quarter_turn(turned) * sin, rest], dim=-1)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """(x0, x1) -> (-x1, x0) for every pair."""
        if self.adjacent:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)
