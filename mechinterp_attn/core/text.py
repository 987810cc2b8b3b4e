"""The one place where text and numbers from outside become something a page may hold."""

from __future__ import annotations

import json
import math
import unicodedata
from typing import Any

_PICTURES = {"\n": "↵", "\t": "⇥"}


def shown(text: str) -> str:
    """A token's text with nothing invisible in it: what every page and figure prints.

    A newline reads as ↵, a tab as ⇥; any other control, format, separator, private or surrogate
    character as its code point, ``⟨U+202E⟩``. A plain space stays (tokens stand on a tinted ground).
    """
    if text.isprintable():
        return text
    return "".join(_character(c) for c in text)


def _character(c: str) -> str:
    if c in _PICTURES:
        return _PICTURES[c]
    if c != " " and unicodedata.category(c)[0] in "CZ":
        return f"⟨U+{ord(c):04X}⟩"
    return c


def number(value: Any, digits: int = 6) -> float | str | None:
    """A number as JSON can hold it: ``digits`` significant ones; "nan", "inf" and "-inf" by name."""
    if value is None:
        return None
    x = float(value)
    if math.isnan(x):
        return "nan"
    if math.isinf(x):
        return "inf" if x > 0 else "-inf"
    return float(f"{x:.{digits}g}")


def signed(x: float) -> str:
    """A number with its sign, to two decimals, the minus as wide as the plus."""
    return f"{x:+.2f}".replace("-", "−")


def inert_json(data: Any) -> str:
    """JSON for a ``<script type="application/json">`` block: pure ASCII without ``<``, ``>``, ``&``,
    so that nothing in it can end the block or be read as markup.
    """
    text = json.dumps(data, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
