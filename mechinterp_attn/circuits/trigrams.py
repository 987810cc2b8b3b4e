"""Skip-trigrams ``source ... destination -> output`` of one head (Elhage et al. 2021, one-layer models).

A head that moves information by QK and OV circuits knows a trigram only in two halves: how much the
destination attends to the source, and what the source then does to the logits. The strength of a
trigram is the product of the halves, so the strongest ones need two lists per source token and no
vocabulary^3 table.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.circuits.circuit import Tokens, ov_circuit, qk_circuit, token_ids, token_texts
from mechinterp_attn.circuits.ends import BIASES, norms_note
from mechinterp_attn.circuits.groups import finite_head
from mechinterp_attn.circuits.listed import fewest, how_many, listed, listed_note, original, size_of
from mechinterp_attn.circuits.streaming import plan_product, top_of_rows
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head
from mechinterp_attn.model.index import Heads

SOURCES = 4096  # source tokens searched at a time


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SkipTrigrams(Result):
    """The strongest skip-trigrams of a head, or of several.

    Attributes:
        frame: one row per trigram: ``head``; ``source, destination, token`` (texts) and their ids;
            ``qk``: how much more the destination attends to the source than to the average token,
            in nats of the score; ``ov``: what the source does to the token's logit, against the
            average token's; ``value`` = qk * ov; ``rank`` (from 1; per source where sources were
            given).
    """

    title: ClassVar[str] = "Skip-trigrams"


@dataclass(frozen=True, eq=False)
class Lists:
    """For every source token: its best destinations and outputs, largest first."""

    source: Int[Tensor, " source"]
    destination: Int[Tensor, "source m"]
    qk: Float[Tensor, "source m"]
    token: Int[Tensor, "source n"]
    ov: Float[Tensor, "source n"]


@dataclass(frozen=True, eq=False)
class Listing:
    """The ids that trigrams are made of; None for all of a vocabulary."""

    inputs: Int[Tensor, " id"] | None
    outputs: Int[Tensor, " id"] | None

    @classmethod
    def of(cls, model: AttentionOnlyModel, special_tokens: bool) -> Listing:
        return cls(listed(model, special_tokens), listed(model, special_tokens, output=True))


def _plan(
    model: AttentionOnlyModel,
    head: Heads | None,
    sources: Tokens | None,
    top_k: int | None,
    special_tokens: bool,
) -> Plan:
    spec, k = model.spec, how_many(top_k, fewest(model, special_tokens))
    ids = listed(model, special_tokens) if sources is None else token_ids(model, sources, spec.d_vocab)
    n = size_of(ids, spec.d_vocab)
    at_once = n if sources is not None else min(n, SOURCES)
    return plan_of(model, _heads(model, head), n, at_once, k)


@plans(_plan, option=True)
@torch.no_grad()
def skip_trigrams(
    model: AttentionOnlyModel,
    head: Heads | None = None,
    *,
    sources: Tokens | None = None,
    top_k: int | None = None,
    special_tokens: bool = False,
    max_bytes: int = MAX_BYTES,
) -> SkipTrigrams:
    """The strongest skip-trigrams, exactly, without a vocabulary^3 table.

    QK entries are comparable only within one query, so each is taken against the destination's
    average key and divided by the attention scale; OV entries are taken against the average output.
    Norm scales, positions and the mask are left out. Sources are searched in the order of a bound on
    their trigrams (Cauchy-Schwarz on both halves), until no later one can hold a better one.

    An MLP-derived head sees only its own token: its destination is the source and ``qk`` is its
    pre-activation.

    Args:
        model: the converted model.
        head: one head (virtual ones too), several, or None for all heads that move information
            between positions.
        sources: only these source tokens, ranked one by one; None searches all of them together.
        top_k: how many trigrams (per source where sources are given); by default 10, or as many as there
            are tokens where these are fewer.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: no such head or token, non-finite weights, or top_k out of range.
    """
    heads = _heads(model, head)
    spec = model.spec
    tokens = Listing.of(model, special_tokens)
    top_k = how_many(top_k, fewest(model, special_tokens))
    ids = None if sources is None else token_ids(model, sources, spec.d_vocab)
    within(
        _plan(model, head, sources, top_k, special_tokens), max_bytes, "fewer sources or a smaller top_k"
    )
    frames: list[pd.DataFrame] = []
    error, floor = 0.0, -1.0
    bar = Progress(heads, desc="skip-trigrams", unit="head", show=len(heads) * spec.d_vocab > 2e5)
    for one in bar:
        halves = halves_of(model, one)
        if ids is None:
            found = _strongest(model, one, halves, tokens, top_k, floor)
        else:
            lists = lists_of(one, halves, ids, top_k, tokens)
            found = [_frame(model, one, lists, *_best_of_each(lists, top_k))]
        if found:
            frames += found
            error = max(error, _error(model, one, found[0]))
            floor = _last_of(top_k, frames)
    table = pd.concat(frames, ignore_index=True)
    by = ["value"] if ids is None else ["_order", "value"]
    if ids is not None:
        table["_order"] = table["source_id"].map({s: i for i, s in reversed(list(enumerate(ids.tolist())))})
    table = table.sort_values(by, ascending=[name != "value" for name in by], kind="stable")
    table = table.head(top_k) if ids is None else table.groupby("_order").head(top_k)
    groups = table["_order"] if ids is not None else pd.Series(0, index=table.index)
    table = table.assign(rank=groups.groupby(groups).cumcount() + 1)
    table = table.drop(columns="_order", errors="ignore").reset_index(drop=True)
    scale = max(1.0, float(table["qk"].abs().max()), float(table["ov"].abs().max()))
    check = Check("halves computed one by one from the circuits", error, 1e-8 * scale)
    notes = {"dtype": "float64", "norms": norms_note(model), "biases": BIASES, "heads searched": len(heads)}
    notes |= listed_note(model, special_tokens)
    return SkipTrigrams(frame=table, receipt=Receipt((check,), notes))


def _heads(model: AttentionOnlyModel, head: Heads | None) -> list[Head]:
    chosen = list(model.heads.between_positions) if head is None else head
    return [finite_head(model, one) for one in model.heads.select(chosen)]


Halves = tuple[Tensor, Tensor, Tensor, Tensor]


def halves_of(model: AttentionOnlyModel, head: Head) -> Halves:
    """Query and key sides (keys against their average, scaled) and both sides of OV (outputs against
    their average).
    """
    qk, ov = qk_circuit(model, head), ov_circuit(model, head)
    query, key = qk.left() / head.bank.score_scale, qk.right().T
    if head.compares_keys:
        key = key - key.mean(0)
    return query, key, ov.left(), ov.right()


def plan_of(model: AttentionOnlyModel, heads: list[Head], sources: int, at_once: int, width: int) -> Plan:
    """What a search over these heads costs, for so many sources and lists of this width.

    Args:
        at_once: sources whose lists are held together.
    """
    spec, widest = model.spec, max(head.W_Q.shape[1] for head in heads)
    return plan_product(
        f"skip-trigrams of {len(heads):,} heads and {sources:,} source tokens, at most",
        (sources, widest, spec.d_vocab + spec.d_vocab_out),
        model.W_E.device,
        times=len(heads),
        each_row=True,
        exact=True,
        listed=2 * at_once * width,  # two lists of each source, of ids and values
    )


def lists_of(head: Head, halves: Halves, source: Tensor, width: int, tokens: Listing) -> Lists:
    """The best destinations and outputs, out of some tokens, of every source."""
    query, key, read, write = halves
    written = write if tokens.outputs is None else write[:, tokens.outputs]
    outputs = top_of_rows(read[source], written, width)
    if head.mixes_positions:
        asking = query if tokens.inputs is None else query[tokens.inputs]
        found = top_of_rows(key[source], asking.T.contiguous(), width)
        destination = original(tokens.inputs, found.column).view(-1, width)
        attended = found.value.view(-1, width)
    else:
        destination = source[:, None]
        attended = (query[source] * key[source]).sum(-1, keepdim=True)
    return Lists(
        source,
        destination,
        attended,
        original(tokens.outputs, outputs.column).view(-1, width),
        outputs.value.view(-1, width),
    )


def _strongest(
    model: AttentionOnlyModel, head: Head, halves: Halves, tokens: Listing, k: int, floor: float
) -> list[pd.DataFrame]:
    """Tables that hold the ``k`` strongest trigrams of a head, as far as they are stronger than
    ``floor``.
    """
    query, key, read, write = halves
    attended = key.norm(dim=1) * query.norm(dim=1).max()
    if not head.mixes_positions:
        attended = (query * key).sum(-1).clamp_min(0)
    bound = attended * read.norm(dim=1) * write.norm(dim=0).max()
    bound, order = (bound if tokens.inputs is None else bound[tokens.inputs]).sort(descending=True)
    order = original(tokens.inputs, order)
    found: list[pd.DataFrame] = []
    first, size = 0, 256  # few at first: they lift the floor
    while first < len(order) and float(bound[first]) > floor:
        lists = lists_of(head, halves, order[first : first + size], k, tokens)
        found.append(_frame(model, head, lists, *_best(lists, k)))
        floor = max(floor, _last_of(k, found))
        first, size = first + size, SOURCES
    return found


def _last_of(k: int, found: list[pd.DataFrame]) -> float:
    """What a further trigram must beat to be among the first ``k``."""
    values = pd.concat([frame["value"] for frame in found]).nlargest(k)
    return -1.0 if len(values) < k else float(values.iloc[-1])


def _products(lists: Lists, rows: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Products of the sorted halves of some sources: places (i, j) with (i + 1)(j + 1) <= k are all
    that can be among the k largest; value ``[row, place]``.
    """
    m, n = lists.qk.shape[1], lists.ov.shape[1]
    i, j = torch.meshgrid(torch.arange(m), torch.arange(n), indexing="ij")
    near = ((i + 1) * (j + 1) <= k).flatten().nonzero().flatten()
    i, j = i.flatten()[near].to(rows.device), j.flatten()[near].to(rows.device)
    qk, ov = lists.qk[rows].clamp_min(0), lists.ov[rows].clamp_min(0)
    return qk[:, i] * ov[:, j], i, j


