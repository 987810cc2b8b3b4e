"""Scores of every head, attention and MLP-derived alike, from its pattern."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor

from mechinterp_attn.causal.batches import (
    Batch,
    Input,
    as_batch,
    look,
    plan_sequences,
    rows_within,
    sequence_bytes,
)
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.detect.measures import SEEN, Sums, hooks_of, sums_of, sums_of_chain
from mechinterp_attn.detect.probes import pairs_by_role, random_probe
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.given import named
from mechinterp_attn.model.index import Heads
from mechinterp_attn.model.on_a_run import Cache
from mechinterp_attn.model.virtual import VirtualHead

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

UP_TO = 8  # the largest offset where none is given
SHORTER = "fewer or shorter sequences"


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadScores(Result):
    """How every head attends.

    Attributes:
        frame: one row per head: ``head, layer, index, kind``, then ``previous_token, current_token,
            first_token, duplicate_token, induction``: mean attention on the pairs that define each
            kind of head, in [0, 1]; ``entropy``: of its rows, in nats; and ``previous_token_weighted,
            ...``: which share of all it moves (attention times the norm of what it writes for that
            key) it moves along those pairs, in [0, 1], NaN where it moves nothing. A score is NaN where
            the tokens have no such pair, as in contexts too short to repeat anything.
        probe: the tokens they were measured on.
    """

    title: ClassVar[str] = "Head scores"
    sort_by: ClassVar[str | None] = "induction"
    probe: Batch

    def plot(self, score: str = "induction") -> Figure:
        """A heatmap of one score over attention heads by layer.

        Args:
            score: a column of the frame.
        """
        return draw(self, score)


def table_bytes(model: AttentionOnlyModel, columns: int) -> int:
    """A table with a row for every head, and the sums that it is made from."""
    return 3 * CELL * columns * model.n_heads


def _plan(
    model: AttentionOnlyModel,
    heads: Heads | None,
    seed: int,
    draws: int,
    tokens: Input | None,
    max_bytes: int,
) -> Plan:
    batch, _ = probe_or(model, tokens, draws=draws, seed=seed)
    return plan_sequences(model, "scores of heads", batch, max_bytes, result=table_bytes(model, 3 * TABLE))


@plans(_plan)
@torch.no_grad()
def score_heads(
    model: AttentionOnlyModel,
    heads: Heads | None = None,
    *,
    seed: int = 0,
    draws: int = 10,
    tokens: Input | None = None,
    max_bytes: int = MAX_BYTES,
) -> HeadScores:
    """Score every head as previous-token, current-token, first-token, duplicate or induction head.

    On random tokens drawn from the model's vocabulary (25 of them, 4 times, after a BOS where the
    model has one; less where the context is short), averaged over draws. ``induction`` is prefix
    matching in its row-sum form (Olsson et al. 2022): the attention from a token to all tokens that
    followed its earlier occurrences, averaged over the tokens that have one. The weighted scores
    ask the same of attention times the norm of what is moved (Elhage et al. 2021, "value-weighted").

    An MLP-derived head sees only its own token and the bias token, so its current-token score is
    its mean gate and the other scores are zero. A virtual head is scored on the product of its
    heads' patterns.

    Args:
        model: the converted model.
        heads: labels or heads, virtual ones such as ``"L0H1 > L1H2"`` too; None: all single heads.
        seed: of the random tokens.
        draws: how many random sequences.
        tokens: score on these instead: tokens ``[batch, pos]``, a text, or texts of any lengths.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: unusable tokens; no such head; no room for a single token.
    """
    chosen = None if heads is None else model.heads.select(heads)
    chains = [head for head in chosen or () if isinstance(head, VirtualHead)]
    extra = set[str]().union(*(hooks_of(model, head) for head in chains))
    batch, notes = probe_or(model, tokens, draws=draws, seed=seed)
    made = within(_plan(model, heads, seed, draws, tokens, max_bytes), max_bytes, SHORTER)
    rows = rows_within(model, batch.tokens.shape[1], max_bytes - made.result)
    parts: list[list[Sums]] = []
    checks: tuple[Check, ...] = ()
    for part in batch.split(rows):
        cache = look(model, part, SEEN, extra)
        sums = sums_of(model, part, cache)
        parts.append([sums, *(sums_of_chain(model, part, cache, head) for head in chains)])
        checks = checks or (dense_check(model, part, cache, sums),)
    totals = [reduce(add, column) for column in zip(*parts, strict=True)]
    frame = model.heads.frame[["head", "layer", "index", "kind"]].assign(**totals[0].columns())
    for head, total in zip(chains, totals[1:], strict=True):
        own = pd.DataFrame(
            {"head": [head.label], "layer": head.layer, "index": head.index, "kind": head.kind}
        )
        frame = pd.concat([frame, own.assign(**total.columns())], ignore_index=True)
    if chosen is not None:
        frame = frame.set_index("head", drop=False).loc[[head.label for head in chosen]]
        frame = frame.reset_index(drop=True)
    return HeadScores(frame=frame, receipt=Receipt(checks, notes), probe=batch)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Offsets(Result):
    """Mean attention of every head by relative position (Elhage et al. 2021, "positional heads").

    Attributes:
        frame: one row per head: ``head, layer, index, kind``, ``offset_0`` (the token itself),
            ``offset_1`` (the one before), ..., in bidirectional models ``offset_-1`` (the one after)
            and so on too, each the mean over the queries that have such a key, and ``at``, the offset
            with most attention.
    """

    title: ClassVar[str] = "Attention by relative offset"


def _plan_of_offsets(
    model: AttentionOnlyModel,
    up_to: int | None,
    seed: int,
    draws: int,
    tokens: Input | None,
    max_bytes: int,
) -> Plan:
    batch, _ = probe_or(model, tokens, draws=draws, seed=seed)
    reach = batch.tokens.shape[1] if up_to is None else up_to
    result = table_bytes(model, TABLE + 2 * reach)  # to both sides in bidirectional models
    return plan_sequences(model, "attention by offset", batch, max_bytes, result=result)


@plans(_plan_of_offsets)
@torch.no_grad()
def offsets(
    model: AttentionOnlyModel,
    *,
    up_to: int | None = None,
    seed: int = 0,
    draws: int = 10,
    tokens: Input | None = None,
    max_bytes: int = MAX_BYTES,
) -> Offsets:
    """Mean attention of every head to the token ``0, 1, ..., up_to`` positions back, in bidirectional
    models as many positions ahead too.

    Args:
        model: the converted model.
        up_to: the largest offset; by default 8, or the last there is in shorter texts.
        seed, draws, tokens, max_bytes: as for ``score_heads``.

    Raises:
        MechInterpError: ``up_to`` reaches beyond the tokens.
    """
    batch, notes = probe_or(model, tokens, draws=draws, seed=seed)
    n = batch.tokens.shape[1]
    up_to = min(UP_TO, n - 1) if up_to is None else up_to
    if not 0 <= up_to < n:
        raise MechInterpError(f"up_to={up_to}; expected 0 to {n - 1}, as there are {n} tokens")
    position = torch.arange(n, device=batch.tokens.device)
    distance = position[:, None] - position[None, :]
    reach = range(0 if model.spec.causal else -up_to, up_to + 1)
    sums: Tensor | int = 0
    counts: Tensor | int = 0
    error = 0.0
    made = within(_plan_of_offsets(model, up_to, seed, draws, tokens, max_bytes), max_bytes, SHORTER)
    for part in batch.split(rows_within(model, n, max_bytes - made.result)):
        cache = look(model, part, roles=("pattern",))
        real, width = part.real, part.tokens.shape[1]
        pairs = [
            real[:, :, None] & real[:, None, :] & (distance[:width, :width] == offset) for offset in reach
        ]
        if model.spec.causal:
            pairs[0][:, 0] = False  # the first token has only itself to look at
        parts = [
            torch.stack([bank.attention_on(cache[bank.hook("pattern")], p) for p in pairs]).double()
            for bank in model.banks
        ]
        error = max(error, _dense_error(model, part, cache, pairs, parts))
        sums = sums + torch.cat(parts, -1)
        counts = counts + torch.stack([p.sum() for p in pairs]).double()
    means = (sums / counts[:, None]).cpu()  # type: ignore[index]
    frame = model.heads.frame[["head", "layer", "index", "kind"]]
    by_offset = {f"offset_{i}": row.numpy() for i, row in zip(reach, means, strict=True)}
    frame = pd.concat([frame, pd.DataFrame(by_offset)], axis=1)
    frame["at"] = means.nan_to_num(-1).argmax(0).numpy() + reach[0]
    check = Check("attention of a head of every bank from its dense picture", error, share_tolerance(model))
    return Offsets(frame=frame, receipt=Receipt((check,), notes))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Matches(Result):
    """Share of every head's attention that lies on given pairs.

    Attributes:
        frame: one row per head: ``head, layer, index, kind, score``, in [0, 1].
    """

    title: ClassVar[str] = "Share of attention on given pairs"
    sort_by: ClassVar[str | None] = "score"


def _plan_of_match(model: AttentionOnlyModel, tokens: Input) -> Plan:
    """One prompt at a time, patterns in float64; their dense pictures and the pairs."""
    batch = as_batch(model, tokens)
    n = batch.tokens.shape[1]
    result = table_bytes(model, TABLE) + CELL * len(batch) * model.n_heads
    one = 3 * sequence_bytes(model, n) + 8 * CELL * n * n
    made = plan_sequences(model, "matches", batch, result + one, result=result)
    return replace(made, bytes=result + one, chunks=len(batch))


@plans(_plan_of_match)
@torch.no_grad()
def match(
    model: AttentionOnlyModel,
    tokens: Input,
    pairs: str | Tensor,
    *,
    exclude_bos: bool = False,
    exclude_current_token: bool = False,
    max_bytes: int = MAX_BYTES,
) -> Matches:
    """Which share of its attention every head puts on a pattern of your own.

    For an original attention head this is TransformerLens's ``head_detector.detect_head`` with
    ``error_measure="mul"``; MLP-derived heads get the same number, the bias token counted as a key.

    Args:
        model: the converted model.
        tokens: one prompt, or several for named pairs (the mean over prompts).
        pairs: ``"previous_token"``, ``"duplicate_token"``, ``"induction"``, ``"current_token"``,
            ``"first_token"``, or weights ``[pos, pos]``, query by key.
        exclude_bos: leave attention to the first token out.
        exclude_current_token: to the token itself.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: pairs of an unknown name or of another shape than the tokens.
    """
    batch = as_batch(model, tokens)
    within(_plan_of_match(model, tokens), max_bytes, SHORTER)
    scores = []
    error = 0.0
    for one in batch.split(1):
        n = one.tokens.shape[1]
        if isinstance(pairs, str):
            roles = pairs_by_role(one)
            if pairs not in roles:
                raise MechInterpError(f"pairs={pairs!r}; expected one of {', '.join(roles)} or a tensor")
            wanted = roles[pairs][0].double()
        else:
            try:
                wanted = torch.as_tensor(pairs, dtype=torch.float64, device=one.tokens.device)
            except (TypeError, ValueError, RuntimeError) as why:
                raise MechInterpError(f"pairs is {named(pairs)}; expected a name or a tensor") from why
        if wanted.shape != (n, n):
            raise MechInterpError(f"pairs of shape {tuple(wanted.shape)}; expected {(n, n)}: query by key")
        left_out = torch.zeros(n, n, dtype=torch.bool, device=wanted.device)
        left_out[:, 0] |= exclude_bos
        left_out |= exclude_current_token & torch.eye(n, dtype=torch.bool, device=wanted.device)
        cache = look(model, one, roles=("pattern",))
        parts = []
        for bank in model.banks:
            pattern = cache[bank.hook("pattern")].double()
            excluded = bank.attention_on(pattern, left_out.double())
            on_pairs = bank.attention_on(pattern, wanted.masked_fill(left_out, 0))
            parts.append(on_pairs / (n - excluded))  # every row sums to 1, the bias token included
            dense = bank.dense_pattern(bank.cached_pattern(cache, 0), 0).double()
            left = F.pad(left_out, (0, 1))
            kept = dense.masked_fill(left, 0)
            again = (kept[:, :n] * wanted).sum() / kept.sum()
            error = max(error, float((again - parts[-1][0]).abs()))
        scores.append(torch.cat(parts))
    frame = model.heads.frame[["head", "layer", "index", "kind"]]
    frame["score"] = torch.stack(scores).mean(0).cpu().numpy()
    notes = {"sequences": len(batch), "exclude_bos": exclude_bos}
    notes["exclude_current_token"] = exclude_current_token
    check = Check("share of a head of every bank from its dense picture", error, share_tolerance(model))
    return Matches(frame=frame, receipt=Receipt((check,), notes))


def probe_or(
    model: AttentionOnlyModel, tokens: Input | None, *, draws: int, seed: int
) -> tuple[Batch, dict[str, Any]]:
    """The caller's tokens, or random tokens repeated; and what to note in the receipt."""
    dtype = str(model.W_E.dtype).removeprefix("torch.")
    if tokens is None:
        probe = random_probe(model, draws=draws, seed=seed)
        notes = {"tokens": str(probe), "seed": seed, "draws": draws, "dtype": dtype}
        if probe.repeats < 2:
            notes["not scored"] = (
                f"induction and duplicate tokens: two tokens said twice need a context of at least 4; this "
                f"model has {model.spec.n_ctx} and {len(model.text_ids)} tokens to draw"
            )
        return probe.batch, notes
    batch = as_batch(model, tokens)
    return batch, {"tokens": f"{int(batch.real.sum())} given", "sequences": len(batch), "dtype": dtype}


