"""``paths``: where a prediction comes from, by orders, terms, paths, scores or as a graph."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp_attn.cli.answer import Answer, answering
from mechinterp_attn.cli.common import (
    Against,
    Heads,
    Ids,
    Model,
    Position,
    Prompt,
    Target,
    TaskOption,
    Top,
    emit_json,
    load,
    one_head,
    prompt_of,
    remark,
    task_of,
    token_of,
    write_figure,
)

if TYPE_CHECKING:
    from mechinterp_attn.causal import Task
    from mechinterp_attn.core.plan import Call
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
    app.command()(answering(paths))


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
    task: TaskOption = None,
    query: Annotated[int, typer.Option(help="score: the query position.")] = -1,
    key: Annotated[int | None, typer.Option(help="score: the key position.")] = None,
    top: Top = 20,
    *,
    answer: Answer,
) -> None:
    """Explain a prediction by paths through heads and neurons, patterns frozen."""
    import mechinterp_attn as mia
    from mechinterp_attn.paths.export import graph_json

    loaded = load(model)
    behaviour = None if task is None else task_of(loaded, task)
    freezing: Call = mia.paths.freeze, (loaded, _prompt(behaviour, prompt, tokens)), {}
    frozen = answer.now(freezing)
    goal: dict[str, Any] = {
        "target": token_of(frozen.model, target),
        "against": token_of(frozen.model, against),
        "position": position,
        "task": behaviour,
    }
    k = top or 20
    call = _call(frozen, analysis, heads, goal, query, key, k)
    result = answer.run(*([freezing] if answer.plan else []), call)
    whole = analysis in (Analysis.orders, Analysis.importance, Analysis.top)  # those have their own length
    rows = result.frame if whole else result.top(k)
    about = _about(frozen, result)
    if isinstance(result, mia.paths.AttributionGraph) and answer.as_json:  # whole, as viewers read it
        emit_json(graph_json(result, "graph"))
        remark(about)
        if answer.figure is not None:
            write_figure(result, answer.figure)
        return
    answer.give(result, rows, about=about)


def _prompt(task: Task | None, prompt: str | None, tokens: str | None) -> Any:
    """The prompt that is explained; of a behaviour, its first one where none is named."""
    if task is None or prompt is not None or tokens is not None:
        return prompt_of(prompt, tokens)
    remark(f"the first of {len(task)} prompts of {task!r}; --prompt names another one")
    return task.clean[0]


def _call(
    frozen: Frozen,
    analysis: Analysis,
    heads: list[str] | None,
    goal: dict[str, Any],
    query: int,
    key: int | None,
    top_k: int,
) -> Call:
    from mechinterp_attn import paths as own
    from mechinterp_attn.core.errors import MechInterpError

    match analysis:
        case Analysis.orders:
            return own.orders, (frozen,), {"task": goal["task"]}
        case Analysis.importance if goal["task"] is not None:
            return own.term_importance, (frozen.model,), {"task": goal["task"]}
        case Analysis.importance:
            return own.term_importance, (frozen.model, frozen.tokens), {}
        case Analysis.attribution:
            return own.logit_attribution, (frozen,), goal
        case Analysis.top:
            return own.top_paths, (frozen,), goal | {"top_k": top_k}
        case Analysis.score:
            if goal["task"] is not None:
                raise MechInterpError("a score is what a head looks by, and no behaviour; leave out --task")
            against = {"against": None if key is None else "others"}
            return own.expand_score, (frozen, one_head(heads, "paths ... score"), query, key), against
        case Analysis.virtual:
            return own.virtual_head, (frozen, *(heads or ())), goal
        case Analysis.graph:
            return own.attribution_graph, (frozen,), goal | {"scores": True}


def _about(frozen: Frozen, result: Result) -> str:
    about, total = getattr(result, "about", None), getattr(result, "total", None)
    if about is None:
        return f"{result.title}: {len(frozen.tokens)} tokens"
    return about if total is None else f"{about} = {total:.4f}"
