"""The bank of heads made of a dictionary's features: transcoders and the encoders of their kin.

A feature with encoder direction e, bias b and decoder direction d is a head of dimension 1, as a neuron
is: its query and value are ``z = x . e + b``, the weight on its own token is its gate, a step at its
threshold (ReLU, JumpReLU, BatchTopK) or whether it is among the k largest (TopK), and it writes along d.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Bool, Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.model.gates import Rule
from mechinterp_attn.model.heads import Kind
from mechinterp_attn.model.neurons import NeuronBank
from mechinterp_attn.model.spec import Attached, Spec


class FeatureBank(NeuronBank):
    """All features of one dictionary as heads, ``L5F1234``.

    Parameters beside those of ``NeuronBank`` (encoder ``W_in``, ``b_in``, decoder ``W_out``, ``b_out``):
        threshold ``[feature]``: below it a feature is silent; 0 for ReLU and TopK.
    """

    kind: ClassVar[Kind] = "feature"
    letter: ClassVar[str] = "F"
    part: ClassVar[str] = "features"

    threshold: Tensor

    def __init__(self, spec: Spec, attached: Attached, weights: Mapping[str, Tensor]):
        rule = Rule(self._gate, (1.0,), (0.0,), (1.0,), False)
        super().__init__(spec, attached.layer, rule, weights)
        self.k = attached.k
        self.over_others = self.k > 0
        self.threshold = nn.Parameter(weights["threshold"], requires_grad=False)

    def _gate(self, z: Float[Tensor, "*n feature"]) -> Float[Tensor, "*n feature"]:
        own: Bool[Tensor, "*n feature"] = z > self.threshold
        if self.k and self.k < z.shape[-1]:
            largest = z.topk(self.k, dim=-1).indices
            own = own & torch.zeros_like(own).scatter(-1, largest, True)
        return own.to(z.dtype)

    def forward(  # type: ignore[override]
        self, x: Float[Tensor, "batch pos d_model"], points: Copy | None = None
    ) -> Float[Tensor, "batch pos d_model"]:
        """The sum of what the features write for ``x``, and ``b_out``.

        Args:
            x: what the dictionary reads.
            points: whose hooks see it; the bank's own by default.
        """
        seen = self if points is None else points
        z = x @ self.W_in + self.b_in
        own = seen.hook_weight(self.rule.weight(seen.hook_score(z)))
        return seen.hook_act(own * seen.hook_read(z)) @ self.W_out + self.b_out


class StreamFeatureBank(FeatureBank):
    """The features of an SAE on the residual stream behind a block: they read and write that stream."""

    place: ClassVar[int] = 2


class Copy(nn.Module):
    """The features once more, inside the error: hooks on the heads do not reach what they leave out, and
    what reaches that (the rules of a backward pass) has these.
    """

    def __init__(self, bank: FeatureBank):
        super().__init__()
        self.rule, self.over_others, self.gated = bank.rule, bank.over_others, False
        self._bank = (bank,)  # in a tuple: the block registers the bank, once
        self.hook_score, self.hook_read = HookPoint(), HookPoint()
        self.hook_weight, self.hook_act = HookPoint(), HookPoint()

    @property
    def bank(self) -> FeatureBank:
        """The features themselves."""
        return self._bank[0]

    def hook(self, role: str) -> str:
        """As ``HeadBank.hook``."""
        return f"blocks.{self.bank.layer}.error.features.{NeuronBank.points[role]}"

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.bank(x, self)