def _dense_error(
    model: AttentionOnlyModel,
    batch: Batch,
    cache: Cache,
    pairs: Sequence[Tensor],
    sums: Sequence[Tensor],
) -> float:
    """How far the mean attention on pairs is from that of dense pictures, for the first heads of banks.

    Args:
        pairs: query by key, ``[batch, pos, pos]``, one after the other.
        sums: of the attention on them, by bank, each ``[pairs, head]``.
    """
    error = 0.0
    for bank, own in zip(model.banks, sums, strict=True):
        pictures = [bank.dense_pattern(bank.cached_pattern(cache, b), 0) for b in range(len(batch))]
        dense = torch.stack(pictures).double()[:, :, :-1]
        for wanted, total in zip(pairs, own, strict=True):
            difference = (dense * wanted).sum() - total[0]
            error = max(error, float(difference.abs()) / max(int(wanted.sum()), 1))
    return error


def share_tolerance(model: AttentionOnlyModel) -> float:
    """How far apart a few roundings may leave two averages of weights between 0 and 1."""
    return max(1e-4, 4 * torch.finfo(model.W_E.dtype).eps)


def dense_check(model: AttentionOnlyModel, batch: Batch, cache: Cache, sums: Sums) -> Check:
    """The first head of every bank again, from its dense picture."""
    error, at = 0.0, 0
    for bank in model.banks:
        pictures = [bank.dense_pattern(bank.cached_pattern(cache, b), 0) for b in range(len(batch))]
        dense = torch.stack(pictures).double()[:, :, :-1]
        for i, pairs in enumerate(pairs_by_role(batch).values()):
            again = (dense * pairs).sum() / max(int(pairs.any(-1).sum()), 1)
            own = sums.attention[i, at] / sums.queries[i].clamp_min(1)
            error = max(error, float((again - own).abs()))
        at += bank.n_heads
    return Check("scores of a head of every bank from its dense picture", error, share_tolerance(model))
