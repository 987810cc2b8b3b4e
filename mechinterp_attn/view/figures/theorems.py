"""Figures of the executable theorems: errors of the construction, masks in weights, costs, training."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from mechinterp_attn.conversion.fidelity import Fidelity
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.theorems.cost_model import Costs
from mechinterp_attn.theorems.steps import Steps
from mechinterp_attn.theorems.whole import MaskSweep
from mechinterp_attn.view.figures.style import KIND_COLOURS, figure

# Colour-blind safe (Okabe and Ito), in the order in which curves are drawn.
CURVES = ("#3b6fb6", "#c2571a", "#4d7c3a", "#8a5a9e", "#7a7a7a", "#b8860b")


@draws(Steps, Fidelity)
def step_errors(steps: Steps | Fidelity) -> go.Figure:
    """The relative error of the residual stream after every sublayer, on a logarithmic axis."""
    frame = steps.frame
    fig = figure(title=steps.title, x="after", y="error / scale of the stream")
    fig.add_trace(
        go.Scatter(
            x=frame["sublayer"],
            y=frame["relative"].clip(lower=1e-18),
            mode="lines+markers",
            line={"color": KIND_COLOURS["attention"]},
            hovertemplate="%{x}: %{y:.1e}<extra></extra>",
        )
    )
    return fig.update_yaxes(type="log", exponentformat="power")


@draws(MaskSweep)
def mask_sweep_lines(sweep: MaskSweep) -> go.Figure:
    """Error (line) and bound (dotted) of every sublayer and the logits against Omega."""
    fig = figure(title=sweep.title, x="Omega", y="largest error")
    for i, (name, own) in enumerate(sweep.frame.groupby("sublayer", sort=False)):
        colour = CURVES[i % len(CURVES)]
        curves = [("error", {"color": colour, "width": 2}, str(name))]
        if own["bound"].notna().any():
            curves.append(("bound", {"color": colour, "width": 1, "dash": "dot"}, f"{name}, bound"))
        for column, line, label in curves:
            y = own[column].where(own[column] > 0)  # exact zeros have no place on this axis
            fig.add_trace(go.Scatter(x=own["omega"], y=y, mode="lines", line=line, name=label))
    return fig.update_yaxes(type="log", exponentformat="power")


@draws(Costs)
def cost_bars(costs: Costs) -> go.Figure:
    """FLOPs per token of every form, by part."""
    fig = figure(
        title=f"{costs.frame['model'].iloc[0]}, {costs.n_tokens:,} tokens", x="form", y="FLOPs per token"
    )
    parts = {"attention": "attention", "mlp": "mlp", "other": "bias"}
    for part, colour in parts.items():
        fig.add_trace(
            go.Bar(
                x=costs.frame["form"],
                y=costs.frame[f"{part}_flops"],
                name={"mlp": "MLP", "other": "unembedding"}.get(part, part),
                marker={"color": KIND_COLOURS[colour]},
                hovertemplate="%{x}: %{y:.3s}<extra></extra>",
            )
        )
    return fig.update_layout(barmode="stack")


def neuron_head_curves(activation: str = "gelu") -> go.Figure:
    """What one softmax head makes of an activation, and what the activation is."""
    import torch

    from mechinterp_attn.theorems.activations import FUNCTIONS, softmax_activation

    z = torch.linspace(-6, 6, 241, dtype=torch.float64)
    head = softmax_activation(activation)
    fig = figure(title=f"{activation} and {head.name}", x="z", y="activation")
    for i, (name, y) in enumerate(((activation, FUNCTIONS[activation](z)), ("one softmax head", head(z)))):
        dash = "solid" if i == 0 else "dot"
        fig.add_trace(go.Scatter(x=z, y=y, name=name, line={"color": CURVES[i], "dash": dash}))
    return fig


def curves_with_spread(
    frame: pd.DataFrame, *, x: str, y: str, by: str, title: str, x_name: str, y_name: str
) -> go.Figure:
    """The mean of ``y`` over seeds against ``x``, one curve per ``by``, between its extremes."""
    fig = figure(title=title, x=x_name, y=y_name, height=480)
    for i, (name, own) in enumerate(frame.groupby(by, sort=False)):
        spread = own.groupby(x)[y].agg(["mean", "min", "max"]).reset_index()
        colour = CURVES[i % len(CURVES)]
        band = pd.concat([spread["max"], spread["min"][::-1]])
        fig.add_trace(
            go.Scatter(
                x=pd.concat([spread[x], spread[x][::-1]]),
                y=band,
                fill="toself",
                fillcolor=colour,
                opacity=0.15,
                line={"width": 0},
                hoverinfo="skip",
                showlegend=False,
            )
        )
        fig.add_trace(
            go.Scatter(x=spread[x], y=spread["mean"], name=str(name), line={"color": colour, "width": 2})
        )
    return fig


def lines(
    frame: pd.DataFrame,
    *,
    x: str,
    y: str,
    by: str,
    title: str,
    x_name: str,
    y_name: str,
    log: bool = False,
) -> go.Figure:
    """``y`` against ``x``, one line per ``by``."""
    fig = figure(title=title, x=x_name, y=y_name)
    for i, (name, own) in enumerate(frame.groupby(by, sort=False)):
        colour = CURVES[i % len(CURVES)]
        fig.add_trace(
            go.Scatter(x=own[x], y=own[y], name=str(name), mode="lines+markers", line={"color": colour})
        )
    if log:
        fig.update_yaxes(type="log", exponentformat="power")
    return fig
