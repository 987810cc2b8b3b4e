"""Figures of what heads do."""

from __future__ import annotations

import plotly.graph_objects as go

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.detect.corpus import CorpusScores
from mechinterp_attn.detect.scores import HeadScores, Offsets
from mechinterp_attn.view.figures.style import SEQUENTIAL, figure


@draws(HeadScores, CorpusScores)
def score_heatmap(scores: HeadScores | CorpusScores, score: str = "induction") -> go.Figure:
    """One score of all attention heads: layers down, heads across, from 0 to 1.

    MLP-derived heads, thousands of them with almost all scores zero, are left to the table.

    Raises:
        MechInterpError: no such score; the message lists them.
    """
    frame = scores.frame[scores.frame["kind"] == "attention"]
    names = list(frame.select_dtypes("float").columns)
    if score not in names:
        raise MechInterpError(f"no score {score!r}; there are {', '.join(names)}")
    grid = frame.pivot(index="layer", columns="index", values=score)
    labels = frame.pivot(index="layer", columns="index", values="head")
    words = score.replace("_", " ")
    fig = figure(title=f"{words.capitalize()} score", x="head", y="layer", height=160 + 30 * len(grid))
    fig.add_trace(
        go.Heatmap(
            z=grid.to_numpy(),
            x=list(grid.columns),
            y=list(grid.index),
            customdata=labels.to_numpy(),
            text=grid.round(2).astype(str).to_numpy() if grid.shape[1] <= 16 else None,
            texttemplate="%{text}" if grid.shape[1] <= 16 else None,
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            xgap=2,
            ygap=2,
            colorbar={"title": words},
            hovertemplate="%{customdata}: %{z:.3f}<extra></extra>",
        )
    )
    fig.update_xaxes(dtick=1, showgrid=False)
    return fig.update_yaxes(autorange="reversed", dtick=1, showgrid=False)


@draws(Offsets)
def offset_heatmap(offsets: Offsets) -> go.Figure:
    """Mean attention of every attention head by how far back it looks."""
    frame = offsets.frame[offsets.frame["kind"] == "attention"]
    names = [name for name in frame.columns if str(name).startswith("offset_")]
    ahead = any(name.startswith("offset_-") for name in names)
    back = "tokens back (negative: ahead)" if ahead else "tokens back"
    fig = figure(title=offsets.title, x=back, y="head", height=160 + 20 * len(frame))
    fig.add_trace(
        go.Heatmap(
            z=frame[names].to_numpy(),
            x=[int(name.removeprefix("offset_")) for name in names],
            y=frame["head"].tolist(),
            colorscale=SEQUENTIAL,
            zmin=0,
            zmax=1,
            colorbar={"title": "attention"},
            hovertemplate="%{y}, %{x} back: %{z:.3f}<extra></extra>",
        )
    )
    return fig.update_yaxes(autorange="reversed")
