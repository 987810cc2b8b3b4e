"""A frozen prompt, or the model and prompt that it would be made of: analyses take either."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, Concatenate, ParamSpec, Protocol, TypeVar, cast, overload, runtime_checkable

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.frozen.freezing import freeze
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.model.attention_only import AttentionOnlyModel

P = ParamSpec("P")
R = TypeVar("R", covariant=True)


@runtime_checkable
class OfPrompt(Protocol[P, R]):
    """An analysis of a frozen prompt, or of a model and a prompt that is frozen for it."""

    @overload
    def __call__(self, frozen: Frozen, /, *args: P.args, **kwargs: P.kwargs) -> R: ...

    @overload
    def __call__(
        self, model: AttentionOnlyModel, prompt: Any, /, *args: P.args, **kwargs: P.kwargs
    ) -> R: ...


def of_prompt(function: Callable[Concatenate[Frozen, P], R]) -> OfPrompt[P, R]:
    """Let an analysis of a frozen prompt be called with a model and a prompt as well.

    Freezing is most of the work of a short analysis, so several of one prompt should share a frozen one.
    """
    name = function.__name__

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        first = args[0] if args else kwargs.get("frozen")
        if isinstance(first, AttentionOnlyModel):
            if len(args) < 2:
                raise MechInterpError(
                    f"{name}(model) lacks the prompt: give {name}(model, prompt), or once for several "
                    f"analyses: {name}(paths.freeze(model, prompt))"
                )
            return function(freeze(first, args[1]), *args[2:], **kwargs)
        if not isinstance(first, Frozen):
            raise MechInterpError(
                f"{name} takes a frozen prompt, got {type(first).__name__}: give "
                f"{name}(paths.freeze(model, prompt)) or {name}(model, prompt)"
            )
        return function(*args, **kwargs)

    return cast("OfPrompt[P, R]", call)
