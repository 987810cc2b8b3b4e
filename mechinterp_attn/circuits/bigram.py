"""The zero-layer table ``W_E W_U``: which token follows which, with every head taken away."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.circuits.circuit import Tokens, ids_of_text, token_ids, token_texts
from mechinterp_attn.circuits.ends import LOGITS, as_read, average_unembedding
from mechinterp_attn.circuits.groups import refuse_non_finite
from mechinterp_attn.circuits.listed import how_many, listed, listed_note, original, size_of
from mechinterp_attn.circuits.streaming import plan_product, top_of_rows
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

AT_ONCE = 64  # rows of the table whose ranks are held at a time
MIN_COUNT = 5  # how often a token must stand in a text for its row to be compared


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Bigrams(Result):
    """The most likely next tokens of every token on the direct path.

    Attributes:
        frame: ``source, source_id, token, token_id, value`` (logit), ``rank`` (from 1, per source).
        rank_correlation: with a text or counts, Spearman's rho between rows of the table and how often
            each token follows, averaged over source tokens by their counts; else None. Tokens that
            never follow anything in the text are left out.
        correlations: the same per source token: ``source, source_id, count, spearman``.
    """

    title: ClassVar[str] = "Bigrams on the direct path"
    rank_correlation: float | None
    correlations: pd.DataFrame | None = field(repr=False)


def _plan(
    model: AttentionOnlyModel, top_k: int | None, sources: Tokens | None, special_tokens: bool
) -> Plan:
    spec = model.spec
    ids = listed(model, special_tokens) if sources is None else token_ids(model, sources, spec.d_vocab)
    rows, columns = (
        size_of(ids, spec.d_vocab),
        size_of(listed(model, special_tokens, output=True), spec.d_vocab_out),
    )
    return plan_product(
        f"bigrams of {rows:,} tokens",
        (rows, spec.d_model, columns),
        model.W_E.device,
        each_row=True,
        exact=model.W_E.dtype == torch.float64,
        listed=rows * how_many(top_k, columns),
    )


@plans(_plan, option=True)
@torch.no_grad()
def bigrams(
    model: AttentionOnlyModel,
    *,
    top_k: int | None = None,
    sources: Tokens | None = None,
    text: str | Tensor | None = None,
    counts: Int[Tensor, "first second"] | None = None,
    bias: bool = False,
    special_tokens: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Bigrams:
    """The table ``W_E W_U`` (Elhage et al. 2021, "zero-layer transformers"), row by row.

    The final norm's gain (and centring) is folded into ``W_U``; its scale, which stretches a row
    without changing its order, is left out. Logits are taken against their average.

    Args:
        model: the converted model.
        top_k: followers per source token; by default 10, or all where there are fewer.
        sources: only these source tokens (texts of one token, or ids); None for all.
        text: a text, or token ids ``[pos]``, whose bigrams to compare the table with.
        counts: the same as a table of how often each token follows each other one;
            ``mia.bigram_counts()`` has those of the bundled models' corpus. Give one of the two.
        bias: add ``b_U``.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: no such token, non-finite weights, top_k out of range, a text too short to
            compare, counts of another vocabulary, or both.
    """
    spec = model.spec
    ids = listed(model, special_tokens) if sources is None else token_ids(model, sources, spec.d_vocab)
    ids = torch.arange(spec.d_vocab) if ids is None else ids
    outputs = listed(model, special_tokens, output=True)
    n_outputs = size_of(outputs, spec.d_vocab_out)
    top_k = how_many(top_k, n_outputs)
    followers = _followers(model, text, counts)
    within(_plan(model, top_k, sources, special_tokens), max_bytes, "fewer sources or a smaller top_k")
    refuse_non_finite(model, ())
    left, right = _table(model, ids.to(model.W_E.device), bias)
    right = right if outputs is None else right[:, outputs]
    bar = "bigrams" if len(ids) * n_outputs > 2e8 else None
    found = top_of_rows(left, right, min(top_k + 2, n_outputs), progress=bar)
    exact = torch.cat(
        [
            (left[r].double() * right.T[c].double()).sum(-1)
            for r, c in zip(found.row.split(2**14), found.column.split(2**14), strict=True)
        ]
    )
    error = float((exact - found.value).abs().max())
    value, order = exact.view(len(ids), -1).topk(top_k)
    places = found.column.view(len(ids), -1).gather(1, order).flatten()
    column = original(outputs, places).tolist()
    source_ids = ids.repeat_interleave(top_k).tolist()
    frame = pd.DataFrame(
        {
            "source": token_texts(model, source_ids),
            "source_id": source_ids,
            "token": token_texts(model, column, output=True),
            "token_id": column,
            "value": value.flatten().cpu().numpy(),
            "rank": list(range(1, top_k + 1)) * len(ids),
        }
    )
    scale = max(1.0, float(exact.abs().max()))
    tolerance = (1e-10 if left.dtype == torch.float64 else 1e-4) * scale
    check = Check("listed entries computed one by one in float64", error, tolerance)
    correlations = None if followers is None else _correlations(model, followers, bias)
    overall = None
    if correlations is not None:
        known = correlations.dropna()
        overall = float((known["spearman"] * known["count"]).sum() / known["count"].sum())
    notes = {
        "norms": "final gain folded, scale left out",
        "b_U": "added" if bias else "left out",
        "logits": LOGITS,
        **listed_note(model, special_tokens),
    }
    return Bigrams(
        frame=frame,
        receipt=Receipt((check,), notes),
        rank_correlation=overall,
        correlations=correlations,
    )


def _table(model: AttentionOnlyModel, ids: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    left, right = as_read(model, model.W_E.detach()[ids], bias=bias), model.W_U.detach()
    right = right - average_unembedding(model)[:, None].to(right)
    if bias:
        b_U = model.b_U.detach()[None].to(right)
        left = torch.cat([left, left.new_ones(len(left), 1)], 1)
        right = torch.cat([right, b_U - b_U.mean()])
    return left, right


Followers = tuple[Tensor, Iterator[tuple[int, Tensor]]]
"""Ids of the tokens that follow anything; then source by source, how often each of them follows it."""


def _followers(
    model: AttentionOnlyModel, text: str | Tensor | None, counts: Tensor | None
) -> Followers | None:
    size = min(model.spec.d_vocab, model.spec.d_vocab_out)
    if text is not None and counts is not None:
        raise MechInterpError("a text and counts were given; give one of them to compare the table with")
    if counts is not None:
        if tuple(counts.shape) != (size, size):
            raise MechInterpError(
                f"counts have shape {tuple(counts.shape)}; expected one row and one column for each of "
                f"the {size} tokens"
            )
        seen = counts.sum(0).nonzero()[:, 0]
        frequent = (counts.sum(1) >= MIN_COUNT).nonzero()[:, 0].tolist()
        return seen, ((source, counts[source, seen]) for source in frequent)
    if text is None:
        return None
    tokens = ids_of_text(model, text, size)
    first, follower = tokens[:-1], tokens[1:]
    seen, place = follower.unique(return_inverse=True)
    sources, times = first.unique(return_counts=True)
    frequent = sources[times >= MIN_COUNT].tolist()
    if not frequent:
        raise MechInterpError(f"no token occurs {MIN_COUNT} times in the text; give a longer text")
    return seen, ((s, place[first == s].bincount(minlength=len(seen))) for s in frequent)


def _correlations(model: AttentionOnlyModel, followers: Followers, bias: bool) -> pd.DataFrame:
    """Spearman's rho per source token, over the tokens that follow anything."""
    seen, rows = followers
    seen, found = seen.to(model.W_E.device), []
    while part := list(islice(rows, AT_ONCE)):
        sources = torch.tensor([source for source, _ in part])
        left, right = _table(model, sources.to(seen.device), bias)
        logits = left.double() @ right[:, seen].double()
        times = torch.stack([times for _, times in part])
        ranks = [pd.DataFrame(table.cpu().numpy()).rank(axis=1) for table in (logits, times)]
        x, y = (r.sub(r.mean(axis=1), axis=0) for r in ranks)
        spread = ((x * x).sum(axis=1) * (y * y).sum(axis=1)) ** 0.5
        correlation = (x * y).sum(axis=1) / spread.where(spread > 0)
        found.append(
            pd.DataFrame({"source_id": sources, "count": times.sum(1), "spearman": correlation.to_numpy()})
        )
    frame = pd.concat(found, ignore_index=True)
    frame.insert(0, "source", token_texts(model, frame["source_id"].tolist()))
    return frame
