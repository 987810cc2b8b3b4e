"""``models``, ``convert``, ``verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechinterp_attn.cli.common import AsJson, CsvFile, Model, emit


def register(app: typer.Typer) -> None:
    app.command()(models)
    app.command()(convert)
    app.command()(verify)


def models(as_json: AsJson = False, csv: CsvFile = None) -> None:
    """List the bundled models."""
    import mechinterp_attn as mia

    emit(mia.models(), as_json=as_json, csv=csv)


def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help="Folder to write the converted model to.")],
) -> None:
    """Convert a model to attention-only form and save it; the folder is printed."""
    import mechinterp_attn as mia

    converted = mia.load(model)
    converted.save(out)
    typer.echo(f"{converted}", err=True)
    typer.echo(str(out))


def verify(
    model: Model,
    text: Annotated[Path | None, typer.Option(help="Text file to compare on.")] = None,
    as_json: AsJson = False,
) -> None:
    """Compare a model in attention-only form with its source; exit code 1 where they differ."""
    raise NotImplementedError
