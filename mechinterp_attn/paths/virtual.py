"""A virtual head on a prompt: two or more heads read one after the other, as one head.

Heads h1, ..., hn compose to the frozen head with pattern ``A_n ... A_1`` and OV ``OV_1 ... OV_n``
(Elhage et al. 2021, "virtual attention heads"); neurons compose the same way, their pattern being a
diagonal.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.frozen.behaviour import Behaviour
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.goals import Target, Token, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen, sum_tolerance
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.model.index import One


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtualTerm(Result):
    """What a virtual head attends to on a prompt, and what it writes.

    Attributes:
        heads: the labels, earliest first.
        pattern: the product of the frozen patterns ``[query, key]``; rows need not sum to 1 (a
            neuron keeps its gate's share).
        logits: what the term adds to all logits, ``[pos, d_vocab_out]``, value biases not included.
        loss_change: mean next-token loss of the prompt with the term minus without it, all else
            frozen (nats); NaN for a single token.
        about: the target in words.
        frame: one row per source position: ``position, token, weight`` (the pattern's entry at
            the target's position), ``value`` (the term's contribution to the target from there).
    """

    title: ClassVar[str] = "Virtual head"
    sort_by: ClassVar[str | None] = "value"
    heads: tuple[str, ...]
    pattern: Float[Tensor, "query key"] = field(repr=False)
    logits: Float[Tensor, "pos d_vocab"] = field(repr=False)
    loss_change: float
    about: str


def _plan(frozen: Frozen, heads: Sequence[One]) -> Plan:
    """The term's logits with those of its loss, its pattern, and one bank's heads on every position."""
    n, size = len(frozen.tokens), frozen.logits.element_size()
    held = max((bank.bank.n_heads * bank.bank.d_head for bank in frozen.banks), default=0)
    floats = 4 * frozen.logits.numel() + 4 * n * n + n * (2 * held + 8 * frozen.end.shape[1])
    result = size * (frozen.logits.numel() + n * n) + CELL * 4 * n
    return plan_runs(
        frozen.model,
        f"the term through {len(heads)} heads on {n} tokens",
        runs=0.5,
        rows=1,
        positions=n,
        bytes=result + size * floats,
        result=result,
    )


@of_prompt
@plans(_plan)
@torch.no_grad()
def virtual_head(
    frozen: Frozen,
    *heads: One,
    target: Target | None = None,
    position: int = -1,
    against: Token | None = None,
    task: Behaviour | None = None,
    max_bytes: int = MAX_BYTES,
) -> VirtualTerm:
    """Compute the term of the path expansion that leads from the embeddings through exactly these heads.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        heads: labels or heads, earliest first, attention heads and neurons alike; or a virtual head
            such as ``"L0H3 > L1H0"``.
        target, position, against: the logit (difference) that ``frame`` breaks down by source
            position; by default the model's top prediction at the last position.
        task: a behaviour (``mia.Task``) that has this prompt, in place of target, position and against; its
            metric is explained, by its gradient where it is no sum of logits.
        max_bytes: memory beyond the model's and the frozen prompt's that may be used, the result included.

    Raises:
        MechInterpError: no heads, an unknown label, or a head that is not earlier than the next one.
    """
    within(_plan(frozen, heads), max_bytes, "a shorter prompt")
    if not heads:
        raise MechInterpError("give at least one head, such as virtual_head(frozen, 'L0H3', 'L1H0')")
    labels = tuple(part.label for head in heads for part in frozen.model.heads.one(head).chain)
    found = [frozen.locate(label) for label in labels]
    late = [
        f"{labels[i]} is not earlier than {labels[i + 1]}"
        for i in range(len(found) - 1)
        if found[i].depth >= found[i + 1].depth
    ]
    if late:
        raise MechInterpError("; ".join(late) + ": a head only reads what earlier sublayers wrote")
    goal = resolve_goal(frozen, target=target, against=against, position=position, task=task)

    x, depth = frozen.start, 0
    for place in found:
        x, depth = frozen.write_at(place, frozen.read_at(place, x, depth)), place.depth
    term = frozen.carry(x, depth, len(frozen.sublayers))

    # The same term read backwards from the target, which tells its sources apart.
    w = torch.zeros_like(frozen.end[None, :, 0])
    w[0, goal.position] = 1
    v, depth = goal.direction[None], len(frozen.sublayers)
    pattern = torch.eye(len(frozen.tokens), dtype=w.dtype, device=w.device)
    for place in reversed(found):
        w, v = frozen.carry_rank_one(w, v, place.depth, depth)
        bank, at = frozen.bank_at(place), torch.tensor([place.head], device=w.device)
        w, v, depth = bank.spread(w, at), bank.pull(v, at), place.depth
        pattern = pattern @ bank.bank.dense_pattern(bank.pattern, place.head)[:, :-1]
    w, v = frozen.carry_rank_one(w, v, 0, depth)
    values = w[0] * (frozen.start @ v[0])

    logits = frozen.read_out(term)
    error = abs(float(values.sum() - term[goal.position] @ goal.direction))
    loss = float("nan")
    if len(frozen.tokens) > 1:
        loss = float(frozen.loss(frozen.logits) - frozen.loss(frozen.logits - logits))
    frame = pd.DataFrame(
        {
            "position": range(len(frozen.tokens)),
            "token": frozen.str_tokens,
            "weight": pattern[goal.position].double().cpu().numpy(),
            "value": values.double().cpu().numpy(),
        }
    )
    check = Check("sources sum to the term run forward", error, sum_tolerance(frozen))
    return VirtualTerm(
        frame=frame,
        receipt=Receipt((check,), frozen.receipt.notes),
        heads=labels,
        pattern=pattern,
        logits=logits,
        loss_change=loss,
        about=goal.about,
    )
