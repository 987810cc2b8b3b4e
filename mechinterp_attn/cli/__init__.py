"""The command line: thin. Parse, call the API, print. One file per group of commands.

Heavy imports stay inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys

import typer

from mechinterp_attn.cli import circuits, detect, models, paths, report
from mechinterp_attn.errors import MechInterpError

app = typer.Typer(
    name="mechinterp-attn",
    help="Transformers as attention heads only: convert, verify, find heads, write circuit reports.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
for group in (models, report, detect, paths, circuits):
    group.register(app)


def main() -> None:
    """Entry point: errors of ours are one line on stderr and exit code 2."""
    try:
        app()
    except MechInterpError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
