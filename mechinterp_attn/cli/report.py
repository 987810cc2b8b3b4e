"""``report``: one HTML file about a model on a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, cast

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
    out: Annotated[Path, typer.Option(help="Where to write the result.", metavar="FILE")],
    prompt: Prompt = None,
    tokens: Ids = None,
    target: Target = None,
    position: Position = -1,
    preset: Annotated[str, typer.Option(help="overview, induction or prediction.")] = "overview",
    section: Annotated[
        list[str] | None,
        typer.Option(help="This section instead of a preset's; may be given several times."),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head whose patterns and circuits to show; may be given several times."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="A second model to set beside this one on the prompt.")
    ] = None,
    compare_mlp: Annotated[
        str | None,
        typer.Option("--compare-mlp", help="Set the same model in this mode beside it: silu or mixture."),
    ] = None,
    seed: Seed = 0,
    data: Annotated[
        bool, typer.Option("--data", help="Also write the report's data as JSON beside it.")
    ] = False,
    quiet: Quiet = False,
) -> None:
    """Write the circuit report of a model on a prompt: one HTML file that opens offline."""
    import mechinterp_attn as mia
    from mechinterp_attn.core.errors import MechInterpError
    from mechinterp_attn.core.files import check_writable

    check_writable(out)  # before the work, not after it
    text = prompt_of(prompt, tokens)
    if compare is not None and compare_mlp is not None:
        raise MechInterpError("give --compare or --compare-mlp, one of the two")
    opened = load(model)
    other = load(compare) if compare is not None else None
    if compare_mlp is not None:
        other = mia.load(model, mlp=cast(Any, compare_mlp))
    page = mia.report(
        opened,
        text,
        target=token_of(opened, target),
        position=position,
        preset=preset,
        sections=section,
        heads=head or (),
        compare=other,
        seed=seed,
        progress=not quiet,
    )
    typer.echo(str(page.save(out, data=data)))
