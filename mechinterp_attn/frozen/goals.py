"""What a path analysis explains: a logit, a logit difference or any direction of logits at a position."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.frozen.behaviour import Behaviour, OnPrompt, asked
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.model.given import single_id

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

Token = str | int
Target = Token | Mapping[str, float] | Mapping[int, float] | Mapping[Token, float]
MOST_NAMED = 4  # tokens of a direction that its name spells out


@dataclass(frozen=True, eq=False)
class Goal:
    """A sum of logits with weights, as a linear reading of the last residual stream.

    Attributes:
        weights: by token id: ``{target: 1}`` for a logit, ``{target: 1, against: -1}`` for a difference.
        position: counted from the start.
        direction: ``total = residual[position] @ direction + offset``, ``[d_model]``, with the final
            norm and a soft cap frozen.
        offset: what the unembedding's bias adds.
        total: the value, as the model computed it.
        name: the tokens: the text of one, else such as ``' dog' - ' cat'``.
        about: the goal in words.
    """

    weights: Mapping[int, float]
    position: int
    direction: Float[Tensor, " d_model"]
    offset: float
    total: float
    name: str
    about: str

    @property
    def target(self) -> int:
        """The token with the largest weight."""
        return max(self.weights, key=lambda token: self.weights[token])

    @property
    def against(self) -> int | None:
        """The token with the most negative weight; None where no weight is negative."""
        lowest = min(self.weights, key=lambda token: self.weights[token])
        return lowest if self.weights[lowest] < 0 else None

    def field(self, frozen: Frozen) -> Float[Tensor, "pos d_model"]:
        """The direction as a field on the last residual stream: zero at all other positions."""
        field = torch.zeros_like(frozen.end)
        field[self.position] = self.direction
        return field

    def value(self, x: Float[Tensor, "pos d_model"]) -> float:
        """What a last residual stream ``x`` makes of the goal, the unembedding's bias included."""
        return float(x[self.position] @ self.direction) + self.offset

    def measure(self, logits: Float[Tensor, "pos d_vocab"]) -> float:
        """The goal, read off the logits of any run."""
        at = logits[self.position].double()
        return sum(weight * float(at[token]) for token, weight in self.weights.items())


def resolve_goal(
    frozen: Frozen,
    *,
    target: Target | None,
    against: Token | None,
    position: int,
    task: Behaviour | None = None,
) -> Goal:
    """Validate a target, by default the model's own top prediction, and find its direction.

    Args:
        task: a behaviour that has this prompt, in place of the other three: the direction is its metric's
            gradient, which for a logit or a logit difference is the metric itself.
        target: a token (its text or id), or a direction of logits: weights by token.
        against: a second token, whose logit is subtracted; not with weights.
        position: where the prediction is made; negative counts from the end.

    Raises:
        MechInterpError: everything that is wrong: the position is outside the prompt, a target is no
            single token or not in the output vocabulary, both targets are the same token, or weights
            are empty, all zero, not finite or given twice for one token; a task together with a target,
            or one whose metric does not read the logits of this prompt at one position.
    """
    model = frozen.model
    if task is None:
        what = ""
        pos = resolve_position(frozen, position)
        weights = _weights(frozen, pos, target, against)
    else:
        if target is not None or against is not None or position != -1:
            raise MechInterpError(
                "a task has an answer and a position of its own; give it alone, or target=, against= and "
                "position="
            )
        what, pos, weights = _weights_of_task(frozen, asked(frozen, task))
    ids = torch.tensor(list(weights), device=frozen.end.device)
    of = frozen.end.new_tensor(list(weights.values()))
    if frozen.cap is not None:
        of = of * frozen.cap[pos, ids]
    at_end = torch.zeros_like(frozen.end)
    at_end[pos] = model.W_U.detach()[:, ids] @ of
    exact = list(weights.values())
    name = direction_name(model, weights)
    return Goal(
        weights=weights,
        position=pos,
        direction=frozen.read_back(at_end)[pos],
        offset=_weighted(frozen.offset()[pos, ids], exact),
        total=_weighted(frozen.logits[pos, ids], exact),
        name=model.output_texts([*weights])[0] if exact == [1.0] else name,
        about=f"{what}logit {name} after {frozen.str_tokens[pos]!r} (position {pos})",
    )


def _weighted(logits: Float[Tensor, " n"], weights: list[float]) -> float:
    return sum(weight * logit for weight, logit in zip(weights, logits.tolist(), strict=True))


