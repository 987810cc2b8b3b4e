"""What a report can be about: a prompt, two prompts, or a behaviour over many."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp_attn.causal.task import Task
from mechinterp_attn.core.errors import MechInterpError

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

Prompt = str | list[int] | Tensor
Subject = Prompt | Sequence[str] | Sequence[list[int]] | Task


def tokens_of(model: AttentionOnlyModel, prompt: Prompt) -> Tensor:
    """Validated ids ``[1, pos]`` of a prompt given as text or ids."""
    return model.as_tokens(prompt)


def two_of(subject: Any) -> tuple[Prompt, Prompt] | None:
    """Both prompts, where two are given; None for a single one.

    Raises:
        MechInterpError: more than two.
    """
    several = isinstance(subject, Sequence) and not isinstance(subject, str)
    if not several or not subject or isinstance(subject[0], int):
        return None
    if len(subject) != 2:
        raise MechInterpError(
            f"a report is about one prompt or two side by side, and {len(subject)} were given; many "
            "prompts are a behaviour: mia.Task(prompts, answer=...)"
        )
    return subject[0], subject[1]


def pair_of(
    model: AttentionOnlyModel, first: Tensor, second: Tensor, position: int, target: str | int | None
) -> Task:
    """Two prompts as a behaviour: what the model says after the first, against what it says after the
    second, which is the counterfactual.

    Args:
        model: the converted model.
        first, second: ids ``[1, pos]``.
        position: where the prediction is made.
        target: what is explained; by default what the model says after the first.

    Raises:
        MechInterpError: the same prompt twice.
    """
    if bool((first == second).all()):
        raise MechInterpError("two prompts are compared, and these are the same; expected different ones")
    with torch.no_grad():
        said = [int(model(tokens)[0, position].argmax()) for tokens in (first, second)]
    answer: Any = said[0] if target is None else target
    against = said[1] if said[1] != said[0] and target is None else None
    return Task(
        first, corrupt=second, answer=[answer], against=None if against is None else [against],
        position=position, metric="logit_diff", name="two prompts",
    )  # fmt: skip
