"""Heads as wide as the stream on one prompt: the linear part of a dictionary, and its error.

The error is frozen as what it was at each position: it is a source, at which paths begin, as the error
nodes of attribution graphs are (Ameisen et al. 2025).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.frozen.bank import FrozenBank, ScoreSides, freeze_bank
from mechinterp_attn.model.norm import FrozenNorm
from mechinterp_attn.model.rest import ErrorBank, WideBank


class FrozenWide(FrozenBank):
    """``x -> own * (norm(x) @ W)`` at every position, or a constant where there is no ``W``.

    Args:
        W: how the head reads, ``[d_model, d_model]``; None: it is frozen as what it held.
        held: that, ``[pos, d_model]``.
    """

    bank: WideBank

    def __init__(
        self,
        bank: WideBank,
        pattern: Float[Tensor, "pos head"],
        norm: FrozenNorm,
        post: FrozenNorm,
        *,
        W: Float[Tensor, "d_model d_model"] | None,
        held: Float[Tensor, "pos d_model"] | None,
    ):
        super().__init__(bank, pattern, norm, post)
        self._W, self._held = W, held

    @property
    def most_terms(self) -> int:
        return 1

    @property
    def z_bias(self) -> Float[Tensor, "pos 1 d_model"]:
        if self._held is None:
            return self.pattern.new_zeros(len(self.pattern), 1, self.bank.d_model)
        return self._held[:, None]

    def read(self, x: Tensor) -> Tensor:
        held = torch.zeros_like(x) if self._W is None else self.pattern * (self._norm.apply(x) @ self._W)
        return held[..., None, :]

    def unread(self, z: Tensor) -> Tensor:
        z = z[..., 0, :]
        return (
            torch.zeros_like(z) if self._W is None else self._norm.adjoint((self.pattern * z) @ self._W.T)
        )

    def write(self, z: Tensor) -> Tensor:
        return self._post.apply(z[..., 0, :])

    def unwrite(self, y: Tensor) -> Tensor:
        return self._post.adjoint(y)[..., None, :]

    def write_at(self, z: Tensor, index: Tensor, position: Tensor) -> Tensor:
        return self._post.at(position).apply(z)

    def pull(self, v: Tensor, index: Tensor) -> Tensor:
        return self._pull(v)

    def _pull(self, v: Float[Tensor, "n d_model"]) -> Float[Tensor, "n d_model"]:
        if self._W is None:
            return torch.zeros_like(v)
        return self._norm.turn_back(self._post.turn_back(v) @ self._W.T)

    def spread(self, w: Tensor, index: Tensor) -> Tensor:
        return self._norm.weigh(self.weigh_out(w) * self.pattern[:, 0])

    def write_groups(self, z: Tensor, position: Tensor) -> Tensor:
        return self._post.at(position).apply(z[:, 0])

    def read_groups(self, y: Tensor, position: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group = torch.arange(len(y), device=y.device)
        at = y.new_zeros(len(y), len(self.pattern))
        at[group, position] = self.pattern[position, 0] * members[:, 0]
        return group, self._norm.weigh(self.weigh_out(at)), self._pull(y)

    def reach(self, m: Tensor, *, summed: bool) -> Tensor:
        return self.pattern.abs() * self.weigh_out(self._norm.weigh(m))[:, None]

    def hold(self, v: Tensor) -> Tensor:
        return self._post.turn_back(v)[:, None]

    def pull_norms(self, held: Tensor) -> Tensor:
        held = held[:, 0]
        read = torch.zeros_like(held) if self._W is None else self._norm.turn_back(held @ self._W.T)
        return read.norm(dim=-1, keepdim=True)

    def write_norms(self, z: Tensor) -> Tensor:
        return self.write(z).norm(dim=-1, keepdim=True)

    def norms(self) -> Tensor:
        if self._W is None:
            return self.pattern.new_zeros(1)
        return torch.linalg.matrix_norm(self._post.turn(self._W), 2)[None]

    def score_sides(self, index: int, x: Tensor) -> ScoreSides:
        one = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)

        def nothing(x: Tensor) -> Tensor:
            return torch.zeros_like(x[..., :1])

        own = torch.eye(len(x), dtype=torch.bool, device=x.device)
        return ScoreSides(nothing, nothing, one, one, own, None)


@freeze_bank.register
def _(bank: WideBank, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm, stream: Tensor) -> FrozenBank:
    return FrozenWide(bank, pattern, norm, post, W=bank.W_V.detach(), held=None)


@freeze_bank.register
def _(bank: ErrorBank, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm, stream: Tensor) -> FrozenBank:
    held = bank.value(norm.apply(stream)[None, :, None])[0, :, 0]
    return FrozenWide(bank, pattern, norm, post, W=None, held=held)
