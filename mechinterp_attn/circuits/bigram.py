"""The zero-layer table ``W_E W_U``: which token follows which, with every head taken away."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.circuits.circuit import Tokens, token_ids, token_texts
from mechinterp_attn.circuits.streaming import top_of_rows
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Check, Receipt, Result

MIN_COUNT = 5  # how often a token must stand in a text for its row to be compared


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Bigrams(Result):
    """The strongest followers of every token on the direct path.

    Attributes:
        frame: ``source, source_id, token, token_id, value`` (logit), ``rank`` (from 1, per source).
        rank_correlation: with a text, Spearman's rho between rows of the table and how often each
            token of the text follows, averaged over source tokens by their counts; else None.
        correlations: the same per source token: ``source, source_id, count, spearman``.
    """

    title: ClassVar[str] = "Bigrams on the direct path"
    rank_correlation: float | None
    correlations: pd.DataFrame | None = field(repr=False)


@torch.no_grad()
def bigrams(
    model: AttentionOnlyModel,
    *,
    top_k: int = 10,
    sources: Tokens | None = None,
    text: str | Tensor | None = None,
    bias: bool = False,
) -> Bigrams:
    """The table ``W_E W_U`` (Elhage et al. 2021, "zero-layer transformers"), row by row.

    The final norm's gain (and centring) is folded into ``W_U``; its scale, which stretches a row
    without changing its order, is left out.

    Args:
        top_k: followers per source token.
        sources: only these source tokens (texts of one token, or ids); None for all.
        text: a text, or token ids ``[pos]``, whose bigrams to compare the table with.
        bias: add ``b_U``.

    Raises:
        MechInterpError: no such token, top_k out of range, or a text too short to compare.
    """
    spec = model.spec
    ids = torch.arange(spec.d_vocab) if sources is None else token_ids(model, sources, spec.d_vocab)
    if not 1 <= top_k <= spec.d_vocab_out:
        raise MechInterpError(f"top_k={top_k} is out of range; expected 1 to {spec.d_vocab_out}")
    left, right = _table(model, ids.to(model.W_E.device), bias)
    bar = "bigrams" if len(ids) * spec.d_vocab_out > 2e8 else None
    found = top_of_rows(left, right, min(top_k + 2, spec.d_vocab_out), progress=bar)
    exact = torch.cat(
        [
            (left[r].double() * right.T[c].double()).sum(-1)
            for r, c in zip(found.row.split(2**14), found.column.split(2**14), strict=True)
        ]
    )
    error = float((exact - found.value).abs().max())
    value, order = exact.view(len(ids), -1).topk(top_k)
    column = found.column.view(len(ids), -1).gather(1, order).flatten().tolist()
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
    correlations = None if text is None else _correlations(model, text, bias)
    overall = None
    if correlations is not None:
        known = correlations.dropna()
        overall = float((known["spearman"] * known["count"]).sum() / known["count"].sum())
    notes = {"norms": "final gain folded, scale left out", "b_U": "added" if bias else "left out"}
    return Bigrams(
        frame=frame,
        receipt=Receipt((check,), notes),
        rank_correlation=overall,
        correlations=correlations,
    )


def _table(model: AttentionOnlyModel, ids: Tensor, bias: bool) -> tuple[Tensor, Tensor]:
    left, right = model.W_E.detach()[ids], model.W_U.detach()
    if bias:
        left = torch.cat([left, left.new_ones(len(left), 1)], 1)
        right = torch.cat([right, model.b_U.detach()[None].to(right)])
    return left, right


def _correlations(model: AttentionOnlyModel, text: str | Tensor, bias: bool) -> pd.DataFrame:
    """Spearman's rho per source token, over the tokens that stand in the text."""
    tokens = model.to_tokens(text, prepend_bos=False)[0] if isinstance(text, str) else torch.as_tensor(text)
    tokens = tokens.flatten().to(model.W_E.device)
    size = min(model.spec.d_vocab, model.spec.d_vocab_out)
    if len(tokens) < 2 or int(tokens.max()) >= size or int(tokens.min()) < 0:
        raise MechInterpError(
            f"a text of {len(tokens)} tokens; expected at least 2, with ids out of 0..{size - 1}"
        )
    first, follower = tokens[:-1], tokens[1:]
    seen, place = follower.unique(return_inverse=True)
    sources, counts = first.unique(return_counts=True)
    sources, counts = sources[counts >= MIN_COUNT], counts[counts >= MIN_COUNT]
    if not len(sources):
        raise MechInterpError(f"no token stands {MIN_COUNT} times in the text; give a longer one")
    rows = []
    for source, count in zip(sources.tolist(), counts.tolist(), strict=True):
        left, right = _table(model, torch.tensor([source], device=seen.device), bias)
        logits = (left.double() @ right[:, seen].double())[0]
        times = place[first == source].bincount(minlength=len(seen))
        pair = pd.DataFrame({"logit": logits.cpu(), "times": times.cpu()}).rank()
        rows.append((source, count, pair["logit"].corr(pair["times"])))
    frame = pd.DataFrame(rows, columns=["source_id", "count", "spearman"])
    frame.insert(0, "source", token_texts(model, frame["source_id"].tolist()))
    return frame
