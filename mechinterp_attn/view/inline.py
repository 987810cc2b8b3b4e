"""Scripts and stylesheets of a page, inline, and the policy that lets it run them and nothing else."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files

# What a page with an attribution graph needs, in this order.
GRAPH_SCRIPTS = (
    "graph_model.js",
    "graph_layout.js",
    "graph_picture.js",
    "graph_paint.js",
    "graph_state.js",
    "graph_card.js",
    "graph_bar.js",
    "graph_figure.js",
    "graph_pins.js",
    "graph.js",
)


@cache
def asset(names: tuple[str, ...]) -> str:
    """Files of ``view/assets/``, one after the other."""
    folder = files("mechinterp_attn.view") / "assets"
    return "\n".join((folder / name).read_text(encoding="utf-8") for name in names)


def policy(scripts: tuple[str, ...], style: str) -> str:
    """A Content-Security-Policy for a page: its scripts and its stylesheet by hash, pictures made in the
    page, and no other source.
    """
    allowed = " ".join(digest(text) for text in scripts if text)
    return (
        f"default-src 'none'; script-src {allowed}; style-src {digest(style)}; img-src data: blob:; "
        "base-uri 'none'; form-action 'none'"
    )


def digest(text: str) -> str:
    """How a Content-Security-Policy names a script or style that stands in the page."""
    sha = hashlib.sha256(text.encode("utf-8")).digest()
    return f"'sha256-{base64.b64encode(sha).decode('ascii')}'"
