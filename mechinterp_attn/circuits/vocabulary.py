"""OV and QK circuits of one head over the vocabulary (Elhage et al. 2021, one-layer models).

``W_E W_OV W_U`` says what attending to a token does to the logits, ``W_E W_QK W_E^T`` which token
attends to which. Both are vocabulary x vocabulary of rank d_head; they are streamed in blocks of
rows and never held. The first norm's gain is folded into the head and the final norm's into
``W_U``; the norms' per-position scales, positions and the layers between are left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.streaming import Entries, top_entries, top_of_rows
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Check, Receipt, Result

Over = Literal["all", "rows", "columns"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenPairs(Result):
    """The largest entries of a circuit over the vocabulary.

    Attributes:
        head: label of the head;  circuit: "OV" or "QK".
        frame: one row per entry: ``source`` and ``source_id`` (OV: the token attended to; QK: the
            query token), ``token`` and ``token_id`` (OV: the token whose logit changes; QK: the key
            token), ``value`` and ``rank`` (from 1, within what was ranked together).
    """

    title: ClassVar[str] = "Circuit over the vocabulary"
    head: str
    circuit: Literal["OV", "QK"]


def ov_top(
    model: AttentionOnlyModel,
    head: str,
    *,
    top_k: int = 10,
    over: Over = "all",
    sources: Sequence[str | int] | None = None,
    largest: bool = True,
) -> TokenPairs:
    """Strongest (attended token -> output token) pairs of a head's OV circuit ``W_E W_OV W_U``.

    Args:
        head: label such as ``L1H2`` or ``L0N7``.
        top_k: how many entries; per row or column where ``over`` says so.
        over: rank ``"all"`` entries together, every source token's ``"rows"``, or every output
            token's ``"columns"``.
        sources: only these attended tokens (texts of one token, or ids).
        largest: False for the most negative entries.

    Raises:
        MechInterpError: no such head or token, or top_k out of range.
    """
    bank, index = model.heads.find(head)
    own = bank.head(index)
    ids, embedding = _embedding(model, sources)
    left = embedding @ own.OV.A.double()
    right = own.OV.B.double() @ model.W_U.detach().double()
    return _ranked(model, head, "OV", left, right, ids, top_k=top_k, over=over, largest=largest)


def qk_top(
    model: AttentionOnlyModel,
    head: str,
    *,
    top_k: int = 10,
    over: Over = "all",
    sources: Sequence[str | int] | None = None,
    largest: bool = True,
) -> TokenPairs:
    """Strongest (query token, key token) pairs of a head's QK circuit ``W_E W_QK W_E^T`` (unscaled).

    Entries are comparable within one query token: softmax does not see what a whole row shares. For
    an MLP-derived head the key is the same for every token and the value is the neuron's
    pre-activation: which tokens make it fire.

    Args: as for ``ov_top``; ``sources`` are query tokens.
    """
    bank, index = model.heads.find(head)
    ids, embedding = _embedding(model, sources)
    left = bank.query_read(index, embedding)
    right = bank.key_read(index, model.W_E.detach().double()).T
    return _ranked(model, head, "QK", left, right, ids, top_k=top_k, over=over, largest=largest)


def _embedding(
    model: AttentionOnlyModel, sources: Sequence[str | int] | None
) -> tuple[list[int], Float[Tensor, "source d_model"]]:
    W_E = model.W_E.detach()
    if sources is None:
        return list(range(len(W_E))), W_E.double()
    ids = [model.to_single_token(s) if isinstance(s, str) else int(s) for s in sources]
    bad = [i for i in ids if not 0 <= i < len(W_E)]
    if bad or not ids:
        raise MechInterpError(f"sources {bad or list(sources)}: expected tokens out of 0..{len(W_E) - 1}")
    return ids, W_E[ids].double()


@torch.no_grad()
def _ranked(
    model: AttentionOnlyModel,
    head: str,
    circuit: Literal["OV", "QK"],
    left: Float[Tensor, "source rank"],
    right: Float[Tensor, "rank token"],
    ids: list[int],
    *,
    top_k: int,
    over: Over,
    largest: bool,
) -> TokenPairs:
    sign = 1 if largest else -1
    limit = {"all": len(left) * right.shape[1], "rows": right.shape[1], "columns": len(left)}
    if over not in limit:
        raise MechInterpError(f"over={over!r}; expected 'all', 'rows' or 'columns'")
    if not 1 <= top_k <= limit[over]:
        raise MechInterpError(f"top_k={top_k} is out of range; expected 1 to {limit[over]}")
    if over == "columns":
        turned = top_of_rows(right.T, left.T, top_k, sign=sign)
        found = Entries(turned.column, turned.row, turned.value)
    else:
        ranking = top_entries if over == "all" else top_of_rows
        found = ranking(left, right, top_k, sign=sign)
    again = (left[found.row] * right.T[found.column]).sum(-1)
    error = float((again - found.value).abs().max())
    scale = float(again.abs().max())
    check = Check("listed entries computed one by one", error, 1e-10 * max(scale, 1.0))
    source_ids = [ids[i] for i in found.row.tolist()]
    token_ids = found.column.tolist()
    frame = pd.DataFrame(
        {
            "source": model.to_str_tokens(source_ids),
            "source_id": source_ids,
            "token": model.to_str_tokens(token_ids),
            "token_id": token_ids,
            "value": found.value.cpu().numpy(),
            "rank": [i % top_k + 1 for i in range(len(token_ids))],
        }
    )
    notes = {"head": head, "circuit": circuit, "dtype": "float64", "norms": "gains folded, scales left out"}
    return TokenPairs(frame=frame, receipt=Receipt((check,), notes), head=head, circuit=circuit)
