"""The strongest virtual heads of a model by weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import torch

from mechinterp_attn.circuits.composition_scores import CompositionScores, composition
from mechinterp_attn.circuits.copying import copying_scores
from mechinterp_attn.circuits.ends import alignment_note
from mechinterp_attn.circuits.groups import Select, groups_of
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plan, plans
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.select import virtual_head
from mechinterp_attn.model.virtual import JOIN

BATCH = 64  # chains lengthened at a time


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtualHeads(Result):
    """Chains of heads that act as one, strongest first.

    Attributes:
        frame: one row per chain: ``head`` (its label, usable wherever a head is), ``src`` (its heads
            but the last), ``dst`` (the last), ``norm`` (Frobenius, of ``W_OV1 W_OV2 ...``), ``score``
            (V-composition of ``src`` with ``dst``), ``baseline, z``, and the ``copying_score`` of the
            product (NaN where the vocabularies differ).
    """

    title: ClassVar[str] = "Virtual heads by weights"
    sort_by: ClassVar[str | None] = "norm"


def _plan(model: AttentionOnlyModel, src: Select, dst: Select, length: int, max_bytes: int) -> Plan:
    pairs = plan(composition, model, "V", src, dst, max_bytes=max_bytes)
    if length == 2:
        return pairs
    groups = groups_of(model, dst)
    chains = flops = 0
    for one in groups_of(model, src):
        for two in groups:
            if one.writes_at < two.reads_at:
                last = [three for three in groups if two.writes_at < three.reads_at]
                n, rank = len(one) * len(two), min(one.rank, two.rank)
                chains += n * sum(len(three) for three in last)
                flops += 2 * n * rank * sum(len(three) * three.rank for three in last) * model.spec.d_model
    return replace(
        pairs,
        what=f"chains of three, at most {chains:,}",
        flops=pairs.flops + flops,
        seconds=pairs.seconds * (1 + flops / pairs.flops),
    )


@plans(_plan, option=True)
@torch.no_grad()
def virtual_heads(
    model: AttentionOnlyModel,
    *,
    src: Select = "attention",
    dst: Select = "attention",
    length: int = 2,
    top_k: int = 20,
    max_bytes: int = MAX_BYTES,
) -> VirtualHeads:
    """Rank chains of heads by the norm of their combined OV circuit (Elhage et al. 2021).

    Chains of three are found exactly without trying all: a pair is lengthened only while its norm
    times the largest singular value of any later head beats the weakest chain on the list.

    Args:
        model: the converted model.
        src, dst: earlier and later heads, as for ``composition``; in a chain of three the first is out
            of ``src``, the others are out of ``dst``.
        length: heads in a chain, 2 or 3.
        top_k: how many to list; no more than there are.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: no chain that composes, non-finite weights, too many pairs to list, length not
            2 or 3, or top_k below 1.
    """
    if top_k < 1 or length not in (2, 3):
        raise MechInterpError(f"top_k={top_k}, length={length}; expected at least 1, and 2 or 3")
    scores = composition(model, "V", src, dst, max_bytes=max_bytes)
    norms: dict[str, float] = {}
    for select in (src, dst):
        for group in groups_of(model, select):
            norms |= dict(zip(group.labels, group.write_norms().tolist(), strict=True))
    frame = _with_norms(scores, norms)
    if length == 3:
        frame = _lengthened(model, frame, dst, norms, top_k, max_bytes)
    frame = frame.head(top_k).reset_index(drop=True)
    heads = [virtual_head(model, a, b) for a, b in zip(frame["src"], frame["dst"], strict=True)]
    copying = copying_scores(model, heads, max_bytes=max_bytes)
    frame["copying_score"] = frame["head"].map(copying.frame.set_index("head")["copying_score"])
    receipt = replace(scores.receipt, notes={**scores.receipt.notes, **alignment_note(model, None)})
    return VirtualHeads(frame=frame, receipt=receipt)


def _with_norms(scores: CompositionScores, norms: Mapping[str, float]) -> pd.DataFrame:
    """Composition scores as chains and their norms, largest first."""
    frame = scores.frame[["src", "dst", "score", "baseline", "z"]].copy()
    frame.insert(2, "norm", frame["score"] * frame["src"].map(norms) * frame["dst"].map(norms))
    frame.insert(0, "head", frame["src"] + JOIN + frame["dst"])
    return frame.sort_values("norm", ascending=False, kind="stable")


def _lengthened(
    model: AttentionOnlyModel,
    pairs: pd.DataFrame,
    dst: Select,
    norms: Mapping[str, float],
    top_k: int,
    max_bytes: int,
) -> pd.DataFrame:
    """The strongest chains of three, out of all pairs, largest norm first.

    Raises:
        MechInterpError: no head comes after any of the pairs.
    """
    later = groups_of(model, dst)
    reach = [(group.reads_at, float(group.spectral_norms().max())) for group in later]
    steps = {label: group.writes_at for group in later for label in group.labels}
    gain = {at: max((s for reads, s in reach if reads > at), default=0.0) for at in set(steps.values())}
    bound = (pairs["norm"] * pairs["dst"].map(steps).map(gain)).sort_values(ascending=False, kind="stable")
    bound = bound[bound > 0]
    if not len(bound):
        raise MechInterpError("no chain of three: no dst head reads what a pair of the heads writes")
    own = pairs.set_index("head")["norm"]
    found = pd.DataFrame({"norm": []})
    for first in Progress(range(0, len(bound), BATCH), desc="chains of three", show=len(bound) > BATCH):
        if len(found) == top_k and bound.iloc[first] <= found["norm"].iloc[-1]:
            break  # no later pair can be lengthened to as much
        batch = pairs.loc[bound.index[first : first + BATCH], "head"]
        scores = composition(model, "V", batch.tolist(), dst, max_bytes=max_bytes)
        more = _with_norms(scores, {**norms, **own[batch].to_dict()})
        found = pd.concat([found, more]) if len(found) else more
        found = found.sort_values("norm", ascending=False, kind="stable").head(top_k)
    return found
