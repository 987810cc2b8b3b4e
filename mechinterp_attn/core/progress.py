"""Progress of long work: one bar for all of it, and a stop that keeps what the work has so far.

Every loop that may run for seconds goes through ``Progress``: one look, silent while the work is
short and under ``--quiet``, and a word every half minute where it goes to a file. ``interrupt.py``
says when a loop is asked to stop.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm.auto import tqdm

from mechinterp_attn.core.interrupt import state

PATIENCE, BETWEEN = 1.0, 0.1  # seconds before a bar is shown, and from one picture of it to the next
IN_A_FILE = 30.0  # both, where nobody sees it move


class Progress(tqdm):
    """A ``tqdm.auto`` bar: over an iterable, or ``with Progress(total=...) as bar: bar.update()``.

    Args:
        iterable: what to go over, if anything.
        desc: what is being done, in a word or two.
        show: draw the bar.
        stops: the loop gives what it has when it is stopped: iteration ends early, and a loop of
            its own looks at ``bar.stopped`` after each step.
        options: as for tqdm (``total``, ``unit``, ``initial``, ...).
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        *,
        desc: str,
        show: bool = True,
        stops: bool = False,
        **options: Any,
    ):
        self.what, self._stops = desc, stops
        self.done = options.get("initial", 0)  # tqdm itself does not count where it draws nothing
        self._iterates = iterable is not None
        seen = _in_notebook() or sys.stderr.isatty()
        super().__init__(
            iterable,
            desc=desc,
            disable=state.quiet or not show,
            delay=PATIENCE if seen else IN_A_FILE,
            mininterval=BETWEEN if seen else IN_A_FILE,
            maxinterval=10.0 if seen else IN_A_FILE,
            file=None if seen else _Lines(),
            leave=False,
            dynamic_ncols=True,
            **options,
        )

    @property
    def stopped(self) -> bool:
        """Whether this loop has been asked to stop."""
        return self._stops and state.stopping

    @property
    def notes(self) -> dict[str, str]:
        """For the receipt of a result: how far the work came, if it was stopped before its end."""
        if not self.stopped or (self.total is not None and self.done >= self.total):
            return {}
        whole = "" if self.total is None else f" of {self.total:,.0f}"
        return {"stopped early": f"after {self.done:,.0f}{whole} ({self.what})"}

    def remark(self, text: str) -> None:
        """A line beside the bar, on standard error, where the bar itself may be drawn."""
        if not self.disable:
            self.write(text, file=sys.stderr)

    def update(self, n: int | float | None = 1) -> bool | None:
        if not self._iterates:  # there tqdm calls this now and then, to draw
            self.done += n or 0
        return super().update(n)

    def __iter__(self) -> Iterator[Any]:
        state.stoppable += self._stops
        try:
            for item in super().__iter__():
                if self.stopped:
                    break
                yield item
                self.done += 1
        finally:
            state.stoppable -= self._stops

    def __enter__(self) -> Progress:
        state.stoppable += self._stops
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        state.stoppable -= self._stops
        super().__exit__(*error)


class _Lines:
    """Standard error where it is a file: each picture of a bar on a line of its own."""

    def write(self, text: str) -> None:
        if line := text.replace("\x1b[A", "").strip():
            print(line, file=sys.stderr, flush=True)

    def flush(self) -> None:
        pass


def _in_notebook() -> bool:
    return any(base.__module__ == "tqdm.notebook" for base in tqdm.__mro__)
