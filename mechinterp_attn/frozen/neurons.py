"""A bank of MLP neurons on one prompt, as a linear map of the residual stream."""

from __future__ import annotations

from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.frozen.bank import FrozenBank, ScoreSides, freeze_bank
from mechinterp_attn.model.neurons import NeuronBank
from mechinterp_attn.model.norm import FrozenNorm


class FrozenNeurons(FrozenBank):
    """``x -> post((own * (norm(x) @ W_in)) @ W_out)`` with the weights on the own token of one run.

    A neuron may be several heads; they share its value and its output direction.
    """

    bank: NeuronBank

    def __init__(
        self, bank: NeuronBank, pattern: Float[Tensor, "pos head"], norm: FrozenNorm, post: FrozenNorm
    ):
        super().__init__(bank, pattern, norm, post)
        self._n = bank.rule.n
        self._own, self._total = pattern, pattern  # [pos, head], [pos, neuron]; no copy of the usual case
        if bank.rule.values != (1.0,):
            self._own = pattern * pattern.new_tensor(bank.rule.values).repeat(bank.n_neurons)
            self._total = self._own.unflatten(-1, (-1, self._n)).sum(-1)

    @property
    def _W_in(self) -> Float[Tensor, "d_model neuron"]:
        return self.wide(self.bank.W_in)

    @property
    def _W_out(self) -> Float[Tensor, "neuron d_model"]:
        return self.wide(self.bank.W_out)

    @property
    def most_terms(self) -> int:
        return 1

    @property
    def z_bias(self) -> Float[Tensor, "pos head 1"]:
        """Made when asked for: for all banks it would be as large as the patterns."""
        return (self._own * self._each(self.wide(self.bank.b_in)))[..., None]

    def _each(self, x: Float[Tensor, "*n neuron"]) -> Float[Tensor, "*n head"]:
        """A number per neuron given to each of its heads."""
        return x if self._n == 1 else x.repeat_interleave(self._n, -1)

    def apply(self, x: Tensor) -> Tensor:
        return self._post.apply((self._total * (self._norm.apply(x) @ self._W_in)) @ self._W_out)

    def adjoint(self, y: Tensor) -> Tensor:
        held = self._total * (self._post.adjoint(y) @ self._W_out.T)
        return self._norm.adjoint(held @ self._W_in.T)

    def read(self, x: Tensor) -> Tensor:
        return (self._own * self._each(self._norm.apply(x) @ self._W_in))[..., None]

    def unread(self, z: Tensor) -> Tensor:
        per_neuron = (self._own * z[..., 0]).unflatten(-1, (-1, self._n)).sum(-1)
        return self._norm.adjoint(per_neuron @ self._W_in.T)

    def write(self, z: Tensor) -> Tensor:
        return self._post.apply(z[..., 0].unflatten(-1, (-1, self._n)).sum(-1) @ self._W_out)

    def unwrite(self, y: Tensor) -> Tensor:
        return self._each(self._post.adjoint(y) @ self._W_out.T)[..., None]

    def write_at(self, z: Tensor, index: Tensor, position: Tensor) -> Tensor:
        return self._post.at(position).apply(z * self.wide(self.bank.W_out[index // self._n]))

    def pull(self, v: Tensor, index: Tensor) -> Tensor:
        neuron = index // self._n
        held = (self._post.turn_back(v) * self.wide(self.bank.W_out[neuron])).sum(-1, keepdim=True)
        return self._norm.turn_back(held * self.wide(self.bank.W_in.T[neuron]))

    def spread(self, w: Tensor, index: Tensor) -> Tensor:
        return self._norm.weigh(self.weigh_out(w) * self._own.T[index])

    def write_groups(self, z: Tensor, position: Tensor) -> Tensor:
        held = z[..., 0].unflatten(-1, (-1, self._n)).sum(-1)
        return self._post.at(position).apply(held @ self._W_out)

    def read_groups(self, y: Tensor, position: Tensor, members: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        group = torch.arange(len(y), device=y.device)
        at = y.new_zeros(len(y), len(self.pattern))
        at[group, position] = 1
        own = (self._own[position] * members).unflatten(-1, (-1, self._n)).sum(-1)
        held = own * (self._post.turn_back(y) @ self._W_out.T)
        return group, self._norm.weigh(self.weigh_out(at)), self._norm.turn_back(held @ self._W_in.T)

    def reach(self, m: Tensor, *, summed: bool) -> Tensor:
        return self._own.abs() * self.weigh_out(self._norm.weigh(m))[:, None]

    def hold(self, v: Tensor) -> Tensor:
        return self._each(self._post.turn_back(v) @ self._W_out.T)[..., None]

    def pull_norms(self, held: Tensor) -> Tensor:
        return held[..., 0].abs() * self._read_norms

    @cached_property
    def _read_norms(self) -> Float[Tensor, " head"]:
        """Asked for once per path opened."""
        return self._each(self._W_in.norm(dim=0))

    def write_norms(self, z: Tensor) -> Tensor:
        norms = z[..., 0].abs() * self._each(self._post.turn(self._W_out).norm(dim=1))
        return self.weigh_out(norms.T).T

    def norms(self) -> Tensor:
        return self._each(self._post.turn(self._W_out).norm(dim=1) * self._W_in.norm(dim=0))

    def score_sides(self, index: int, x: Tensor) -> ScoreSides:
        weights = {name: self.wide(w) for name, w in self.bank.weights(index).items()}
        one = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        return ScoreSides(
            query=lambda x: self._norm.apply(x) @ weights["W_Q"],
            key=lambda x: torch.zeros_like(x[..., :1]),
            query_bias=weights["b_Q"] * one,
            key_bias=one,
            allowed=torch.eye(len(x), dtype=torch.bool, device=x.device),
            to_pattern=None,
        )


@freeze_bank.register
def _(bank: NeuronBank, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm, stream: Tensor) -> FrozenBank:
    return FrozenNeurons(bank, pattern, norm, post)
