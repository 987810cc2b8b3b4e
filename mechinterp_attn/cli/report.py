"""``report``: one HTML file about a model on a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechinterp_attn.cli.common import (
    Ids,
    Model,
    Position,
    Prompt,
    Quiet,
    Seed,
    Target,
    load,
    prompt_of,
    token_of,
)


def register(app: typer.Typer) -> None:
    app.command()(report)


def report(
    model: Model,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    prompt: Prompt = None,
    tokens: Ids = None,
    target: Target = None,
    position: Position = -1,
    preset: Annotated[str, typer.Option(help="overview, induction or prediction.")] = "overview",
    section: Annotated[
        list[str] | None,
        typer.Option(help="This section instead of a preset's; may be given several times."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="A second model to set beside this one on the prompt.")
    ] = None,
    seed: Seed = 0,
    data: Annotated[
        bool, typer.Option("--data", help="Also write the report's data as JSON beside it.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write the circuit report of a model on a prompt: one HTML file that opens offline."""
    import mechinterp_attn as mia
    from mechinterp_attn.view.report.build import writable

    writable(out)  # before the work, not after it
    text = prompt_of(prompt, tokens)
    opened = load(model)
    page = mia.report(
        opened,
        text,
        target=token_of(opened, target),
        position=position,
        preset=preset,
        sections=section,
        compare=None if compare is None else load(compare),
        seed=seed,
        progress=not quiet,
    )
    typer.echo(str(page.save(out, data=data)))
