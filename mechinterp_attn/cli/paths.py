"""``paths``: where a prediction comes from, by orders, terms, paths, scores or as a graph."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mechinterp_attn.cli.common import (
    Against,
    AsJson,
    CsvFile,
    FigureFile,
    Heads,
    Ids,
    Model,
    Position,
    Prompt,
    Quiet,
    Target,
    Top,
    Wide,
    deliver,
    emit_json,
    load,
    one_head,
    prompt_of,
    remark,
    token_of,
    write_figure,
)

if TYPE_CHECKING:
    from mechinterp_attn.core.results import Result
    from mechinterp_attn.paths import Frozen


class Analysis(StrEnum):
    orders = "orders"
    importance = "importance"
    attribution = "attribution"
    top = "top"
    score = "score"
    virtual = "virtual"
    graph = "graph"


def register(app: typer.Typer) -> None:
    app.command()(paths)


def paths(
    model: Model,
    analysis: Annotated[
        Analysis,
        typer.Argument(
            help="orders: logits and loss by path order; importance: what each order, layer and head is "
            "worth; attribution: heads and neurons behind a logit; top: the strongest paths to it; score: "
            "why a head attends there, or a neuron fires; virtual: heads in a row as one; graph: the "
            "attribution graph of a logit.",
            metavar="ANALYSIS",
            show_default=False,
        ),
    ],
    heads: Heads = None,
    prompt: Prompt = None,
    tokens: Ids = None,
    target: Target = None,
    against: Against = None,
    position: Position = -1,
    query: Annotated[int, typer.Option(help="score: the query position.")] = -1,
    key: Annotated[int | None, typer.Option(help="score: the key position.")] = None,
    top: Top = 20,
    as_json: AsJson = False,
    csv: CsvFile = None,
    figure: FigureFile = None,
    wide: Wide = False,
    quiet: Quiet = False,
) -> None:
    """Explain a prediction by paths through heads and neurons, patterns frozen."""
    import torch

    import mechinterp_attn as mia
    from mechinterp_attn.paths.export import graph_json

    text = prompt_of(prompt, tokens)
    frozen = mia.paths.freeze(load(model), text if isinstance(text, str) else torch.tensor(text))
    goal: dict[str, Any] = {
        "target": token_of(frozen.model, target),
        "against": token_of(frozen.model, against),
        "position": position,
    }
    k = top or 20
    result: Result
    match analysis:
        case Analysis.orders:
            result = mia.paths.orders(frozen)
            rows = result.frame
        case Analysis.importance:
            result = mia.paths.term_importance(frozen.model, frozen.tokens)
            rows = result.frame
        case Analysis.attribution:
            result = mia.paths.logit_attribution(frozen, **goal)
            rows = result.top(k)
        case Analysis.top:
            result = mia.paths.top_paths(frozen, **goal, top_k=k)
            rows = result.frame
        case Analysis.score:
            head = one_head(heads, "paths ... score")
            against_others = None if key is None else "others"
            result = mia.paths.expand_score(frozen, head, query, key, against=cast(Any, against_others))
            rows = result.top(k)
        case Analysis.virtual:
            result = mia.paths.virtual_head(frozen, *(heads or ()), **goal)
            rows = result.top(k)
        case Analysis.graph:
            result = mia.paths.attribution_graph(frozen, **goal, scores=True)
            rows = result.edges.head(k)
    about = _about(frozen, result)
    if isinstance(result, mia.paths.AttributionGraph) and as_json:  # whole, as viewers read it
        emit_json(graph_json(result, "graph"))
        remark(about)
        if figure is not None:
            write_figure(result, figure)
        return
    deliver(result, rows, about=about, as_json=as_json, csv=csv, figure=figure)


def _about(frozen: Frozen, result: Result) -> str:
    about, total = getattr(result, "about", None), getattr(result, "total", None)
    if about is None:
        return f"{result.title}: {len(frozen.tokens)} tokens"
    return about if total is None else f"{about} = {total:.4f}"
