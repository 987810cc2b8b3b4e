"""Tables of results, as text and as HTML: how every ``Result`` shows itself.

Text from tokens and labels is only text: what cannot be seen is written out, and nothing is markup.
"""

from __future__ import annotations

import html
import math
import unicodedata
from collections.abc import Callable, Sequence
from typing import Any

import pandas as pd

from mechinterp_attn.core.palette import KIND_COLOURS, NEGATIVE, POSITIVE
from mechinterp_attn.core.text import shown

DIGITS = 4  # significant ones of the largest number in a column


def text_table(frame: pd.DataFrame) -> str:
    """A table as aligned text: its heading, then a line a row."""
    frame = _with_index(frame)
    return _joined([_aligned(frame.iloc[:, i], name) for i, name in enumerate(frame.columns)])


def fitted_table(frame: pd.DataFrame, width: int, keep: Sequence[str] = ()) -> tuple[str, list[str]]:
    """A table as aligned text that fits a terminal: long texts are cut, then columns are left out, the
    last ones first.

    Args:
        width: how many signs fit in a line.
        keep: columns that stay, beside the first one.

    Returns:
        The text, and the names of the columns that were left out.
    """
    frame = _with_index(frame)
    names = [str(name) for name in frame.columns]
    columns = [_aligned(frame.iloc[:, i], name) for i, name in enumerate(names)]
    texts = [not _is_number(frame.iloc[:, i]) for i in range(len(names))]
    shown_ones = list(range(len(names)))

    def excess() -> int:
        return sum(width_of(columns[i][0]) + len(_GAP) for i in shown_ones) - len(_GAP) - width

    while excess() > 0:
        longest = max(
            (i for i in shown_ones if texts[i]), key=lambda i: width_of(columns[i][0]), default=None
        )
        if longest is not None and width_of(columns[longest][0]) > _SHORTEST_TEXT:
            room = max(_SHORTEST_TEXT, width_of(columns[longest][0]) - excess())
            columns[longest] = [_cut(cell, room) for cell in columns[longest]]
            continue
        spare = [i for i in shown_ones[1:] if names[i] not in keep]
        if not spare:
            break
        shown_ones.remove(spare[-1])
    left_out = [name for i, name in enumerate(names) if i not in shown_ones]
    return _joined([columns[i] for i in shown_ones]), left_out


_GAP = "  "
_SHORTEST_TEXT = 28  # a text is cut to this before a column is left out


def _aligned(values: pd.Series, name: Any) -> list[str]:
    """A column's heading and cells, all of one width: numbers to the right, texts to the left."""
    number = _is_number(values)
    quote = "'" if not number and _needs_quotes(values) else ""
    write = formatter(values) if number else (lambda v: _quoted(v, quote))
    cells = [_text(name), *map(write, values.tolist())]
    width = max(map(width_of, cells))
    pads = [" " * (width - width_of(cell)) for cell in cells]
    return [p + c if number else c + p for c, p in zip(cells, pads, strict=True)]


def _joined(columns: list[list[str]]) -> str:
    return "\n".join(_GAP.join(row).rstrip() for row in zip(*columns, strict=True))


def _cut(cell: str, width: int) -> str:
    """A padded cell in fewer columns of the terminal, with an ellipsis where text is lost."""
    text = cell.rstrip()
    if width_of(text) > width:
        while width_of(text) > width - 1:
            text = text[:-1]
        text += "…"
    return text + " " * (width - width_of(text))


def html_table(frame: pd.DataFrame, shaded: Sequence[str] = ()) -> str:
    """A table as HTML that needs no stylesheet and reads on light and dark ground.

    Args:
        shaded: columns whose cells are coloured by value: red below zero, blue above, the strongest
            colour at the column's largest magnitude.
    """
    frame = _with_index(frame)
    heads, columns = [], []
    for position, name in enumerate(frame.columns):
        values = frame.iloc[:, position]
        number = _is_number(values)
        heads.append(f'<th style="{_CELL}text-align:{"right" if number else "left"}">{_escaped(name)}</th>')
        if number:
            columns.append(_number_cells(values, name in shaded))
        else:
            columns.append(_text_cells(values, str(name)))
    rows = "".join(f"<tr>{''.join(row)}</tr>" for row in zip(*columns, strict=True))
    return (
        '<table class="dataframe" '
        'style="border-collapse:collapse;border:0;font-variant-numeric:tabular-nums">'
        f"<thead><tr>{''.join(heads)}</tr></thead><tbody>{rows}</tbody></table>"
    )


