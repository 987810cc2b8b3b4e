"""Figures of circuits: composition, copying, blocks of tokens, positions."""

from __future__ import annotations

import numpy as np
import plotly.graph_objects as go

from mechinterp_attn.circuits.circuit import TokenBlock
from mechinterp_attn.circuits.composition_scores import CompositionScores
from mechinterp_attn.circuits.copying import CopyingScores
from mechinterp_attn.circuits.positions import PositionCircuit
from mechinterp_attn.circuits.spectrum import SingularDirections
from mechinterp_attn.circuits.vocabulary import TokenPairs
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.view.charts import composition_matrix
from mechinterp_attn.view.figures.chart import plotly_matrix
from mechinterp_attn.view.figures.style import (
    KIND_COLOURS,
    NEGATIVE,
    POSITIVE,
    SEQUENTIAL,
    figure,
    safe_text,
    signed_scale,
)

MAX_CELLS = 1_000_000


@draws(CompositionScores)
def composition_figure(result: CompositionScores, *, ranking: bool, k: int) -> go.Figure:
    """The heatmap, or, where asked for or where a streamed search kept no scores, the ranking."""
    return (
        composition_ranking(result, k) if ranking or result.scores is None else composition_heatmap(result)
    )


def composition_heatmap(result: CompositionScores) -> go.Figure:
    """Scores minus the random baseline, earlier by later head; pairs that do not compose stay empty."""
    assert result.scores is not None
    if result.scores.numel() > MAX_CELLS:
        raise MechInterpError(
            f"{result.scores.numel():,} pairs are too many for a heatmap ({MAX_CELLS:,}); choose heads "
            "with src= and dst=, or plot(ranking=True)"
        )
    return plotly_matrix(composition_matrix(result))


def composition_ranking(result: CompositionScores, k: int) -> go.Figure:
    """The strongest pairs as bars, the random baseline and two spreads marked on each."""
    top = result.frame.head(k) if result.scores is None else result.top(k)
    names = (top["src"] + " → " + top["dst"]).tolist()
    fig = figure(
        title=f"Strongest {result.kind}-composition",
        x="composition score",
        y="",
        height=max(300, 22 * len(top) + 120),
    )
    fig.add_bar(
        x=top["score"],
        y=names,
        orientation="h",
        marker_color=KIND_COLOURS["attention"],
        name="score",
        customdata=top[["z"]],
        hovertemplate="%{y}<br>score %{x:.4f}, z %{customdata[0]:.1f}<extra></extra>",
    )
    fig.add_scatter(
        x=top["baseline"],
        y=names,
        mode="markers",
        marker={"symbol": "line-ns", "size": 14, "line": {"width": 2, "color": "#222"}},
        error_x={"type": "data", "array": 2 * top["spread"].fillna(0), "thickness": 1},
        name="random heads, ± 2 spreads",
    )
    return fig.update_yaxes(autorange="reversed")


@draws(CopyingScores)
def copying_figure(result: CopyingScores, head: str | None) -> go.Figure:
    """The eigenvalues of one head, or the scores of all."""
    return copying_bars(result) if head is None else eigenvalue_plane(result, head)


def eigenvalue_plane(result: CopyingScores, head: str) -> go.Figure:
    """The eigenvalues of one head's OV circuit over the vocabulary."""
    if head not in result.eigenvalues:
        raise MechInterpError(
            f"no eigenvalues of {head} in this result: it was not scored, or has one (column 'eigenvalue')"
        )
    values = result.eigenvalues[head].numpy()
    score = float(values.real.sum() / np.abs(values).sum())
    fig = figure(
        title=f"Eigenvalues of the OV circuit of {head}: copying score {score:+.2f}",
        x="real part",
        y="imaginary part",
    )
    fig.add_scatter(
        x=values.real,
        y=values.imag,
        mode="markers",
        marker={
            "color": np.sign(values.real),
            "colorscale": [[0, NEGATIVE], [1, POSITIVE]],
            "cmin": -1,
            "cmax": 1,
            "size": 8,
        },
        hovertemplate="%{x:.3g} + %{y:.3g}i<extra></extra>",
    )
    fig.add_vline(x=0, line_color="#999", line_width=1)
    return fig.update_yaxes(scaleanchor="x")


