"""Rotary position embeddings: queries and keys are turned by an angle that grows with position."""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.model.spec import RotaryTable, Spec

Rotation = tuple[Tensor, Tensor]  # cosines and sines, [batch, pos, 1, rotary_dim]


class Rotary:
    """Turns the first ``rotary_dim`` coordinates of queries and keys, pair by pair.

    Angles are computed in float32 whatever the model's dtype, as the sources do, so that a float64
    model and its source turn by the very same angles, and a bfloat16 one loses no positions.
    """

    def __init__(self, table: RotaryTable, *, adjacent: bool):
        self.table = table
        self.adjacent = adjacent
        self.factor = table.factor
        self.frequency = torch.tensor(table.frequencies)
        self._beyond = torch.tensor(table.beyond)

    def frequencies(self, length: int) -> Float[Tensor, " pair"]:
        """Radians per token of every pair in a sequence of so many tokens."""
        table = self.table
        if table.until is None or length <= table.until:
            return self.frequency
        if table.stretch is None:
            return self._beyond
        (base, factor), dim = table.stretch, 2 * len(table.frequencies)
        wide = base * ((factor * length / table.until) - (factor - 1)) ** (dim / (dim - 2))
        return 1.0 / (wide ** (torch.arange(0, dim, 2).float() / dim))

    def tables(self, positions: Int[Tensor, "batch pos"], dtype: torch.dtype, length: int) -> Rotation:
        """The cosines and sines by which queries and keys at these positions are turned.

        Args:
            length: of the whole sequence, where the frequencies depend on it.
        """
        angle = positions[..., None].float() * self.frequencies(length).to(positions.device)
        angle = angle.repeat_interleave(2, -1) if self.adjacent else torch.cat([angle, angle], -1)
        angle = angle[:, :, None]
        return (angle.cos() * self.factor).to(dtype), (angle.sin() * self.factor).to(dtype)

    def rotate(
        self, x: Float[Tensor, "*batch pos head d_head"], tables: Rotation
    ) -> Float[Tensor, "*batch pos head d_head"]:
        """Queries or keys turned by the tables of their positions."""
        cos, sin = tables
        turned, rest = x.split([cos.shape[-1], x.shape[-1] - cos.shape[-1]], dim=-1)
        return torch.cat([turned * cos + self._quarter_turn(turned) * sin, rest], dim=-1)

    def turn(self, x: Float[Tensor, "*n d_head"], position: int) -> Float[Tensor, "*n d_head"]:
        """Queries or keys as they are at one position of a sequence of ordinary length."""
        at = torch.tensor([[position]], device=x.device)
        return self.rotate(x.reshape(1, 1, -1, x.shape[-1]), self.tables(at, x.dtype, 1)).reshape(x.shape)

    def _quarter_turn(self, x: Tensor) -> Tensor:
        """(x0, x1) -> (-x1, x0) for every pair."""
        if self.adjacent:
            return torch.stack([-x[..., 1::2], x[..., 0::2]], dim=-1).flatten(-2)
        first, second = x.chunk(2, dim=-1)
        return torch.cat([-second, first], dim=-1)


def rotary_of(spec: Spec, layer: int) -> Rotary | None:
    """The rotation of one layer, or None where it has none."""
    index = spec.rotary(layer)
    return None if index is None else rotaries_of(spec)[index]


def rotaries_of(spec: Spec) -> tuple[Rotary, ...]:
    """The model's rotations, one for each of its tables."""
    if spec.positions != "rotary":
        return ()
    dim = spec.rotary_dim
    plain = 1.0 / (spec.rotary_base ** (torch.arange(0, dim, 2).float() / dim))
    tables = spec.rotaries or (RotaryTable(tuple(plain.tolist())),)
    return tuple(Rotary(table, adjacent=spec.rotary_adjacent) for table in tables)
