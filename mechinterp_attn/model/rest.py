"""What stands beside the features of an attached dictionary: its linear part, and what it leaves out.

Both are heads as wide as the stream that look at their own token alone. The skip of a skip-transcoder is a
linear head. The error is ``MLP(x) - dictionary(x)``: what it reads is the MLP's input, what it holds is
that difference, and the neurons are inside it. With it a model with a dictionary is the model it was.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping
from functools import reduce
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.model.features import Copy, FeatureBank
from mechinterp_attn.model.heads import Kind, Side
from mechinterp_attn.model.on_a_run import Cache
from mechinterp_attn.model.own_token import OwnTokenBank
from mechinterp_attn.model.spec import Attached, Spec


class WideBank(OwnTokenBank):
    """One head as wide as the stream, which looks at its own token with weight 1 and writes what it holds.

    ``hook_read`` sees what it reads, ``hook_act`` what it holds, both ``[batch, pos, 1, d_model]``.
    """

    place: ClassVar[int] = 1
    sides: ClassVar[tuple[Side, ...]] = ("V",)
    points: ClassVar[Mapping[str, str]] = {
        "q": "hook_score", "v": "hook_read", "pattern": "hook_weight", "z": "hook_act"
    }  # fmt: skip

    def __init__(self, spec: Spec, attached: Attached):
        super().__init__()
        self.layer = attached.layer
        self.n_heads, self.d_head, self.d_model = 1, spec.d_model, spec.d_model
        self.parallel = spec.parallel
        self.hook_score = HookPoint()  # [batch, pos, head]: 1, a score that compares with nothing
        self.hook_read = HookPoint()  # [batch, pos, head, d_model]
        self.hook_weight = HookPoint()  # [batch, pos, head]: the pattern, 1 on the own token
        self.hook_act = HookPoint()  # [batch, pos, head, d_model]: z

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the head writes for ``x``."""
        ones = torch.ones_like(x[..., :1])
        own = self.hook_weight(self.hook_score(ones).detach())
        held = own[..., None] * self.value(self.hook_read(self.moves(x)[..., None, :]))
        return self.hook_act(held)[..., 0, :]

    def moves(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """The head's value, linear in what it reads."""
        return x

    def value(self, v: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """What is made of it at its token."""
        return v

    @property
    def W_V(self) -> Float[Tensor, "d_model d_model"]:
        """How the head reads."""
        return torch.eye(self.d_model, dtype=self._like.dtype, device=self._like.device)

    @property
    @abstractmethod
    def _like(self) -> Tensor:
        """A tensor of the bank's dtype and device."""

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return self._like.new_zeros(self.d_model)

    @property
    def z_constant(self) -> Float[Tensor, "head d_model"]:
        return self._like.new_zeros(1, self.d_model)

    def weights(self, index: int) -> dict[str, Tensor]:
        nothing = self._like.new_zeros(self.d_model, self.d_model)
        zero = nothing[0]
        one = torch.eye(self.d_model, dtype=nothing.dtype, device=nothing.device)
        return {
            "W_Q": nothing, "W_K": nothing, "W_V": self.W_V, "W_O": one,
            "b_Q": zero, "b_K": zero, "b_V": zero,
        }  # fmt: skip

    def _stacked(self, side: Side, heads: slice | Tensor) -> Tensor:
        return self.weights(0)[f"W_{side}"].detach()[None][heads]

    def by_head(self, z: Tensor) -> Float[Tensor, "*batch pos head d_head"]:
        return z

    def entropy(self, pattern: Float[Tensor, "batch pos head"]) -> Tensor:
        return torch.zeros_like(pattern)

    def moved(self, cache: Cache) -> Tensor:
        return self.value(cache[self.hook("v")]).norm(dim=-1)

    def written(self, cache: Cache) -> Tensor:
        return cache[self.hook("z")].norm(dim=-1)


class SkipBank(WideBank):
    """The linear part of a skip-transcoder: ``x @ W_skip``."""

    kind: ClassVar[Kind] = "skip"
    letter: ClassVar[str] = "S"
    part: ClassVar[str] = "skip"

    W_skip: Tensor

    def __init__(self, spec: Spec, attached: Attached, weights: Mapping[str, Tensor]):
        super().__init__(spec, attached)
        self.W_skip = nn.Parameter(weights["W_skip"])

    @property
    def W_V(self) -> Float[Tensor, "d_model d_model"]:
        return self.W_skip

    @property
    def _like(self) -> Tensor:
        return self.W_skip

    def moves(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        return x @ self.W_skip


class ErrorBank(WideBank):
    """What a dictionary leaves out, ``L5E0``: a head that holds ``MLP(x) - dictionary(x)``.

    It has no circuit: what it holds is no linear function of what it reads, whatever is frozen but its
    output. On a frozen prompt it is that output, at which paths begin.
    """

    kind: ClassVar[Kind] = "error"
    letter: ClassVar[str] = "E"
    part: ClassVar[str] = "error"
    has_circuit: ClassVar[bool] = False

    def __init__(
        self,
        spec: Spec,
        attached: Attached,
        whole: tuple[nn.Module, ...],
        features: FeatureBank,
        skip: SkipBank | None,
    ):
        """Args:
        whole: what the dictionary stands for, as modules that follow one another; the block's own. None:
            it stands for what it reads.
        features, skip: the dictionary.
        """
        super().__init__(spec, attached)
        self.features = Copy(features)
        self._skip = (skip,)  # in a tuple: the block registers it, once
        self._whole = whole

    @property
    def _like(self) -> Tensor:
        return self.features.bank.W_out

    def value(self, v: Float[Tensor, "batch pos 1 d_model"]) -> Float[Tensor, "batch pos 1 d_model"]:
        x = v[..., 0, :]
        whole = reduce(lambda y, part: part(y), self._whole, x)
        rest = whole - self.features(x)
        if (skip := self._skip[0]) is not None:
            rest = rest - skip.moves(x)
        return rest[..., None, :]


class StreamErrorBank(ErrorBank):
    """What an SAE on the residual stream leaves out of it."""

    place: ClassVar[int] = 2
