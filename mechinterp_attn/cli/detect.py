"""``detect``: which head does what."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from mechinterp_attn.cli.common import (
    AsJson,
    CsvFile,
    FigureFile,
    Model,
    Quiet,
    Seed,
    Top,
    deliver,
    load,
    remark,
)

if TYPE_CHECKING:
    from mechinterp_attn.model import AttentionOnlyModel
    from mechinterp_attn.results import Result

CIRCUIT = "circuit"


def register(app: typer.Typer) -> None:
    app.command()(detect)


def detect(
    model: Model,
    top: Top = None,
    by: Annotated[
        str,
        typer.Option(
            help="The score to sort by: of attention (induction, previous_token, ...), of weights "
            "(copying_z, induction_z, ...), of cutting heads out (loss_change), or 'circuit' for the "
            "induction circuit by all three."
        ),
    ] = "induction",
    corpus: Annotated[
        Path | None, typer.Option(help="Score on this .txt or .jsonl file, not on random tokens.")
    ] = None,
    field: Annotated[str, typer.Option(help="Where a line of a .jsonl corpus has its text.")] = "text",
    limit: Annotated[int | None, typer.Option(help="Only so many documents.", min=1)] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep what was counted here; the same command goes on from it.")
    ] = None,
    seed: Seed = 0,
    as_json: AsJson = False,
    csv: CsvFile = None,
    figure: FigureFile = None,
    quiet: Quiet = False,
) -> None:
    """Score every head, attention and MLP-derived: by attention, weights or cutting, or on a corpus."""
    import mechinterp_attn as mia
    from mechinterp_attn.errors import MechInterpError

    opened = load(model)
    result: Result
    if corpus is not None:
        result = mia.detect.over_corpus(opened, corpus, field=field, limit=limit, save=save)
    elif by == CIRCUIT:
        circuit = mia.detect.induction(opened, seed=seed)
        remark(str(circuit))
        rows = circuit.frame.head(top or len(circuit.frame))
        deliver(circuit, rows, as_json=as_json, csv=csv, figure=figure)
        return
    else:
        result = _scores(opened, by, seed)
    names = list(result.frame.select_dtypes("float").columns)
    if by not in names:
        raise MechInterpError(f"no score {by!r}; there are {', '.join(names)}")
    rows = result.top(top or len(result.frame), by=by)
    deliver(result, rows, as_json=as_json, csv=csv, figure=figure)


def _scores(model: AttentionOnlyModel, by: str, seed: int) -> Result:
    """The table that has a score: by attention unless it is one of the others'."""
    import mechinterp_attn as mia

    if by in ("loss_change", "logit_change", "estimate"):
        probe = mia.detect.random_repeats(model, draws=10, seed=seed)
        return mia.detect.ablate(model, probe.tokens, where=probe.repeated)
    if by in ("copying", "copying_z", "copying_size", "pure_copying", "induction_z"):
        return mia.detect.score_weights(model, seed=seed)
    return mia.detect.score_heads(model, seed=seed)
