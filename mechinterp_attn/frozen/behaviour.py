"""What analyses of single prompts need of a behaviour (``mia.Task``): its metric, read off their logits.

The behaviour itself stands on a higher floor, with the interventions that it is for. Here it is only seen
as one metric for each of its prompts.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.model.given import named

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel


@dataclass(frozen=True, eq=False)
class OnPrompt:
    """A metric on one prompt.

    Attributes:
        tokens: the prompt, ``[pos]``.
        position: where the metric reads the logits; None: at every position.
        measure: from logits ``[..., pos, d_vocab_out]`` to one number each, ``[...]``.
        about: the metric in words.
        weight: of this prompt in a mean over several.
    """

    tokens: Int[Tensor, " pos"]
    position: int | None
    measure: Callable[[Tensor], Tensor]
    about: str
    weight: int = 1

    @torch.enable_grad()
    def gradient(self, logits: Float[Tensor, "pos d_vocab"]) -> Float[Tensor, "pos d_vocab"]:
        """How the metric changes with each logit.

        Args:
            logits: ``[pos, d_vocab_out]``, where the gradient is taken.

        Raises:
            MechInterpError: the metric has no gradient.
        """
        at = logits.detach().clone().requires_grad_()
        value = self.measure(at)
        if not value.requires_grad:
            raise MechInterpError(
                f"the metric {self.about} has no gradient: it does not depend on the logits, or is a step; "
                "use a smooth one such as 'logit_diff'"
            )
        return torch.autograd.grad(value.sum(), at)[0]


@runtime_checkable
class Behaviour(Protocol):
    """What a ``mia.Task`` is to an analysis of single prompts."""

    def on(self, model: AttentionOnlyModel) -> list[OnPrompt]:
        """The metric on each of its prompts, in a model's tokens.

        Args:
            model: the converted model.
        """
        ...


def next_tokens(frozen: Frozen) -> OnPrompt:
    """The mean next-token loss (nats) of a frozen prompt, NaN where it has none; weighted by predictions.

    Args:
        frozen: the prompt.
    """
    return OnPrompt(frozen.tokens, None, frozen.loss, "loss", len(frozen.tokens) - 1)


def on_prompts(model: AttentionOnlyModel, task: Behaviour) -> list[OnPrompt]:
    """A behaviour's metric on each of its prompts.

    Args:
        model: the converted model.
        task: the behaviour.

    Raises:
        MechInterpError: it is no behaviour, or does not fit the model.
    """
    if not isinstance(task, Behaviour):
        raise MechInterpError(f"task={named(task)} is no task; give mia.Task(prompts, answer=...)")
    return task.on(model)


def asked(frozen: Frozen, task: Behaviour) -> OnPrompt:
    """A behaviour's metric on a frozen prompt, which is one of the behaviour's own.

    Args:
        frozen: the prompt.
        task: the behaviour.

    Raises:
        MechInterpError: it is no behaviour, or has no such prompt.
    """
    prompts = on_prompts(frozen.model, task)
    for one in prompts:
        if torch.equal(one.tokens, frozen.tokens):
            return one
    raise MechInterpError(
        f"the frozen prompt of {len(frozen.tokens)} tokens is not among the {len(prompts)} prompts of "
        f"{task!r}; freeze one of them, such as mia.paths.freeze(model, task.clean[0])"
    )
