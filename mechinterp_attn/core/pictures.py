"""Pictures of results, looked up by type: an analysis does not know how its result is drawn.

Functions in ``view`` say with ``@draws(SomeResult)`` what they draw. They are imported when the first
picture is asked for, by the one name below, so that no room has to import the roof.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, Literal, Protocol, TypeVar, runtime_checkable

from mechinterp_attn.core.errors import MechInterpError

GALLERY = "mechinterp_attn.view.gallery"  # importing it registers every drawing

Form = Literal["figure", "page"]
Drawing = TypeVar("Drawing", bound=Callable[..., Any])

_drawings: dict[tuple[Form, type], Callable[..., Any]] = {}


@runtime_checkable
class Page(Protocol):
    """An interactive picture: shown by a notebook, saved as one HTML file that works offline."""

    def page(self) -> str: ...

    def save(self, path: str | os.PathLike[str]) -> Path: ...

    def _repr_html_(self) -> str: ...


def draws(*subjects: type, form: Form = "figure") -> Callable[[Drawing], Drawing]:
    """Register a function as the drawing of these types and of their subclasses.

    Args:
        subjects: the types whose instances the function takes as its first argument.
        form: "figure" for a plotly figure, "page" for an interactive page.
    """

    def register(drawing: Drawing) -> Drawing:
        for subject in subjects:
            _drawings[form, subject] = drawing
        return drawing

    return register


def draw(subject: Any, *args: Any, form: Form = "figure", **options: Any) -> Any:
    """The picture of a result or head, by the drawing registered for its type or nearest base.

    Args:
        subject: what to draw.
        args: passed on to the drawing.
        form: "figure" for a plotly figure, "page" for an interactive page.
        options: passed on to the drawing.

    Raises:
        MechInterpError: nothing draws this type.
    """
    import_module(GALLERY)
    for base in type(subject).__mro__:
        if (form, base) in _drawings:
            return _drawings[form, base](subject, *args, **options)
    raise MechInterpError(f"there is no {form} of a {type(subject).__name__}")
