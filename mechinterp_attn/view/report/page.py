"""From a report's data to its page: one template, one stylesheet, one script, all inline.

The page may run this very script and use this very stylesheet and nothing else: a
Content-Security-Policy in it names both by hash and forbids every other source.
"""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from typing import Any

import jinja2
from markupsafe import Markup

from mechinterp_attn.core.text import inert_json
from mechinterp_attn.view import circuitsvis
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
    "graph.js",
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
    scripts = " ".join(digest(text) for text in (code, bundle) if text)
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {digest(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(
        report=data,
        data=Markup(inert_json(data)),
        style=Markup(style),
        script=Markup(code),
        circuitsvis=Markup(bundle),
        policy=policy,
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


@cache
def asset(names: tuple[str, ...]) -> str:
    """Styles or scripts of the pages, one after the other."""
    folder = files("mechinterp_attn.view") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _has_patterns(data: dict[str, Any]) -> bool:
    return any(block["type"] == "patterns" for part in data["sections"] for block in part["blocks"])


def digest(text: str) -> str:
    """How a Content-Security-Policy names a script or style that stands in the page."""
    sha = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(sha).decode('ascii')}'"
