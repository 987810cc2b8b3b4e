"""What a head's QK circuit makes of positions alone (Elhage et al. 2021, positional heads).

Learned positions are vectors of the residual stream, so ``W_pos W_QK W_pos^T`` is a table of position
against position. Rotary positions turn queries and keys: only the distance matters, and the score of
an average query with an average key is a curve over distances.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar, Literal, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.circuit import qk_circuit, token_texts
from mechinterp_attn.circuits.ends import BIASES, CHUNK, as_read, norms_note
from mechinterp_attn.circuits.groups import finite_head
from mechinterp_attn.circuits.listed import how_many, listed, listed_note, original, size_of
from mechinterp_attn.circuits.streaming import top_entries
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention import AttentionBank
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class PositionCircuit(Result):
    """A head's attention by position, tokens left out.

    Attributes:
        head: its label.
        scores: learned positions: ``(W_pos W_Q + b_Q) W_K^T W_pos^T``, unscaled, ``[query, key]``; rotary
            ones: the score of the average query with the average key, ``[offset]``; ALiBi's: what the
            distance alone adds to a scaled score, ``[offset]``.
        pattern: the attention that the scores alone give, ``[query, key]``; learned positions are
            divided by the size that the norm typically gives them beside a token.
        frame: one row per ``offset`` (how many tokens before the query the key stands): mean
            ``score`` and mean ``attention`` over the queries that have such a key.
    """

    title: ClassVar[str] = "Position circuit"
    sort_by: ClassVar[str | None] = "attention"
    head: str
    scores: Tensor = field(repr=False)
    pattern: Float[Tensor, "query key"] = field(repr=False)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenPositions(Result):
    """Which tokens attend to which positions, or positions to tokens, by weights, the query's bias
    included.

    Attributes:
        head: its label.
        frame: ``token, token_id, position, value`` (against the average key, unscaled), ``rank``.
    """

    title: ClassVar[str] = "QK circuit between tokens and positions"
    head: str


@torch.no_grad()
def position_circuit(
    model: AttentionOnlyModel, head: str | Head, *, n_positions: int | None = None
) -> PositionCircuit:
    """The position-to-position part of a head's QK circuit, or its curve over distances (rotary).

    The query's bias takes part (it speaks to positions); a rotary head's key bias does too.

    Args:
        model: the converted model.
        head: a label (``"L0H3"``), a ``Head`` or a virtual head.
        n_positions: only so many positions; by default the context, at most 512.

    Raises:
        MechInterpError: no such head, a model without positions, or n_positions out of range.
    """
    one = finite_head(model, head)
    n = min(model.spec.n_ctx, 512) if n_positions is None else n_positions
    if not 1 <= n <= model.spec.n_ctx:
        raise MechInterpError(f"n_positions={n}; expected 1 to {model.spec.n_ctx}")
    _need_positions(model, one)
    offsets = range(0 if model.spec.causal else 1 - n, n)
    scale = one.bank.score_scale
    if model.spec.positions == "rotary":
        curve = _rotary_curve(model, one, offsets)
        distance = torch.arange(n)[:, None] - torch.arange(n) - offsets[0]
        scores, shown = curve, curve[distance.clamp_min(0).to(curve.device)] / scale  # masked below
        tested = _rotary_at(model, one, n - 1)
        error = abs(float(tested - curve[-1]))
    elif model.spec.positions == "alibi":
        scores, shown, error = _by_distance(one, n)
    else:
        P = model.W_pos.detach()[:n].double()
        keys, size = as_read(model, P), _typical_size(model, n)
        queries = as_read(model, P, bias=True)
        if model.spec.positions == "shortformer":  # added behind the norms, and nothing is beside them
            keys, queries, size = P, P, 1.0
        scores = one.query_read(queries) @ one.key_read(keys).T
        shown = one.query_read(queries / size) @ one.key_read(keys / size).T / scale
        query = queries[-1] @ one.W_Q.double() + one.b_Q.double()
        error = float((query @ one.key_read(keys[:1])[0] - scores[-1, 0]).abs())
    allowed = torch.ones_like(shown, dtype=torch.bool)
    allowed = allowed.tril() if model.spec.causal else allowed
    pattern = shown.masked_fill(~allowed, -torch.inf).softmax(-1)
    frame = pd.DataFrame(
        {
            "offset": offsets,
            "score": scores.tolist() if scores.ndim == 1 else _by_offset(scores, offsets),
            "attention": _by_offset(pattern, offsets),
        }
    )
    check = Check("one score computed on its own", error, 1e-8 * max(1.0, float(scores.abs().max())))
    notes = {"dtype": "float64", "positions": model.spec.positions, "tokens": "left out"}
    return PositionCircuit(
        frame=frame, receipt=Receipt((check,), notes), head=one.label, scores=scores, pattern=pattern
    )


@torch.no_grad()
def token_positions(
    model: AttentionOnlyModel,
    head: str | Head,
    *,
    query: Literal["token", "position"] = "token",
    top_k: int | None = None,
    special_tokens: bool = False,
) -> TokenPositions:
    """Strongest pairs of a token with a position: ``(W_E W_Q + b_Q) W_K^T W_pos^T``, or with ``W_E`` and
    ``W_pos`` exchanged.

    Args:
        model: the converted model.
        head: a label (``"L0H3"``), a ``Head`` or a virtual head.
        top_k: how many rows to give.
        query: which of the two asks; the other one is the key. Entries are taken against the
            average key, so that they compare across queries.
        top_k: how many pairs; by default 10, or all where there are fewer.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.

    Raises:
        MechInterpError: no such head, a model without learned positions, or top_k out of range.
    """
    one = finite_head(model, head)
    if model.spec.positions != "standard":
        raise MechInterpError(
            f"token_positions needs learned positions; this model has {model.spec.positions or 'none'}"
        )
    if query not in ("token", "position"):
        raise MechInterpError(f"query={query!r}; expected 'token' or 'position'")
    circuit, P = qk_circuit(model, one), model.W_pos.detach().double()
    asking, asked = as_read(model, P, bias=True), as_read(model, P)
    ids = listed(model, special_tokens)
    top_k = how_many(top_k, size_of(ids, model.spec.d_vocab) * len(P))
    if query == "token":
        left, keys = circuit.left(ids), one.key_read(asked)
        keys = keys - keys.mean(0) if one.compares_keys else keys
    else:
        left, keys = one.query_read(asking), circuit.right().T
        keys = keys - keys.mean(0) if one.compares_keys else keys
        keys = keys if ids is None else keys[ids]
    found = top_entries(left, keys.T.contiguous(), top_k)
    token, position = (found.row, found.column) if query == "token" else (found.column, found.row)
    token = original(ids, token)
    again = (left[found.row] * keys[found.column]).sum(-1)
    error = float((again - found.value).abs().max())
    check = Check("listed entries computed one by one", error, 1e-9 * max(1.0, float(again.abs().max())))
    frame = pd.DataFrame(
        {
            "token": token_texts(model, token.tolist()),
            "token_id": token.tolist(),
            "position": position.tolist(),
            "value": again.cpu().numpy(),
            "rank": range(1, top_k + 1),
        }
    )
    notes = {"dtype": "float64", "query": query, "norms": norms_note(model), "biases": BIASES}
    notes |= listed_note(model, special_tokens)
    return TokenPositions(frame=frame, receipt=Receipt((check,), notes), head=one.label)


def _by_distance(head: Head, n: int) -> tuple[Float[Tensor, " offset"], Tensor, float]:
    """What the distance alone adds to a head's scores (ALiBi): by offset, for every pair of positions, and
    how far the last of them is from slope times distance.
    """
    bank, at = cast(AttentionBank, head.bank), torch.arange(n)
    every = cast(Tensor, bank.distance_score(at, at))[head.index].double()
    slope, step = cast(Tensor, bank.slopes)[head.index], torch.tensor(n - 1)
    fall = slope.bfloat16() * step / bank.scale if bank.rounded_slopes else slope * step
    return every[-1].flip(0), every, abs(float(fall.double() + every[-1, 0]))


def _need_positions(model: AttentionOnlyModel, head: Head) -> None:
    if model.spec.positions is None or (model.spec.positions == "alibi" and head.kind != "attention"):
        raise MechInterpError(
            f"this model has no positions that a head's weights could read ({head.label}); its heads "
            "tell positions apart through the causal mask only"
        )


def _by_offset(table: Float[Tensor, "query key"], offsets: range) -> list[float]:
    """Means over the pairs whose key stands so many tokens before the query (negative: behind it)."""
    return [float(table.diagonal(-k).mean()) for k in offsets]


def _average(model: AttentionOnlyModel, head: Head) -> tuple[Tensor, Tensor]:
    """The average token's query and key, biases included ``[d_head]``."""
    mean = torch.stack([x.double().sum(0) for x in model.W_E.detach().split(CHUNK)]).sum(0)
    mean = as_read(model, mean / model.spec.d_vocab, bias=True)
    query, key = (mean @ W.double() + b.double() for W, b in ((head.W_Q, head.b_Q), (head.W_K, head.b_K)))
    return query, key


def _rotary_curve(model: AttentionOnlyModel, head: Head, offsets: range) -> Float[Tensor, " offset"]:
    query, key = _average(model, head)
    turned = head.bank.turned
    return torch.stack([turned(query, max(k, 0)) @ turned(key, max(-k, 0)) for k in offsets])


def _rotary_at(model: AttentionOnlyModel, head: Head, offset: int) -> Tensor:
    """The same score with both turned: the key one step on, the query ``offset`` after it."""
    query, key = _average(model, head)
    step = 1 if offset + 1 < model.spec.n_ctx else 0
    return head.bank.turned(query, offset + step) @ head.bank.turned(key, step)


def _typical_size(model: AttentionOnlyModel, n: int) -> float:
    """What the first norm typically divides token plus position by; 1 where there is no norm."""
    if model.spec.norm is None:
        return 1.0
    step = max(1, model.spec.d_vocab // 512)
    x = model.W_E.detach()[::step].double()[:, None] + model.W_pos.detach()[:n:4].double()
    if model.spec.norm == "LN":
        x = x - x.mean(-1, keepdim=True)
    return float(x.square().mean(-1).sqrt().mean())
