"""What was given as a text or as tokens, told apart and checked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError


def is_text(input: Any) -> bool:
    """A text, or a list with texts in it."""
    return isinstance(input, str) or (
        isinstance(input, list) and bool(input) and any(isinstance(part, str) for part in input)
    )


def is_list(input: Any) -> bool:
    """A list of texts or of rows of tokens."""
    return (
        isinstance(input, list | tuple)
        and bool(input)
        and all(isinstance(one, str | list | tuple) or getattr(one, "ndim", 0) for one in input)
    )


def sound(text: Any, name: str) -> str:
    """A text that can be written down in UTF-8."""
    if not isinstance(text, str):
        raise MechInterpError(f"{name} is {named(text)}; expected a text (str)")
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise MechInterpError(
            f"{name} is not valid Unicode: a lone surrogate {text[error.start]!a} at character "
            f"{error.start}; it was probably read with the wrong encoding"
        ) from error
    return text


def integers(input: Any) -> Tensor:
    """Token ids as a tensor of integers."""
    try:
        ids = torch.as_tensor(input)
    except (TypeError, ValueError, RuntimeError) as error:
        raise MechInterpError(
            f"{named(input)}: {' '.join(str(error).split())}; expected a text, texts, or token ids [pos] "
            "or [batch, pos] (rows of different lengths as a list of tensors)"
        ) from error
    if ids.numel() and (ids.dtype.is_floating_point or ids.dtype.is_complex or ids.dtype == torch.bool):
        raise MechInterpError(f"tokens must be integers, got dtype {ids.dtype}")
    return ids.long()


def single_id(input: Any, what: str = "a token id") -> int:
    """One token id, or another whole number, as an integer.

    Args:
        what: it is, for errors.

    Raises:
        MechInterpError: it is no integer, or several.
    """
    try:
        ids = integers(input)
    except MechInterpError:
        ids = torch.zeros(0)
    if ids.numel() != 1:
        raise MechInterpError(f"{what} is {named(input)}; expected one integer")
    return int(ids)


def named(input: Any) -> str:
    """A value and its type, in few words, for errors."""
    shown = " ".join(repr(input).split())
    return f"{type(input).__name__} {shown if len(shown) <= 60 else shown[:57] + '...'}"
