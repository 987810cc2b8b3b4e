"""Rotary position embeddings: queries and keys are turned by an angle that grows with position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.spec import Spec

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [batch, pos, 1, rotary_dim]


def rotation(spec: Spec, positions: Int[Tensor, "batch pos"], dtype: torch.dtype) -> Rotation:
    """The cosines and sines by which queries and keys at these positions are turned.

    Computed in float32 whatever the model's dtype, as the sources do, so that a float64 model and
    its source turn by the very same angles.
    """
    dim = spec.rotary_dim
    if spec.rotary_frequencies:
        frequency = torch.tensor(spec.rotary_frequencies)
    else:
        frequency = 1.0 / (spec.rotary_base ** (torch.arange(0, dim, 2).float() / dim))
    angle = positions[..., None].float() * frequency.to(positions.device)
    angle = angle.repeat_interleave(2, -1) if spec.rotary_adjacent else torch.cat([angle, angle], -1)
    angle = angle[:, :, None]
    return (
        (angle.cos() * spec.rotary_factor).to(dtype),
        (angle.sin() * spec.rotary_factor).to(dtype),
    )


def rotate(
    x: Float[Tensor, "batch pos head d_head"], turn: Rotation, *, adjacent: bool
) -> Float[Tensor, "batch pos head d_head"]:
    """Turn the first ``rotary_dim`` coordinates, pair by pair."""
    cos, sin = turn
    dim = cos.shape[-1]
    turned, rest = x[..., :dim], x[..., dim:]
    return torch.cat([turned * cos + _quarter_turn(turned, adjacent) * sin, rest], dim=-1)


def _quarter_turn(x: Tensor, adjacent: bool) -> Tensor:
    """(x0, x1) -> (-x1, x0) for every pair."""
    if adjacent:
        return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
    first, second = x.chunk(2, dim=-1)
    return torch.cat([-second, first], dim=-1)
