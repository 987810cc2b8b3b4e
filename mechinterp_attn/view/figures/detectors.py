"""Figures of detectors: loss along the context, an induction circuit, its birth in training."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from mechinterp_attn.core.pictures import draws
from mechinterp_attn.detect.induction_circuit import Induction
from mechinterp_attn.detect.losses import InContextLearning
from mechinterp_attn.view.figures.style import KIND_COLOURS, figure

LINES = ("attention", "mlp", "embed", "bias")


@draws(InContextLearning)
def loss_by_position(result: InContextLearning) -> go.Figure:
    """Loss against position with its standard error, the two positions of the score marked."""
    frame = result.frame
    fig = figure(title=f"In-context-learning score {result.score:+.3f} nats", x="position", y="loss (nats)")
    fig.add_trace(
        go.Scatter(
            x=frame["position"],
            y=frame["loss"],
            error_y={"array": frame["error"], "thickness": 0.6, "width": 0},
            mode="lines",
            line={"color": KIND_COLOURS["attention"], "width": 2},
            hovertemplate="position %{x}: %{y:.3f} nats<extra></extra>",
        )
    )
    for position, name in ((result.early, "early"), (result.late, "late")):
        fig.add_vline(x=position, line={"dash": "dot", "color": KIND_COLOURS["bias"]}, annotation_text=name)
    return fig.update_layout(showlegend=False)


@draws(Induction)
def induction_views(result: Induction) -> go.Figure:
    """Every head that was cut: its induction attention against what the model loses without it."""
    lost = "loss_change" if result.task is None else "effect"
    unit = "loss on repeats without the head (nats)" if result.task is None else result.task.about
    frame = result.scores.frame.merge(result.ablations.frame[["head", lost]], on="head")
    roles = frame["head"].map(result.frame.set_index("head")["role"]).fillna("")
    fig = figure(
        title="Induction circuit" if result.found else "No induction circuit found",
        x="induction score (attention)",
        y=unit if result.task is None else f"what {unit} loses without the head",
    )
    colours = {"induction": "attention", "previous_token": "embed", "": "bias"}
    for role, colour in colours.items():
        own = frame[roles == role]
        fig.add_trace(
            go.Scatter(
                x=own["induction"],
                y=own[lost],
                text=own["head"],
                mode="markers+text" if role else "markers",
                textposition="middle left",
                name=role.replace("_", " ") or "other",
                marker={"color": KIND_COLOURS[colour], "size": 11 if role else 7},
                hovertemplate="%{text}: attention %{x:.3f}, lost %{y:+.3f}<extra></extra>",
            )
        )
    return fig


def phase_change(scores: pd.DataFrame, columns: dict[str, str]) -> go.Figure:
    """Scores measured during training against tokens seen.

    Args:
        scores: one row per measurement, with ``tokens``.
        columns: which columns to draw, and what to call them; the first reads on the left axis, the
            others, in nats, on the right.
    """
    fig = figure(title="Scores during training", x="training tokens", y=next(iter(columns.values())))
    for i, (column, name) in enumerate(columns.items()):
        fig.add_trace(
            go.Scatter(
                x=scores["tokens"],
                y=scores[column],
                name=name,
                mode="lines+markers",
                yaxis="y" if i == 0 else "y2",
                line={"color": KIND_COLOURS[LINES[i % len(LINES)]], "width": 2},
                hovertemplate="%{x:,} tokens: %{y:.3f}<extra></extra>",
            )
        )
    return fig.update_layout(
        yaxis={"range": [0, 1]},
        yaxis2={"title": "nats", "overlaying": "y", "side": "right", "showgrid": False},
        legend={"orientation": "h", "y": 1.12, "x": 0},
    )
