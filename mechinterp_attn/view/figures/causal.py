"""Figures of causes: the curve of a circuit's faithfulness, and a circuit itself."""

from __future__ import annotations

import plotly.graph_objects as go

from mechinterp_attn.causal.circuit import Circuit
from mechinterp_attn.causal.differences import Diff
from mechinterp_attn.causal.evaluation import Faithfulness
from mechinterp_attn.causal.wires import EMBED, LOGITS, edge_name
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.view.figures.style import KIND_COLOURS, figure, safe_text

MODES = {"Q": "#8a4fa3", "K": "#b8860b", "V": "#2a7f78", "": KIND_COLOURS["bias"]}
SHOWN = 120  # edges that are drawn: more are no picture
LINES = {"reverse": ("bias", "dot", "reverse ranking"), "random": ("mlp", "dash", "random")}


@draws(Faithfulness)
def faithfulness_curve(result: Faithfulness) -> go.Figure:
    """Faithfulness against the share of heads or edges in the circuit, on a logarithmic axis, with its
    bootstrap interval, beside random and reverse rankings; 1 is the whole model.
    """
    frame = result.frame
    percent = 100 * frame["share"]
    distance = "" if result.cmd != result.cmd else f" (CMD {result.cmd:.3f})"
    share = f"share of {result.total:,} {result.units}"
    fig = figure(title=f"Faithfulness{distance}", x=share, y="faithfulness")
    colour = KIND_COLOURS["attention"]
    fig.add_trace(
        go.Scatter(
            x=[*percent, *percent[::-1]],
            y=[*frame["high"], *frame["low"][::-1]],
            fill="toself",
            fillcolor="rgba(59,111,182,.18)",
            line={"width": 0},
            hoverinfo="skip",
            name="95 % over prompts",
        )
    )
    fig.add_trace(
        go.Scatter(
            x=percent,
            y=frame["faithfulness"],
            customdata=frame["size"],
            mode="lines+markers",
            name="circuit",
            line={"color": colour, "width": 2},
            hovertemplate=f"%{{customdata:,}} {result.units} (%{{x:.2g}} %): %{{y:.3f}}<extra></extra>",
        )
    )
    for column, (kind, dash, words) in LINES.items():
        if frame[column].notna().any():
            fig.add_trace(
                go.Scatter(
                    x=percent,
                    y=frame[column],
                    mode="lines",
                    name=words,
                    line={"color": KIND_COLOURS[kind], "dash": dash, "width": 1.5},
                    hovertemplate=words + ", %{x:.2g} %: %{y:.3f}<extra></extra>",
                )
            )
    for level in (0, 1):
        fig.add_hline(y=level, line={"color": "#999", "width": 1, "dash": "dot"})
    return fig.update_xaxes(type="log", ticksuffix=" %")


@draws(Diff)
def what_changed(result: Diff) -> go.Figure:
    """Every head by how much of what it writes has changed and what the metric gains by that; heads that
    did not change are left out. Measured heads are named.
    """
    frame = result.frame[result.frame["output"] > 0]
    fig = figure(title=result.title, x="relative change of what the head writes", y="gained, estimate")
    for kind in frame["kind"].unique():
        own = frame[frame["kind"] == kind]
        fig.add_trace(
            go.Scattergl(
                x=own["output"],
                y=own["gained_estimate"],
                mode="markers+text",
                text=[
                    safe_text(h) if g == g else "" for h, g in zip(own["head"], own["gained"], strict=True)
                ],
                textposition="top center",
                customdata=own[["head", "z"]].map(str),
                name=str(kind),
                marker={"color": KIND_COLOURS[kind], "size": 6},
                hovertemplate="%{customdata[0]}: changed by %{x:.3g}, gains %{y:.3g}<extra></extra>",
            )
        )
    fig.add_hline(y=0, line={"color": "#999", "width": 1, "dash": "dot"})
    return fig.update_xaxes(type="log", exponentformat="power")


@draws(Circuit)
def circuit_drawing(circuit: Circuit) -> go.Figure:
    """Heads in rows by layer, the embedding below and the logits above, edges in the colours of their
    modes; the strongest edges first, at most 120 of them.
    """
    place = _places(circuit)
    height = 220 + 70 * len({y for _, y in place.values()})
    fig = figure(title=safe_text(repr(circuit).partition(":")[0]), x="", y="layer", height=height)
    edges, scores = circuit.edges[:SHOWN], circuit.scores[:SHOWN] if circuit.edges else ()
    largest = max(map(abs, scores), default=1.0) or 1.0
    drawn: set[str] = set()
    for i, (src, dst, mode) in enumerate(edges):
        (x, y), (u, v) = place[src], place[dst]
        score = scores[i] if i < len(scores) else None
        words = edge_name(src, dst, mode) + ("" if score is None else f": {score:.3g}")
        fig.add_trace(
            go.Scatter(
                x=[x, (x + u) / 2 + 0.06 * (v - y), u],
                y=[y, (y + v) / 2, v],
                mode="lines",
                name={"": "to the logits"}.get(mode, mode),
                legendgroup=mode,
                showlegend=mode not in drawn,
                opacity=1.0 if score is None else 0.25 + 0.75 * abs(score) / largest,
                line={"color": MODES[mode], "width": 2, "shape": "spline"},
                text=[words] * 3,
                hovertemplate="%{text}<extra></extra>",
            )
        )
        drawn.add(mode)
    for kind in ("attention", "mlp", "embed", "bias"):
        own = [label for label in place if _kind(label) == kind]
        if own:
            fig.add_trace(
                go.Scatter(
                    x=[place[label][0] for label in own],
                    y=[place[label][1] for label in own],
                    text=[safe_text(label) for label in own],
                    mode="markers+text",
                    textposition="top center",
                    showlegend=False,
                    marker={"size": 13, "color": KIND_COLOURS[kind]},
                    hovertemplate="%{text}<extra></extra>",
                )
            )
    rows = sorted({y for _, y in place.values()})
    names = dict.fromkeys(rows, "") | {y: f"{_layer(label)}" for label, (_, y) in place.items()}
    fig.update_xaxes(visible=False)
    return fig.update_yaxes(
        tickvals=rows, ticktext=[names[y] for y in rows], showgrid=False, zeroline=False
    )


def _places(circuit: Circuit) -> dict[str, tuple[float, float]]:
    """Every node by its row (the embedding, attention and neurons of each layer, the logits)."""
    ends = {end for edge in circuit.edges for end in edge[:2]} & {EMBED, LOGITS}
    rows: dict[tuple[float, int], list[str]] = {}
    for label in (*circuit.heads, *sorted(ends)):
        rows.setdefault(_row(label), []).append(label)
    found = {}
    for y, row in enumerate(sorted(rows)):
        labels = rows[row]
        for i, label in enumerate(labels):
            found[label] = ((i + 0.5) / len(labels) - 0.5, float(y))
    return found


def _row(label: str) -> tuple[float, int]:
    if label in (EMBED, LOGITS):
        return (-1.0 if label == EMBED else float("inf"), 0)
    return (float(_layer(label)), int(_kind(label) == "mlp"))


def _layer(label: str) -> str:
    return label[1:].partition("H")[0].partition("N")[0] if label not in (EMBED, LOGITS) else ""


def _kind(label: str) -> str:
    if label in (EMBED, LOGITS):
        return "embed" if label == EMBED else "bias"
    return "mlp" if "N" in label else "attention"
