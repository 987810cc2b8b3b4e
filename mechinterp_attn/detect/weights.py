"""What the weights alone say: which heads copy, which previous-token and induction heads compose.

Eigenvalues are those of matrices over the vocabulary, vocabulary x vocabulary of rank d_head, taken
from their d_head x d_head products: eig(AB) = eig(BA). Norm gains are folded in, norm scales and
positions are left out. float64 throughout.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Complex, Float
from torch import Tensor

from mechinterp_attn.circuits.composition_scores import composition
from mechinterp_attn.circuits.copying import copying_scores
from mechinterp_attn.circuits.ends import alignment, alignment_note, embedding, seen_width
from mechinterp_attn.circuits.groups import HeadGroup, groups_of
from mechinterp_attn.circuits.null import expected_maximum
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, joined, plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.index import Heads

NULL_DRAWS = 100
PAIR_COLUMNS = ("src", "dst", "composition", "trace", "trace_z", "matching", "matching_z")
COPY_TOKENS = 25  # Olsson et al. 2022: copying is scored among 25 random tokens


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class WeightScores(Result):
    """Copying by every head, and K-composition of pairs of heads into induction circuits.

    Attributes:
        frame: one row per head: ``head, layer, index, kind``; ``copying``: sum of the eigenvalues
            of ``W_E W_OV W_U`` over the sum of their sizes, in [-1, 1], ``copying_z``: in standard
            deviations of random heads (``circuits.copying_scores``); ``copying_size``: the sum of
            their sizes divided by the vocabulary; ``pure_copying``: the head's OV alone on random
            tokens, the share of the attended token in what is raised, scaled to [-1, 1];
            ``induction, induction_z, from_head``: ``matching`` and ``trace_z`` of the earlier head
            with which the trace stands out most, and which that is.
        pairs: one row per pair of an earlier and a later head that move between positions:
            ``src, dst``; ``composition``: the K-composition score (``circuits.composition``); ``trace``: of
            ``W_E W_QK W_OV^T W_E^T`` with a query's scores taken against their average, by the
            vocabulary less one: how much higher a token's score is on what it preceded than on
            what other tokens did; ``matching``: trace over the sum of the eigenvalues' sizes, in
            [-1, 1]; ``trace_z``: in standard deviations of the trace with ``src`` turned at random
            (exact); ``matching_z``: against random heads in the place of ``src``.
    """

    title: ClassVar[str] = "What the weights of heads say"
    sort_by: ClassVar[str | None] = "copying_z"
    pairs: pd.DataFrame


def _plan(model: AttentionOnlyModel, heads: Heads | None, max_bytes: int) -> Plan:
    """Copying scores, compositions and traces of all pairs; both vocabularies once in float64."""
    chosen = None if heads is None else model.heads.select(heads)
    mixing = list(model.heads.between_positions)
    parts = [plan(copying_scores, model, chosen, max_bytes=max_bytes)]
    if len({model[label].layer for label in mixing}) > 1:
        parts.append(plan(composition, model, "K", mixing, mixing, max_bytes=max_bytes))
    kept = CELL * (model.W_E.numel() + model.W_U.numel() + model.W_E.numel())
    made = joined("scores of heads by their weights", parts)
    table = 3 * CELL * TABLE * (2 * model.n_heads + len(mixing) ** 2)
    return replace(made, bytes=made.bytes + kept + table, result=table)


@plans(_plan)
@torch.no_grad()
def score_weights(
    model: AttentionOnlyModel,
    heads: Heads | None = None,
    *,
    seed: int = 0,
    draws: int = 10,
    align: Sequence[int] | Tensor | None = None,
    max_bytes: int = MAX_BYTES,
) -> WeightScores:
    """Score every head by its weights: copying, and induction by K-composition.

    Copying is the eigenvalue score of Elhage et al. 2021 ("Detecting copying behavior") and the
    pure-OV copying of Olsson et al. 2022: logits of 25 random tokens through the head's OV, mean
    removed, negative ones dropped, the attended token's share. For an MLP-derived head, whose OV
    has rank 1, the eigenvalue score can only be 1 or -1: read its ``copying_size``.

    The K-composed QK circuit asks which token attends to which through the earlier head's output
    (Elhage et al. 2021, "two-layer models"; Olsson et al. 2022, "trace of QK"): an induction head
    has a large positive trace with its previous-token head. A neuron has no key, so no row in
    ``pairs``: as ``src`` it moves nothing between positions.

    Args:
        model: the converted model.
        heads: labels or heads for ``frame``, virtual ones such as ``"L0H1 > L1H2"`` too, whose OV is
            the product; None: all single heads.
        seed: of random tokens and random heads.
        draws: of 25 random tokens for ``pure_copying``.
        align: for a model whose outputs are not its input tokens: the id of the input token that each
            output stands for, in order; by default the first ones, one for one (the receipt says so).
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: no such head, or an align that is no list of input tokens.
    """
    within(_plan(model, heads, max_bytes), max_bytes, "fewer heads")
    inputs, W_E = alignment(model, align), embedding(model)
    W_U = model.W_U.detach()[:, : len(inputs)].double()
    chosen = None if heads is None else model.heads.select(heads)
    copying = copying_scores(model, chosen, align=align, seed=seed)
    columns = {"copying_score": "copying", "z": "copying_z", "size": "copying_size"}
    frame = copying.frame[["head", "layer", "kind", *columns]].rename(columns=columns)
    groups = groups_of(model, chosen)
    index = {head.label: head.index for group in groups for head in group.members()}
    frame.insert(2, "index", frame["head"].map(index))
    pure = {
        label: score
        for group in groups
        for label, score in zip(
            group.labels,
            _pure_copying(group, W_E[inputs], W_U, draws=draws, seed=seed).tolist(),
            strict=True,
        )
    }
    frame["pure_copying"] = frame["head"].map(pure)
    if chosen is not None:
        frame = frame.set_index("head", drop=False).loc[[head.label for head in chosen]]
        frame = frame.reset_index(drop=True)
    pairs, check = _pairs(model, W_E - W_E.mean(0), seed)
    best = pairs.sort_values("trace_z", ascending=False).drop_duplicates("dst").set_index("dst")
    for column, source in (("induction", "matching"), ("induction_z", "trace_z"), ("from_head", "src")):
        frame[column] = frame["head"].map(best[source])
    notes = {
        "dtype": "float64",
        "null": f"{NULL_DRAWS} random heads of the same shape; of trace, closed form",
        "seed": seed,
        "pairs compared": len(pairs),
        "largest trace_z by chance": round(expected_maximum(len(pairs)), 2),
        **alignment_note(model, align),
    }
    return WeightScores(frame=frame, receipt=Receipt((*copying.receipt.checks, check), notes), pairs=pairs)


def eigenvalue_score(eigenvalues: Complex[Tensor, "*head rank"]) -> Float[Tensor, "*head"]:
    """Sum of eigenvalues over the sum of their sizes, in [-1, 1]; 0 where all are zero."""
    size = eigenvalues.abs().sum(-1)
    return eigenvalues.real.sum(-1) / size.where(size > 0, 1)


def _pure_copying(
    group: HeadGroup, W_E: Tensor, W_U: Tensor, *, draws: int, seed: int
) -> Float[Tensor, " head"]:
    generator = torch.Generator().manual_seed(seed)  # the same tokens for every group
    W_V, W_O = (group.stacked(side, dtype=torch.float64) for side in ("V", "O"))
    n = min(COPY_TOKENS, len(W_E))
    shares = []
    for _ in range(draws):
        chosen = torch.randperm(len(W_E), generator=generator)[:n].to(W_E.device)
        read, write = W_E[chosen] @ W_V, W_O @ W_U[:, chosen]  # [head, n, d_head], [head, d_head, n]
        logits = read @ write  # [head, attended, raised]
        raised = (logits - logits.mean(-1, keepdim=True)).relu()
        own = raised.diagonal(dim1=1, dim2=2)
        shares.append(own / raised.sum(-1).clamp_min(torch.finfo(own.dtype).tiny))
    return 2 * torch.stack(shares).mean((0, 2)).cpu() - 1


def _pairs(model: AttentionOnlyModel, W_E: Tensor, seed: int) -> tuple[pd.DataFrame, Check]:
    """All pairs, from embeddings against their average: with those a query's scores are against its
    average score, and neither what all keys share nor the query's bias is left in a trace.
    """
    gram, width = W_E.T @ W_E, seen_width(model)
    banks = model.heads.between_positions.banks
    parts: list[pd.DataFrame] = []
    error = 0.0
    for late in Progress(banks, desc="pairs of heads"):
        W_Q, W_K = (late.stacked(side, dtype=torch.float64) for side in ("Q", "K"))
        seen = gram @ W_Q  # [head, d_model, d_head]
        earlier = [bank for bank in banks if bank.step < late.step]
        # What an earlier head's OV, turned at random, meets: trace = <OV, seen W_K^T>.
        singular = torch.linalg.svdvals(torch.linalg.qr(seen).R @ torch.linalg.qr(W_K).R.mT)
        spread = singular.norm(dim=-1) / width
        mean, deviation = _null_matching(singular, seed) if earlier else (spread, spread)
        for early in earlier:
            W_V, W_O = (early.stacked(side, dtype=torch.float64) for side in ("V", "O"))
            ov = ((W_V.mT @ W_V) * (W_O @ W_O.mT)).sum((1, 2)).sqrt()
            for i in range(early.n_heads):
                # W_E W_Q (W_K^T W_O^T) W_V^T W_E^T, turned round: [head, d_head, d_head]
                eigenvalues = torch.linalg.eigvals((W_O[i] @ W_K).mT @ (W_V[i].T @ seen))
                score, trace = eigenvalue_score(eigenvalues), eigenvalues.real.sum(-1)
                columns = {
                    "trace": trace / (len(W_E) - 1),
                    "trace_z": trace / (ov[i] * spread).clamp_min(1e-300),
                    "matching": score,
                    "matching_z": (score - mean) / deviation,
                }
                parts.append(
                    pd.DataFrame(
                        {"src": early.label(i), "dst": late.labels()}
                        | {name: column.cpu().numpy() for name, column in columns.items()}
                    )
                )
            again = torch.einsum("vd,dk,ka,ab,bc,vc->", W_E, W_Q[0], W_K[0].T, W_O[-1].T, W_V[-1].T, W_E)
            mine = float(parts[-1]["trace"][0]) * (len(W_E) - 1)
            error = max(error, float((again - mine).abs() / again.abs().clamp_min(1e-300)))
    check = Check("a trace of every pair of layers summed over the vocabulary, relative", error, 1e-8)
    if not parts:
        return pd.DataFrame(columns=list(PAIR_COLUMNS)), check
    mixing = list(model.heads.between_positions)
    composed = composition(model, "K", mixing, mixing).frame
    composed = composed[["src", "dst", "score"]].rename(columns={"score": "composition"})
    pairs = pd.concat(parts, ignore_index=True).merge(composed, on=["src", "dst"], how="left")
    return pairs[list(PAIR_COLUMNS)], check


def _null_matching(
    singular: Float[Tensor, "head rank"], seed: int
) -> tuple[Float[Tensor, " head"], Float[Tensor, " head"]]:
    """Mean and deviation of matching with random earlier heads of the same inner dimension.

    With Gaussian ``W_V`` and ``W_O`` the eigenvalues of the K-composed circuit are those of ``A^T B S``, A
    and B Gaussian, S the singular values of what the later head makes of the embeddings: the same draws
    for every head, and however the residual stream is turned.
    """
    generator = torch.Generator().manual_seed(seed)
    rank, scores = singular.shape[1], []
    for _ in range(NULL_DRAWS):
        A, B = (
            torch.randn(rank, rank, generator=generator, dtype=torch.float64).to(singular) for _ in "AB"
        )
        scores.append(eigenvalue_score(torch.linalg.eigvals((A.T @ B) * singular[:, None])))
    drawn = torch.stack(scores)
    return drawn.mean(0), drawn.std(0)
