"""The prompt with arcs between its tokens: who looks where, as one small picture."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from markupsafe import Markup

from mechinterp_attn.core.table import width_of
from mechinterp_attn.core.text import shown
from mechinterp_attn.view.report.svg import tag

WIDTHS = {"wide": 880, "narrow": 340}  # a desktop's column, a phone's
CHARACTER, PAD, GAP = 8.0, 5.0, 3.0  # of a token's box
LONGEST = 12  # characters of a token
LEVEL = 30  # height of an arc over the one inside it
BOX = 26
SKIP = 18.0  # the room of an ellipsis


def arcs(block: dict[str, Any]) -> Markup:
    """The picture in two widths; the stylesheet shows the one that fits."""
    return Markup("").join(_picture(block, name, width) for name, width in WIDTHS.items())


def kept(tokens: Sequence[str], needed: Sequence[int], width: float) -> list[int]:
    """The positions that fit into a width: those needed, then their neighbours, the nearest first."""
    must = sorted(set(needed))
    order = sorted(range(len(tokens)), key=lambda i: (min(abs(i - m) for m in must), -i))
    chosen: list[int] = []
    used = 0.0
    for i in order:
        size = _size(tokens[i]) + GAP
        if used + size > width and i not in must:
            break
        chosen.append(i)
        used += size
    return sorted(chosen)


def _text(text: str) -> str:
    text = shown(text)
    return text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def _size(text: str) -> float:
    return CHARACTER * max(1, width_of(_text(text))) + 2 * PAD


def _picture(block: dict[str, Any], name: str, width: int) -> Markup:
    tokens, drawn, position = block["tokens"], block["arcs"], block["position"]
    needed = [position, *(end for arc in drawn for end in (arc["from"], arc["to"]))]
    places = kept(tokens, needed, width - _size(block["answer"]) - 3 * SKIP - 40)
    levels = [_level(arc, drawn) for arc in drawn]
    top = 26.0 + LEVEL * (max(levels) + 1) if levels else 6.0
    boxes: dict[int, float] = {}  # where the middle of each token is
    x, last, parts = 4.0, -1, []
    for i in places:
        if i != last + 1:
            parts.append(_words("…", x + SKIP / 2, top + 17, "gap"))
            x += SKIP
        lit = " lit" if i in needed else ""
        parts += _boxed(tokens[i], x, top, "box" + lit, "piece" + lit)
        size = _size(tokens[i])
        boxes[i] = x + size / 2
        x, last = x + size + GAP, i
        if i == position:
            parts.append(_words("→", x + SKIP / 2, top + 17, "gap"))
            x += SKIP
            parts += _boxed(block["answer"], x, top, "answer", "piece lit")
            size = _size(block["answer"])
            parts.append(_words(block["p"], x + size / 2, top + BOX + 16, "note"))
            x += size + GAP
    whole = max(x + 4, 120.0)
    taken: list[tuple[float, float, float]] = []  # by labels: height, left, right
    for arc, level in zip(drawn, levels, strict=True):
        parts += _arc(arc, boxes[arc["from"]], boxes[arc["to"]], top, level, whole, taken)
    return tag(
        "svg",
        tag("title", block["caption"]),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {whole:.0f} {top + BOX + 22:.0f}",
        width=f"{whole:.0f}",
        role="img",
        aria_label=block["caption"],
        class_="arcs " + name,
    )


def _words(text: str, x: float, y: float, name: str) -> Markup:
    return tag("text", text, x=x, y=y, text_anchor="middle", class_=name)


def _label(text: str, x: float, y: float, name: str) -> Markup:
    """``L1H3 49 %, L1H1 74 %``, each part under the name of its head."""
    parts: list[Markup] = []
    for i, part in enumerate(text.split(", ")):
        parts += [tag("tspan", ", ")] if i else []
        parts.append(tag("tspan", part, data_head=part.split(" ")[0]))
    return tag("text", *parts, x=x, y=y, text_anchor="middle", class_=name)


def _boxed(text: str, x: float, top: float, box: str, piece: str) -> list[Markup]:
    ground = tag("rect", x=x, y=top, width=_size(text), height=BOX, rx=4, class_=box)
    return [ground, tag("text", _text(text), x=x + PAD, y=top + 18, class_=piece)]


def _arc(
    arc: dict[str, Any],
    start: float,
    stop: float,
    top: float,
    level: int,
    whole: float,
    taken: list[tuple[float, float, float]],
) -> list[Markup]:
    """An arc with its head and its words, which stand over those that are in their way."""
    kind, high = arc["kind"], top - 24 - LEVEL * level
    path = f"M{start:.1f},{top - 2:.1f} C{start:.1f},{high:.1f} {stop:.1f},{high:.1f} "
    path += f"{stop:.1f},{top - 4:.1f}"
    tip = f"{stop - 4:.1f},{top - 9:.1f} {stop + 4:.1f},{top - 9:.1f} {stop:.1f},{top - 2:.1f}"
    half = 7 * len(arc["label"]) / 2
    middle = min(max((start + stop) / 2, half + 2), whole - half - 2)
    y = top - (top - high) * 0.75 - 4

    def hides(at: float, left: float, right: float) -> bool:
        return abs(y - at) < 13 and middle - half < right and left < middle + half

    while any(hides(*other) for other in taken):
        y -= 14
    taken.append((y, middle - half, middle + half))
    return [
        tag(
            "path",
            tag("title", arc["title"]),
            d=path,
            class_="arc " + kind,
            stroke_width=1.5 + 3 * arc["weight"],
        ),
        tag("polygon", points=tip, class_="tip " + kind),
        _label(arc["label"], middle, y, "label " + kind),
    ]


def _level(arc: dict[str, Any], drawn: Sequence[dict[str, Any]]) -> int:
    """Arcs over others stand higher."""

    def inside(other: dict[str, Any]) -> bool:
        low, high = sorted((arc["from"], arc["to"]))
        a, b = sorted((other["from"], other["to"]))
        return other is not arc and low <= a and b <= high and (a, b) != (low, high)

    return max((_level(other, drawn) + 1 for other in drawn if inside(other)), default=0)
