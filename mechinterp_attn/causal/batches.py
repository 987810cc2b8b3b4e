"""Texts or tokens as equal rows, with what is padding."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel

Input = str | list[str] | Tensor


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of tokens, padded on the right.

    Attributes:
        tokens: ``[batch, pos]``.
        real: which of them are no padding, ``[batch, pos]``.
    """

    tokens: Int[Tensor, "batch pos"]
    real: Bool[Tensor, "batch pos"]

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def mask(self) -> Bool[Tensor, "batch pos"] | None:
        """The attention mask, or None where nothing is padding."""
        return None if bool(self.real.all()) else self.real

    @property
    def predicts(self) -> Bool[Tensor, "batch pos_minus_1"]:
        """Which tokens after the first are real: those that have a loss."""
        return self.real[:, 1:]

    def split(self, rows: int) -> Iterator[Batch]:
        """The batch in parts of at most ``rows`` sequences, each cut to its longest one."""
        for start in range(0, len(self), rows):
            tokens, real = self.tokens[start : start + rows], self.real[start : start + rows]
            width = int(real.sum(1).max())
            yield Batch(tokens[:, :width], real[:, :width])

    def repeat(self, n: int) -> Batch:
        """The whole batch ``n`` times."""
        return Batch(self.tokens.repeat(n, 1), self.real.repeat(n, 1))


def as_batch(model: AttentionOnlyModel, input: Input) -> Batch:
    """Tokens ``[pos]`` or ``[batch, pos]``, a text, or texts of any lengths.

    Raises:
        MechInterpError: unusable tokens; no texts.
    """
    if isinstance(input, list) and not input:
        raise MechInterpError("an empty list of texts; give at least one")
    if isinstance(input, list) and isinstance(input[0], str):
        return pad(model, [model.as_tokens(text)[0] for text in input])
    tokens = model.as_tokens(input)
    return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))


def pad(model: AttentionOnlyModel, rows: list[Tensor]) -> Batch:
    """Rows of tokens of any lengths as one batch."""
    width = max(len(row) for row in rows)
    device = model.W_E.device
    tokens = torch.zeros(len(rows), width, dtype=torch.long, device=device)
    real = torch.zeros(len(rows), width, dtype=torch.bool, device=device)
    for i, row in enumerate(rows):
        tokens[i, : len(row)] = row
        real[i, : len(row)] = True
    return Batch(tokens, real)


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
    hooks: tuple[str, ...],
    extra: Collection[str] = (),
) -> dict[str, Tensor]:
    """Run a batch and keep some hooks of every bank, and ``extra`` ones by their full names."""
    model.heads.required()
    names = {f"{bank.path}.{hook}" for bank in model.banks for hook in hooks} | set(extra)
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    _, cache = model.run_with_cache(
        batch.tokens,
        return_type=None,
        names_filter=lambda name: name in names,
        return_cache_object=False,
        **padded,
    )
    return cache
