"""Small charts as SVG: they print, follow the page's colours, and download as they are."""

from __future__ import annotations

import math
from typing import Any

from markupsafe import Markup, escape

from mechinterp_attn.core.text import signed

WIDTH = 720


def svg(chart: dict[str, Any]) -> Markup:
    """The picture of a chart block."""
    return {"line": _line, "bars": _bars}[chart["kind"]](chart)


def tag(name: str, *children: str | Markup, **attributes: object) -> Markup:
    """One element; text and attributes are escaped, so what stands in them stays text."""
    pairs = ((k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items())
    opened = Markup("").join(Markup(' {}="{}"').format(k, _short(v)) for k, v in pairs)
    return Markup("<{}{}>{}</{}>").format(
        Markup(name), opened, Markup("").join(map(escape, children)), Markup(name)
    )


def _short(value: object) -> str:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else str(value)


def _frame(chart: dict[str, Any], height: int, *children: Markup) -> Markup:
    return tag(
        "svg",
        tag("title", chart["caption"]),
        *children,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {WIDTH} {height}",
        role="img",
        aria_label=f"{chart['caption']}; the table beside it holds the same numbers",
        class_="chart",
    )


def ticks(low: float, high: float, n: int = 5) -> list[float]:
    """Round numbers from about ``low`` to about ``high``."""
    span = high - low or abs(high) or 1.0
    step = 10.0 ** math.floor(math.log10(span / n))
    step *= min((m for m in (1, 2, 5, 10) if span / (step * m) <= n), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [i * step for i in range(first, last + 1)]


def _label(x: float) -> str:
    return f"{x:.4g}".replace("-", "−")


def _known(series: dict[str, Any]) -> list[float | None]:
    """The values that can be drawn: None for those that are missing or not finite."""
    return [v if isinstance(v, float) else None for v in series["values"]]


def _line(chart: dict[str, Any]) -> Markup:
    """Points joined by lines; what is not finite is drawn as a cross on the axis."""
    height, left, right, top, bottom = 300, 64, 24, 28, 52
    lines, reference = [_known(one) for one in chart["series"]], chart["reference"]
    several = len(lines) > 1
    known = [v for line in lines for v in line if v is not None]
    marks = ticks(*_range(known + ([reference[1]] if reference else [])))
    low, high = marks[0], marks[-1]
    n = len(chart["labels"])

    def x(i: int) -> float:
        return left + (i + 0.5) * (WIDTH - left - right) / n

    def y(v: float) -> float:
        return top + (high - v) * (height - top - bottom) / (high - low or 1)

    parts = []
    for mark in marks:
        parts.append(tag("line", x1=left, x2=WIDTH - right, y1=y(mark), y2=y(mark), class_="grid"))
        parts.append(tag("text", _label(mark), x=left - 8, y=y(mark) + 4, text_anchor="end", class_="tick"))
    every = math.ceil(n / 26)
    for i, label in enumerate(chart["labels"]):
        if i % every == 0:
            parts.append(
                tag("text", label, x=x(i), y=height - bottom + 18, text_anchor="middle", class_="tick")
            )
    if reference:
        level = y(reference[1])
        parts.append(tag("line", x1=left, x2=WIDTH - right, y1=level, y2=level, class_="reference"))
        text = f"{reference[0]} {_label(reference[1])}"
        parts.append(tag("text", text, x=WIDTH - right, y=level - 6, text_anchor="end", class_="note"))
    for number, (series, line) in enumerate(zip(chart["series"], lines, strict=True)):
        other = " other" if number else ""  # dashed, with squares
        points = " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(line) if v is not None)
        parts.append(tag("polyline", points=points, class_="line" + other))
        if several:
            at = left + 4 + number * (WIDTH - left - right) / 2
            parts.append(tag("line", x1=at, x2=at + 26, y1=10, y2=10, class_="line" + other))
            parts.append(tag("text", series["name"], x=at + 32, y=14, class_="note"))
        for i, (label, v) in enumerate(zip(chart["labels"], line, strict=True)):
            if v is None and several:  # the shorter of two lines ends here
                continue
            if v is None:
                cross = {"x": x(i), "y": height - bottom - 6, "text_anchor": "middle", "class_": "value"}
                parts.append(tag("text", f"× {series['values'][i]}", **cross))
                continue
            title = tag("title", f"{series['name']}, {label}: {v:.4f}" if several else f"{label}: {v:.4f}")
            if number:
                box = {"x": x(i) - 4, "y": y(v) - 4, "width": 8, "height": 8}
                parts.append(tag("rect", title, **box, class_="dot other"))
            else:
                parts.append(tag("circle", title, cx=x(i), cy=y(v), r=4.5, class_="dot"))
            if n <= 12 and not several:
                parts.append(
                    tag("text", f"{v:.2f}", x=x(i), y=y(v) - 11, text_anchor="middle", class_="value")
                )
    middle = (left + WIDTH - right) / 2
    parts.append(tag("text", chart["over"], x=middle, y=height - 8, text_anchor="middle", class_="axis"))
    parts.append(tag("text", chart["value"], x=left - 48, y=height - 8 if several else 14, class_="axis"))
    return _frame(chart, height, *parts)


def _bars(chart: dict[str, Any]) -> Markup:
    """Signed bars, zero in view: right of it raises, left of it lowers. The parts of a bar are stacked from
    zero to either side; alone, a bar has the colour of its sign.
    """
    row, bottom, left, right = 24, 44, 130, 64
    several = len(chart["series"]) > 1
    top = 34 if several else 8
    height = top + row * len(chart["labels"]) + bottom
    rows = list(zip(*(_known(one) for one in chart["series"]), strict=True))
    ends = [
        sum((v for v in values if v is not None and v * side > 0), 0.0)
        for values in rows
        for side in (-1, 1)
    ]
    marks = ticks(*_range(ends, zero=True))
    low, high = marks[0], marks[-1]

    def x(v: float) -> float:
        return left + (v - low) * (WIDTH - left - right) / (high - low or 1)

    zero, parts = x(0.0), []
    for number, series in enumerate(chart["series"] if several else ()):
        start = 4 + number * WIDTH / len(chart["series"])
        parts.append(tag("rect", x=start, y=6, width=12, height=12, class_="of-" + series["kind"]))
        parts.append(tag("text", series["name"], x=start + 18, y=17, class_="note"))
    for mark in marks:
        parts.append(tag("line", x1=x(mark), x2=x(mark), y1=top, y2=height - bottom, class_="grid"))
        at = {"x": x(mark), "y": height - bottom + 17}
        parts.append(tag("text", _label(mark), **at, text_anchor="middle", class_="tick"))
    for i, (label, values) in enumerate(zip(chart["labels"], rows, strict=True)):
        y = top + row * i
        parts.append(tag("text", label, x=left - 10, y=y + 16, text_anchor="end", class_="value"))
        if all(v is None for v in values):
            given = chart["series"][0]["values"][i]
            parts.append(tag("text", f"× {given}", x=zero + 6, y=y + 16, class_="value"))
            continue
        reached = {-1: 0.0, 1: 0.0}
        for series, v in zip(chart["series"], values, strict=True):
            if v is None:
                continue
            side = 1 if v >= 0 else -1
            start, reached[side] = reached[side], reached[side] + v
            own = ("plus" if v >= 0 else "minus") if not several else "of-" + series["kind"]
            name = f"{label}, {series['name']}" if several else label
            box = {"x": x(min(start, reached[side])), "y": y + 4, "height": row - 8, "rx": 2}
            box["width"] = max(abs(x(reached[side]) - x(start)), 0.5)
            parts.append(tag("rect", tag("title", f"{name}: {v:+.4f}"), **box, class_=own))
        whole = sum((v for v in values if v is not None), 0.0)
        parts.append(tag("text", signed(whole), x=x(reached[1]) + 6, y=y + 16, class_="note"))
    parts.append(tag("line", x1=zero, x2=zero, y1=top, y2=height - bottom, class_="zero"))
    middle = (left + WIDTH - right) / 2
    parts.append(tag("text", chart["value"], x=middle, y=height - 8, text_anchor="middle", class_="axis"))
    return _frame(chart, height, *parts)


def _range(values: list[float], zero: bool = False) -> tuple[float, float]:
    values = [*values, 0.0] if zero or not values else values
    return min(values), max(values)
