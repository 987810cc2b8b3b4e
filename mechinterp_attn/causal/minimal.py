"""Whether a circuit needs each of its heads or edges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.alone import Alone, Parts, alone_of
from mechinterp_attn.causal.evaluation import ends_of, faithful, plan_of_circuits, whole_check
from mechinterp_attn.causal.runs import MAX_BYTES, ready
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import Plan, plans, within
from mechinterp_attn.core.results import Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Minimality(Result):
    """How much each head or edge of a circuit contributes to it.

    Attributes:
        frame: one row per head or edge, the worthiest first: ``head`` or ``edge``; ``without``, the
            circuit's faithfulness when it alone is held to the counterfactual too; ``loss``, how much less
            that is than the whole circuit's (Wang et al. 2022); ``p``, the share of random others, put into
            the circuit, of which it would lose as much when they are taken out again (NaN without any).
        faithfulness: of the whole circuit.
        null: what the circuit loses without each of the random others that were put in, ``[draw]``.
    """

    title: ClassVar[str] = "Minimality of a circuit"
    sort_by: ClassVar[str | None] = "loss"
    faithfulness: float
    null: Float[Tensor, " draw"]


def _plan(model: AttentionOnlyModel, task: Task, circuit: Any, draws: int, max_bytes: int) -> Plan:
    alone = alone_of(model, bound_to(model, task), circuit, max_bytes)
    return plan_of_circuits(model, task, alone, 1 + len(alone.order) + draws, max_bytes)


@plans(_plan)
def minimality(
    model: AttentionOnlyModel,
    task: Task,
    circuit: Any,
    *,
    draws: int = 20,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Minimality:
    """Remove each head or edge from a circuit, one at a time, beside random others that are not its own.

    The null is that of Shi et al. 2024: a random head or edge of the rest of the model is put into the
    circuit and taken out again. What a circuit needs costs it more than nearly all of those; ``p`` is
    ``(1 + as costly ones) / (1 + draws)``, so no smaller than ``1 / (1 + draws)``.

    Args:
        model: the converted model.
        task: the prompts, with counterfactuals; best others than the circuit was found on.
        circuit: a ``Circuit``, or what else ``faithfulness`` takes as a ranking, all of it.
        draws: how many random others; 0 leaves them out.
        seed: of the random others.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: as for ``faithfulness``.
    """
    if draws < 0:
        raise MechInterpError(f"draws={draws}; expected 0 or more")
    made = _plan(model, task, circuit, draws, max_bytes)
    max_bytes = within(made, max_bytes, "fewer prompts").left(max_bytes)
    bound = ready(model, bound_to(model, task), max_bytes)
    bound.counterfactual("minimality")
    alone = alone_of(model, bound, circuit, max_bytes)
    found, ends = ends_of(model, bound, max_bytes)
    n = len(alone.order)
    parts = [Parts(alone.order), *(Parts(alone.order[alone.order != own]) for own in alone.order)]
    parts += [Parts(torch.cat([alone.order, one[None]])) for one in _others(alone, draws, seed)]
    values = faithful(alone.metric(parts), ends)[0]
    whole, without, null = float(values[0]), values[1 : n + 1], values[n + 1 :] - values[0]
    frame = pd.DataFrame({alone.units[:-1]: alone.names(), "without": without.tolist()})
    frame["loss"] = whole - frame["without"]
    frame["p"] = [_p(loss, null) for loss in frame["loss"]]
    frame = frame.sort_values("loss", ascending=False, kind="stable", ignore_index=True)
    notes = {
        "metric": bound.about, "faithfulness of the circuit": round(whole, 4), **found.notes,
        **alone.held_out(task), "random others": len(null), "seed": seed,
    }  # fmt: skip
    receipt = Receipt((whole_check(alone, ends),), notes)
    return Minimality(frame=frame, receipt=receipt, faithfulness=whole, null=null)


def _others(alone: Alone, draws: int, seed: int) -> Tensor:
    """Heads or edges at random that are not in the circuit, fewer where there are fewer."""
    generator = torch.Generator().manual_seed(seed)
    drawn = alone.drawn(min(alone.total, draws + len(alone.order)), generator)
    return drawn[~torch.isin(drawn, alone.order)][:draws]


def _p(loss: float, null: Tensor) -> float:
    """NaN without a null."""
    return (1 + int((null >= loss).sum())) / (1 + len(null)) if len(null) else float("nan")
