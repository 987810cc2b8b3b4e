"""Direct logit attribution: what every head and neuron writes straight to a chosen next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch

from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.paths.frozen import Frozen, sum_tolerance
from mechinterp_attn.results import Check, Receipt, Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

    from mechinterp_attn.model import AttentionOnlyModel

Target = str | int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LogitAttribution(Result):
    """A logit (or a logit difference) as a sum over everything that writes to it.

    Attributes:
        total: the logit itself, as the model computed it.
        target, against, position: what was attributed: token ids and the position.
        about: the same in words.
        frame: one row per term: ``head`` (label, or "embed", "bias b_O", "b_U"), ``layer, kind,
            index, value`` (logits) and ``share`` of the total.
    """

    title: ClassVar[str] = "Direct logit attribution"
    sort_by: ClassVar[str | None] = "value"
    total: float
    target: int
    against: int | None
    position: int
    about: str

    def plot(self, k: int = 20) -> Figure:
        """The ``k`` largest terms as signed bars."""
        from mechinterp_attn.view.figures.paths import attribution_bars

        return attribution_bars(self, k)


@torch.no_grad()
def logit_attribution(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Target | None = None,
) -> LogitAttribution:
    """Split one logit into what the embedding, every head and neuron, and the biases write to it.

    Args:
        target: the next token (text of one token, or its id); by default the model's own top one.
        position: where the prediction is made; negative counts from the end.
        against: a second token: attribute ``logit(target) - logit(against)``.

    Raises:
        MechInterpError: the position is outside the prompt, or a target is no single token.
    """
    pos = resolve_position(frozen, position)
    logits = frozen.logits[pos]
    goal = int(logits.argmax()) if target is None else resolve_token(frozen.model, target)
    other = None if against is None else resolve_token(frozen.model, against)
    W_U, b_U = frozen.model.W_U.detach(), frozen.model.b_U.detach()
    unembed = W_U[:, goal] if other is None else W_U[:, goal] - W_U[:, other]
    offset = b_U[goal] if other is None else b_U[goal] - b_U[other]
    total = float(logits[goal] if other is None else logits[goal] - logits[other])
    direction = frozen.final_norm.at(pos).apply(unembed)  # the frozen norm is its own transpose
    rows: list[tuple[str, int | None, str, None, float]] = [
        ("embed", None, "embed", None, float(frozen.start[pos] @ direction))
    ]
    parts = []
    for bank, x in zip(frozen.banks, frozen.residuals, strict=False):
        values = bank.head_outputs_along(x, pos, direction)
        heads = bank.bank
        parts.append(
            pd.DataFrame(
                {
                    "head": heads.labels(),
                    "layer": heads.layer,
                    "kind": heads.kind,
                    "index": range(heads.n_heads),
                    "value": values.double().cpu().numpy(),
                }
            )
        )
        bias = float(heads.b_O.detach() @ direction)
        rows.append((f"L{heads.layer} {heads.part} bias", heads.layer, "bias", None, bias))
    rows.append(("unembedding bias", None, "bias", None, float(offset)))
    others = pd.DataFrame(rows, columns=["head", "layer", "kind", "index", "value"])
    frame = pd.concat([others.iloc[:1], *parts, others.iloc[1:]], ignore_index=True)
    frame = frame.astype({"layer": "Int64", "index": "Int64"})
    frame["share"] = frame["value"] / total
    error = abs(float(frame["value"].sum()) - total)
    check = Check("terms sum to the logit", error, sum_tolerance(frozen))
    return LogitAttribution(
        frame=frame,
        receipt=Receipt((check,), frozen.receipt.notes),
        total=total,
        target=goal,
        against=other,
        position=pos,
        about=f"{logit_name(frozen.model, goal, other)} after {frozen.str_tokens[pos]!r} (position {pos})",
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
        raise MechInterpError(f"position {position} is outside the prompt of {n} tokens")
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
