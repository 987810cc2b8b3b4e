"""What all commands share: one name and one meaning for every option, one way to answer.

The result goes to standard output, everything else to standard error.
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp_attn.core.interrupt import state

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp_attn.causal import Task
    from mechinterp_attn.core.results import Result
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

# Exit codes, as the manual has them (docs/cli.md).
DIFFERS, WRONG_INPUT, BUG, INTERRUPTED = 1, 2, 70, 130
TASKS = ("induction", "ioi", "sva", "greater_than", "pronouns", "docstring", "brackets")  # of mia.tasks
PROMPTS = 32  # of a behaviour by name


def _models(incomplete: str) -> list[str]:
    """For the shell's completion, at once, with nothing loaded: bundled models and folders."""
    weights = files("mechinterp_attn") / "sources" / "weights"
    bundled = sorted(entry.name for entry in weights.iterdir() if entry.is_dir())
    start = Path(incomplete)
    folder = start if incomplete.endswith("/") else start.parent
    folders = [str(path) for path in folder.iterdir() if path.is_dir()] if folder.is_dir() else []
    return [name for name in [*bundled, *sorted(folders)] if name.startswith(incomplete)]


def _hush(quiet: bool) -> bool:
    state.quiet = quiet
    return quiet


def _widen(wide: bool) -> bool:
    state.wide = wide
    return wide


def typed(text: str | None) -> str | None:
    """A text of the command line as it was typed. Where the system's encoding is not the terminal's
    (``LC_ALL=C``), Python has its bytes as surrogates; they are UTF-8 nearly always.
    """
    if text is None or text.isprintable():
        return text
    return text.encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def _writable(file: Path | None) -> Path | None:
    """A file that can be written: said before the work, not after it."""
    from mechinterp_attn.core.files import check_writable

    return None if file is None else check_writable(file)


