"""Direct logit attribution: what every head and neuron writes straight to a chosen next token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch

from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.frozen.behaviour import Behaviour
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.goals import Target, Token, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen, sum_tolerance
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.paths.explanation import Explanation

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class LogitAttribution(Explanation):
    """A logit (or a logit difference) as a sum of direct contributions.

    Attributes:
        total, target, against, position, about: what is explained, as in ``Explanation``.
        frame: one row per term: ``head`` (label, or "embed", "position", "L0 attn bias", ...),
            ``layer, kind, index, value`` (logits) and ``share`` of the total.
    """

    title: ClassVar[str] = "Direct logit attribution"
    sort_by: ClassVar[str | None] = "value"

    def plot(self, k: int = 20) -> Figure:
        """The ``k`` largest terms as signed bars.

        Args:
            k: how many to show.
        """
        return draw(self, k)


def _plan(frozen: Frozen) -> Plan:
    """A row for every head, and once more while the table is made; the field on every stream."""
    table = CELL * TABLE * (frozen.model.n_heads + len(frozen.sources) + 1)
    fields = frozen.end.element_size() * (len(frozen.sublayers) + 4) * frozen.end.numel()
    return plan_runs(
        frozen.model,
        f"the attribution of a logit to {frozen.model.n_heads:,} heads",
        runs=1,
        rows=1,
        positions=len(frozen.tokens),
        bytes=3 * table + fields,
        result=table,
    )


@of_prompt
@plans(_plan)
@torch.no_grad()
def logit_attribution(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Token | None = None,
    task: Behaviour | None = None,
    max_bytes: int = MAX_BYTES,
) -> LogitAttribution:
    """Split a logit into the direct contributions of the embedding, every head and neuron, and the biases.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        target: the next token (text of one token, or its id); by default the model's own top one.
        position: where the prediction is made; negative counts from the end.
        against: a second token: attribute ``logit(target) - logit(against)``.
        task: a behaviour (``mia.Task``) that has this prompt, in place of target, position and against; its
            metric is explained, by its gradient where it is no sum of logits.
        max_bytes: memory beyond the model's and the frozen prompt's that may be used, the result included.

    Raises:
        MechInterpError: the position is outside the prompt, a target is no single token, or the table
            needs more than max_bytes.
    """
    within(_plan(frozen), max_bytes, "a shorter prompt")
    goal = resolve_goal(frozen, target=target, against=against, position=position, task=task)
    pos, direction, total = goal.position, goal.direction, goal.total
    n = len(frozen.sublayers)
    rows: list[tuple[str, int | None, str, None, float]] = [
        (
            source.name,
            source.layer,
            "embed" if source.kind == "start" else "bias",
            None,
            float(frozen.carry(source.values, source.depth, n)[pos] @ direction),
        )
        for source in frozen.sources
    ]
    field = goal.field(frozen)
    tables = []
    for i, sublayer in enumerate(frozen.sublayers):
        direct = frozen.carry_back(field, i, n)[pos]
        for bank in sublayer.banks:
            values = bank.head_outputs_along(sublayer.stream, pos, direct)
            heads = bank.bank
            tables.append(
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
    rows.append(("unembedding bias", None, "bias", None, goal.offset))
    others = pd.DataFrame(rows, columns=["head", "layer", "kind", "index", "value"])
    starts = len(frozen.parts)
    frame = pd.concat([others.iloc[:starts], *tables, others.iloc[starts:]], ignore_index=True)
    frame = frame.astype({"layer": "Int64", "index": "Int64"})
    frame["share"] = frame["value"] / total
    error = abs(float(frame["value"].sum()) - total)
    check = Check("terms sum to the logit", error, sum_tolerance(frozen))
    return LogitAttribution(
        frame=frame,
        receipt=Receipt((check,), frozen.receipt.notes),
        **Explanation.of(goal),
    )
