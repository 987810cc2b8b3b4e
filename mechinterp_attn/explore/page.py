"""The explorer's own page: its style and script stand in it, and a policy allows nothing else."""

from __future__ import annotations

from functools import cache
from importlib.resources import files

import jinja2
from markupsafe import Markup

from mechinterp_attn.view.inline import asset, digest


@cache
def _template() -> jinja2.Template:
    source = (files("mechinterp_attn.explore") / "explore.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(source)


def page(name: str, n_heads: int, prompt: str) -> tuple[str, str]:
    """The page of a model, and its Content-Security-Policy.

    Args:
        name: the model's.
        n_heads: of all kinds.
        prompt: that stands in the box at first.
    """
    own = files("mechinterp_attn.explore")
    style = asset(("report.css",)) + "\n" + (own / "explore.css").read_text(encoding="utf-8")
    code = script()
    policy = (
        f"default-src 'none'; script-src {digest(code)}; style-src {digest(style)}; connect-src 'self'; "
        "frame-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    text = _template().render(
        name=name, n_heads=n_heads, prompt=prompt, style=Markup(style), script=Markup(code)
    )
    return text, policy


def script() -> str:
    """The one script that the page runs."""
    own = (files("mechinterp_attn.explore") / "explore.js").read_text(encoding="utf-8")
    return asset(("element.js",)) + "\n" + own
