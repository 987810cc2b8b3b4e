"""``detect``: which head does what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp_attn.cli.answer import Answer, answering
from mechinterp_attn.cli.common import (
    Heads,
    Model,
    Seed,
    TaskOption,
    Top,
    load,
    remark,
    task_of,
)

if TYPE_CHECKING:
    from mechinterp_attn.core.plan import Call
    from mechinterp_attn.core.results import Result
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

CIRCUIT = "circuit"
BY_CUTTING = ("loss_change", "logit_change", "estimate")
BY_WEIGHTS = ("copying", "copying_z", "copying_size", "pure_copying", "induction_z")


def register(app: typer.Typer) -> None:
    app.command()(answering(detect))


def detect(
    model: Model,
    heads: Heads = None,
    top: Top = None,
    by: Annotated[
        str,
        typer.Option(
            help="The score to sort by: of attention (induction, previous_token, ...), of weights "
            "(copying_z, induction_z, ...), of cutting heads out (loss_change, estimate), or 'circuit' "
            "for the induction circuit by all three."
        ),
    ] = "induction",
    corpus: Annotated[
        Path | None,
        typer.Option(help="Score on this .txt or .jsonl file, not on random tokens; cut HEADS there."),
    ] = None,
    field: Annotated[str, typer.Option(help="Where a line of a .jsonl corpus has its text.")] = "text",
    limit: Annotated[int | None, typer.Option(help="Only so many documents.", min=1)] = None,
    resume: Annotated[
        Path | None, typer.Option(help="Keep what was found here; the same command goes on from it.")
    ] = None,
    workers: Annotated[
        int | None, typer.Option(help="Let so many Ray workers read the corpus.", min=1)
    ] = None,
    passages: Annotated[
        str | None, typer.Option(help="The passages where this head writes most.", metavar="HEAD")
    ] = None,
    task: TaskOption = None,
    seed: Seed = 0,
    *,
    answer: Answer,
) -> None:
    """Score heads, attention, MLP-derived and virtual: by attention, weights or cutting, or on a corpus."""
    import mechinterp_attn as mia
    from mechinterp_attn.core.errors import MechInterpError

    given = {"resume": resume, "workers": workers, "passages": passages, "limit": limit}
    only = [name for name, value in given.items() if value is not None]
    if corpus is None and only:
        raise MechInterpError(f"--{only[0]} is about a corpus; give one with --corpus")
    if task is not None and (corpus is not None or by != CIRCUIT):
        raise MechInterpError(
            "--task is what the heads of a circuit are cut for: with --by circuit; what a behaviour loses "
            "without each head is 'causal MODEL effects TASK'"
        )
    opened = load(model)
    behaviour = None if task is None else task_of(opened, task, seed=seed)
    result: Result
    if corpus is not None:
        options: dict[str, Any] = {
            "heads": heads or (),
            "estimate": by == "estimate",
            "field": field,
            "limit": limit,
        }
        options |= {"resume": resume, "workers": workers}
        scores = answer.run((mia.detect.over_corpus, (opened, corpus), options))
        if passages is not None:
            found = scores.passages(passages)
            about = f"Where {passages} writes most"
            answer.give(scores, found.head(top or len(found)), about=about)
            return
        result = scores
    elif by == CIRCUIT:
        circuit = answer.run((mia.detect.induction, (opened,), {"task": behaviour, "seed": seed}))
        remark(str(circuit))
        rows = circuit.frame.head(top or len(circuit.frame))
        answer.give(circuit, rows)
        return
    else:
        result = answer.run(_scores(opened, heads, by, seed))
    names = list(result.frame.select_dtypes("float").columns)
    if by not in names:
        others = [] if corpus is not None else [CIRCUIT, *BY_WEIGHTS, *BY_CUTTING]
        raise MechInterpError(f"no score {by!r} here; there are {', '.join([*names, *others])}")
    rows = result.top(top or len(result.frame), by=by)
    answer.give(result, rows, by=by)


def _scores(model: AttentionOnlyModel, heads: list[str] | None, by: str, seed: int) -> Call:
    """The table that has a score: by attention unless it is one of the others'."""
    import mechinterp_attn as mia

    chosen = heads or None
    if by in BY_CUTTING:
        probe = mia.detect.random_repeats(model, draws=10, seed=seed)
        return mia.detect.ablate, (model, probe.tokens, chosen), {"where": probe.repeated}
    if by in BY_WEIGHTS:
        return mia.detect.score_weights, (model, chosen), {"seed": seed}
    return mia.detect.score_heads, (model, chosen), {"seed": seed}
