"""One look for every figure: colours, scale and signs."""

from __future__ import annotations

import html
from typing import Any

import numpy as np
import plotly.graph_objects as go

from mechinterp_attn.core.palette import (
    DIVERGING as DIVERGING,
    KIND_COLOURS as KIND_COLOURS,
    NEGATIVE as NEGATIVE,
    POSITIVE as POSITIVE,
    SEQUENTIAL as SEQUENTIAL,
)
from mechinterp_attn.core.text import shown


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


def signed_scale(values: Any) -> dict[str, Any]:
    """Colours of a heatmap of signed values: red below zero, white at it, blue above."""
    finite = np.asarray(values, dtype=float)
    finite = np.abs(finite[np.isfinite(finite)])
    bound = float(finite.max(initial=0.0)) or 1.0
    return {"colorscale": DIVERGING, "zmin": -bound, "zmax": bound}


def safe_text(text: str) -> str:
    """Text from a token or label for a title, tick or hover: plotly reads ``<b>`` and ``<a>`` in
    those as markup.
    """
    return html.escape(shown(text), quote=False)
