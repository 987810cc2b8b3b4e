"""Bugs of factoring (Elhage et al. 2021, one-layer models).

A head knows a skip-trigram only as a product of two halves. Where two trigrams share a source, their
crossings are implied too: keep ... in mind and keep ... at bay imply keep ... in bay.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.circuit import Tokens, ids_of_text, token_ids, token_texts
from mechinterp_attn.circuits.ends import BIASES, average_unembedding, embedding, norms_note
from mechinterp_attn.circuits.groups import finite_head
from mechinterp_attn.circuits.listed import fewest, listed_note, original, size_of
from mechinterp_attn.circuits.trigrams import Listing, Lists, again, halves_of, lists_of, plan_of
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head

WIDTH = 24  # destinations and outputs of a source among which factoring bugs are sought
REACH = 64  # tokens between source and destination within which a text's trigrams count


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class FactoringBugs(Result):
    """Pairs of good skip-trigrams with the same source, whose crossed versions the head implies as well.

    Attributes:
        frame: one row per pair: ``source, destination, token, other_destination, other_token`` and
            their ids;
            ``strength`` and ``other_strength`` of the two good trigrams, ``crossing`` (destination ->
            other token) and ``other_crossing`` of the implied ones, ``value``, the weaker crossing,
            and ``rank``.
    """

    title: ClassVar[str] = "Bugs of factoring: crossings that good trigrams imply"


def _plan(model: AttentionOnlyModel, head: str | Head, sources: Tokens | None) -> Plan:
    n = model.spec.d_vocab if sources is None else len(token_ids(model, sources, model.spec.d_vocab))
    return plan_of(model, [finite_head(model, head)], n, n, WIDTH)


@plans(_plan, option=True)
@torch.no_grad()
def factoring_bugs(
    model: AttentionOnlyModel,
    head: str | Head,
    *,
    sources: Tokens | None = None,
    text: str | Tensor | None = None,
    top_k: int = 10,
    special_tokens: bool = False,
    max_bytes: int = MAX_BYTES,
) -> FactoringBugs:
    """Find a head's "bugs": crossings of good skip-trigrams that it implies though they are not good.

    For a source, every pair of its strong destinations and outputs gets the product of the halves.
    Of two trigrams ``source ... d1 -> o1`` and ``source ... d2 -> o2`` that something else supports,
    the crossings ``d1 -> o2`` and ``d2 -> o1`` are bugs where the support lacks. The support is how often
    the trigram stands in ``text`` (destination and output side by side, the source at most 64 tokens
    before), or, without a text, the model's own direct path from destination to output.

    Args:
        model: the converted model.
        head: a label (``"L0H3"``), a ``Head`` or a virtual head.
        top_k: how many rows to give.
        sources: only these source tokens; by default the 50 with the strongest trigrams.
        text: a text or token ids ``[pos]`` that says which trigrams are good.
        top_k: at most so many.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: no such head or token, top_k below 1, or a head that sees only its own token.
    """
    one = finite_head(model, head)
    if not one.mixes_positions:
        raise MechInterpError(f"{one.label} sees only its own token; it has no skip-trigrams to cross")
    if top_k < 1:
        raise MechInterpError(f"top_k={top_k}; expected at least 1")
    spec = model.spec
    ids = None if sources is None else token_ids(model, sources, spec.d_vocab)
    within(_plan(model, head, sources), max_bytes, "fewer sources")
    tokens = Listing.of(model, special_tokens)
    every = torch.arange(spec.d_vocab, device=model.W_E.device)
    searched = original(tokens.inputs, every[: size_of(tokens.inputs, len(every))]) if ids is None else ids
    lists = lists_of(
        one, halves_of(model, one), searched, min(WIDTH, fewest(model, special_tokens)), tokens
    )
    best = lists.qk[:, 0].clamp_min(0) * lists.ov[:, 0].clamp_min(0)
    counts = None if text is None else ids_of_text(model, text, model.spec.d_vocab)
    parts = [
        _crossings(model, lists, int(i), counts) for i in best.topk(min(50, len(best))).indices.tolist()
    ]
    frame = pd.concat(parts, ignore_index=True)
    frame = frame.sort_values("value", ascending=False, kind="stable").head(top_k).reset_index(drop=True)
    frame["rank"] = range(1, len(frame) + 1)
    scale = max(1.0, float(frame[list(_TRIGRAMS)].to_numpy().max())) if len(frame) else 1.0
    check = Check(
        "trigrams computed one by one from the circuits", _bugs_error(model, one, frame), 1e-8 * scale
    )
    notes = {"head": one.label, "support": "the direct path" if text is None else "trigrams of the text"}
    notes |= {"norms": norms_note(model), "biases": BIASES} | listed_note(model, special_tokens)
    return FactoringBugs(frame=frame, receipt=Receipt((check,), notes))


# The four trigrams of a bug: which destination with which output.
_TRIGRAMS = {
    "strength": ("destination_id", "token_id"),
    "other_strength": ("other_destination_id", "other_token_id"),
    "crossing": ("destination_id", "other_token_id"),
    "other_crossing": ("other_destination_id", "token_id"),
}


def _bugs_error(model: AttentionOnlyModel, head: Head, frame: pd.DataFrame) -> float:
    """All trigrams of the first bugs, out of the full circuits' rows."""
    off = 0.0
    for _, row in frame.head(2).iterrows():
        for column, (destination, token) in _TRIGRAMS.items():
            qk, ov = again(model, head, row["source_id"], row[destination], row[token])
            off = max(off, abs(max(qk, 0.0) * max(ov, 0.0) - row[column]))
    return off


