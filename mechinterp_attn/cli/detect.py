"""``detect``: which head does what."""

from __future__ import annotations

from typing import Annotated

import typer

from mechinterp_attn.cli.common import AsJson, CsvFile, Model, emit


def register(app: typer.Typer) -> None:
    app.command()(detect)


def detect(
    model: Model,
    top: Annotated[int | None, typer.Option(help="Only this many heads, best first.", min=1)] = None,
    by: Annotated[str, typer.Option(help="The score to sort by.")] = "induction",
    seed: Annotated[int, typer.Option(help="Of the random tokens.")] = 0,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """Score every head, attention and MLP-derived, on repeated random tokens."""
    import mechinterp_attn as mia
    from mechinterp_attn.errors import MechInterpError

    scores = mia.detect.score_heads(mia.load(model), seed=seed)
    names = list(scores.frame.select_dtypes("float").columns)
    if by not in names:
        raise MechInterpError(f"no score {by!r}; there are {', '.join(names)}")
    emit(scores.top(top or len(scores.frame), by=by), as_json=as_json, csv=csv)
