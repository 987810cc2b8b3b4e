"""Data from outside (JSON, YAML) checked field by field, every mistake named."""

from __future__ import annotations

import json
import reprlib
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from pydantic import TypeAdapter


def wrong_fields(kind: Any, data: Any, *, what: str = "") -> list[str]:
    """What is wrong with data that should be of a kind; empty if nothing is.

    Types are taken strictly: ``"2"`` or ``2.0`` is not an integer, ``1`` is not a truth value.

    Args:
        kind: a type that pydantic knows, such as a dataclass or a ``TypedDict``.
        data: what was read from a file: mappings, lists, texts, numbers.
        what: put in front of every mistake, such as ``"config has "``.

    Returns:
        one line per mistake: the field, its value, and what was expected.
    """
    from pydantic import ValidationError

    try:
        _adapter(kind).validate_json(json.dumps(data, default=repr), strict=True)
    except ValidationError as error:
        return [_line(one, what) for one in error.errors(include_url=False)]
    return []


def _line(error: Any, what: str) -> str:
    place = ".".join(str(part) for part in error["loc"] if part != "[key]")
    said = error["msg"].removeprefix("Input should be ").removeprefix("Value error, ")
    if error["type"] == "extra_forbidden":
        return f"{what}{place}, which is not a known field"
    if error["type"] == "missing":
        return f"{what}no {place}"
    return f"{what}{place}={short(error['input'])}, expected {said}"


def short(value: Any) -> str:
    """A value as an error message shows it: no longer than 60 characters."""
    text = reprlib.repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    from pydantic import TypeAdapter

    return TypeAdapter(kind)
