"""Ctrl-C in the command line, ``--quiet`` and ``--wide``: what loops and tables ask before they go on.

The first Ctrl-C asks the loops that can give a partial result to stop at their next step; what they
return says in its receipt how far they came. In Python nothing changes: there Ctrl-C is a
``KeyboardInterrupt``.
"""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any


@dataclass
class State:
    """Of this process.

    Attributes:
        quiet: draw no bars.
        wide: print all columns of a table, however wide the terminal is.
        stopping: the work has been asked to stop.
        stoppable: how many of the running loops stop when asked.
    """

    quiet: bool = False
    wide: bool = False
    stopping: bool = False
    stoppable: int = 0


state = State()


@contextmanager
def gentle_interrupt(say: Callable[[], object]) -> Iterator[Callable[[], bool]]:
    """Within, the first Ctrl-C stops the running loops that have something to give.

    A second one, or one where no such loop is running, is a ``KeyboardInterrupt``.

    Args:
        say: called at the first Ctrl-C.

    Yields:
        a function that says whether the work was stopped.
    """

    def ask(signum: int, frame: Any) -> None:
        if state.stopping or not state.stoppable:
            raise KeyboardInterrupt
        state.stopping = True
        say()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield lambda: state.stopping
    finally:
        signal.signal(signal.SIGINT, before)
        state.stopping = False
