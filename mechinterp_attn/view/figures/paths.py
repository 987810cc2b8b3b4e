"""Figures of path analyses: what each order is worth, which terms make a logit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

import pandas as pd
import plotly.graph_objects as go

from mechinterp_attn.core.pictures import draws
from mechinterp_attn.paths.by_order import Orders
from mechinterp_attn.paths.graph import AttributionGraph
from mechinterp_attn.paths.importance import TermImportance
from mechinterp_attn.paths.logits import LogitAttribution
from mechinterp_attn.paths.score import ScoreExpansion
from mechinterp_attn.paths.search import TopPaths
from mechinterp_attn.paths.virtual import VirtualTerm
from mechinterp_attn.view.charts import largest_paths, largest_terms, loss_by_order, worth_of_orders
from mechinterp_attn.view.figures.chart import plotly_chart
from mechinterp_attn.view.figures.heads import pattern_heatmap
from mechinterp_attn.view.figures.style import (
    KIND_COLOURS,
    NEGATIVE,
    POSITIVE,
    figure,
    safe_text,
    signed_scale,
)


@draws(Orders)
def order_line(orders: Orders) -> go.Figure:
    """Loss (or a task's metric) with the paths up to each order as a line, each step with its change."""
    return plotly_chart(loss_by_order([orders]))


@draws(LogitAttribution)
def attribution_bars(attribution: LogitAttribution, k: int = 20) -> go.Figure:
    """The ``k`` largest terms of a logit as signed bars, and all others as one bar.

    The bars add up to the logit, so nothing is out of sight.
    """
    return plotly_chart(largest_terms(attribution, k))


@draws(TopPaths)
def path_bars(paths: TopPaths, k: int = 20) -> go.Figure:
    """The ``k`` largest paths to a logit as signed bars, and all others as one bar."""
    return plotly_chart(largest_paths(paths, k))


@draws(TermImportance)
def importance_bars(importance: TermImportance) -> go.Figure:
    """What each order gains, by attention-only paths and by those with MLP-derived heads."""
    return plotly_chart(worth_of_orders(importance))


@draws(ScoreExpansion)
def score_terms(expansion: ScoreExpansion, k: int = 12) -> go.Figure:
    """Query-side times key-side terms of a score as a map: the ``k`` largest parts of either side."""
    frame = expansion.frame.assign(size=expansion.frame["value"].abs())
    rows = frame.groupby("query_term")["size"].sum().nlargest(k).index
    columns = frame.groupby("key_term")["size"].sum().nlargest(k).index
    table = frame.pivot_table(index="query_term", columns="key_term", values="value", aggfunc="sum")
    table = table.loc[rows, columns]
    fig = figure(
        title=f"{safe_text(expansion.about)} = {expansion.total:.3f}",
        x="key side",
        y="query side",
        height=180 + 28 * len(rows),
    )
    fig.add_trace(
        go.Heatmap(
            z=table.to_numpy(),
            x=[safe_text(name) for name in table.columns],
            y=[safe_text(name) for name in table.index],
            **signed_scale(table.to_numpy()),
            hovertemplate="%{y} x %{x}: %{z:.4f}<extra></extra>",
        )
    )
    return fig.update_yaxes(autorange="reversed")


@draws(VirtualTerm)
def virtual_pattern(term: VirtualTerm) -> go.Figure:
    """The composed attention pattern of a virtual head."""
    tokens = [f"{safe_text(token)} ({i})" for i, token in enumerate(term.frame["token"])]
    return pattern_heatmap(f"Pattern of {' then '.join(term.heads)}", term.pattern, tokens, tokens)


@draws(AttributionGraph)
def graph_figure(graph: AttributionGraph, most: int = 40) -> go.Figure:
    """The graph's nodes, positions across and layers up, with its largest edges.

    A node's size is its value, an edge's width its weight; blue adds to the target, red takes away.
    ``view()`` is the interactive picture with all of it.
    """
    inner = graph.nodes[graph.nodes["kind"].isin(["attention", "mlp"])].nlargest(most, "influence")
    ends = graph.nodes[graph.nodes["kind"].isin(["token", "logit"])]
    nodes = pd.concat([ends, inner])
    top = 2 * int(inner["layer"].max()) + 3 if len(inner) else 2
    height = {"token": 0, "logit": top}
    levels_of: dict[str, tuple[int, int]] = {}
    for node in cast(Iterable[Any], nodes.itertuples()):
        level = height.get(node.kind)
        if level is None:
            level = 1 + 2 * int(node.layer) + (node.kind == "mlp")
        levels_of[node.node] = (int(node.position), level)
    places = _apart(levels_of)
    fig = figure(
        title=f"{safe_text(graph.about)} = {graph.total:.3f}", x="position", y="", height=160 + 70 * top
    )
    edges = graph.edges[graph.edges["kind"] == "value"]
    edges = edges[edges["source"].isin(places) & edges["target"].isin(places)]
    edges = edges.loc[edges["weight"].abs().nlargest(3 * most).index]
    widest = edges["weight"].abs().max() if len(edges) else 1.0
    for edge in cast(Iterable[Any], edges.itertuples()):
        (x0, y0), (x1, y1) = places[edge.source], places[edge.target]
        line = {
            "width": 0.5 + 4 * abs(edge.weight) / widest,
            "color": POSITIVE if edge.weight > 0 else NEGATIVE,
        }
        drawn = {"mode": "lines", "line": line, "opacity": 0.35, "hoverinfo": "skip"}
        fig.add_scatter(x=[x0, x1], y=[y0, y1], showlegend=False, **drawn)
    largest = nodes["value"].abs().max() or 1.0
    for kind, own in nodes.groupby("kind", sort=False):
        fig.add_scatter(
            x=[places[node][0] for node in own["node"]],
            y=[places[node][1] for node in own["node"]],
            mode="markers",
            name=str(kind),
            marker={
                "size": 7 + 18 * (own["value"].abs() / largest) ** 0.5,
                "color": KIND_COLOURS.get({"token": "embed"}.get(str(kind), str(kind)), "#222"),
                "line": {"width": 1, "color": "#fff"},
            },
            customdata=[[safe_text(n.node), n.value] for n in cast(Iterable[Any], own.itertuples())],
            hovertemplate="%{customdata[0]}: %{customdata[1]:+.4f}<extra></extra>",
        )
    levels = {0: "tokens", top: "logit"}
    levels |= {1 + 2 * n: f"L{n} heads" for n in set(inner["layer"][inner["kind"] == "attention"])}
    levels |= {2 + 2 * n: f"L{n} MLP" for n in set(inner["layer"][inner["kind"] == "mlp"])}
    tokens = [safe_text(token) for token in graph.tokens]
    fig.update_xaxes(tickvals=list(range(len(tokens))), ticktext=tokens, tickangle=-60)
    return fig.update_yaxes(tickvals=list(levels), ticktext=list(levels.values()))


def _apart(places: dict[str, tuple[int, int]]) -> dict[str, tuple[float, int]]:
    """Nodes that share a position and a level side by side."""
    groups: dict[tuple[int, int], list[str]] = {}
    for node, place in places.items():
        groups.setdefault(place, []).append(node)
    return {
        node: (x + 0.8 * ((i + 0.5) / len(own) - 0.5), y)
        for (x, y), own in groups.items()
        for i, node in enumerate(own)
    }
