"""What all commands share: how a model is named, how a table is printed."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    import pandas as pd

Model = Annotated[
    str, typer.Argument(help="Name of a bundled model, or a folder with a model.", show_default=False)
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the table as JSON, one object a row.")]
CsvFile = Annotated[Path | None, typer.Option("--csv", help="Write the table to this CSV file instead.")]


def emit(frame: pd.DataFrame, *, as_json: bool = False, csv: Path | None = None) -> None:
    """Print a table: aligned text, JSON lines of records, or a CSV file (its path on stdout)."""
    if csv is not None:
        from mechinterp_attn.sources.saved import write_atomic

        write_atomic(csv, lambda path: frame.to_csv(path, index=False))
        typer.echo(str(csv))
    elif as_json:
        typer.echo(frame.to_json(orient="records", indent=1))
    else:
        typer.echo(frame.to_string(index=False))
