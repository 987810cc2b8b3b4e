"""``report``: one HTML file about a model on a prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from mechinterp_attn.cli.common import (
    Ids,
    Model,
    Position,
    Prompt,
    Quiet,
    Seed,
    Target,
    TaskOption,
    load,
    prompt_of,
    task_of,
    token_of,
    typed,
)

# Written out, so that a wrong name is said at once, before anything is loaded; a test compares them with
# the report's own.
Preset = Literal["overview", "induction", "prediction", "large"]
SECTIONS = (
    "story", "circuit", "summary", "provenance", "fidelity", "orders", "importance", "heads", "patterns",
    "composition", "vocabulary", "paths", "graph", "neurons", "glossary", "faithfulness", "prompts",
)  # fmt: skip
Mode = Literal["exact", "silu", "mixture"]


def _known(sections: list[str] | None) -> list[str] | None:
    wrong = [name for name in sections or () if name not in SECTIONS]
    if wrong:
        raise typer.BadParameter(f"no section {', '.join(wrong)}; there are {', '.join(SECTIONS)}.")
    return sections or None


def register(app: typer.Typer) -> None:
    app.command()(report)


def report(
    model: Model,
    text: Annotated[
        str | None,
        typer.Argument(
            help="The text to analyse; - is standard input.", show_default=False, callback=typed
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            help="Where to write the result.",
            metavar="FILE",
            show_default=False,
        ),
    ] = None,
    prompt: Prompt = None,
    tokens: Ids = None,
    target: Target = None,
    position: Position = -1,
    preset: Annotated[
        Preset | None, typer.Option(help="A choice of sections; by default one that fits the model's size.")
    ] = None,
    section: Annotated[
        list[str] | None,
        typer.Option(
            help="This section instead of a preset's; may be given several times.", callback=_known
        ),
    ] = None,
    head: Annotated[
        list[str] | None,
        typer.Option(help="A head whose patterns and circuits to show; may be given several times."),
    ] = None,
    compare: Annotated[
        str | None, typer.Option(help="A second model to set beside this one on the prompt.")
    ] = None,
    compare_mlp: Annotated[
        Mode | None,
        typer.Option("--compare-mlp", help="Set the same model in this mode beside it."),
    ] = None,
    task: TaskOption = None,
    beside: Annotated[
        str | None,
        typer.Option(help="A second text, of as many tokens: what differs between the two."),
    ] = None,
    prompts: Annotated[int, typer.Option(help="How many prompts, of a behaviour by name.", min=2)] = 32,
    seed: Seed = 0,
    data: Annotated[
        bool, typer.Option("--data", help="Also write the report's data as JSON beside it.")
    ] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would cost, and stop.")] = False,
    quiet: Quiet = False,
) -> None:
    """Write the circuit report of a model on a prompt, on two, or on a behaviour (--task): one HTML file
    that opens offline.

    By default MODEL.html in this folder; --out - is standard output.
    """
    import mechinterp_attn as mia
    from mechinterp_attn.core.errors import MechInterpError
    from mechinterp_attn.core.files import check_writable

    stream = str(out) == "-"
    file = Path("/dev/stdout") if stream else out or Path(Path(model).name + ".html")
    check_writable(file)  # before the work, not after it
    if text is not None and prompt is not None:
        raise MechInterpError("give the text once: after the model, or with --prompt")
    text = prompt if text is None else text
    if task is not None and (text is not None or tokens is not None or beside is not None):
        raise MechInterpError("--task has its own prompts; leave out the text, --tokens and --beside")
    given = None if task is not None else prompt_of(text, tokens)
    if stream and data:
        raise MechInterpError("--data writes a file beside the page; give --out a file as well")
    if compare is not None and compare_mlp is not None:
        raise MechInterpError("give --compare or --compare-mlp, one of the two")
    opened = load(model)
    other = load(compare) if compare is not None else None
    if compare_mlp is not None:
        other = mia.load(model, mlp=compare_mlp)
    subject: Any = task_of(opened, task, prompts, seed) if task is not None else given
    if beside is not None:
        subject = [given, beside]
    options: dict[str, Any] = {
        "target": token_of(opened, target),
        "position": position,
        "preset": preset,
        "sections": section,
        "heads": head or (),
        "compare": other,
        "seed": seed,
        "progress": not quiet,
    }
    if plan:
        typer.echo(str(mia.plan(mia.report, opened, subject, **options)))
        return
    page = mia.report(opened, subject, **options)
    page.save(file, data=data)
    if not stream:
        typer.echo(str(file))
