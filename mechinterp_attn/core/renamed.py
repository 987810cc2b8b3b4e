"""Arguments that got another name: the old one works for one version more, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable
from typing import ParamSpec, TypeVar

from mechinterp_attn.core.errors import MechInterpError

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(**names: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that takes arguments under their old names too.

    Args:
        names: old name to new name. The function itself knows only the new one.

    Raises:
        MechInterpError: (when the function is called) both names of an argument are given.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                new = names[old]
                if new in kwargs:
                    raise MechInterpError(f"{old}= and {new}= are the same argument: give {new}= alone")
                warnings.warn(
                    f"{function.__name__}({old}=) is called {new}= now; the old name goes next time",
                    FutureWarning,
                    stacklevel=2,
                )
                kwargs[new] = kwargs.pop(old)
            return function(*args, **kwargs)

        return call

    return decorate
