"""Which heads copy: eigenvalues of the OV circuit over the vocabulary (Elhage et al. 2021).

``W_E W_OV W_U``, logits against their average, has at most d_head eigenvalues that differ from zero, those
of the d_head x d_head product ``W_O (W_U W_E) W_V``. Where they are positive the head raises what it
attends to.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp_attn.circuits.circuit import ov_circuit, positive_share
from mechinterp_attn.circuits.ends import (
    CHUNK,
    LOGITS,
    alignment,
    alignment_note,
    norms_note,
    seen_width,
    unembed_embed,
)
from mechinterp_attn.circuits.groups import HeadGroup, Select, groups_of, refuse_non_finite
from mechinterp_attn.circuits.null import largest_by_chance
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, make_plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

NULL_DRAWS = 200
TOKENS = 512  # that ``diagonals`` looks at
BATCH = 1024  # heads at a time


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CopyingScores(Result):
    """How much every head copies what it attends to.

    Attributes:
        frame: one row per head: ``head, layer, kind``; ``copying_score``, ``sum(lambda) /
            sum(|lambda|)`` in [-1, 1]; ``size``, ``sum(|lambda|)`` per token of the vocabulary;
            ``z`` against random heads of the same shape in this vocabulary. A rank-1 head has one
            eigenvalue, so its score is only a sign: ``eigenvalue`` holds it, ``percentile`` its
            place among the rank-1 heads scored, and ``z`` compares it with rank-1 heads of the same
            norm and random directions. With ``diagonals``: ``positive_diagonal`` and
            ``top1_on_diagonal`` (see ``CircuitStatistics``).
        eigenvalues: of every head of more than one dimension, complex128.
    """

    title: ClassVar[str] = "Copying scores"
    sort_by: ClassVar[str | None] = "z"
    eigenvalues: Mapping[str, Tensor] = field(repr=False)

    def plot(self, head: str | None = None) -> Figure:
        """The eigenvalues of a head on the complex plane; by default, the scores of all heads.

        Args:
            head: one head's eigenvalues; the scores of all heads by default.
        """
        return draw(self, head)


def _plan(model: AttentionOnlyModel, heads: Select, diagonals: bool) -> Plan:
    return _plan_of(model, groups_of(model, heads), diagonals)


@plans(_plan, option=True)
@torch.no_grad()
def copying_scores(
    model: AttentionOnlyModel,
    heads: Select = None,
    *,
    diagonals: bool = False,
    align: Sequence[int] | Tensor | None = None,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> CopyingScores:
    """Copying scores of heads by the eigenvalues of their OV circuits.

    Args:
        model: the converted model.
        heads: labels or heads (virtual ones too), "attention", "mlp", or None for all.
        diagonals: add the two alternatives that Elhage et al. name: the share of tokens that a head
            raises at all and of those it raises most. A pass over the vocabulary for every head, for
            models whose outputs are their input tokens.
        align: for a model whose outputs are not its input tokens: the id of the input token that each
            output stands for, in order; by default the first ones, one for one (the receipt says so).
        seed: of the random heads and of the tokens that ``diagonals`` looks at.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: no such head, non-finite weights, an align that is no list of input tokens, or
            diagonals where input and output vocabularies differ.
    """
    spec = model.spec
    if diagonals and spec.d_vocab != spec.d_vocab_out:
        raise MechInterpError(
            f"diagonals look at all tokens in and out, but this model has {spec.d_vocab} and "
            f"{spec.d_vocab_out} of them; leave diagonals out: eigenvalues compare those that align pairs"
        )
    inputs = alignment(model, align)
    groups = groups_of(model, heads)
    within(_plan_of(model, groups, diagonals), max_bytes, "fewer heads")
    refuse_non_finite(model, (group.bank for group in groups))
    middle = unembed_embed(model, inputs)
    scale = float(middle.norm()) / seen_width(model)  # spread of u @ middle @ w for random unit u and w
    eigenvalues: dict[str, Tensor] = {}
    nulls: dict[int, tuple[float, float]] = {}
    parts, error, biggest = [], 0.0, 1.0
    for group in groups:
        found = _eigenvalues(group, middle)  # [head, rank]
        numbers = {"head": group.labels, "layer": group.layer, "kind": group.kind}
        size = found.abs().sum(-1)
        score = found.real.sum(-1) / torch.where(size > 0, size, torch.nan)
        numbers |= {"copying_score": score.cpu(), "size": (size / len(inputs)).cpu()}
        if group.rank == 1:
            value = found[:, 0].real
            norm = group.write_norms() * scale
            numbers |= {
                "eigenvalue": value.cpu(),
                "z": (value / torch.where(norm > 0, norm, torch.nan)).cpu(),
            }
        else:
            if group.rank not in nulls:
                nulls[group.rank] = _null(middle, group.rank, seed)
            mean, spread = nulls[group.rank]
            numbers["z"] = ((score - mean) / spread).cpu()
            eigenvalues |= dict(zip(group.labels, found.cpu(), strict=True))
        trace = _traces(group, middle)
        error = max(error, float((found.real.sum(-1) - trace).abs().max()))
        biggest = max(biggest, float(size.max()))
        parts.append(pd.DataFrame(numbers))
    frame = pd.concat(parts, ignore_index=True)
    if "eigenvalue" in frame:
        frame["percentile"] = frame["eigenvalue"].rank(pct=True) * 100
    if diagonals:
        frame = _with_diagonals(model, frame, groups, seed)
    check = Check("eigenvalues sum to the trace of the circuit", error, 1e-9 * biggest)
    notes = {
        "dtype": "float64",
        "null": f"{NULL_DRAWS} random heads, seed {seed}; of rank 1, closed form",
        **largest_by_chance(int(frame["z"].notna().sum())),
        "norms": norms_note(model),
        "logits": LOGITS,
        **alignment_note(model, align),
    }
    return CopyingScores(frame=frame, receipt=Receipt((check,), notes), eigenvalues=eigenvalues)


def _plan_of(model: AttentionOnlyModel, groups: list[HeadGroup], diagonals: bool) -> Plan:
    d, v = model.spec.d_model, model.spec.d_vocab
    vectors = sum(len(group) * group.rank for group in groups)
    flops = 2 * v * d * d + 2 * vectors * d * d
    if diagonals:
        flops += 2 * vectors * v * (2 * d + TOKENS)
    result = CELL * sum(len(group) * (10 + 2 * group.rank) for group in groups)  # a row, and eigenvalues
    widest = max(min(len(group), BATCH) * group.rank for group in groups)
    return make_plan(
        what=f"copying scores of {sum(map(len, groups)):,} heads",
        flops=flops,
        bytes=8 * (d * d + 2 * CHUNK * d + 4 * widest * d) + 3 * result,
        result=result,
        chunks=sum(-(-len(group) // BATCH) for group in groups),
        device=model.W_E.device,
        shape=(min(v, CHUNK), d, d),
        exact=True,
    )


def _eigenvalues(group: HeadGroup, middle: Tensor) -> Tensor:
    if group.rank == 1:
        return _traces(group, middle)[:, None].to(torch.complex128)
    W_V, W_O = (group.stacked(side, dtype=torch.float64) for side in ("V", "O"))
    return torch.linalg.eigvals(W_O @ (middle @ W_V))


def _traces(group: HeadGroup, middle: Tensor) -> Float[Tensor, " head"]:
    """``tr(W_E W_OV W_U)`` of every head, as a sum over entries."""
    traces = []
    for a in range(0, len(group), BATCH):
        part = slice(a, a + BATCH)
        W_V, W_O = (group.stacked(side, part, torch.float64) for side in ("V", "O"))
        held = (W_O.flatten(0, 1) @ middle).view_as(W_O)
        traces.append((held * W_V.mT).sum((1, 2)))
    return torch.cat(traces)


def _null(middle: Tensor, rank: int, seed: int) -> tuple[float, float]:
    """Mean and spread of the score of random heads of a rank in this vocabulary.

    Gaussian heads are Gaussian in every basis, so ``W_O middle W_V`` is drawn from the singular values of
    ``middle`` alone: the same draws however the residual stream is turned.
    """
    generator = torch.Generator().manual_seed(seed)
    singular = torch.linalg.svdvals(middle)[:, None]
    scores = []
    for _ in range(NULL_DRAWS):
        W_V, W_O = (
            torch.randn(len(middle), rank, generator=generator, dtype=torch.float64).to(middle)
            for _ in range(2)
        )
        scores.append(positive_share(torch.linalg.eigvals(W_O.T @ (singular * W_V))))
    drawn = torch.tensor(scores, dtype=torch.float64)
    return float(drawn.mean()), float(drawn.std())


def _with_diagonals(
    model: AttentionOnlyModel, frame: pd.DataFrame, groups: list[HeadGroup], seed: int
) -> pd.DataFrame:
    names = ["positive_diagonal", "top1_on_diagonal"]
    heads = [head for group in groups for head in group.members()]
    rows = [
        [circuit[name] for name in names]
        for head in tqdm(heads, desc="diagonals", disable=len(heads) < 100)
        for circuit in [ov_circuit(model, head).statistics(tokens=TOKENS, seed=seed)]
    ]
    return frame.join(pd.DataFrame(rows, columns=names))
