"""Texts or tokens as equal rows, with what is padding."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.batch import Batch as Batch

Input = str | list[str] | Tensor


def as_batch(model: AttentionOnlyModel, input: Input) -> Batch:
    """Tokens ``[pos]`` or ``[batch, pos]``, a text, or texts of any lengths.

    Raises:
        MechInterpError: unusable tokens; no texts.
    """
    return model.to_batch(input, padding_side="right")


def pad(model: AttentionOnlyModel, rows: list[Tensor]) -> Batch:
    """Rows of tokens of any lengths as one batch."""
    return model.to_batch(rows, padding_side="right")


def rows_within(model: AttentionOnlyModel, positions: int, max_bytes: int) -> int:
    """How many sequences of this length may be looked at together: their patterns, values and logits.

    Raises:
        MechInterpError: not even one; says what one needs.
    """
    per_position = len(model.heads.between_positions) * positions + sum(
        3 * bank.n_heads * bank.d_head for bank in model.banks
    )
    need = 4 * positions * (per_position + 3 * model.spec.d_vocab_out)
    if need > max_bytes:
        raise MechInterpError(
            f"one sequence of {positions} tokens needs about {need / 2**20:.0f} MiB; raise max_bytes "
            f"(now {max_bytes / 2**20:.0f} MiB) or shorten the sequences"
        )
    return max_bytes // need


def look(
    model: AttentionOnlyModel,
    batch: Batch,
    roles: tuple[str, ...],
    extra: Collection[str] = (),
) -> dict[str, Tensor]:
    """Run a batch and keep what hooks of every bank see.

    Args:
        roles: which of every bank: "q", "v", "pattern", "z"; see ``HeadBank.hook``.
        extra: other hooks, by their full names.
    """
    model.heads.required()
    names = {bank.hook(role) for bank in model.banks for role in roles} | set(extra)
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    _, cache = model.run_with_cache(
        batch.tokens,
        return_type=None,
        names_filter=lambda name: name in names,
        return_cache_object=False,
        **padded,
    )
    return cache
