"""How an analysis is answered: the options that every analysis has, and what they do."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer

from mechinterp_attn.cli.common import AsJson, CsvFile, FigureFile, Quiet, Wide, emit, remark, write_figure

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp_attn.core.plan import Call
    from mechinterp_attn.core.results import Result

Command = TypeVar("Command", bound=Callable[..., None])


@dataclass(frozen=True)
class Answer:
    """What the user asked for with ``--plan``, ``--max-bytes``, ``--json``, ``--csv`` and ``--figure``."""

    max_bytes: int | None
    plan: bool
    as_json: bool
    csv: Path | None
    figure: Path | None

    def run(self, *calls: Call) -> Any:
        """What the last of some calls gives; with ``--plan`` the cost of each is printed, and that is all.

        Args:
            calls: the analysis; in front of it other calls that only ``--plan`` is to show.

        Raises:
            MechInterpError: as the analysis, or it takes no ``--max-bytes`` or has no plan.
        """
        from mechinterp_attn.core.plan import plan

        for function, args, options in map(self._limited, calls):
            if self.plan:
                typer.echo(str(plan(function, *args, **options)))
        if self.plan:
            raise typer.Exit
        return self.now(calls[-1])

    def now(self, call: Call) -> Any:
        """What a call gives, also with ``--plan``: a step that the plan of a later one needs."""
        function, args, options = self._limited(call)
        return function(*args, **options)

    def _limited(self, call: Call) -> Call:
        from mechinterp_attn.core.errors import MechInterpError

        function, args, options = call
        if self.max_bytes is None:
            return call
        if "max_bytes" not in inspect.signature(function).parameters:
            name = function.__name__
            raise MechInterpError(f"{name} needs little memory and has no --max-bytes; leave it out")
        return function, args, options | {"max_bytes": self.max_bytes}

    def give(
        self,
        result: Result,
        frame: pd.DataFrame | None = None,
        *,
        about: str | None = None,
        by: str | None = None,
    ) -> None:
        """Answer with a result: what it is and its receipt as remarks, the table, and the figure.

        Args:
            result: what was found.
            frame: the rows to give; by default all.
            about: what it is, where the title does not say enough.
            by: the column that the rows are sorted by, where it is not the result's own; always shown.
        """
        remark(about or result.title)
        remark(str(result.receipt))
        keep = [by] if (by := by or result.sort_by) else []
        emit(result.frame if frame is None else frame, as_json=self.as_json, csv=self.csv, keep=keep)
        if self.figure is not None:
            write_figure(result, self.figure)


def _options(
    max_bytes: Annotated[
        int | None,
        typer.Option(help="Memory beyond the model's that the analysis may take; 2 GiB by default.", min=1),
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="Say what it would cost, and stop.")] = False,
    as_json: AsJson = False,
    csv: CsvFile = None,
    figure: FigureFile = None,
    wide: Wide = False,
    quiet: Quiet = False,
) -> Answer:
    """The options themselves; ``--wide`` and ``--quiet`` are heard by callbacks of their own."""
    return Answer(max_bytes, plan, as_json, csv, figure)


def answering(command: Command) -> Command:
    """A command whose last parameter, ``answer``, stands for the options that all analyses have."""
    own = list(inspect.signature(command, eval_str=True).parameters.values())[:-1]
    shared = inspect.signature(_options, eval_str=True).parameters

    @functools.wraps(command)
    def call(**given: Any) -> None:
        answer = _options(**{name: given.pop(name) for name in shared})
        command(**given, answer=answer)

    call.__signature__ = inspect.Signature([*own, *shared.values()])  # type: ignore[attr-defined]
    call.__annotations__ = {p.name: p.annotation for p in (*own, *shared.values())}
    return call  # type: ignore[return-value]
