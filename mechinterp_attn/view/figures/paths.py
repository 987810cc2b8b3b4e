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
from mechinterp_attn.view.figures.style import (
    KIND_COLOURS,
    NEGATIVE,
    POSITIVE,
    SEQUENTIAL,
    figure,
    safe_text,
    signed_scale,
)

ORDER_COLOURS = {"0 heads": "#4d7c3a", "1 head": "#8fb3de", "2 heads": "#3b6fb6", "3 heads": "#1d3f75"}


@draws(Orders)
def loss_by_order(orders: Orders) -> go.Figure:
    """Loss (or a task's metric) with the paths up to each order as a line, each step with its change."""
    frame = orders.frame
    metric = orders.receipt.notes.get("metric")
    of, unit = ("loss", " nats") if metric is None else (safe_text(str(metric)), "")
    steps = ["" if change != change else f"{change:+.3f}" for change in frame["change"]]
    fig = figure(
        title=f"{of.capitalize()} by path order", x="paths through at most this many heads",
        y="loss (nats)" if metric is None else of,
    )  # fmt: skip
    fig.add_trace(
        go.Scatter(
            x=frame["order"],
            y=frame["loss" if metric is None else "metric"],
            text=steps,
            mode="lines+markers+text",
            textposition="top right",
            line={"color": KIND_COLOURS["attention"], "width": 2},
            marker={"size": 9},
            hovertemplate=f"order %{{x}}<br>{of} %{{y:.4f}}{unit}<br>change %{{text}}<extra></extra>",
        )
    )
    return fig.update_xaxes(type="category").update_layout(showlegend=False)


@draws(LogitAttribution)
def attribution_bars(attribution: LogitAttribution, k: int = 20) -> go.Figure:
    """The ``k`` largest terms of a logit as signed bars, and all others as one bar.

    The bars add up to the logit, so nothing is out of sight.
    """
    top = attribution.top(k)
    return _bars(
        title=f"{safe_text(attribution.about)} = {attribution.total:.3f}",
        names=list(top["head"]),
        values=list(top["value"]),
        kinds=list(top["kind"]),
        total=attribution.total,
        n_others=len(attribution.frame) - len(top),
    )


@draws(TopPaths)
def path_bars(paths: TopPaths, k: int = 20) -> go.Figure:
    """The ``k`` largest paths to a logit as signed bars, and all others as one bar."""
    top = paths.frame.head(k)
    return _bars(
        title=f"{safe_text(paths.about)} = {paths.total:.3f}",
        names=[safe_text(path) for path in top["path"]],
        values=list(top["contribution"]),
        kinds=[f"{order} heads" if order != 1 else "1 head" for order in top["order"]],
        total=paths.total,
        n_others=None,
    )


def _bars(
    *,
    title: str,
    names: list[str],
    values: list[float],
    kinds: list[str],
    total: float,
    n_others: int | None,
) -> go.Figure:
    """Signed bars by kind, largest on top, with all that is left in one bar."""
    if n_others is None or n_others:
        names = [*names, "all others" if n_others is None else f"{n_others:,} others"]
        kinds = [*kinds, "others"]
        values = [*values, total - sum(values)]
    fig = figure(title=title, x="contribution (logits)", y="", height=140 + 22 * len(names))
    colours = KIND_COLOURS | ORDER_COLOURS
    for kind in dict.fromkeys(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]
        fig.add_trace(
            go.Bar(
                x=[values[i] for i in own],
                y=[names[i] for i in own],
                orientation="h",
                name=kind,
                marker_color=colours.get(kind, KIND_COLOURS["bias"]),
                hovertemplate="%{y}: %{x:.4f}<extra></extra>",
            )
        )
    return fig.update_yaxes(categoryorder="array", categoryarray=names[::-1])


@draws(TermImportance)
def importance_bars(importance: TermImportance) -> go.Figure:
    """What each order changes the loss by: attention-only paths, and those with MLP-derived heads."""
    frame = importance.frame
    metric = importance.receipt.notes.get("metric")
    of = "the loss (nats; below 0 is a gain)" if metric is None else safe_text(str(metric))
    fig = figure(title="Term importance", x="heads on the path", y=f"change of {of}")
    start = frame.iloc[:1]
    rest = frame.iloc[1:]
    for name, x, y, colour in (
        ("direct path, against uniform", start["order"], start["change"], KIND_COLOURS["embed"]),
        ("attention heads only", rest["order"], rest["attention_only"], KIND_COLOURS["attention"]),
        ("with MLP-derived heads", rest["order"], rest["with_mlp"], KIND_COLOURS["mlp"]),
    ):
        hover = f"order %{{x}}: %{{y:+.4f}}{' nats' if metric is None else ''}<extra>" + name + "</extra>"
        fig.add_trace(go.Bar(x=x, y=y, name=name, marker_color=colour, hovertemplate=hover))
    return fig.update_layout(barmode="relative").update_xaxes(type="category")


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
    title = f"Pattern of {' then '.join(term.heads)}"
    fig = figure(title=title, x="key", y="query", height=160 + 22 * len(tokens))
    fig.add_trace(
        go.Heatmap(
            z=term.pattern.double().cpu().numpy(),
            x=tokens,
            y=tokens,
            colorscale=SEQUENTIAL,
            zmin=0,
            hovertemplate="%{y} from %{x}: %{z:.4f}<extra></extra>",
        )
    )
    return fig.update_yaxes(autorange="reversed")


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