def _support(
    model: AttentionOnlyModel, source: int, destination: Tensor, token: Tensor, tokens: Tensor | None
) -> Float[Tensor, "destination token"]:
    """How well each (destination, output) is backed: counts in a text, or the direct path's logits
    against their row.
    """
    if tokens is None:
        columns = model.W_U.detach()[:, token].double() - average_unembedding(model)[:, None]
        return embedding(model, destination) @ columns
    out = torch.zeros(len(destination), len(token), dtype=torch.float64)
    stands = (tokens == source).long().cumsum(0)
    place = torch.arange(len(tokens))
    before = torch.where(place >= REACH, stands[(place - REACH).clamp_min(0)], 0)
    near = torch.zeros(len(tokens), dtype=torch.bool)
    near[1:] = (stands[:-1] - before[1:]) > 0  # the source stands at most REACH tokens before
    where = near[:-1].nonzero().flatten()
    pairs = torch.stack([tokens[where], tokens[where + 1]], 1)
    columns_of = {t: b for b, t in enumerate(token.tolist())}
    rows_of = {d: a for a, d in enumerate(destination.tolist())}
    for d, t in pairs[torch.isin(pairs[:, 0], destination.cpu())].tolist():
        if t in columns_of:
            out[rows_of[d], columns_of[t]] += 1
    return out


def _crossings(model: AttentionOnlyModel, lists: Lists, row: int, tokens: Tensor | None) -> pd.DataFrame:
    source = int(lists.source[row])
    destination, token = lists.destination[row], lists.token[row]
    strength = lists.qk[row].clamp_min(0)[:, None] * lists.ov[row].clamp_min(0)
    support = _support(model, source, destination, token, tokens).to(strength)
    good = torch.minimum(support[:, None, :, None], support[None, :, None, :])  # [d1, d2, o1, o2]
    crossed = torch.maximum(support[:, None, None, :], support[None, :, :, None].expand_as(good))
    weaker = torch.minimum(strength[:, None, None, :], strength[None, :, :, None].expand_as(good))
    once = torch.arange(len(destination), device=support.device)
    once = (once[:, None] < once)[:, :, None, None]
    bug = once & (good > 0) & (good > crossed) & (weaker > 0)
    if tokens is not None:
        bug &= crossed == 0
    value = weaker.where(bug, 0)
    best = value.flatten().topk(min(50, value.numel()))
    flat = best.indices[best.values > 0]
    n, m = len(destination), len(token)
    d1, d2, o1, o2 = flat // (n * m * m), flat // (m * m) % n, flat // m % m, flat % m
    return pd.DataFrame(
        {
            "source": token_texts(model, [source])[0],
            "source_id": source,
            **_named(model, "destination", destination[d1]),
            **_named(model, "token", token[o1], output=True),
            **_named(model, "other_destination", destination[d2]),
            **_named(model, "other_token", token[o2], output=True),
            "strength": strength[d1, o1].cpu().numpy(),
            "other_strength": strength[d2, o2].cpu().numpy(),
            "crossing": strength[d1, o2].cpu().numpy(),
            "other_crossing": strength[d2, o1].cpu().numpy(),
            "value": value.flatten()[flat].cpu().numpy(),
        }
    )


def _named(
    model: AttentionOnlyModel, column: str, ids: Tensor, *, output: bool = False
) -> dict[str, list[str] | np.ndarray]:
    """Two columns: the tokens' texts, and their ids."""
    return {column: token_texts(model, ids.tolist(), output=output), f"{column}_id": ids.cpu().numpy()}
