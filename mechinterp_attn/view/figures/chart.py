"""A ``Chart`` and a ``Matrix`` as plotly figures."""

from __future__ import annotations

from math import isfinite

import plotly.graph_objects as go

from mechinterp_attn.view.charts import Chart, Matrix
from mechinterp_attn.view.figures.style import KIND_COLOURS, figure, safe_text, signed_scale

ORDER_COLOURS = {"0 heads": "#4d7c3a", "1 head": "#8fb3de", "2 heads": "#3b6fb6", "3 heads": "#1d3f75"}
COLOURS = KIND_COLOURS | ORDER_COLOURS


def plotly_chart(chart: Chart) -> go.Figure:
    """The picture, with its reference as a dashed level."""
    return _line(chart) if chart.shape == "line" else _bars(chart)


def plotly_matrix(matrix: Matrix) -> go.Figure:
    """A heatmap around zero."""
    fig = figure(
        title=safe_text(matrix.caption),
        x=safe_text(matrix.axes[1]),
        y=safe_text(matrix.axes[0]),
        height=max(420, 14 * len(matrix.rows) + 120),
    )
    fig.add_heatmap(
        z=matrix.values,
        x=list(map(safe_text, matrix.columns)),
        y=list(map(safe_text, matrix.rows)),
        **signed_scale(matrix.values),
        colorbar_title=safe_text(matrix.value),
        hovertemplate=f"%{{y}} → %{{x}}<br>{safe_text(matrix.value)} %{{z:.4f}}<extra></extra>",
    )
    return fig.update_yaxes(autorange="reversed")


def _line(chart: Chart) -> go.Figure:
    fig = figure(title=safe_text(chart.caption), x=chart.over, y=safe_text(chart.value))
    for series in chart.series:
        before = (float("nan"), *series.values)
        steps = [
            f"{v - b:+.3f}" if isfinite(v - b) else "" for b, v in zip(before, series.values, strict=False)
        ]
        fig.add_scatter(
            x=chart.labels,
            y=series.values,
            text=steps,
            name=safe_text(series.name),
            mode="lines+markers+text",
            textposition="top right",
            line={"color": COLOURS[series.kind], "width": 2},
            marker={"size": 9},
            hovertemplate="order %{x}: %{y:.4f}<br>change %{text}<extra></extra>",
        )
    if chart.reference is not None:
        name, level = chart.reference
        fig.add_hline(
            y=level, line_dash="dash", line_color=COLOURS["bias"], annotation_text=f"{name} {level:.4g}"
        )
    return fig.update_xaxes(type="category").update_layout(showlegend=len(chart.series) > 1)


def _bars(chart: Chart) -> go.Figure:
    names = [safe_text(label) for label in chart.labels]
    fig = figure(
        title=safe_text(chart.caption), x=safe_text(chart.value), y=chart.over, height=140 + 22 * len(names)
    )
    for series in chart.series:
        known = [(value, name) for value, name in zip(series.values, names, strict=True) if isfinite(value)]
        fig.add_bar(
            x=[value for value, _ in known],
            y=[name for _, name in known],
            orientation="h",
            name=series.name,
            marker_color=COLOURS.get(series.kind, COLOURS["bias"]),
            hovertemplate="%{y}: %{x:.4f}<extra></extra>",
        )
    return fig.update_layout(barmode="relative").update_yaxes(
        categoryorder="array", categoryarray=names[::-1]
    )
