"""Composition as tokens see it: does a later head look for the very token that an earlier one wrote down?

Frobenius composition (``composition``) adds up squares over all of the residual stream, most of which no
token ever reaches, and does not ask whether what was written is what is looked for. Here ``W_OV1`` is read
from embeddings, the later head's other side is read from embeddings too, and the score is the cosine of
the two maps from tokens to the stream between them. It is the trace of the virtual circuit on the
vocabulary, ``sum_t e_t W_OV1 W_QK2' e_t'`` (Elhage et al. 2021, "induction heads": positive eigenvalues),
over the norms of its two halves, so that 1 is a perfect match of every token with itself.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.ends import CHUNK, embedding, norms_note
from mechinterp_attn.circuits.groups import OTHER, HeadGroup, Select, groups_of, refuse_non_finite
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, make_plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

MAX_PAIRS = 2_000_000  # that are listed
Pairs = list[tuple[HeadGroup, HeadGroup]]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenComposition(Result):
    """How well later heads look for the tokens that earlier heads write down.

    Attributes:
        frame: one row per pair, largest score first: ``src, dst, kind``; ``score`` in [-1, 1]; ``spread``,
            its standard deviation where what ``src`` writes is turned at random (the mean is 0); ``z``,
            the score over it.
    """

    title: ClassVar[str] = "Composition on tokens"
    sort_by: ClassVar[str | None] = "score"


def _plan(model: AttentionOnlyModel, kind: str, src: Select, dst: Select, max_bytes: int) -> Plan:
    d = model.spec.d_model
    pairs = _pairs(model, kind, src, dst)
    count = sum(len(one) * len(two) for one, two in pairs)
    flops = 4 * d * sum(len(a) * a.rank * len(b) * b.qk_rank for a, b in pairs)
    flops += 4 * sum(len(a) * len(b) * a.rank * b.qk_rank * (a.rank + b.qk_rank) for a, b in pairs)
    flops += 2 * model.spec.d_vocab * d * d
    least = max((_of_one(a, b, d) for a, b in pairs), default=0)
    held = 8 * (3 * CHUNK * d + 4 * d * d)
    result = CELL * 3 * TABLE * count
    rooms = max(1, (max_bytes - result - held) // max(1, least))
    widest = max((len(a) for a, _ in pairs), default=1)
    return make_plan(
        what=f"{kind}-composition on tokens of {count:,} pairs", flops=flops, device=model.W_E.device,
        bytes=result + held + least * min(rooms, widest), result=result, chunks=len(pairs),
        shape=(4096, d, 4096), exact=True,
    )  # fmt: skip


@plans(_plan)
@torch.no_grad()
def token_composition(
    model: AttentionOnlyModel,
    kind: Literal["Q", "K"] = "K",
    src: Select = "attention",
    dst: Select = "attention",
    *,
    max_bytes: int = MAX_BYTES,
) -> TokenComposition:
    """How well later heads look for the tokens that earlier heads write down, for all pairs of two sets.

    An induction head scores high with the previous-token head before it: what the one moves from a token is
    what the other, at that token, looks for. Tokens count alike, about their mean; of rotary heads, queries
    and keys are compared unturned.

    Args:
        model: the converted model.
        kind: whether the later head reads the earlier one in its keys ("K": they are compared with the
            queries of tokens) or its queries ("Q": with the keys of tokens).
        src, dst: earlier and later heads: labels or heads, a kind, or None for all. Pairs in which the
            later one does not read the earlier are left out.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: another kind, no such head, no pair that composes, too many pairs, or weights that
            are not finite.
    """
    pairs = _pairs(model, kind, src, dst)
    made = within(_plan(model, kind, src, dst, max_bytes), max_bytes, "fewer heads")
    refuse_non_finite(model, (group.bank for pair in pairs for group in pair))
    S = _covariance(model)
    d, other = model.spec.d_model, OTHER[kind]
    room = max_bytes - made.result - 8 * (3 * CHUNK * d + 4 * d * d)
    tables = []
    for one, two in pairs:
        look, near = (two.stacked(side, dtype=torch.float64) for side in (other, kind))  # [dst, d, r]
        at_once = max(1, room // _of_one(one, two, d))
        for start in range(0, len(one), at_once):
            part = torch.arange(start, min(start + at_once, len(one)), device=S.device)
            V, O = (one.stacked(side, part, torch.float64) for side in ("V", "O"))  # noqa: E741
            score, spread = _scores(S, V, O, look, near)
            row, column = score.isfinite().nonzero().T
            names = [one.label(start + i) for i in row.tolist()], [two.label(j) for j in column.tolist()]
            numbers = [values[row, column].cpu().numpy() for values in (score, spread)]
            columns = dict(zip(("src", "dst", "score", "spread"), (*names, *numbers), strict=True))
            tables.append(pd.DataFrame(columns))
    frame = pd.concat(tables, ignore_index=True)
    frame.insert(2, "kind", kind)
    frame["z"] = frame["score"] / frame["spread"]
    frame = frame.sort_values("score", ascending=False, kind="stable", ignore_index=True)
    error = _error(model, kind, frame)
    notes = {
        "compared": len(frame),
        "null": "what src writes turned at random: mean 0, spread in closed form",
        "tokens": f"all {model.spec.d_vocab:,}, alike, about their mean",
        "norms": norms_note(model),
        "dtype": "float64",
    }
    check = Check("the largest score as a sum over tokens", error, 1e-8)
    return TokenComposition(frame=frame, receipt=Receipt((check,), notes))


def _pairs(model: AttentionOnlyModel, kind: str, src: Select, dst: Select) -> Pairs:
    if kind not in ("Q", "K"):
        raise MechInterpError(
            f"kind={kind!r}; expected 'Q' or 'K': a later head compares queries with keys, and through "
            "values nothing is looked for (circuits.copying_scores of a virtual head says what comes)"
        )
    found = [
        (one, two)
        for two in groups_of(model, dst)
        if two.reads_stream(kind)  # type: ignore[arg-type]
        for one in groups_of(model, src)
        if one.writes_at < two.reads_at and two.reads_stream(OTHER[kind])  # type: ignore[index, arg-type]
    ]
    count = sum(len(one) * len(two) for one, two in found)
    if not count:
        raise MechInterpError("none of the dst heads reads what a src head writes; src must come earlier")
    if count > MAX_PAIRS:
        raise MechInterpError(
            f"{count:,} pairs are too many to list (up to {MAX_PAIRS:,}); name fewer heads"
        )
    return found


def _of_one(one: HeadGroup, two: HeadGroup, d: int) -> int:
    """Bytes that one head of ``src`` takes with all heads of ``two``."""
    wide = len(two) * two.qk_rank
    return 8 * (4 * one.rank * wide + 2 * one.rank * d + 6 * len(two)) + 8 * 4 * d * wide // max(
        1, len(one)
    )


def _covariance(model: AttentionOnlyModel) -> Float[Tensor, "d_model d_model"]:
    """Of the embeddings of all tokens as heads read them, float64."""
    n, d = model.spec.d_vocab, model.spec.d_model
    S = torch.zeros(d, d, dtype=torch.float64, device=model.W_E.device)
    mean = S.new_zeros(d)
    for start in range(0, n, CHUNK):
        E = embedding(model, torch.arange(start, min(start + CHUNK, n), device=S.device))
        S += E.T @ E
        mean += E.sum(0)
    return S / n - torch.outer(mean / n, mean / n)


def _scores(
    S: Tensor,
    V: Float[Tensor, "src d_model r"],
    O: Float[Tensor, "src r d_model"],  # noqa: E741
    look: Float[Tensor, "dst d_model k"],
    near: Float[Tensor, "dst d_model k"],
) -> tuple[Float[Tensor, "src dst"], Float[Tensor, "src dst"]]:
    """Cosines of ``V O`` and ``look near'``, both from tokens to the stream, and their spread."""
    read = torch.einsum("sdr,gdk->srgk", S @ V, look)
    meets = torch.einsum("srd,gdk->srgk", O, near)
    trace = (read * meets).sum((1, 3))
    written, wanted = O @ O.mT, near.mT @ near
    size = ((V.mT @ (S @ V)) * written).sum((1, 2)).clamp_min(0).sqrt()
    other = ((look.mT @ (S @ look)) * wanted).sum((1, 2)).clamp_min(0).sqrt()
    turned = torch.einsum("srgk,gkl->srgl", read, wanted)
    turned = torch.einsum("srgl,sqr->sqgl", turned, written)
    spread = ((turned * read).sum((1, 3)).clamp_min(0) / S.shape[0]).sqrt()
    both = size[:, None] * other
    both = torch.where(both > 0, both, torch.nan)
    return trace / both, spread / both


def _error(model: AttentionOnlyModel, kind: str, frame: pd.DataFrame) -> float:
    """Of the first row, from the tokens' own vectors."""
    if not len(frame):
        return 0.0
    one, two = (model.heads.one(frame[side][0]) for side in ("src", "dst"))
    E = embedding(model)
    E = E - E.mean(0)
    O = one.bank.seen(one.W_O.double())  # noqa: E741
    far, near = (two.W_Q, two.W_K) if kind == "K" else (two.W_K, two.W_Q)
    left, right = E @ one.W_V.double() @ O, E @ far.double() @ near.double().T
    cosine = float((left * right).sum() / (left.norm() * right.norm()))
    return abs(cosine - float(frame["score"][0]))
