"""The command line: thin. Parse, call the API, print. One file per group of commands.

Heavy imports stay inside the commands, so that ``--help`` answers at once.
"""

from __future__ import annotations

import sys
import traceback
from typing import Annotated

import typer

from mechinterp_attn.cli import causal, circuits, detect, explore, models, paths, report
from mechinterp_attn.cli.common import BUG, INTERRUPTED, WRONG_INPUT, any_console, fail, remark
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.interrupt import gentle_interrupt
from mechinterp_attn.version import __version__

app = typer.Typer(
    name="mechinterp-attn",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"mechinterp-attn {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version and stop.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Transformers as attention heads only: convert, verify, find heads, write circuit reports."""


for group in (models, report, explore, detect, paths, circuits, causal):
    group.register(app)


def main() -> None:
    """Entry point: an error is one line on stderr, whoever noticed it.

    Exit codes: 0 all went well; 1 ``verify`` found a difference; 2 wrong input; 70 a bug; 130
    interrupted (what there was by then has been given).
    """

    def say() -> None:
        remark("stopping at the next step; Ctrl-C again to stop at once")

    any_console()
    if len(sys.argv) == 1:
        sys.argv.append("--help")
    with gentle_interrupt(say) as stopped:
        try:
            code = app(standalone_mode=False) or 0
        except MechInterpError as error:
            fail(str(error))
            code = WRONG_INPUT
        except typer.TyperException as error:  # an unknown option, a missing argument
            context = getattr(error, "ctx", None)
            said = error.format_message().replace("Value error, ", "")
            fail(said + (f" See {context.command_path} --help." if context else ""))
            code = WRONG_INPUT
        except OSError as error:  # a file that cannot be read or written
            fail(str(error))
            code = WRONG_INPUT
        except KeyboardInterrupt:
            code = INTERRUPTED
        except Exception:
            traceback.print_exc()
            fail("this is a bug; please report it with the lines above")
            code = BUG
        if code == INTERRUPTED:  # typer says so too
            fail("interrupted")
        elif stopped() and code == 0:
            remark("interrupted: this is what there was by then")
            code = INTERRUPTED
    sys.exit(code)