_CELL = "border:0;border-bottom:1px solid rgba(128,128,128,.25);padding:.15em .7em;white-space:pre;"


def _number_cells(values: pd.Series, shade: bool) -> list[str]:
    write, limit = formatter(values), _largest(values)
    cells = []
    for value in values.tolist():
        style = f"{_CELL}text-align:right"
        if shade and limit and _finite(value):
            red, green, blue = _rgb(NEGATIVE if value < 0 else POSITIVE)
            style += f";background:rgba({red},{green},{blue},{0.45 * abs(value) / limit:.2f})"
        cells.append(f'<td style="{style}">{write(value).replace("-", "−")}</td>')
    return cells


def _text_cells(values: pd.Series, name: str) -> list[str]:
    tokens = _needs_quotes(values)
    cells = []
    for value in values.tolist():
        text = _escaped(value)
        if name == "kind" and value in KIND_COLOURS:
            text = f'<span style="color:{KIND_COLOURS[value]}">●</span> {text}'
        elif tokens:
            text = f'<code style="background:rgba(128,128,128,.15);border-radius:3px">{text}</code>'
        cells.append(f'<td style="{_CELL}text-align:left">{text}</td>')
    return cells


def formatter(values: pd.Series) -> Callable[[Any], str]:
    """How the numbers of a column are written: the same decimals for all, or, where they span many
    sizes, the same significant digits; with a sign where some are negative.
    """
    if values.dtype.kind in "iu":
        return lambda v: _special(v) or f"{v:,}"
    finite = [abs(v) for v in values.tolist() if _finite(v) and v]
    sign = "+" if any(_finite(v) and v < 0 for v in values.tolist()) else ""
    if not finite:
        return lambda v: _special(v) or f"{v:{sign}.0f}"
    decimals = max(0, DIGITS - 1 - math.floor(math.log10(max(finite))))
    if decimals > 6 or min(finite) < 10**-decimals / 2:
        return lambda v: _special(v) or ("0" if v == 0 else f"{v:{sign}.{DIGITS - 1}g}")
    return lambda v: _special(v) or f"{v:{sign},.{decimals}f}"


def _special(value: Any) -> str:
    if value is None or value is pd.NA or value != value:
        return "–"
    return {math.inf: "∞", -math.inf: "-∞"}.get(value, "")


def _finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def _largest(values: pd.Series) -> float:
    return float(max((abs(v) for v in values.tolist() if _finite(v)), default=0))


def _is_number(values: pd.Series) -> bool:
    return values.dtype.kind in "iuf"


def _needs_quotes(values: pd.Series) -> bool:
    """Whether spaces at the ends of a column's texts say something: tokens, not words."""
    return any(isinstance(v, str) and v != v.strip() for v in values.tolist())


def _text(value: Any) -> str:
    if isinstance(value, str):
        return shown(value)
    return "–" if value is None or value is pd.NA or value != value else shown(str(value))


def _quoted(value: Any, quote: str) -> str:
    return f"{quote}{_text(value)}{quote}" if isinstance(value, str) else _text(value)


def _escaped(value: Any) -> str:
    return html.escape(_text(value))


def _with_index(frame: pd.DataFrame) -> pd.DataFrame:
    """A table whose rows have names shows them."""
    plain = isinstance(frame.index, pd.RangeIndex) or frame.index.dtype.kind == "i"
    return frame if plain else frame.reset_index()


def width_of(text: str) -> int:
    """Columns on a terminal: letters of East Asian scripts take two, combining ones none."""
    wide = sum(unicodedata.east_asian_width(c) in "WF" for c in text)
    return len(text) + wide - sum(unicodedata.combining(c) != 0 for c in text)


def _rgb(colour: str) -> tuple[int, int, int]:
    return int(colour[1:3], 16), int(colour[3:5], 16), int(colour[5:7], 16)
