"""The augmented residual stream: what the theorems add to a sequence so that heads suffice.

A sequence ``X [pos, d_model]`` becomes ``X' [1 + pos, width]`` (Huben & Morris 2023):

- one more row in front, the bias token, zero in every coordinate a head reads. It stands first, so
  that every mask of the paper is a part of the causal one;
- one more coordinate that is 1 on the real rows and 0 on the bias token, which carries all biases
  and is the key of the neuron heads;
- where a construction asks for them, scratch coordinates (zero between uses) and one-hot positions,
  which carry the masks that are written into weights.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError


@dataclass(frozen=True)
class Layout:
    """Where everything stands in an augmented stream.

    Attributes:
        d_model: width of the original stream; its coordinates come first.
        scratch: number of scratch coordinates.
        positions: number of one-hot coordinates, one for every row of the longest sequence with its
            persistent rows; 0 for none.
        persistent: rows in front of the sequence: the bias token, and more of them for SoLU.
    """

    d_model: int
    scratch: int = 0
    positions: int = 0
    persistent: int = 1

    @property
    def width(self) -> int:
        """Coordinates of a row of the augmented stream."""
        return self.d_model + 1 + self.scratch + self.positions

    @property
    def data(self) -> range:
        """The original coordinates."""
        return range(self.d_model)

    @property
    def constant(self) -> int:
        """The coordinate that is 1 on real rows and 0 on persistent ones."""
        return self.d_model

    @property
    def scratch_at(self) -> range:
        """The scratch coordinates."""
        return range(self.d_model + 1, self.d_model + 1 + self.scratch)

    @property
    def positions_at(self) -> range:
        """The one-hot position coordinates."""
        return range(self.width - self.positions, self.width)

    def augment(self, X: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch row width"]:
        """``aug(X)``: persistent rows in front, then the constant, scratch and position coordinates.

        Args:
            X: ``[..., pos, d_model]``.

        Raises:
            MechInterpError: X is not ``d_model`` wide, or longer than the positions allow.
        """
        rows = self.persistent + X.shape[-2]
        if X.shape[-1] != self.d_model:
            raise MechInterpError(
                f"X has shape {tuple(X.shape)}; expected [..., pos, {self.d_model}] for this layout"
            )
        if self.positions and rows > self.positions:
            raise MechInterpError(
                f"{X.shape[-2]} tokens and {self.persistent} persistent rows need {rows} position "
                f"coordinates and this layout has {self.positions}; use Layout(positions={rows})"
            )
        out = X.new_zeros(*X.shape[:-2], rows, self.width)
        out[..., self.persistent :, : self.d_model] = X
        out[..., self.persistent :, self.constant] = 1
        if self.positions:
            row = torch.arange(rows, device=X.device)
            out[..., row, row + self.positions_at.start] = 1
        return out

    def deaugment(self, X: Float[Tensor, "*batch row width"]) -> Float[Tensor, "*batch pos d_model"]:
        """The original stream: real rows, original coordinates.

        Args:
            X: the augmented stream, ``[..., row, width]``.

        Raises:
            MechInterpError: X is not as wide as this layout.
        """
        if X.shape[-1] != self.width:
            raise MechInterpError(
                f"X has shape {tuple(X.shape)}; expected [..., row, {self.width}] for this layout"
            )
        return X[..., self.persistent :, : self.d_model]

    def embed(
        self, W: Float[Tensor, "*head rows columns"], at: range | list[int], *, dim: int
    ) -> Float[Tensor, "*head wide_rows wide_columns"]:
        """W with one dimension zero-padded to ``width``, its entries at the coordinates ``at``.

        Args:
            W: ``[..., rows, columns]``.
            at: where the entries go.
            dim: which dimension is padded.

        Raises:
            MechInterpError: that dimension of W does not have one entry per coordinate.
        """
        if W.shape[dim] != len(at):
            raise MechInterpError(
                f"weights of shape {tuple(W.shape)} for {len(at)} coordinates; expected {len(at)} "
                f"entries in dimension {dim}"
            )
        shape = list(W.shape)
        shape[dim] = self.width
        index = torch.tensor(list(at), device=W.device, dtype=torch.long)
        return W.new_zeros(shape).index_copy(dim, index, W)

    def affine(
        self,
        W: Float[Tensor, "columns out"],
        b: Float[Tensor, " out"] | None = None,
        at: range | None = None,
    ) -> Float[Tensor, "width out"]:
        """Weights that read ``x @ W + b`` from an augmented row; the bias is in the constant's row.

        Args:
            W: ``[columns, out]``.
            b: ``[out]``, or none.
            at: the coordinates read; the original ones by default.

        Raises:
            MechInterpError: the bias does not fit the weights.
        """
        wide = self.embed(W, self.data if at is None else at, dim=0)
        if b is not None:
            if b.shape != W.shape[1:]:
                raise MechInterpError(f"bias of shape {tuple(b.shape)} for weights {tuple(W.shape)}")
            wide[self.constant] = b
        return wide
