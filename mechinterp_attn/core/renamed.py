"""Names that changed: the old ones work for one version more, with a warning."""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import Any, ParamSpec, TypeVar

from mechinterp_attn.core.errors import MechInterpError

P = ParamSpec("P")
R = TypeVar("R")


def renamed_arguments(
    **names: str | tuple[str, Callable[[Any], Any]],
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that takes arguments under their old names too.

    Args:
        names: old name to new name, or to the new name and what an old value becomes. The function
            itself knows only the new one.

    Raises:
        MechInterpError: (when the function is called) both names of an argument are given.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        @functools.wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            for old in names.keys() & kwargs.keys():
                renamed = names[old]
                new, value = (renamed, None) if isinstance(renamed, str) else renamed
                if new in kwargs:
                    raise MechInterpError(f"{old}= and {new}= are the same argument: give {new}= alone")
                warnings.warn(
                    f"{function.__name__}({old}=) is called {new}= now; the old name goes next time",
                    FutureWarning,
                    stacklevel=2,
                )
                given = kwargs.pop(old)
                kwargs[new] = given if value is None else value(given)
            return function(*args, **kwargs)

        return call

    return decorate


def moved_names(room: str, names: Mapping[str, str]) -> Callable[[str], Any]:
    """The ``__getattr__`` of a room that no longer offers some names.

    Args:
        room: its module.
        names: each old name, and where the same thing stands: module and name, with dots.

    Raises:
        AttributeError: (when it is called) a name that the room never had.
    """

    def find(name: str) -> Any:
        if name not in names:
            raise AttributeError(f"module {room!r} has no attribute {name!r}")
        warnings.warn(
            f"{room}.{name} is {names[name]} now; the old name goes next time", FutureWarning, stacklevel=2
        )
        module, _, own = names[name].rpartition(".")
        return getattr(import_module(module), own)

    return find
