"""A matrix kept as a product of two thin factors."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix kept as the product ``A @ B``; never multiplied out unless ``dense()`` is asked for.

    Attributes:
        A: left factor ``[rows, rank]``.
        B: right factor ``[rank, columns]``.
    """

    A: Float[Tensor, "rows rank"]
    B: Float[Tensor, "rank columns"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.A.shape[0], self.B.shape[1]

    @property
    def rank(self) -> int:
        """The bound on the rank that the factors give: their inner dimension."""
        return self.A.shape[1]

    @property
    def T(self) -> LowRank:
        return LowRank(self.B.T, self.A.T)

    def dense(self) -> Float[Tensor, "rows columns"]:
        return self.A @ self.B

    def norm(self) -> float:
        """Frobenius norm, from the two rank x rank Gram matrices (float64)."""
        A, B = self.A.double(), self.B.double()
        return float(((A.T @ A) * (B @ B.T)).sum().clamp_min(0).sqrt())

    def eigenvalues(self) -> Tensor:
        """The ``rank`` eigenvalues that can differ from zero: eig(AB) = eig(BA) (complex128)."""
        return torch.linalg.eigvals(self.B.double() @ self.A.double())

    def __repr__(self) -> str:
        return f"LowRank({self.shape[0]} x {self.shape[1]}, rank <= {self.rank})"
