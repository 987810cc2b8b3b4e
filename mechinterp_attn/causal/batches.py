"""Texts or tokens as equal rows, with what is padding."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import Plan
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.batch import Batch as Batch
from mechinterp_attn.model.cost import plan_runs

Input = str | Tensor | Sequence[Any]  # texts, ids, or a list of rows of ids


def as_batch(model: AttentionOnlyModel, input: Input) -> Batch:
    """Tokens ``[pos]`` or ``[batch, pos]``, a text, or texts of any lengths.

    Raises:
        MechInterpError: unusable tokens; no texts.
    """
    return model.to_batch(input, padding_side="right")


def pad(model: AttentionOnlyModel, rows: list[Tensor]) -> Batch:
    """Rows of tokens of any lengths as one batch."""
    return model.to_batch(rows, padding_side="right")


def sequence_bytes(model: AttentionOnlyModel, positions: int) -> int:
    """What looking at one sequence takes: its patterns, values and streams,
    pairs of positions and their pictures in float64; logits. Found by counting
    (``tests/core/test_memory.py``).
    """
    spec, size = model.spec, model.W_E.element_size()
    pairs = (len(model.heads.between_positions) + 8) * positions
    values = sum(3 * bank.n_heads * bank.d_head for bank in model.banks)
    return size * positions * (pairs + values + 8 * spec.d_model + 3 * spec.d_vocab_out)


def plan_sequences(
    model: AttentionOnlyModel,
    what: str,
    batch: Batch,
    max_bytes: int,
    *,
    runs: float | int = 1,
    result: int = 0,
    together: int = 1,
) -> Plan:
    """The plan of looking at sequences, as many at a time as the memory beside the result allows.

    Args:
        model: the converted model.
        what: what is computed.
        batch: the sequences.
        max_bytes: what may be used.
        runs: how often each goes through the model; a backward pass counts as two.
        result: bytes that are kept from the first run to the end.
        together: how many runs of all sequences are made at once where the memory allows.
    """
    n, positions = batch.tokens.shape
    need = sequence_bytes(model, positions)
    rows = min(n, max(1, (max_bytes - result) // need))
    return plan_runs(
        model,
        f"{what} on {n:,} sequences of {positions:,} tokens",
        runs=runs,
        rows=n,
        positions=positions,
        bytes=result + rows * need * max(1, min(together, (max_bytes - result) // (need * rows))),
        result=result,
        chunks=-(-n // rows),
    )


def rows_within(model: AttentionOnlyModel, positions: int, max_bytes: int) -> int:
    """How many sequences of this length may be looked at together: their patterns, values and logits.

    Raises:
        MechInterpError: not even one; says what one needs.
    """
    need = sequence_bytes(model, positions)
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
