"""``explore``: a local page to type prompts into and to cut heads on."""

from __future__ import annotations

import webbrowser
from pathlib import Path
from typing import Annotated

import typer

from mechinterp_attn.cli.common import Model, Quiet, load, remark, typed


def register(app: typer.Typer) -> None:
    app.command()(explore)


def explore(
    model: Model,
    text: Annotated[
        str | None,
        typer.Argument(
            help="The text that stands in the box at first.", show_default=False, callback=typed
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Where to listen; 0 takes a free one.", min=0, max=65535)] = 0,
    open_: Annotated[bool, typer.Option("--open", help="Open the page in the browser.")] = False,
    quiet: Quiet = False,
) -> None:
    """Explore a model in the browser: type a prompt, read its story, cut, scale and patch heads.

    The address is printed. Only this machine can reach it, and Ctrl-C ends it.
    """
    from mechinterp_attn.explore import serve
    from mechinterp_attn.explore.application import PROMPT, needed

    needed()  # before the model loads, not after it

    def ready(address: str) -> None:
        typer.echo(address)
        remark("Ctrl-C to stop")
        if open_:
            webbrowser.open(address)

    serve(
        load(model), name=Path(model).name, prompt=PROMPT if text is None else text, port=port, ready=ready
    )
