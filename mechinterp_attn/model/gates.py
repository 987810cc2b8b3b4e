"""How an activation function becomes the attention pattern of a neuron's head.

A neuron computes ``act(z) = G(z) * z``: it looks at its own token with weight ``G(z)``, at the bias
token (whose value is zero) with the rest, and moves the value ``z`` (Huben & Morris 2023, theorem
on MLP neurons). ``G`` is a softmax over the scores (z, 0) exactly for SiLU; for the others it is
the activation's own gate, a pattern over {self, bias} that is not a softmax of linear scores. In a
gated MLP the value is another reading ``u`` of the stream and the weight on it is ``act(g)``.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mechinterp_attn.model.spec import Spec

Function = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Gate:
    """An activation ``act(z)`` and its weight on the own token ``weight(z) = act(z) / z``.

    Attributes:
        weight: None where it does not exist (``act(0)`` is not 0): then only gated MLPs have heads.
        is_softmax: the weight is a true softmax over {self, bias} of linear scores.
        is_softmax_gated: ``act`` itself is one, so that gated neurons are true softmax heads.
    """

    name: str
    act: Function
    weight: Function | None
    is_softmax: bool = False
    is_softmax_gated: bool = False


def _probit(z: Tensor) -> Tensor:
    return torch.special.ndtr(z)


def _tanh_gate(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh(math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)))


def _step(z: Tensor) -> Tensor:
    return (z > 0).to(z.dtype)


def _quick(z: Tensor) -> Tensor:
    return torch.sigmoid(1.702 * z)


def _over_neurons(z: Tensor) -> Tensor:
    """SoLU: a softmax over the neurons, in each of which all others are tokens of value zero."""
    return z.softmax(-1)


def _over_neurons_normed(z: Tensor) -> Tensor:
    """SoLU with the LayerNorm behind it; its centring and gain are folded into W_out."""
    g = z.softmax(-1)
    return g / (g * z).var(-1, unbiased=False, keepdim=True).add(1e-5).sqrt()


_GATES = (
    Gate("silu", F.silu, torch.sigmoid, is_softmax=True),
    Gate("gelu", F.gelu, _probit),
    Gate("gelu_new", lambda z: F.gelu(z, approximate="tanh"), _tanh_gate),
    Gate("quick_gelu", lambda z: z * _quick(z), _quick, is_softmax=True),
    Gate("relu", F.relu, _step),
    Gate("relu2", lambda z: F.relu(z) ** 2, F.relu),
    Gate("linear", lambda z: z, torch.ones_like),
    Gate("sigmoid", torch.sigmoid, None, is_softmax_gated=True),
    Gate("solu", lambda z: z * _over_neurons(z), _over_neurons, is_softmax=True),
    Gate("solu_ln", lambda z: z * _over_neurons_normed(z), _over_neurons_normed),
)
ALIASES = {
    "swish": "silu",
    "gelu_python": "gelu",
    "gelu_fast": "gelu_new",
    "gelu_pytorch_tanh": "gelu_new",
    "gelu_python_tanh": "gelu_new",
    "gelu_accurate": "gelu_new",
    "relu_squared": "relu2",
}
GATES: dict[str, Gate] = {gate.name: gate for gate in _GATES}
GATES |= {alias: GATES[name] for alias, name in ALIASES.items()}


@dataclass(frozen=True)
class Rule:
    """What makes a neuron ``len(slopes)`` heads: head k looks at its own token with weight
    ``weight(slope_k * z + offset_k)`` and moves ``value_k`` times the neuron's value.

    Attributes:
        total: the summed weight on the own token, ``[..., neuron] -> [..., neuron]``, in one step.
        act: ``total(z) * z`` where it is known in closed form, for MLPs that are not gated.
        is_softmax: every head is a true softmax over {self, bias}.
    """

    weight: Function
    slopes: tuple[float, ...]
    offsets: tuple[float, ...]
    values: tuple[float, ...]
    is_softmax: bool
    act: Function | None = None

    @property
    def n(self) -> int:
        return len(self.slopes)

    def total(self, z: Tensor) -> Tensor:
        if self.n == 1 and self.slopes == (1.0,) and self.offsets == (0.0,):
            return self.values[0] * self.weight(z)
        out = torch.zeros_like(z)
        for slope, offset, value in zip(self.slopes, self.offsets, self.values, strict=True):
            out = out + value * self.weight(slope * z + offset)
        return out


def rule_for(spec: Spec, layer: int) -> Rule | None:
    """What a layer's neurons are made of; None without an MLP."""
    if spec.act_fn is None:
        return None
    gate = GATES[spec.act_fn]
    if spec.mixtures:
        slopes, offsets, values = spec.mixtures[layer]
        return Rule(torch.sigmoid, slopes, offsets, values, is_softmax=True)
    if spec.gated:
        return Rule(gate.act, (1.0,), (0.0,), (1.0,), gate.is_softmax_gated)
    assert gate.weight is not None
    return Rule(gate.weight, (1.0,), (0.0,), (1.0,), gate.is_softmax, gate.act)
