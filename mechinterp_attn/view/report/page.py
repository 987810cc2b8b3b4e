"""From a report's data to its page: one template, one stylesheet, one script, all inline.

The page may run this very script and use this very stylesheet and nothing else: a
Content-Security-Policy in it names both by hash and forbids every other source.
"""

from __future__ import annotations

from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from mechinterp_attn.core.text import inert_json
from mechinterp_attn.view import circuitsvis
from mechinterp_attn.view.inline import GRAPH_SCRIPTS, asset, policy
from mechinterp_attn.view.report.arcs import arcs
from mechinterp_attn.view.report.diagram import diagram
from mechinterp_attn.view.report.svg import svg

_SCRIPTS = (
    "element.js",
    "core.js",
    "figure.js",
    "table.js",
    "patterns.js",
    "matrix.js",
    *GRAPH_SCRIPTS,
    "cards.js",
    "main.js",
)
_STYLES = ("report.css", "graph.css")

# CircuitsVis holds the browser up on longer prompts; the page's own patterns do not.
CIRCUITSVIS_TOKENS = 64


def page(data: dict[str, Any]) -> str:
    """The HTML of a report."""
    style, code = asset(_STYLES), script()
    bundle = (
        circuitsvis.bundle() if len(data["prompt"]) <= CIRCUITSVIS_TOKENS and _has_patterns(data) else ""
    )
    return _template().render(
        report=data,
        data=Markup(inert_json(data)),
        style=Markup(style),
        script=Markup(code),
        circuitsvis=Markup(bundle),
        policy=policy((code, bundle), style),
    )


def script() -> str:
    """The one script that a page runs."""
    return asset(_SCRIPTS)


@cache
def _template() -> jinja2.Template:
    source = (files("mechinterp_attn.view") / "assets" / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["svg"] = svg
    environment.filters["arcs"] = arcs
    environment.filters["diagram"] = diagram
    return environment.from_string(source)


def _has_patterns(data: dict[str, Any]) -> bool:
    return any(block["type"] == "patterns" for part in data["sections"] for block in part["blocks"])
