"""``report``: one HTML file about a model on a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mechinterp_attn.cli.common import Model


def register(app: typer.Typer) -> None:
    app.command()(report)


def report(
    model: Model,
    out: Annotated[Path, typer.Option(help="The HTML file to write.")],
    prompt: Annotated[str | None, typer.Option(help="The text to analyse.")] = None,
    tokens: Annotated[
        str | None,
        typer.Option(help="Token ids instead of a text, such as '2 1 0', for a model without tokenizer."),
    ] = None,
    target: Annotated[
        str | None, typer.Option(help="The next token to explain [default: the model's own].")
    ] = None,
    position: Annotated[int, typer.Option(help="Where it is predicted; -1 is the last token.")] = -1,
    preset: Annotated[str, typer.Option(help="overview, induction or prediction.")] = "overview",
    section: Annotated[
        list[str] | None,
        typer.Option(help="This section instead of a preset's; may be given several times."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="A second model to set beside this one on the prompt.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of the random tokens that heads are scored on.")] = 0,
    data: Annotated[
        bool, typer.Option("--data", help="Also write the report's data as JSON beside it.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="No progress on stderr.")] = False,
) -> None:
    """Write the circuit report of a model on a prompt: one HTML file that opens offline."""
    import mechinterp_attn as mia
    from mechinterp_attn.view.report.build import writable

    writable(out)  # before the work, not after it
    ids = _ids(prompt, tokens)
    if not quiet:
        typer.echo(f"loading {model}", err=True)
    page = mia.report(
        mia.load(model),
        ids,
        target=int(target) if target is not None and prompt is None else target,
        position=position,
        preset=preset,
        sections=section,
        compare=None if compare is None else mia.load(compare),
        seed=seed,
        progress=not quiet,
    )
    typer.echo(str(page.save(out, data=data)))


def _ids(prompt: str | None, tokens: str | None) -> str | list[int]:
    from mechinterp_attn.errors import MechInterpError

    if (prompt is None) == (tokens is None):
        raise MechInterpError("give a text with --prompt, or token ids with --tokens (one of the two)")
    if prompt is not None:
        return prompt
    try:
        return [int(part) for part in str(tokens).replace(",", " ").split()]
    except ValueError as error:
        raise MechInterpError(f"--tokens {tokens!r}: expected ids such as '2 1 0'") from error