def _weights(frozen: Frozen, pos: int, target: Target | None, against: Token | None) -> dict[int, float]:
    """The direction of logits that is meant, by token id."""
    model = frozen.model
    if isinstance(target, Mapping):
        return _direction(model, target, against)
    goal = int(frozen.logits[pos].argmax()) if target is None else resolve_token(model, target)
    if against is None:
        return {goal: 1.0}
    other = resolve_token(model, against)
    if goal == other:
        raise MechInterpError(
            f"target and against are both token {goal} ({model.output_texts([goal])[0]!r}); "
            "their logit difference is 0 everywhere"
        )
    return {goal: 1.0, other: -1.0}


def _weights_of_task(frozen: Frozen, on: OnPrompt) -> tuple[str, int, dict[int, float]]:
    """A metric's gradient at the model's own logits: in words, its position, and the weights by token."""
    if on.position is None:
        raise MechInterpError(
            f"the metric {on.about} reads the logits of all positions, but paths lead to a single one; "
            "give the task answers and a position, or use paths.orders or term_importance, which measure it"
        )
    gradient = on.gradient(frozen.logits)[on.position]
    flat = on.gradient(torch.zeros_like(frozen.logits))[on.position]
    ids = gradient.nonzero()[:, 0].tolist()
    if (
        not ids or float(gradient.abs().max()) < 4 * torch.finfo(gradient.dtype).eps
    ):  # "kl", but for rounding
        raise MechInterpError(
            f"the metric {on.about} has a gradient of 0 here: there is nothing to explain"
        )
    linear = "" if torch.equal(gradient, flat) else f"{on.about}, linearised: "
    return linear, on.position, dict(zip(ids, gradient[ids].tolist(), strict=True))


def _direction(
    model: AttentionOnlyModel,
    target: Mapping[str, float] | Mapping[int, float] | Mapping[Token, float],
    against: Token | None,
) -> dict[int, float]:
    wrong: list[str] = []
    weights: dict[int, float] = {}
    if against is not None:
        wrong.append("against= was given too; put its weight, such as -1, among the others")
    for token, weight in target.items():
        try:
            found = resolve_token(model, token)
        except MechInterpError as error:
            wrong.append(str(error))
            continue
        if not math.isfinite(weight):
            wrong.append(f"the weight of {token!r} is {weight}")
        if found in weights:
            wrong.append(f"token {found} ({token!r}) is there twice")
        weights[found] = float(weight)
    if not any(weights.values()) and not wrong:
        wrong.append("no weight differs from 0")
    if wrong:
        raise MechInterpError(listing("target is not a direction of logits", wrong))
    return {token: weight for token, weight in weights.items() if weight}


def direction_name(model: AttentionOnlyModel, weights: Mapping[int, float]) -> str:
    """``' dog'``, ``' dog' - ' cat'`` or ``0.5 ' dog' + 0.5 ' cat' - ' fish'``."""
    largest = sorted(weights, key=lambda token: -abs(weights[token]))[:MOST_NAMED]
    order = sorted(largest, key=lambda token: -weights[token])
    names = model.output_texts(order)
    parts: list[str] = []
    for token, name in zip(order, names, strict=True):
        size = abs(weights[token])
        sign = ("- " if parts else "-") if weights[token] < 0 else ("+ " if parts else "")
        parts.append(f"{sign}{'' if size == 1 else f'{size:.3g} '}{name!r}")
    more = len(weights) - len(parts)
    return " ".join(parts) + (f" and {more:,} more" if more else "")


def resolve_position(frozen: Frozen, position: int) -> int:
    """A position counted from the start.

    Raises:
        MechInterpError: it is no integer, or outside the prompt.
    """
    n, position = len(frozen.tokens), single_id(position, "position")
    if not -n <= position < n:
        raise MechInterpError(
            f"position {position} is outside the prompt of {n} tokens; expected {-n} to {n - 1}"
        )
    return position % n


def resolve_token(model: AttentionOnlyModel, token: Token) -> int:
    """The id of an output token given as text or id.

    Raises:
        MechInterpError: the text is several tokens, or the id is no integer or outside the output
            vocabulary.
    """
    if isinstance(token, str) and model.spec.d_vocab_out != model.spec.d_vocab:
        raise MechInterpError(
            f"{token!r} is a text, but this model's {model.spec.d_vocab_out} outputs are not tokens; give "
            "the number of an output"
        )
    found = model.to_single_token(token) if isinstance(token, str) else single_id(token)
    if not 0 <= found < model.spec.d_vocab_out:
        raise MechInterpError(
            f"token id {found} is outside the output vocabulary 0..{model.spec.d_vocab_out - 1}"
        )
    return found
