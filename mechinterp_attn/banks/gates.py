"""How an activation function becomes the attention pattern of a neuron's head.

A neuron computes ``act(z) = G(z) * z``: it looks at its own token with weight ``G(z)``, at the bias
token (whose value is zero) with the rest, and moves the value ``z`` (Huben & Morris 2023, theorem
on MLP neurons). ``G`` is a softmax over the scores (z, 0) exactly for SiLU; for the others it is
the activation's own gate, a pattern over {self, bias} that is not a softmax of linear scores.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """An activation ``act(z)`` and its weight on the own token ``weight(z) = act(z) / z``.

    ``is_softmax`` says whether the weight is a true softmax over {self, bias}.
    """

    name: str
    act: Function
    weight: Function
    is_softmax: bool


def _probit(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


def _tanh_gate(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


_GATES = (
    Gate("silu", F.silu, torch.sigmoid, is_softmax=True),
    Gate("gelu", F.gelu, _probit, is_softmax=False),
    Gate("gelu_new", lambda z: F.gelu(z, approximate="tanh"), _tanh_gate, is_softmax=False),
    Gate("relu", F.relu, _step, is_softmax=False),
)
GATES: dict[str, Gate] = {gate.name: gate for gate in _GATES} | {"swish": _GATES[0]}
