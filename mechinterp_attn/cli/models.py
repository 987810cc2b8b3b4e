"""``models``, ``convert``, ``verify``, ``attach``."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from mechinterp_attn.cli.common import (
    DIFFERS,
    AsJson,
    CsvFile,
    Model,
    Quiet,
    Wide,
    emit,
    emit_json,
    load,
    records,
    remark,
)

if TYPE_CHECKING:
    from torch import Tensor

    from mechinterp_attn.model.attention_only import AttentionOnlyModel

Mode = Literal["exact", "silu", "mixture"]
MLPMode = Annotated[Mode, typer.Option(help="How MLP neurons become heads.")]
Components = Annotated[int, typer.Option(help="Heads per neuron in mode 'mixture'.")]
TextFile = Annotated[
    Path,
    typer.Option(
        help="Text to compare on; token ids, one sequence a line, without a tokenizer.", metavar="FILE"
    ),
]
MaxTokens = Annotated[int, typer.Option(help="How many tokens of the text to use at most.")]
RESULT = "Where to write the result."


def register(app: typer.Typer) -> None:
    app.command()(models)
    app.command()(convert)
    app.command()(verify)
    app.command()(attach)


def models(as_json: AsJson = False, csv: CsvFile = None, wide: Wide = False, quiet: Quiet = False) -> None:
    """List the bundled models."""
    import mechinterp_attn as mia

    emit(mia.models(), as_json=as_json, csv=csv)


def convert(
    model: Model,
    out: Annotated[Path, typer.Option(help=RESULT, metavar="FOLDER")],
    mlp: MLPMode = "exact",
    components: Components = 8,
    quiet: Quiet = False,
) -> None:
    """Convert a model to attention-only form, check it, and save it; the folder is printed."""
    import mechinterp_attn as mia

    remark(f"loading {model}")
    converted = mia.load(model, mlp=mlp, components=components)
    converted.save(out)
    remark(str(converted))
    typer.echo(str(out))


def verify(
    model: Model,
    text: TextFile,
    mlp: MLPMode = "exact",
    components: Components = 8,
    max_tokens: MaxTokens = 4096,
    as_json: AsJson = False,
    csv: CsvFile = None,
    wide: Wide = False,
    quiet: Quiet = False,
) -> None:
    """Compare a model in attention-only form with its source; exit code 1 where they differ."""
    import mechinterp_attn as mia
    from mechinterp_attn.sources.doors import open_source

    remark(f"loading {model}")
    source = open_source(model)
    converted = mia.convert(source, mlp=mlp, components=components, check=False)
    tokens = windows(converted, read_text(text), max_tokens)
    fidelity = mia.verify(converted, source, tokens)
    if as_json:
        emit_json({"model": model} | fidelity.summary() | {"per_layer": records(fidelity.per_layer)})
    else:
        if csv is None:
            typer.echo(f"{model}: {fidelity}")
        emit(fidelity.per_layer, csv=csv)
    raise typer.Exit(0 if fidelity.ok else DIFFERS)


def attach(
    model: Model,
    dictionary: Annotated[
        str,
        typer.Argument(
            help="A folder with a dictionary, or a bundled model that has some.", metavar="DICTIONARY"
        ),
    ],
    layer: Annotated[int, typer.Option(help="Where it is attached.")],
    text: TextFile,
    out: Annotated[Path | None, typer.Option(help=RESULT, metavar="FOLDER")] = None,
    max_tokens: MaxTokens = 4096,
    as_json: AsJson = False,
    csv: CsvFile = None,
    wide: Wide = False,
    quiet: Quiet = False,
) -> None:
    """Attach a dictionary's features as heads, and measure on a text how well it describes the model.

    With --out the model with its features is saved, as a folder that every other command takes.
    """
    import mechinterp_attn as mia

    converted = load(model)
    attached = mia.attach(converted, mia.Dictionary.load(dictionary, layer=layer), layer=layer)
    tokens = windows(attached, read_text(text), max_tokens)
    found = mia.detect.reconstruction(attached, tokens)
    if out is not None:
        attached.save(out)
        remark(f"wrote {out}")
    emit(found.frame, as_json=as_json, csv=csv)
    remark(str(found.receipt))


def read_text(file: Path) -> str:
    """A UTF-8 file.

    Raises:
        MechInterpError: it cannot be read, or it holds nothing.
    """
    from mechinterp_attn.core.errors import MechInterpError

    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        raise MechInterpError(f"cannot read the text {file}: {error}") from error
    if not text.strip():
        raise MechInterpError(f"the text {file} is empty; give at least two tokens")
    return text


def windows(model: AttentionOnlyModel, text: str, max_tokens: int) -> Tensor:
    """The text as equal windows of tokens ``[batch, pos]`` that fit the model's context.

    Raises:
        MechInterpError: fewer than two tokens, or ids that are no integers.
    """
    import torch

    from mechinterp_attn.core.errors import MechInterpError

    if model.tokenizer is None:
        try:
            ids = [[int(i) for i in line.split()] for line in text.splitlines() if line.strip()]
        except ValueError as error:
            raise MechInterpError(
                f"this model has no tokenizer, so the text must be token ids, one sequence a line; {error}"
            ) from error
        if len({len(row) for row in ids}) > 1:
            raise MechInterpError("the sequences of token ids must be equally long, one a line")
        return torch.tensor(ids)
    flat = model.to_tokens(text)[0, :max_tokens]
    width = min(model.spec.n_ctx, 256, len(flat))
    if width < 2:
        raise MechInterpError(f"the text is {len(flat)} token; give at least two")
    return flat[: len(flat) // width * width].view(-1, width)
