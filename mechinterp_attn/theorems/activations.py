"""Which activation functions a softmax head can be: the generalised SiLU class.

A head that sees itself with score ``slope z + shift`` and the bias token with score 0 attends to
itself with weight ``sigmoid(slope z + shift)``. With the value ``scale z`` it computes
``scale z sigmoid(slope z + shift)``. The paper's class is shift 0: ``a1 SiLU(a2 z)``, which has
scale ``a1 a2`` and slope ``a2``. SiLU is in it; ReLU and GELU are approximated by their parameters;
a sum of such terms (several heads a neuron) comes as close to them as one likes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.gates import ALIASES, GATES, Function


@dataclass(frozen=True)
class SoftmaxActivation:
    """``act(z) = sum_k scale_k z sigmoid(slope_k z + shift_k)``: one head of a neuron per term.

    Attributes:
        terms: (scale, slope, shift) of every head.
        name: what it stands for.
    """

    terms: tuple[tuple[float, float, float], ...]
    name: str

    def __call__(self, z: Tensor) -> Tensor:
        """The activation of ``z``."""
        return z * self.weight(z)

    def weight(self, z: Tensor) -> Tensor:
        """``act(z) / z``: what the heads together take from their own token.

        Args:
            z: pre-activations of any shape.
        """
        parts = (scale * torch.sigmoid(slope * z + shift) for scale, slope, shift in self.terms)
        return torch.stack(list(parts)).sum(0)


def generalised_silu(a1: float, a2: float, name: str | None = None) -> SoftmaxActivation:
    """``a1 SiLU(a2 z)``, the paper's class: one head per neuron.

    Args:
        a1: scale of the output.
        a2: scale of the input.
        name: for messages; made from a1 and a2 by default.
    """
    return SoftmaxActivation(((a1 * a2, a2, 0.0),), name or f"{a1:g} SiLU({a2:g} z)")


GELU_SLOPE = 1.702
RELU_SHARPNESS = 1000.0

# What class_error and best_in_class know by name: the models' own activations, and some that are not
# in the class.
FUNCTIONS: dict[str, Function] = {
    name: GATES[name].act
    for name in ("silu", "gelu", "gelu_new", "quick_gelu", "relu", "relu2", "sigmoid", "linear")
} | {"tanh": torch.tanh, "softplus": F.softplus, "elu": F.elu}
# What |act(z) - a1 SiLU(a2 z)| is at most, for all z. ReLU: max over t of t sigmoid(-t), over k.
BOUNDS = {"silu": 0.0, "quick_gelu": 0.0, "gelu": 0.020336, "gelu_new": 0.020661}
RELU_BOUND = 0.278465


def relu_bound(sharpness: float) -> float:
    """The largest error of ``SiLU(k z) / k`` as a ReLU.

    Args:
        sharpness: the k of ``SiLU(k z) / k`` in the place of the ReLU.
    """
    return RELU_BOUND / sharpness


def softmax_activation(
    activation: str | SoftmaxActivation, *, sharpness: float = RELU_SHARPNESS
) -> SoftmaxActivation:
    """The paper's parameters for an activation by name.

    Args:
        activation: "silu", "gelu", "gelu_new", "quick_gelu", "relu" or "linear" (the limit of the
            class at slope 0: half of twice the value); or a ``SoftmaxActivation``, as it is.
        sharpness: k of ``SiLU(k z) / k`` for ReLU: its error is at most 0.2785 / k.

    Raises:
        MechInterpError: outside the class; says the best approximation in it and its error.
    """
    if isinstance(activation, SoftmaxActivation):
        return activation
    activation = ALIASES.get(activation, activation)
    if activation == "silu":
        return generalised_silu(1.0, 1.0, "SiLU")
    if activation in ("gelu", "gelu_new", "quick_gelu"):
        return generalised_silu(1 / GELU_SLOPE, GELU_SLOPE)
    if activation == "relu":
        if not sharpness > 0:
            raise MechInterpError(f"sharpness={sharpness}; expected a positive number")
        return generalised_silu(1 / sharpness, sharpness)
    if activation == "linear":
        return SoftmaxActivation(((2.0, 0.0, 0.0),), "linear")
    if activation not in FUNCTIONS:
        raise MechInterpError(
            f"activation {activation!r} is not known; use one of {', '.join(FUNCTIONS)}, or "
            "generalised_silu(a1, a2)"
        )
    a1, a2, error = best_in_class(FUNCTIONS[activation])
    raise MechInterpError(
        f"activation {activation!r} is outside the generalised SiLU class a1 SiLU(a2 z); its best "
        f"approximation there, {a1:.4g} SiLU({a2:.4g} z), is off by {error:.2g} on |z| <= 6. To use it "
        f"all the same, pass generalised_silu({a1:.4g}, {a2:.4g})"
    )


def class_error(
    activation: str | Function, approximation: Function, *, radius: float = 30.0
) -> tuple[float, float]:
    """The largest ``|act(z) - approximation(z)|`` on ``|z| <= radius``, and the z where it is.

    On a float64 grid of step ``radius / 200,000``.

    Args:
        activation: its name, or a function.
        approximation: a function of z.
        radius: the range of z.
    """
    act = FUNCTIONS[activation] if isinstance(activation, str) else activation
    z = torch.linspace(-radius, radius, 400_001, dtype=torch.float64)
    error = (act(z) - approximation(z)).abs()
    return float(error.max()), float(z[error.argmax()])


def best_in_class(act: Function, *, radius: float = 6.0) -> tuple[float, float, float]:
    """The a1, a2 with the least largest error ``|act(z) - a1 SiLU(a2 z)|`` on ``|z| <= radius``.

    For each slope the best scale is a one-dimensional convex problem; the slope is found on a grid
    of powers, refined four times. The error is measured on a finer grid of z.

    Args:
        act: the activation to come near.
        radius: the range of z.

    Returns:
        a1, a2 and that error.
    """
    z = torch.linspace(-radius, radius, 401, dtype=torch.float64)
    target = act(z)

    def error_of(slopes: Tensor) -> tuple[Tensor, Tensor]:
        basis = z * torch.sigmoid(slopes[:, None] * z)
        low = torch.full_like(slopes, -10.0)
        high = torch.full_like(slopes, 10.0)
        for _ in range(45):  # ternary search, all slopes at once
            third = (high - low) / 3
            left, right = low + third, high - third
            worse = (target - left[:, None] * basis).abs().amax(1) > (
                target - right[:, None] * basis
            ).abs().amax(1)
            low, high = torch.where(worse, left, low), torch.where(worse, high, right)
        scale = (low + high) / 2
        return scale, (target - scale[:, None] * basis).abs().amax(1)

    centre, reach = 0.0, math.log(100.0)
    best = (0.0, 1.0, math.inf)
    for _ in range(5):
        grid = torch.exp(torch.linspace(centre - reach, centre + reach, 61, dtype=torch.float64))
        slopes = torch.cat([grid, -grid])
        scale, error = error_of(slopes)
        i = int(error.argmin())
        if float(error[i]) < best[2]:
            slope = float(slopes[i])
            best = (float(scale[i]) / slope, slope, float(error[i]))
        centre, reach = math.log(abs(best[1])), reach / 15
    a1, a2, _ = best
    return a1, a2, class_error(act, generalised_silu(a1, a2), radius=radius)[0]
