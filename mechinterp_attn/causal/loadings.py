"""What a score is made of: the loading of every earlier head and neuron on where a head looks.

A score is a query times a key, and each is a sum over what was written to the stream before. With one side
held fixed the score is linear in the other, so every earlier head has a loading on either side, and the
loadings of a side add up to the score (Elhage et al. 2021, "QK circuits" with composition). Norms,
rotations and what the heads hold are those of the run.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.causal.task import Task
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.frozen.freezing import freeze
from mechinterp_attn.frozen.goals import resolve_position
from mechinterp_attn.frozen.prompt import Frozen, Place
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.model.heads import Head
from mechinterp_attn.paths.score import Contrast, key_weights, pullback, resolve_key

Row = tuple[str, str, int | None, str, int | None]  # side, head, layer, kind, index


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadLoadings(Result):
    """What every earlier head and neuron adds to a head's score, through its query and through its key.

    Attributes:
        frame: one row per side and source, largest first: ``side`` ("query" or "key"), ``head`` (label, or
            "embed", "position", "L0 attn bias", "own bias", "distance"), ``layer, kind, index``,
            ``value`` (units of the score, a mean over prompts) and ``share`` of the total.
        total: the score: before softmax and a soft cap, with its scale; or its excess over other keys.
        head: the label.
        positions: of every prompt, its query and key.
    """

    title: ClassVar[str] = "Loadings on a score"
    sort_by: ClassVar[str | None] = "value"
    total: float
    head: str
    positions: list[tuple[int, int]]


def _plan(model: AttentionOnlyModel, prompt: Any) -> Plan:
    """The longest prompt, frozen; fields on its stream, and a row for every head on either side."""
    prompts = _prompts(model, prompt)
    longest = max(prompts, key=len)
    table = 2 * CELL * TABLE * model.n_heads
    held = sum(bank.n_heads * bank.d_head for bank in model.banks)
    floats = len(longest) * (held + 8 * model.spec.d_model)
    return plan_runs(
        model,
        f"loadings on a score in {len(prompts):,} prompts of up to {len(longest):,} tokens",
        runs=4 * sum(map(len, prompts)) / len(longest),
        rows=1,
        positions=len(longest),
        bytes=plan(freeze, model, longest).bytes + model.W_E.element_size() * floats + 3 * table,
        result=table,
        chunks=len(prompts),
    )


@plans(_plan)
@torch.no_grad()
def head_loadings(
    model: AttentionOnlyModel,
    prompt: Task | str | Tensor,
    head: str | Head,
    query: int = -1,
    key: int | None = None,
    *,
    against: Contrast = None,
    max_bytes: int = MAX_BYTES,
) -> HeadLoadings:
    """Which heads, neurons and embeddings make a head look where it looks, or a neuron fire.

    What all keys of a query share does not move the head: ``against="others"`` gives the loadings on the
    score minus its mean over the other keys. For every pair of a query's and a key's source, see
    ``paths.expand_score``.

    Args:
        model: the converted model.
        prompt: a text, tokens ``[pos]``, or a task, over whose prompts loadings are averaged.
        head: a label or head of any kind. A neuron's score is its pre-activation.
        query: the position that looks; negative counts from the end of each prompt.
        key: the position that is looked at, likewise; by default the one that the head looks at most in
            each prompt. Of a neuron, its own token.
        against: None for the score itself, "others", or another key's position.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: no such head, a position outside a prompt, a key that the mask hides, no other key
            to compare with; it needs more than max_bytes.
    """
    label = model.heads.one(head).label
    if ">" in label:
        raise MechInterpError(
            f"{label} is a virtual head, which has no score of its own; give its last head"
        )
    within(_plan(model, prompt), max_bytes, "shorter prompts")
    prompts = _prompts(model, prompt)
    rows: list[Row] = []
    values: Tensor = torch.zeros(0)
    total, error, scale, places = 0.0, 0.0, 1.0, []
    for tokens in Progress(prompts, desc="loadings", show=len(prompts) > 1):
        frozen = freeze(model, tokens)
        rows, own, score, at = _of_prompt(frozen, label, query, key, against)
        values = values + own if len(values) else own
        on_query = torch.tensor([side == "query" for side, *_ in rows])
        sums = torch.stack([own[on_query].sum(), own[~on_query].sum()])
        error = max(error, float((sums - score).abs().max()))
        scale = max(scale, abs(score))
        total += score / len(prompts)
        places.append(at)
    frame = pd.DataFrame(rows, columns=["side", "head", "layer", "kind", "index"])
    frame = frame.astype({"layer": "Int64", "index": "Int64"})
    frame["value"] = (values / len(prompts)).numpy()
    frame["share"] = frame["value"] / total if total else float("nan")
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
    check = Check(
        "loadings of either side sum to the score (worst prompt)", error, TOLERANCE[model.W_E.dtype] * scale
    )
    notes = {"prompts": len(prompts), "score": round(total, 6), "against": str(against)}
    return HeadLoadings(
        frame=frame.loc[order].reset_index(drop=True),
        receipt=Receipt((check,), notes | {"dtype": str(model.W_E.dtype).removeprefix("torch.")}),
        total=total,
        head=label,
        positions=places,
    )


def _prompts(model: AttentionOnlyModel, prompt: Any) -> list[Tensor]:
    if not isinstance(prompt, Task):
        return list(model.as_tokens(prompt))
    clean = prompt.bind(model).clean
    return [row[real] for row, real in zip(clean.tokens, clean.real, strict=True)]


def _of_prompt(
    frozen: Frozen, head: str, query: int, key: int | None, against: Contrast
) -> tuple[list[Row], Tensor, float, tuple[int, int]]:
    """Sources with their loadings (float64), the score, and its query and key."""
    q = resolve_position(frozen, query)
    place = frozen.locate(head)
    bank, x = frozen.bank_at(place), frozen.residuals[place.depth]
    sides = bank.score_sides(place.head, x)
    if key is None and bank.bank.mixes_positions:
        key = int(bank.bank.dense_pattern(bank.pattern, place.head)[q, : len(x)].argmax())
    k = resolve_key(frozen, sides, head, q, key)
    keys = key_weights(sides, head, q, k, against, frozen)
    at_query = torch.eye(len(x)).to(x)[q]
    queried, looked_at = (
        at_query @ (sides.query(x) + sides.query_bias),
        keys @ (sides.key(x) + sides.key_bias),
    )
    distance = 0.0 if sides.distance is None else float(sides.distance[q] @ keys)
    rows: list[Row] = []
    values: list[Tensor] = []
    for side, field, own in (
        (
            "query",
            pullback(sides.query, torch.outer(at_query, looked_at), x),
            at_query @ sides.query_bias @ looked_at,
        ),
        ("key", pullback(sides.key, torch.outer(keys, queried), x), keys @ sides.key_bias @ queried),
    ):
        found, loads = _along(frozen, place, field)
        rows += [(side, *one) for one in [*found, ("own bias", None, "bias", None)]]
        values += [loads, own.double()[None].cpu()]
        if sides.distance is not None:
            rows.append((side, "distance", None, "bias", None))
            values.append(torch.tensor([distance], dtype=torch.float64))
    return rows, torch.cat(values), float(queried @ looked_at) + distance, (q, k)


def _along(frozen: Frozen, place: Place, field: Tensor) -> tuple[list[tuple[Any, ...]], Tensor]:
    """What was written along a direction of the stream that a head reads, source by source."""
    rows: list[tuple[Any, ...]] = []
    values: list[Tensor] = []
    for source in frozen.sources:
        if source.reader <= place.depth:
            moved = (frozen.carry(source.values, source.depth, place.depth) * field).sum()
            rows.append((source.name, source.layer, "embed" if source.kind == "start" else "bias", None))
            values.append(moved[None])
    for depth, earlier in enumerate(frozen.sublayers[: place.depth]):
        direct = frozen.carry_back(field, depth, place.depth)
        for bank, z in zip(earlier.banks, frozen.held[depth], strict=True):
            own = bank.bank
            rows += [(label, own.layer, own.kind, i) for i, label in enumerate(own.labels())]
            values.append((z * bank.unwrite(direct)).sum((0, -1)))
    return rows, torch.cat(values).double().cpu()
