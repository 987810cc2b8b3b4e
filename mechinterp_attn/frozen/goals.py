"""What a path analysis explains: a logit or a logit difference at a position."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.frozen.prompt import Frozen

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

Target = str | int


@dataclass(frozen=True, eq=False)
class Goal:
    """A logit, or a difference of two, as a linear reading of the last residual stream.

    Attributes:
        target, against: token ids; against is None for a single logit.
        position: counted from the start.
        direction: ``total = residual[position] @ direction + offset``, ``[d_model]``, with the final
            norm and a soft cap frozen.
        offset: what the unembedding's bias adds.
        total: the value, as the model computed it.
        about: the goal in words.
    """

    target: int
    against: int | None
    position: int
    direction: Float[Tensor, " d_model"]
    offset: float
    total: float
    about: str

    def field(self, frozen: Frozen) -> Float[Tensor, "pos d_model"]:
        """The direction as a field on the last residual stream: zero at all other positions."""
        field = torch.zeros_like(frozen.end)
        field[self.position] = self.direction
        return field

    def value(self, x: Float[Tensor, "pos d_model"]) -> float:
        """What a last residual stream ``x`` makes of the goal, the unembedding's bias included."""
        return float(x[self.position] @ self.direction) + self.offset


def resolve_goal(frozen: Frozen, *, target: Target | None, against: Target | None, position: int) -> Goal:
    """Validate a target, by default the model's own top prediction, and find its direction.

    Raises:
        MechInterpError: everything that is wrong: the position is outside the prompt, a target is no
            single token or not in the output vocabulary, or both targets are the same token.
    """
    model = frozen.model
    pos = resolve_position(frozen, position)
    goal = int(frozen.logits[pos].argmax()) if target is None else resolve_token(model, target)
    other = None if against is None else resolve_token(model, against)
    if goal == other:
        raise MechInterpError(
            f"target and against are both token {goal} ({model.to_str_tokens([goal])[0]!r}); "
            "their logit difference is 0 everywhere"
        )
    W_U, offsets, logits = model.W_U.detach(), frozen.offset()[pos], frozen.logits[pos]
    factor = logits.new_ones(len(logits)) if frozen.cap is None else frozen.cap[pos]
    direction, offset, total = W_U[:, goal] * factor[goal], offsets[goal], logits[goal]
    if other is not None:
        direction = direction - W_U[:, other] * factor[other]
        offset, total = offset - offsets[other], total - logits[other]
    at_end = torch.zeros_like(frozen.end)
    at_end[pos] = direction
    return Goal(
        target=goal,
        against=other,
        position=pos,
        direction=frozen.read_back(at_end)[pos],
        offset=float(offset),
        total=float(total),
        about=f"{logit_name(model, goal, other)} after {frozen.str_tokens[pos]!r} (position {pos})",
    )


def logit_name(model: AttentionOnlyModel, target: int, against: int | None = None) -> str:
    """``logit ' dog'`` or ``logit ' dog' - ' cat'``."""
    names = model.to_str_tokens([target] if against is None else [target, against])
    return "logit " + " - ".join(repr(name) for name in names)


def resolve_position(frozen: Frozen, position: int) -> int:
    """A position counted from the start.

    Raises:
        MechInterpError: it is outside the prompt.
    """
    n = len(frozen.tokens)
    if not -n <= position < n:
        raise MechInterpError(
            f"position {position} is outside the prompt of {n} tokens; expected {-n} to {n - 1}"
        )
    return position % n


def resolve_token(model: AttentionOnlyModel, token: Target) -> int:
    """The id of an output token given as text or id.

    Raises:
        MechInterpError: the text is several tokens, or the id is outside the output vocabulary.
    """
    found = model.to_single_token(token) if isinstance(token, str) else int(token)
    if not 0 <= found < model.spec.d_vocab_out:
        raise MechInterpError(
            f"token id {found} is outside the output vocabulary 0..{model.spec.d_vocab_out - 1}"
        )
    return found
