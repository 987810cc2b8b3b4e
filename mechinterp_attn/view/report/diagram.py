"""A circuit as a small picture: the tokens below, the logits above, an arrow for each edge."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

from mechinterp_attn.causal.wires import EMBED, LOGITS
from mechinterp_attn.view.report.svg import tag

SPAN, ROW, TOP = 116.0, 86.0, 24.0  # the room of a head, of a layer, above them
HALF, HIGH = 44.0, 26.0  # half the width of a box, its height
MODES = {"Q": "queries", "K": "keys", "V": "values", "": "the logits"}
_LABEL = re.compile(r"L(\d+)([A-Z])")
KINDS = {"H": "attention", "N": "mlp", "F": "feature", "E": "error"}


def _parts(name: str) -> tuple[int, str]:
    """The layer of a head or of a whole bank (``L3N*``), and the letter of its kind."""
    match = _LABEL.match(name)
    assert match is not None
    return int(match[1]), match[2]


def diagram(block: dict[str, Any]) -> Markup:
    """The picture of a circuit block."""
    rows: list[list[str]] = block["rows"]
    widest = max(len(row) for row in rows)
    width = max(340.0, SPAN * widest + 20)
    place = {
        name: (width / 2 + SPAN * (i - (len(row) - 1) / 2), TOP + ROW * (len(rows) - 1 - level))
        for level, row in enumerate(rows)
        for i, name in enumerate(row)
    }
    height = TOP + ROW * (len(rows) - 1) + HIGH + 40
    parts = [_edge(edge, place) for edge in block["edges"]]
    for name, (x, y) in place.items():
        match = _LABEL.match(name)  # none at the ends, nor in a name from a file that somebody made up
        kind = "end" if name in (EMBED, LOGITS) else KINDS.get(match[2] if match else "", "mlp")
        text = {EMBED: "tokens", LOGITS: "logits"}.get(name, name)
        link = {} if kind == "end" else {"data_head": name}
        parts.append(
            tag("rect", x=x - HALF, y=y, width=2 * HALF, height=HIGH, rx=5, class_="node " + kind, **link)
        )
        parts.append(tag("text", text, x=x, y=y + 17, text_anchor="middle", class_="name " + kind, **link))
    used = dict.fromkeys(edge["mode"] for edge in block["edges"])
    for i, mode in enumerate(used):
        x, y, name = 10 + 82 * i, height - 8, mode or "out"
        parts.append(tag("line", x1=x, x2=x + 18, y1=y - 4, y2=y - 4, class_="wire mode-" + name))
        parts.append(tag("text", MODES[mode], x=x + 22, y=y, class_="key"))
    return tag(
        "svg",
        tag("title", block["caption"]),
        *parts,
        xmlns="http://www.w3.org/2000/svg",
        viewBox=f"0 0 {width:.0f} {height:.0f}",
        width=f"{width:.0f}",
        role="img",
        aria_label=block["caption"],
        class_="diagram",
    )


def _edge(edge: dict[str, Any], place: dict[str, tuple[float, float]]) -> Markup:
    """From the top of a box to the foot of a later one; queries, keys and values enter side by side."""
    (x, y), (u, v) = place[edge["from"]], place[edge["to"]]
    u += {"Q": -16.0, "K": 0.0, "V": 16.0}.get(edge["mode"], 0.0)
    v += HIGH
    middle = (y + v) / 2
    bow = 0.0 if abs(x - u) > 20 or y - v < ROW else HALF + 14  # around what stands between
    path = f"M{x:.1f},{y:.1f} C{x + bow:.1f},{middle:.1f} {u + bow:.1f},{middle:.1f} {u:.1f},{v + 7:.1f}"
    tip = f"{u - 4:.1f},{v + 8:.1f} {u + 4:.1f},{v + 8:.1f} {u:.1f},{v + 1:.1f}"
    name = "mode-" + (edge["mode"] or "out")
    thick = 1.2 + 2.8 * float(edge["weight"])
    return Markup("").join(
        [
            tag("path", tag("title", edge["title"]), d=path, class_="wire " + name, stroke_width=thick),
            tag("polygon", points=tip, class_="tip " + name),
        ]
    )


def rows_of(edges: list[tuple[str, str, str]]) -> list[list[str]]:
    """The nodes of edges in rows, from the tokens up: attention heads of a layer, then its neurons."""
    found: dict[tuple[float, int], list[str]] = {}
    for name in dict.fromkeys(end for edge in edges for end in edge[:2]):
        if name in (EMBED, LOGITS):
            key = (-1.0 if name == EMBED else float("inf"), 0)
        else:
            layer, letter = _parts(name)
            key = (float(layer), int(letter != "H"))
        found.setdefault(key, []).append(name)
    return [sorted(found[key]) for key in sorted(found)]