def _best(lists: Lists, k: int) -> tuple[Tensor, Tensor, Tensor]:
    """Places (source, destination, output) of the k largest products over all sources."""
    best = lists.qk[:, 0].clamp_min(0) * lists.ov[:, 0].clamp_min(0)
    rows = best.topk(min(k, len(best))).indices  # no other source can hold one of the k largest
    value, i, j = _products(lists, rows, k)
    flat = value.flatten().topk(min(k, value.numel())).indices
    return rows[flat // len(i)], i[flat % len(i)], j[flat % len(i)]


def _best_of_each(lists: Lists, k: int) -> tuple[Tensor, Tensor, Tensor]:
    rows = torch.arange(len(lists.source), device=lists.source.device)
    value, i, j = _products(lists, rows, k)
    places = value.topk(min(k, value.shape[1])).indices
    return rows[:, None].expand_as(places).flatten(), i[places].flatten(), j[places].flatten()


def _frame(
    model: AttentionOnlyModel, head: Head, lists: Lists, row: Tensor, i: Tensor, j: Tensor
) -> pd.DataFrame:
    source, destination = lists.source[row].tolist(), lists.destination[row, i].tolist()
    token = lists.token[row, j].tolist()
    qk, ov = lists.qk[row, i].cpu().numpy(), lists.ov[row, j].cpu().numpy()
    return pd.DataFrame(
        {
            "head": head.label,
            "source": token_texts(model, source),
            "source_id": source,
            "destination": token_texts(model, destination),
            "destination_id": destination,
            "token": token_texts(model, token, output=True),
            "token_id": token,
            "qk": qk,
            "ov": ov,
            "value": np.clip(qk, 0, None) * np.clip(ov, 0, None),
        }
    )


def _error(model: AttentionOnlyModel, head: Head, frame: pd.DataFrame) -> float:
    """The first trigrams' halves, out of the full circuits' rows."""
    off = 0.0
    for _, row in frame.head(3).iterrows():
        qk, ov = again(model, head, row["source_id"], row["destination_id"], row["token_id"])
        off = max(off, abs(qk - row["qk"]), abs(ov - row["ov"]))
    return off


def again(
    model: AttentionOnlyModel, head: Head, source: int, destination: int, token: int
) -> tuple[float, float]:
    """Both halves of one trigram from whole rows of the circuits, each against its row's mean."""
    qk, ov = qk_circuit(model, head), ov_circuit(model, head)
    asking, attended = (torch.tensor([i], device=model.W_E.device) for i in (destination, source))
    scores = (qk.left(asking) @ qk.right())[0] / head.bank.score_scale
    logits = (ov.left(attended) @ ov.right())[0]
    centre = scores.mean() if head.compares_keys else 0.0
    return float(scores[source] - centre), float(logits[token] - logits.mean())
