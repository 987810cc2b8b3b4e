"""Figures of path analyses: what each order is worth, which terms make a logit."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from mechinterp_attn.view.figures.style import KIND_COLOURS, figure

if TYPE_CHECKING:
    from mechinterp_attn.paths.logits import LogitAttribution
    from mechinterp_attn.paths.orders import Orders


def safe(text: str) -> str:
    """Text of the model's for a plotly label, which would read tags in it as formatting."""
    return html.escape(text, quote=False)


def loss_by_order(orders: Orders) -> go.Figure:
    """Loss with the paths up to each order as a falling line, each step labelled with its gain."""
    frame = orders.frame
    steps = ["" if change != change else f"{change:+.3f}" for change in frame["change"]]
    fig = figure(title="Loss by path order", x="paths through at most this many heads", y="loss (nats)")
    fig.add_trace(
        go.Scatter(
            x=frame["order"],
            y=frame["loss"],
            text=steps,
            mode="lines+markers+text",
            textposition="top right",
            line={"color": KIND_COLOURS["attention"], "width": 2},
            marker={"size": 9},
            hovertemplate="order %{x}<br>loss %{y:.4f} nats<br>change %{text}<extra></extra>",
        )
    )
    return fig.update_xaxes(type="category").update_layout(showlegend=False)


def attribution_bars(attribution: LogitAttribution, k: int = 20) -> go.Figure:
    """The ``k`` largest terms of a logit as signed bars, and all others as one bar.

    The bars add up to the logit, so nothing is out of sight.
    """
    top = attribution.top(k)
    names, values, kinds = list(top["head"]), list(top["value"]), list(top["kind"])
    others = len(attribution.frame) - len(top)
    if others:
        names.append(f"{others:,} others")
        values.append(attribution.total - sum(values))
        kinds.append("bias")
    fig = figure(
        title=f"{safe(attribution.about)} = {attribution.total:.3f}",
        x="contribution (logits)",
        y="",
        height=140 + 22 * len(names),
    )
    for kind in dict.fromkeys(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]
        fig.add_trace(
            go.Bar(
                x=[values[i] for i in own],
                y=[names[i] for i in own],
                orientation="h",
                name=kind,
                marker_color=KIND_COLOURS.get(kind, KIND_COLOURS["bias"]),
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
            )
        )
    return fig.update_yaxes(categoryorder="array", categoryarray=names[::-1])
