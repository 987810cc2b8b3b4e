"""One look for every figure: colours, scale and signs."""

from __future__ import annotations

import html

import plotly.graph_objects as go

from mechinterp_attn.view.text import shown

# Colour-blind safe; attention heads and MLP-derived heads keep theirs everywhere.
KIND_COLOURS = {"attention": "#3b6fb6", "mlp": "#c2571a", "embed": "#4d7c3a", "bias": "#7a7a7a"}
SEQUENTIAL = "Blues"  # for scores in [0, 1]
DIVERGING = "RdBu"  # for signed values, centred at zero: red is negative, blue positive


def figure(*, title: str, x: str, y: str, height: int = 420) -> go.Figure:
    """An empty figure in the common style with named axes."""
    layout = go.Layout(
        title=title,
        xaxis_title=x,
        yaxis_title=y,
        height=height,
        template="plotly_white",
        margin={"l": 60, "r": 20, "t": 50, "b": 50},
        font={"family": "system-ui, sans-serif", "size": 13},
    )
    return go.Figure(layout=layout)


def safe_text(text: str) -> str:
    """Text from a token or label for a title, tick or hover: plotly reads ``<b>`` and ``<a>`` in
    those as markup."""
    return html.escape(shown(text), quote=False)
