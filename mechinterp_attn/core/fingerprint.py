"""One fingerprint for the whole package: of weights, of texts, of settings."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

AT_ONCE = 2**26  # bytes of a tensor that are copied at a time


def fingerprint(*parts: Any) -> str:
    """A hash that changes when any part does.

    Args:
        parts: tensors (dtype, shape and every byte count, wherever they are and however they are laid
            out), texts, bytes, numbers, None, and mappings, dataclasses or sequences of all of these.

    Returns:
        32 hexadecimal digits.

    Raises:
        TypeError: a part of another kind, whose content cannot be told.
    """
    digest = hashlib.sha256()
    for piece in _pieces(parts):
        digest.update(piece)
    return digest.hexdigest()[:32]


def _pieces(part: Any) -> Iterable[bytes | memoryview]:
    """The bytes of a part, each kind with a mark and a length of its own, so that no two run together."""
    if part is None or isinstance(part, bool | int | float | complex):
        yield f"{type(part).__name__} {part!r};".encode()
    elif isinstance(part, str | bytes):
        raw = part.encode("utf-8", "surrogatepass") if isinstance(part, str) else part
        yield f"{type(part).__name__} {len(raw)};".encode()
        yield raw
    elif isinstance(part, Mapping):
        yield f"mapping {len(part)};".encode()
        for key in part:
            yield from _pieces(key)
            yield from _pieces(part[key])
    elif is_dataclass(part) and not isinstance(part, type):
        yield f"{type(part).__qualname__};".encode()
        yield from _pieces({field.name: getattr(part, field.name) for field in fields(part)})
    elif isinstance(part, list | tuple | set | frozenset):
        items = sorted(part) if isinstance(part, set | frozenset) else part
        yield f"sequence {len(items)};".encode()
        for item in items:
            yield from _pieces(item)
    elif hasattr(part, "untyped_storage"):
        yield from _of_tensor(part)
    else:
        raise TypeError(f"no fingerprint of a {type(part).__name__}")


def _of_tensor(tensor: Tensor) -> Iterable[bytes | memoryview]:
    import torch

    yield f"tensor {tensor.dtype} {tuple(tensor.shape)};".encode()
    flat = tensor.detach().reshape(-1)
    step = AT_ONCE // flat.element_size()
    for start in range(0, len(flat), step):
        yield flat[start : start + step].cpu().view(torch.uint8).numpy().data
