"""Figures of path analyses: what each order is worth, which terms make a logit."""

from __future__ import annotations

import html
from typing import TYPE_CHECKING

import plotly.graph_objects as go

from mechinterp_attn.view.figures.style import DIVERGING, KIND_COLOURS, figure

if TYPE_CHECKING:
    from mechinterp_attn.paths.importance import TermImportance
    from mechinterp_attn.paths.logits import LogitAttribution
    from mechinterp_attn.paths.orders import Orders
    from mechinterp_attn.paths.score import ScoreExpansion


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


def importance_bars(importance: TermImportance) -> go.Figure:
    """What each order changes the loss by: attention-only paths, and those with MLP-derived heads."""
    frame = importance.frame
    fig = figure(
        title="Term importance", x="heads on the path", y="change of the loss (nats; below 0 is a gain)"
    )
    start = frame.iloc[:1]
    rest = frame.iloc[1:]
    for name, x, y, colour in (
        ("direct path, against uniform", start["order"], start["change"], KIND_COLOURS["embed"]),
        ("attention heads only", rest["order"], rest["attention_only"], KIND_COLOURS["attention"]),
        ("with MLP-derived heads", rest["order"], rest["with_mlp"], KIND_COLOURS["mlp"]),
    ):
        hover = "order %{x}: %{y:+.4f} nats<extra>" + name + "</extra>"
        fig.add_trace(go.Bar(x=x, y=y, name=name, marker_color=colour, hovertemplate=hover))
    return fig.update_layout(barmode="relative").update_xaxes(type="category")


def score_terms(expansion: ScoreExpansion, k: int = 12) -> go.Figure:
    """Query-side times key-side terms of a score as a map: the ``k`` largest parts of either side."""
    frame = expansion.frame.assign(size=expansion.frame["value"].abs())
    rows = frame.groupby("query_term")["size"].sum().nlargest(k).index
    columns = frame.groupby("key_term")["size"].sum().nlargest(k).index
    table = frame.pivot_table(index="query_term", columns="key_term", values="value", aggfunc="sum")
    table = table.loc[rows, columns]
    bound = float(table.abs().to_numpy().max()) or 1.0
    fig = figure(
        title=f"{safe(expansion.about)} = {expansion.total:.3f}",
        x="key side",
        y="query side",
        height=180 + 28 * len(rows),
    )
    fig.add_trace(
        go.Heatmap(
            z=table.to_numpy(),
            x=list(table.columns),
            y=list(table.index),
            colorscale=DIVERGING,
            zmin=-bound,
            zmax=bound,
            hovertemplate="%{y} x %{x}: %{z:.4f}<extra></extra>",
        )
    )
    return fig.update_yaxes(autorange="reversed")
