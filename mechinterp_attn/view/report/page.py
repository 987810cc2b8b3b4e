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

from mechinterp_attn.view.report.svg import svg
from mechinterp_attn.view.text import inert_json

_SCRIPTS = ("core.js", "table.js", "patterns.js", "main.js")
_STYLES = ("report.css",)


def page(data: dict[str, Any]) -> str:
    """The HTML of a report."""
    style, script = _asset(_STYLES), _asset(_SCRIPTS)
    policy = (
        f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )
    return _template().render(
        report=data,
        data=Markup(inert_json(data)),
        style=Markup(style),
        script=Markup(script),
        policy=policy,
    )


@cache
def _template() -> jinja2.Template:
    source = (files("mechinterp_attn.view") / "assets" / "report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    environment.filters["svg"] = svg
    return environment.from_string(source)


@cache
def _asset(names: tuple[str, ...]) -> str:
    folder = files("mechinterp_attn.view") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(digest).decode('ascii')}'"
