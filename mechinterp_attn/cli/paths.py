"""``paths``: where a prediction comes from, by orders, terms, paths, scores or as a graph."""

from __future__ import annotations

import json
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mechinterp_attn.cli.common import AsJson, CsvFile, Model, emit

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp_attn.paths import (
        AttributionGraph,
        Frozen,
        Orders,
        ScoreExpansion,
        TermImportance,
        TopPaths,
    )

    Explained = Orders | TermImportance | TopPaths | ScoreExpansion


class Analysis(StrEnum):
    orders = "orders"
    importance = "importance"
    top = "top"
    score = "score"
    graph = "graph"


def register(app: typer.Typer) -> None:
    app.command()(paths)


def paths(
    model: Model,
    analysis: Annotated[
        Analysis,
        typer.Argument(
            help="orders: logits and loss by path order; importance: what each order, layer and head is "
            "worth; top: the strongest paths to a logit; score: why a head attends there, or a neuron "
            "fires; graph: the attribution graph of a logit."
        ),
    ],
    prompt: Annotated[str, typer.Option(help="The text.")],
    target: Annotated[str | None, typer.Option(help="Next token; by default the top one.")] = None,
    against: Annotated[str | None, typer.Option(help="Explain the logit over this token's.")] = None,
    position: Annotated[int, typer.Option(help="Of the prediction; negative from the end.")] = -1,
    top: Annotated[int, typer.Option("--top", "-k", help="How many rows.", min=1)] = 20,
    head: Annotated[str | None, typer.Option(help="score: the head, such as L1H0 or L1N7.")] = None,
    query: Annotated[int, typer.Option(help="score: the query position.")] = -1,
    key: Annotated[int | None, typer.Option(help="score: the key position.")] = None,
    as_json: AsJson = False,
    csv: CsvFile = None,
    html: Annotated[Path | None, typer.Option(help="Also write the picture to this file.")] = None,
) -> None:
    """Explain a prediction by paths through heads and neurons, patterns frozen."""
    import mechinterp_attn as mia
    from mechinterp_attn.errors import MechInterpError

    loaded = mia.load(model)
    frozen = mia.paths.freeze(loaded, prompt)
    result: Explained
    match analysis:
        case Analysis.orders:
            result = mia.paths.orders(frozen)
            frame = result.frame
        case Analysis.importance:
            result = mia.paths.term_importance(loaded, frozen.tokens)
            frame = result.frame
        case Analysis.top:
            result = mia.paths.top_paths(frozen, target=target, against=against, position=position, k=top)
            frame = result.frame
        case Analysis.score:
            if head is None:
                raise MechInterpError("paths ... score needs --head, such as --head L1H0")
            result = mia.paths.expand_score(
                frozen, head, query, key, against=None if key is None else "others"
            )
            frame = result.top(top)
        case Analysis.graph:
            graph = mia.paths.attribution_graph(
                frozen, target=target, against=against, position=position, scores=True
            )
            return _graph(graph, top, as_json, csv, html)
    typer.echo(f"{_about(frozen, result)}\n{result.receipt}", err=True)
    emit(frame, as_json=as_json, csv=csv)
    if html is not None:
        _write_figure(result, html)


def _graph(graph: AttributionGraph, top: int, as_json: bool, csv: Path | None, html: Path | None) -> None:
    """The graph's JSON for viewers with ``--json``; else its largest edges."""
    from mechinterp_attn.paths.export import graph_json

    typer.echo(f"{graph.about} = {graph.total:.4f}\n{graph.receipt}", err=True)
    if as_json:
        typer.echo(json.dumps(graph_json(graph, "graph"), allow_nan=False))
    else:
        edges: pd.DataFrame = graph.edges if csv is not None else graph.edges.head(top)
        emit(edges, csv=csv)
    if html is not None:
        typer.echo(f"wrote {graph.plot().save(html)}", err=True)


def _about(frozen: Frozen, result: Explained) -> str:
    about = getattr(result, "about", None)
    if about is None:
        return f"{result.title}: {len(frozen.tokens)} tokens"
    return f"{about} = {getattr(result, 'total', float('nan')):.4f}"


def _write_figure(result: Explained, html: Path) -> None:
    from mechinterp_attn.sources.saved import write_atomic

    figure = result.plot()
    text = figure.to_html(include_plotlyjs=True, full_html=True)
    write_atomic(html, lambda path: path.write_text(text, encoding="utf-8"))
    typer.echo(f"wrote {html}", err=True)
