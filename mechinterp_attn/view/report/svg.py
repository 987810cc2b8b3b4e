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


def _line(chart: dict[str, Any]) -> Markup:
    """Points joined by a line; what is not finite is drawn as a cross on the axis."""
    height, left, right, top, bottom = 300, 64, 24, 28, 52
    values = [v if isinstance(v, float) else None for v in chart["values"]]
    other = chart.get("other")  # a second line: dashed, with squares
    second = [v if isinstance(v, float) else None for v in other["values"]] if other else []
    known = [v for v in [*values, *second] if v is not None]
    reference = chart.get("reference")
    marks = ticks(
        *_range(known + ([reference["value"]] if reference and reference["value"] != "nan" else []))
    )
    low, high = marks[0], marks[-1]

    def x(i: int) -> float:
        return left + (i + 0.5) * (WIDTH - left - right) / len(values)

    def y(v: float) -> float:
        return top + (high - v) * (height - top - bottom) / (high - low or 1)

    parts = []
    for mark in marks:
        parts.append(tag("line", x1=left, x2=WIDTH - right, y1=y(mark), y2=y(mark), class_="grid"))
        parts.append(tag("text", _label(mark), x=left - 8, y=y(mark) + 4, text_anchor="end", class_="tick"))
    every = math.ceil(len(values) / 26)
    for i, label in enumerate(chart["labels"]):
        if i % every == 0:
            parts.append(
                tag("text", label, x=x(i), y=height - bottom + 18, text_anchor="middle", class_="tick")
            )
    if reference:
        level = y(reference["value"])
        parts.append(tag("line", x1=left, x2=WIDTH - right, y1=level, y2=level, class_="reference"))
        text = f"{reference['label']} {_label(reference['value'])}"
        parts.append(tag("text", text, x=WIDTH - right, y=level - 6, text_anchor="end", class_="note"))

    def joined(line: list[float | None]) -> str:
        return " ".join(f"{x(i):.1f},{y(v):.1f}" for i, v in enumerate(line) if v is not None)

    parts.append(tag("polyline", points=joined(values), class_="line"))
    if other:
        parts.append(tag("polyline", points=joined(second), class_="line other"))
        for i, (label, v) in enumerate(zip(chart["labels"], second, strict=True)):
            if v is not None:
                title = tag("title", f"{other['name']}, {label}: {v:.4f}")
                box = {"x": x(i) - 4, "y": y(v) - 4, "width": 8, "height": 8}
                parts.append(tag("rect", title, **box, class_="dot other"))
        for i, (name, kind) in enumerate(((other["own"], ""), (other["name"], " other"))):
            at = left + 4 + i * (WIDTH - left - right) / 2
            parts.append(tag("line", x1=at, x2=at + 26, y1=10, y2=10, class_="line" + kind))
            parts.append(tag("text", name, x=at + 32, y=14, class_="note"))
    for i, (label, v) in enumerate(zip(chart["labels"], values, strict=True)):
        if v is None and other:  # the shorter of two lines ends here
            continue
        if v is None:
            parts.append(
                tag("text", f"× {chart['values'][i]}", x=x(i), y=height - bottom - 6,
                    text_anchor="middle", class_="value")
            )  # fmt: skip
            continue
        parts.append(
            tag("circle", tag("title", f"{label}: {v:.4f}"), cx=x(i), cy=y(v), r=4.5, class_="dot")
        )
        if len(values) <= 12 and not other:
            parts.append(tag("text", f"{v:.2f}", x=x(i), y=y(v) - 11, text_anchor="middle", class_="value"))
    middle = (left + WIDTH - right) / 2
    parts.append(tag("text", chart["x"], x=middle, y=height - 8, text_anchor="middle", class_="axis"))
    parts.append(tag("text", chart["y"], x=left - 48, y=14 if not other else height - 8, class_="axis"))
    return _frame(chart, height, *parts)


def _bars(chart: dict[str, Any]) -> Markup:
    """Signed bars, largest first, zero in view: right of it raises, left of it lowers."""
    row, top, bottom, left, right = 24, 8, 44, 130, 64
    height = top + row * len(chart["values"]) + bottom
    values = [v if isinstance(v, float) else None for v in chart["values"]]
    marks = ticks(*_range([v for v in values if v is not None], zero=True))
    low, high = marks[0], marks[-1]

    def x(v: float) -> float:
        return left + (v - low) * (WIDTH - left - right) / (high - low or 1)

    zero, parts = x(0.0), []
    for mark in marks:
        parts.append(tag("line", x1=x(mark), x2=x(mark), y1=top, y2=height - bottom, class_="grid"))
        parts.append(
            tag(
                "text", _label(mark), x=x(mark), y=height - bottom + 17, text_anchor="middle", class_="tick"
            )
        )
    for i, (label, v) in enumerate(zip(chart["labels"], values, strict=True)):
        y = top + row * i
        parts.append(tag("text", label, x=left - 10, y=y + 16, text_anchor="end", class_="value"))
        if v is None:
            parts.append(tag("text", f"× {chart['values'][i]}", x=zero + 6, y=y + 16, class_="value"))
            continue
        box = tag(
            "rect",
            tag("title", f"{label}: {v:+.4f}"),
            x=min(zero, x(v)),
            y=y + 4,
            width=max(abs(x(v) - zero), 0.5),
            height=row - 8,
            rx=2,
            class_="plus" if v >= 0 else "minus",
        )
        parts += [box, tag("text", signed(v), x=max(zero, x(v)) + 6, y=y + 16, class_="note")]
    parts.append(tag("line", x1=zero, x2=zero, y1=top, y2=height - bottom, class_="zero"))
    middle = (left + WIDTH - right) / 2
    parts.append(tag("text", chart["x"], x=middle, y=height - 8, text_anchor="middle", class_="axis"))
    return _frame(chart, height, *parts)


def _range(values: list[float], zero: bool = False) -> tuple[float, float]:
    values = [*values, 0.0] if zero or not values else values
    return min(values), max(values)
