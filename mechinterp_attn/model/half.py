"""Weights in half precision under wider streams: a part of the model is computed in the stream's dtype."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

HALF = (torch.bfloat16, torch.float16)


def through(module: nn.Module, x: Tensor, *rest: Any) -> Any:
    """``module(x, *rest)``, with weights as wide as ``x`` for the time of the call.

    Every bfloat16 or float16 number is a float32 number, so nothing is rounded; only one module's weights
    are ever held twice.

    Args:
        module: a block, or what stands around the blocks.
        x: what it reads.
        rest: its other arguments.
    """
    weights = dict(module.named_parameters())
    if x.dtype in HALF or not any(W.dtype in HALF for W in weights.values()):
        return module(x, *rest)
    return functional_call(module, {name: W.to(x.dtype) for name, W in weights.items()}, (x, *rest))
