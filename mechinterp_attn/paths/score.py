"""Why does this head attend here, why does this neuron fire? A score as a sum over terms.

A score is bilinear: what the query side reads of the stream at the query, times what the key side
reads at the key. Both streams are sums (embedding, position, every earlier head, biases), so the
score is a sum of products (Elhage et al. 2021, "analyzing a two-layer model", the QK circuit as
1 + H + H + H^2 terms). Norms, rotations and query/key norms are frozen. A neuron's score is its
pre-activation: its key side is the constant 1, so its terms are linear.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.frozen.bank import FrozenBank, ScoreSides
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.goals import resolve_position
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.model.heads import Head

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Contrast = Literal["others"] | int | None


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ScoreExpansion(Result):
    """A head's attention score at one query and key, as a sum of products of query- and key-side terms.

    Attributes:
        total: the score itself (before a soft cap; with the softmax scale), or its excess over the
            other keys.
        head, query, key: what was expanded: label and positions.
        about: the same in words.
        frame: one row per term, largest first: ``query_term, key_term, value, share, kind``:
            "direct" (neither side through an earlier head; what the distance alone adds, where positions
            are ALiBi's, is one such term, "distance"), "query" (only the query side),
            "key" (only the key side), "both".
    """

    title: ClassVar[str] = "Score expansion"
    sort_by: ClassVar[str | None] = "value"
    total: float
    head: str
    query: int
    key: int
    about: str

    def plot(self, k: int = 12) -> Figure:
        """The largest terms as a table of query-side times key-side parts.

        Args:
            k: how many to show.
        """
        return draw(self, k)


def _plan(frozen: Frozen, head: str | Head, by_source: bool, keep: int) -> Plan:
    """Every term of one side against every term of the other, in a table; the head's
    scores, and what one bank's heads hold.
    """
    label = frozen.model.heads.one(head).label
    depth, n = frozen.locate(label).depth, len(frozen.tokens)
    before = [bank.bank for sublayer in frozen.sublayers[:depth] for bank in sublayer.banks]
    ways = len(frozen.parts) + 1 if by_source else 1
    terms = len(frozen.parts) + 1 + ways * sum(min(bank.n_heads, keep) + 1 for bank in before)
    held = max((bank.n_heads * bank.d_head for bank in before), default=0)
    table = CELL * 5 * terms**2
    floats = 8 * n + (ways + 4) * held + 8 * frozen.end.shape[1]  # at each position
    return plan_runs(
        frozen.model,
        f"the score of {label} from up to {terms:,} x {terms:,} terms",
        runs=2,
        rows=1,
        positions=n,
        bytes=4 * table + frozen.end.element_size() * n * floats,
        result=table,
        flops=4 * terms * n * frozen.end.shape[1],
    )


@of_prompt
@plans(_plan)
@torch.no_grad()
def expand_score(
    frozen: Frozen,
    head: str | Head,
    query: int,
    key: int | None = None,
    *,
    against: Contrast = None,
    by_source: bool = False,
    keep: int = 64,
    max_bytes: int = MAX_BYTES,
) -> ScoreExpansion:
    """Expand an attention score into products of query-side and key-side terms.

    Softmax does not see what all keys of a query share, so a raw score says little about why this
    key rather than another: ``against="others"`` expands the score minus its mean over the other keys
    that the head may look at, and a position expands the difference to that key.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        head: a label or head. For an MLP-derived head (``L1N7``) leave ``key`` out: it sees its own token.
        query, key: positions; negative counts from the end.
        against: None for the score itself, "others", or another key's position.
        by_source: tell an earlier head's output apart by what it moved: "embed > L0H0" is what L0H0
            moved of the token embeddings, "... > L0H0" all that came through other heads.
        keep: how many heads of each bank are told apart on either side; the others are one term.
        max_bytes: memory beyond the model's and the frozen prompt's that may be used, the result included.

    Raises:
        MechInterpError: everything that is wrong: no such head, a position outside the prompt, a key
            that the mask hides, no other key to compare with, keep below 0.
    """
    q = resolve_position(frozen, query)
    head = frozen.model.heads.one(head).label
    place = frozen.locate(head)
    sublayer, bank, index = place.depth, frozen.bank_at(place), place.head
    x = frozen.residuals[sublayer]
    sides = bank.score_sides(index, x)
    k = resolve_key(frozen, sides, head, q, key)
    weights = key_weights(sides, head, q, k, None if against is None else against, frozen)
    if keep < 0:
        raise MechInterpError(f"keep={keep}; expected 0 or more")
    within(_plan(frozen, head, by_source, keep), max_bytes, "a smaller keep")

    total_q = (sides.query(x) + sides.query_bias)[q]
    total_k = weights @ (sides.key(x) + sides.key_bias)
    query_side = _side(frozen, sublayer, q, sides, total_k, is_query=True, by_source=by_source, keep=keep)
    key_side = _side(
        frozen, sublayer, weights, sides, total_q, is_query=False, by_source=by_source, keep=keep
    )
    values = (query_side.vectors @ key_side.vectors.T).double().flatten().tolist()
    total = float(total_q @ total_k)
    query_terms = [name for name in query_side.names for _ in key_side.names]
    key_terms = key_side.names * len(query_side.names)
    kinds = [
        ("both" if b else "query") if a else ("key" if b else "direct")
        for a in query_side.through_head
        for b in key_side.through_head
    ]
    if sides.distance is not None:
        values.append(by_distance := float(sides.distance[q] @ weights))
        total += by_distance
        query_terms.append("distance")
        key_terms.append("distance")
        kinds.append("direct")
    frame = pd.DataFrame({"query_term": query_terms, "key_term": key_terms, "value": values})
    frame["share"] = frame["value"] / total
    frame["kind"] = kinds
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
    return ScoreExpansion(
        frame=frame.loc[order].reset_index(drop=True),
        receipt=_receipt(frozen, bank, index, sides, x, q, sum(values), total),
        total=total,
        head=head,
        query=q,
        key=k,
        about=_about(frozen, head, q, k, against),
    )


@dataclass(frozen=True)
class _Side:
    """The terms of one side, as vectors in the head's own space ``[term, rank]``."""

    names: list[str]
    vectors: Float[Tensor, "term rank"]
    through_head: list[bool]


def _side(
    frozen: Frozen,
    sublayer: int,
    at: int | Tensor,
    sides: ScoreSides,
    other: Float[Tensor, " rank"],
    *,
    is_query: bool,
    by_source: bool,
    keep: int,
) -> _Side:
    """What one side reads of every part of the stream at a position or a weighting of positions."""
    linear, bias = (sides.query, sides.query_bias) if is_query else (sides.key, sides.key_bias)
    x = frozen.residuals[sublayer]
    weights = at if isinstance(at, Tensor) else torch.eye(len(x)).to(x)[at]

    def reading(part: Float[Tensor, "pos d_model"]) -> Float[Tensor, " rank"]:
        return weights @ linear(part)

    names = list(frozen.parts)
    vectors = [reading(frozen.carry(part, 0, sublayer)) for part in frozen.parts.values()]
    through = [False] * len(names)
    biases = weights @ bias
    for extra in frozen.sources:
        if extra.kind == "bias" and extra.reader <= sublayer:
            biases = biases + reading(frozen.carry(extra.values, extra.depth, sublayer))
    field = pullback(linear, torch.outer(weights, other), x)
    for depth, earlier in enumerate(frozen.sublayers[:sublayer]):
        direct = frozen.carry_back(field, depth, sublayer)
        for bank, z in zip(earlier.banks, frozen.held[depth], strict=True):
            effect = (z * bank.unwrite(direct)).sum((0, -1)).abs()
            chosen = effect.topk(min(keep, len(effect))).indices.sort().values.tolist()
            for source, z_part in _sources(frozen, bank, depth, z, by_source):
                for name, written in _writings(bank, z_part, chosen):
                    through.append(True)
                    names.append(f"{source}{name}")
                    vectors.append(reading(frozen.carry(written, depth, sublayer)))
    names.append("bias")
    through.append(False)
    vectors.append(biases)
    kept = [i for i, v in enumerate(vectors) if bool(v.any())] or [len(vectors) - 1]
    return _Side(
        [names[i] for i in kept], torch.stack([vectors[i] for i in kept]), [through[i] for i in kept]
    )


def pullback(
    linear: Callable[[Tensor], Tensor], along: Float[Tensor, "pos rank"], x: Tensor
) -> Float[Tensor, "pos d_model"]:
    """The field whose product with a stream is that of ``linear(stream)`` with ``along``."""
    with torch.enable_grad():
        probe = torch.zeros_like(x, requires_grad=True)
        reading = (linear(probe) * along).sum()
        if not reading.requires_grad:
            return torch.zeros_like(x)
        return torch.autograd.grad(reading, probe)[0]


def _writings(
    bank: FrozenBank, z: Float[Tensor, "pos head d_head"], chosen: list[int]
) -> Iterator[tuple[str, Float[Tensor, "pos d_model"]]]:
    """What each chosen head of a bank writes, then all others together, one at a time."""
    for i in chosen:
        yield bank.bank.label(i), bank.write_one(z[:, i], i)
    if left := z.shape[1] - len(chosen):
        rest = z.clone()
        rest[:, chosen] = 0
        yield f"{left:,} other L{bank.bank.layer} {bank.bank.part}", bank.write(rest)


def _sources(
    frozen: Frozen, bank: FrozenBank, depth: int, z: Tensor, by_source: bool
) -> list[tuple[str, Float[Tensor, "pos head d_head"]]]:
    """What the heads hold, whole or by the part of the stream that they moved."""
    if not by_source:
        return [("", z)]
    parts = {name: frozen.carry(part, 0, depth) for name, part in frozen.parts.items()}
    rest = frozen.sublayers[depth].stream - sum(parts.values())
    moved = [(f"{name} > ", bank.read(part)) for name, part in parts.items()]
    others = bank.z_bias + (bank.read(rest) if depth else 0)
    return [*moved, ("... > ", others)] if bool(others.any()) else moved


def resolve_key(frozen: Frozen, sides: ScoreSides, head: str, q: int, key: int | None) -> int:
    """The key's position, counted from the start; a neuron's own token.

    Raises:
        MechInterpError: an attention head without a key, a key outside the prompt or behind the mask.
    """
    seen = sides.allowed[q].nonzero()[:, 0].tolist()
    if key is None:
        if len(seen) > 1:
            raise MechInterpError(f"{head} is an attention head; give the key's position")
        return seen[0]
    k = resolve_position(frozen, key)
    if k not in seen:
        raise MechInterpError(f"{head} cannot see position {k} from position {q}; it sees {_ranges(seen)}")
    return k


def _ranges(seen: list[int]) -> str:
    return f"position {seen[0]}" if len(seen) == 1 else f"positions {seen[0]} to {seen[-1]}"


def key_weights(
    sides: ScoreSides, head: str, q: int, k: int, against: Contrast, frozen: Frozen
) -> Float[Tensor, " pos"]:
    """The weighting of keys whose score is expanded: one key, or one minus others."""
    weights = torch.zeros_like(sides.key_bias[:, 0])
    weights[k] = 1
    if against is None:
        return weights
    if against == "others":
        others = sides.allowed[q].clone()
        others[k] = False
        if not bool(others.any()):
            raise MechInterpError(f"{head} sees no other key from position {q}; leave against out")
        return weights - others.to(weights.dtype) / others.sum()
    if isinstance(against, str):
        raise MechInterpError(f"against={against!r}; expected None, 'others' or a key position")
    other = resolve_key(frozen, sides, head, q, against)
    if other == k:
        raise MechInterpError(f"key and against are both position {k}; their difference is 0")
    weights[other] -= 1
    return weights


def _receipt(
    frozen: Frozen,
    bank: FrozenBank,
    index: int,
    sides: ScoreSides,
    x: Tensor,
    q: int,
    summed: float,
    total: float,
) -> Receipt:
    tolerance = TOLERANCE[x.dtype]
    scores = (sides.query(x) + sides.query_bias) @ (sides.key(x) + sides.key_bias).T
    scale = max(float(scores[sides.allowed].abs().max()), 1.0)
    checks = [Check("terms sum to the score", abs(summed - total), tolerance * scale)]
    if sides.to_pattern is not None:
        own = bank.bank.dense_pattern(bank.pattern, index)[q, :-1]
        error = float((sides.to_pattern(scores)[q] - own).abs().max())
        checks.append(Check("softmax of the scores gives the frozen pattern", error, tolerance * scale))
    return Receipt(tuple(checks), frozen.receipt.notes)


def _about(frozen: Frozen, head: str, q: int, k: int, against: Contrast) -> str:
    tokens = frozen.str_tokens
    text = f"score of {head} from {tokens[q]!r} ({q})"
    if "K" not in frozen.bank_at(frozen.locate(head)).bank.sides:
        return f"pre-activation of {head} at {tokens[q]!r} ({q})"
    text += f" to {tokens[k]!r} ({k})"
    if against is None:
        return text
    return f"{text} over " + ("its other keys" if against == "others" else f"key {against}")
