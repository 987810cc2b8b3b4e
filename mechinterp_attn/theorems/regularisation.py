"""What training pressures do to a converted model (Huben & Morris 2023, remarks on regularisation).

Weight decay shrinks what the constructions need as it is: Omega, whose mask then leaks, the constant
coordinate, which carries every bias and the neuron heads' keys, and the one-hot positions, which
Omega is read through. Attention dropout on a neuron head drops the neuron.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection
from typing import Literal, get_args

import torch
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.theorems.literal import LiteralModel

Part = Literal["omega", "constant", "positions"]


def decay(model: LiteralModel, factor: float, *, only: Collection[str] = get_args(Part)) -> LiteralModel:
    """The model with the parts that carry its construction shrunk by ``factor``, all else as it was.

    What n steps of decoupled weight decay do to weights that get no gradient: ``factor = (1 - lr *
    weight_decay) ** n``. The result is a new model.

    Args:
        model: a literal model; it is left as it was.
        factor: what the parts are multiplied by, in (0, 1].
        only: which parts decay; the others are exempt. "omega": the penalties in ``W_QK``;
            "constant": the coordinate that is 1; "positions": the one-hot coordinates, which each
            score reads twice.

    Raises:
        MechInterpError: an unknown part, a factor outside (0, 1], or a part that the model lacks.
    """
    unknown = [part for part in only if part not in get_args(Part)]
    if unknown or not 0 < factor <= 1:
        raise MechInterpError(
            f"only={list(only)}, factor={factor}; expected parts out of {list(get_args(Part))} and a "
            "factor in (0, 1]"
        )
    if model.omega is None and {"omega", "positions"} & set(only):
        raise MechInterpError("this model's masks are masks: it has no omega and no positions to decay")
    decayed = copy.deepcopy(model)
    if model.omega is not None:
        shrink = (factor if "omega" in only else 1.0) * (factor**2 if "positions" in only else 1.0)
        decayed.omega = model.omega * shrink
    if "constant" in only:
        decayed.constant = model.constant * factor
    return decayed


def attention_dropout(
    model: LiteralModel, rate: float, generator: torch.Generator
) -> list[tuple[str, Callable[[Tensor, HookPoint], Tensor]]]:
    """Hooks that drop attention weights of every head with probability ``rate`` (and scale up the
    rest), for ``model.run_with_hooks(tokens, fwd_hooks=...)``.

    On a neuron head the weight on the own token is dropped or kept as a whole; the weight on the bias
    token does not matter, its value being zero. So it is dropout of the neuron.

    Args:
        model: the literal model.
        rate: between 0 and 1.
        generator: of the draws.

    Raises:
        MechInterpError: a rate outside [0, 1).
    """
    if not 0 <= rate < 1:
        raise MechInterpError(f"rate={rate}; expected a probability below 1")

    def drop(pattern: Tensor, hook: HookPoint) -> Tensor:
        kept = torch.rand(pattern.shape, generator=generator).to(pattern.device) >= rate
        return pattern * kept / (1 - rate)

    return [(bank.hook("pattern"), drop) for bank in model.banks]
