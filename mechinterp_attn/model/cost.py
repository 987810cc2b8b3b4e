"""What running a model costs: operations, and the memory of what its heads hold."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp_attn.core.plan import Plan, make_plan

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel


def run_flops(model: AttentionOnlyModel, tokens: int, positions: int) -> int:
    """Multiplications and additions of a run over so many tokens, in sequences of so many positions."""
    spec = model.spec
    weights = spec.d_model * spec.d_vocab_out
    mixing = 0
    for bank in model.banks:
        weights += sum(parameter.numel() for parameter in bank.parameters())
        mixing += 2 * bank.n_heads * bank.d_head * positions if bank.mixes_positions else 0
    return 2 * tokens * (weights + mixing)


def held_floats(model: AttentionOnlyModel, positions: int) -> int:
    """How many numbers the patterns and the values of all heads are, on one sequence."""
    mixing = sum(bank.n_heads for bank in model.banks if bank.mixes_positions)
    values = sum(bank.n_heads * bank.d_head for bank in model.banks)
    return positions * (mixing * positions + 3 * values)


def plan_runs(
    model: AttentionOnlyModel,
    what: str,
    *,
    runs: float | int,
    rows: int,
    positions: int,
    bytes: int,
    result: int = 0,
    flops: int = 0,
    chunks: int = 1,
) -> Plan:
    """The plan of work that is mostly runs of the model.

    Args:
        model: the converted model.
        what: what is computed.
        runs: how often all rows go through the model; a backward pass counts as two.
        rows: sequences.
        positions: tokens of each.
        bytes: memory at its peak, result included.
        result: bytes of the result.
        flops: beside the runs.
        chunks: pieces that the work is cut into.
    """
    tokens = rows * positions
    return make_plan(
        what=what,
        flops=int(runs * run_flops(model, tokens, positions)) + flops,
        bytes=bytes,
        result=result,
        chunks=chunks,
        device=model.W_E.device,
        shape=(tokens, model.spec.d_model, 4 * model.spec.d_model),
    )