def copying_bars(result: CopyingScores) -> go.Figure:
    """The scores of all heads that have more than one eigenvalue, or the eigenvalues of the others."""
    frame = result.frame
    many = frame[frame["head"].isin(list(result.eigenvalues))]
    shown, column = (many, "copying_score") if len(many) else (frame, "eigenvalue")
    fig = figure(title="Copying scores of the OV circuits", x="head", y=column.replace("_", " "))
    for kind, part in shown.groupby("kind", sort=False):
        fig.add_bar(
            x=part["head"],
            y=part[column],
            name=str(kind),
            marker_color=KIND_COLOURS.get(str(kind), KIND_COLOURS["bias"]),
            customdata=part[["z"]],
            hovertemplate="%{x}<br>%{y:.3f}, z %{customdata[0]:.1f}<extra></extra>",
        )
    return fig


@draws(TokenBlock)
def block_heatmap(result: TokenBlock) -> go.Figure:
    """Chosen rows and columns of a circuit."""
    values = result.values.cpu().numpy()
    rows = {"OV": "attended token", "QK": "query token"}[result.circuit]
    columns = {"OV": "output token", "QK": "key token"}[result.circuit]
    fig = figure(
        title=f"{result.circuit} circuit of {result.head}",
        x=columns,
        y=rows,
        height=max(320, 24 * len(values) + 140),
    )
    places = [list(range(n)) for n in values.shape]  # two tokens may look alike: numbers place them
    fig.add_heatmap(
        z=values,
        x=places[1],
        y=places[0],
        **signed_scale(values),
        hovertemplate="%{z:.4g}<extra></extra>",
    )
    fig.update_xaxes(tickvals=places[1], ticktext=[_quoted(t) for t in result.frame.columns])
    fig.update_yaxes(tickvals=places[0], ticktext=[_quoted(t) for t in result.frame.index])
    return fig.update_yaxes(autorange="reversed")


@draws(TokenPairs)
def pair_bars(result: TokenPairs, k: int) -> go.Figure:
    """The first entries of a ranking as signed bars."""
    top = result.frame.head(k)
    names = [f"{_quoted(s)} → {_quoted(t)}" for s, t in zip(top["source"], top["token"], strict=True)]
    fig = figure(
        title=f"{result.circuit} circuit of {result.head}",
        x="entry",
        y="",
        height=max(300, 22 * len(top) + 120),
    )
    colours = [POSITIVE if v >= 0 else NEGATIVE for v in top["value"]]
    fig.add_bar(x=top["value"], y=list(range(len(top))), orientation="h", marker_color=colours)
    fig.update_yaxes(tickvals=list(range(len(top))), ticktext=names, autorange="reversed")
    return fig


@draws(PositionCircuit)
def position_heatmap(result: PositionCircuit) -> go.Figure:
    """The attention that positions alone give."""
    fig = figure(
        title=f"Attention of {result.head} by position alone", x="key position", y="query position"
    )
    pattern = result.pattern.cpu().numpy()
    fig.add_heatmap(
        z=pattern,
        colorscale=SEQUENTIAL,
        zmin=0,
        zmax=1,
        hovertemplate="query %{y}, key %{x}: %{z:.3f}<extra></extra>",
    )
    return fig.update_yaxes(autorange="reversed", scaleanchor="x")


@draws(SingularDirections)
def spectrum_line(result: SingularDirections) -> go.Figure:
    """The singular values of a head's OV circuit, largest first."""
    values = result.singular_values.double().cpu().numpy()
    title = f"Singular values of the OV circuit of {result.head}"
    fig = figure(title=title, x="component", y="singular value")
    fig.add_scatter(
        y=values,
        mode="lines+markers",
        line={"color": KIND_COLOURS["attention"]},
        hovertemplate="component %{x}: %{y:.4g}<extra></extra>",
    )
    return fig.update_yaxes(rangemode="tozero")


def _quoted(token: str) -> str:
    """A token on an axis: its spaces visible, nothing in it markup."""
    return f"'{safe_text(token)}'"
