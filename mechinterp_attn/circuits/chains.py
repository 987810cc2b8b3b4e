"""The strongest virtual heads of a model by weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, cast

import torch

from mechinterp_attn.circuits.composition import CompositionScores, composition
from mechinterp_attn.circuits.copying import copying_scores
from mechinterp_attn.circuits.groups import Select, groups_of
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Result
from mechinterp_attn.virtual import JOIN, virtual_head


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class VirtualHeads(Result):
    """Pairs of heads that act as one, strongest first.

    Attributes:
        frame: one row per pair: ``head`` (its label, usable wherever a head is), ``src, dst``,
            ``norm`` (Frobenius, of ``W_OV1 W_OV2``), ``score`` (V-composition), ``baseline, z``, and the
            ``copying_score`` of the product (NaN where the vocabularies differ).
    """

    title: ClassVar[str] = "Virtual heads by weights"
    sort_by: ClassVar[str | None] = "norm"


@torch.no_grad()
def virtual_heads(
    model: AttentionOnlyModel, *, src: Select = "attention", dst: Select = "attention", top_k: int = 20
) -> VirtualHeads:
    """Rank pairs of heads by the size of what they move together (Elhage et al. 2021).

    Args:
        src, dst: earlier and later heads, as for ``composition``.
        top_k: how many to list; no more than there are.

    Raises:
        MechInterpError: no pair that composes, too many pairs to list, or top_k below 1.
    """
    if top_k < 1:
        raise MechInterpError(f"top_k={top_k}; expected at least 1")
    scores = cast(CompositionScores, composition(model, "V", src, dst))
    norms: dict[str, float] = {}
    for select in (src, dst):
        for group in groups_of(model, select):
            norms |= dict(zip(group.labels, group.write_norms().tolist(), strict=True))
    frame = scores.frame.drop(columns=["kind", "spread", "z_spectrum"])
    frame["norm"] = frame["score"] * frame["src"].map(norms) * frame["dst"].map(norms)
    frame.insert(0, "head", frame["src"] + JOIN + frame["dst"])
    frame = frame.sort_values("norm", ascending=False, kind="stable").head(top_k).reset_index(drop=True)
    frame["copying_score"] = float("nan")
    if model.spec.d_vocab == model.spec.d_vocab_out:
        heads = [virtual_head(model, a, b) for a, b in zip(frame["src"], frame["dst"], strict=True)]
        found = copying_scores(model, heads).frame.set_index("head")["copying_score"]
        frame["copying_score"] = frame["head"].map(found)
    columns = ["head", "src", "dst", "norm", "score", "baseline", "z", "copying_score"]
    return VirtualHeads(frame=frame[columns], receipt=scores.receipt)