def any_console() -> None:
    """Let answers go to every console: what its encoding has no sign for is replaced, as by ``?``."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


Model = Annotated[
    str,
    typer.Argument(
        help="A bundled model, a folder with a model, or a Hugging Face id.",
        metavar="MODEL",
        show_default=False,
        autocompletion=_models,
    ),
]
Heads = Annotated[
    list[str] | None,
    typer.Argument(
        help="Heads such as L1H2, L0N7 or 'L0H1 > L1H4'; all where that makes sense.", metavar="HEADS"
    ),
]
Prompt = Annotated[
    str | None,
    typer.Option(help="The text to analyse; - is standard input.", show_default=False, callback=typed),
]
Ids = Annotated[
    str | None,
    typer.Option(
        "--tokens", help="Token ids such as '2 1 0' instead, for a model without tokenizer.", metavar="IDS"
    ),
]
Target = Annotated[
    str | None,
    typer.Option(
        help="The next token to explain; by default the model's own.", metavar="TOKEN", callback=typed
    ),
]
Against = Annotated[
    str | None,
    typer.Option(help="Explain the logit over this token's.", metavar="TOKEN", callback=typed),
]
Position = Annotated[int, typer.Option(help="Where it is predicted; negative counts from the end.")]
TaskOption = Annotated[
    str | None,
    typer.Option(
        "--task",
        help=f"A behaviour: a file that Task.save wrote (.jsonl), or one of {', '.join(TASKS)}.",
        metavar="TASK",
    ),
]
Top = Annotated[int | None, typer.Option("--top", "-k", help="How many rows, the first ones.", min=1)]
Seed = Annotated[int, typer.Option(help="Of all that is random.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print the table as JSON: one object a row.")]
CsvFile = Annotated[
    Path | None,
    typer.Option(
        "--csv",
        help="Write the table to this file, print its path.",
        metavar="FILE",
        callback=_writable,
    ),
]
FigureFile = Annotated[
    Path | None,
    typer.Option("--figure", help="Also write the figure, as HTML.", metavar="FILE", callback=_writable),
]
Quiet = Annotated[
    bool, typer.Option("--quiet", "-q", help="Nothing on standard error but errors.", callback=_hush)
]

Wide = Annotated[
    bool, typer.Option("--wide", help="All columns of the table, though they do not fit.", callback=_widen)
]


def remark(text: str) -> None:
    """A line on standard error, unless ``--quiet``.

    Args:
        text: what to say.
    """
    if not state.quiet:
        typer.echo(_style(text, sys.stderr, dim=True), err=True)


def fail(text: str) -> None:
    """An error, in one line on standard error.

    Args:
        text: what went wrong and what to do.
    """
    line = " ".join(text.split())
    typer.echo(f"{_style('error:', sys.stderr, fg='red', bold=True)} {line}", err=True)


def _style(text: str, stream: Any, **look: Any) -> str:
    colour = stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    return typer.style(text, **look) if colour else text


def emit(
    frame: pd.DataFrame, *, as_json: bool = False, csv: Path | None = None, keep: Sequence[str] = ()
) -> None:
    """Print a table: aligned text, JSON records, or a CSV file (its path on stdout).

    On a terminal the text fits its width, unless ``--wide``; a pipe or a file gets every column.

    Args:
        keep: columns that are shown however narrow the terminal is.
    """
    if csv is not None:
        from mechinterp_attn.core.files import is_stream, write_csv

        write_csv(csv, frame)
        if not is_stream(csv):  # it would stand behind the table in /dev/stdout
            typer.echo(str(csv))
    elif as_json:
        emit_json(records(frame))
    else:
        from mechinterp_attn.core.table import fitted_table, text_table

        text = text_table(frame)
        left_out: list[str] = []
        if sys.stdout.isatty() and not state.wide:
            text, left_out = fitted_table(frame, shutil.get_terminal_size().columns, keep)
        head, *rows = text.splitlines()
        typer.echo("\n".join([_style(head, sys.stdout, bold=True), *rows]))
        if left_out:
            remark(f"left out to fit the terminal: {', '.join(left_out)}; --wide shows them")


def emit_json(data: Any) -> None:
    """Print JSON that every reader takes: pure ASCII, no NaN (``null`` in its place)."""
    typer.echo(json.dumps(_plain(data), indent=1, allow_nan=False))


def records(frame: pd.DataFrame) -> list[dict[str, Any]]:
    """The rows of a table as JSON has them."""
    return [_plain(row) for row in frame.to_dict(orient="records")]


def _plain(value: Any) -> Any:
    """Numpy's scalars as Python's; what is no number as ``None``."""
    if isinstance(value, dict):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if value is None or isinstance(value, str | bool | int | float):
        return value
    return str(value)


def write_figure(result: Result, file: Path) -> None:
    """The figure of a result as one HTML file that opens offline."""
    from mechinterp_attn.core.files import write_text

    if hasattr(result, "view"):  # the attribution graph's own page
        result.view().save(file)
    else:
        write_text(file, result.plot().to_html(include_plotlyjs=True, full_html=True))
    remark(f"wrote {file}")


def load(model: str) -> AttentionOnlyModel:
    """``mia.load``, with a remark: a large model takes a while."""
    import mechinterp_attn as mia

    remark(f"loading {model}")
    return mia.load(model)


def prompt_of(prompt: str | None, tokens: str | None) -> str | list[int]:
    """What ``--prompt`` or ``--tokens`` give; ``-`` stands for standard input.

    Raises:
        MechInterpError: both or neither, or ids that are no integers.
    """
    from mechinterp_attn.core.errors import MechInterpError

    if (prompt is None) == (tokens is None):
        raise MechInterpError("give a text with --prompt, or token ids with --tokens (one of the two)")
    if prompt == "-":
        return sys.stdin.read().removesuffix("\n")
    if prompt is not None:
        return prompt
    try:
        return [int(part) for part in str(tokens).replace(",", " ").split()]
    except ValueError as error:
        raise MechInterpError(f"--tokens {tokens!r}: expected ids such as '2 1 0'") from error


def token_of(model: AttentionOnlyModel, text: str | None) -> str | int | None:
    """A token as an option gives it: its text, or its id where the model has no tokenizer."""
    return int(text) if text is not None and model.tokenizer is None and text.isdigit() else text


def task_of(model: AttentionOnlyModel, name: str, prompts: int = PROMPTS, seed: int = 0) -> Task:
    """A behaviour by name, in the model's own tokens, or from a file.

    Raises:
        MechInterpError: neither; what ``Task.load`` or the behaviour's own function finds.
    """
    import mechinterp_attn as mia
    from mechinterp_attn.core.errors import MechInterpError

    if name in TASKS:
        return getattr(mia.tasks, name)(model, n=prompts, seed=seed)
    if not Path(name).is_file():
        raise MechInterpError(
            f"{name!r} is neither a file nor the name of a behaviour; the behaviours are {', '.join(TASKS)}"
        )
    return mia.Task.load(name)


def one_head(heads: list[str] | None, what: str) -> str:
    """The one head that an analysis takes.

    Raises:
        MechInterpError: none, or several.
    """
    from mechinterp_attn.core.errors import MechInterpError

    if not heads or len(heads) != 1:
        raise MechInterpError(f"{what} takes one head, got {len(heads or [])}; give one such as L0H1")
    return heads[0]
