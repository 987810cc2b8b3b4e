"""The strongest entries of a head's OV and QK circuits, streamed over the whole vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Literal

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.circuits.circuit import (
    Tokens,
    VocabularyCircuit,
    Which,
    ov_circuit,
    qk_circuit,
    token_ids,
    token_texts,
)
from mechinterp_attn.circuits.groups import finite_head
from mechinterp_attn.circuits.listed import how_many, listed, listed_note, original, size_of
from mechinterp_attn.circuits.streaming import (
    Entries,
    Precision,
    matmul_precision,
    plan_product,
    top_entries,
    top_of_rows,
)
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Over = Literal["all", "rows", "columns"]
SMALL = 2e9  # multiplications of a scan that is made in float64 outright
SPARE = 8  # entries scanned beyond top_k, so that float32 rounding cannot push one out
UNIT_ROUNDOFF = {"float64": 1e-11, "float32": 1e-4, "tf32": 1e-2, "bfloat16": 1e-1}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenPairs(Result):
    """The largest entries of a circuit over the vocabulary.

    Attributes:
        head: label of the head.
        circuit: "OV" or "QK".
        frame: one row per entry: ``source`` and ``source_id`` (OV: the token attended to; QK: the
            query token), ``token`` and ``token_id`` (OV: the token whose logit changes; QK: the key
            token), ``value`` and ``rank`` (from 1, within what was ranked together).
    """

    title: ClassVar[str] = "Circuit over the vocabulary"
    head: str
    circuit: Which

    def plot(self, k: int = 20) -> Figure:
        """The first ``k`` entries as signed bars.

        Args:
            k: how many to show.
        """
        return draw(self, k)


def _ov_plan(
    model: AttentionOnlyModel,
    head: str | Head,
    top_k: int | None,
    over: Over,
    sources: Tokens | None,
    special_tokens: bool,
) -> Plan:
    return _scan(ov_circuit(model, finite_head(model, head)), top_k, over, sources, special_tokens).plan()


def _qk_plan(
    model: AttentionOnlyModel,
    head: str | Head,
    top_k: int | None,
    over: Over,
    sources: Tokens | None,
    offset: int | None,
    special_tokens: bool,
) -> Plan:
    circuit = qk_circuit(model, finite_head(model, head), offset=offset)
    return _scan(circuit, top_k, over, sources, special_tokens).plan()


@plans(_ov_plan, option=True)
def ov_top(
    model: AttentionOnlyModel,
    head: str | Head,
    *,
    top_k: int | None = None,
    over: Over = "all",
    sources: Tokens | None = None,
    largest: bool = True,
    special_tokens: bool = False,
    precision: Precision = "float32",
    max_bytes: int = MAX_BYTES,
) -> TokenPairs:
    """Strongest (attended token -> output token) pairs of a head's OV circuit ``W_E W_OV W_U``, each logit
    against the average over the vocabulary.

    Args:
        model: the converted model.
        head: label such as ``L1H2``, ``L0N7`` or ``L0H1 > L1H4``, or a ``Head`` (virtual ones too).
        top_k: how many entries; per row or column where ``over`` says so. By default 10, or all where
            there are fewer.
        over: rank ``"all"`` entries together, every source token's ``"rows"``, or every output
            token's ``"columns"``.
        sources: only these attended tokens (texts of one token, or ids).
        largest: False for the most negative entries.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.
        precision: of the search (float64 where it is small or the model is); the entries listed
            are always computed again in float64.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: no such head or token, non-finite weights, or top_k out of range.
    """
    scan = _scan(ov_circuit(model, finite_head(model, head)), top_k, over, sources, special_tokens)
    return _top(scan, largest, precision, max_bytes)


@plans(_qk_plan, option=True)
def qk_top(
    model: AttentionOnlyModel,
    head: str | Head,
    *,
    top_k: int | None = None,
    over: Over = "all",
    sources: Tokens | None = None,
    largest: bool = True,
    offset: int | None = None,
    special_tokens: bool = False,
    precision: Precision = "float32",
    max_bytes: int = MAX_BYTES,
) -> TokenPairs:
    """Strongest (query token, key token) pairs of a head's QK circuit ``(W_E W_Q + b_Q) W_K^T W_E^T``
    (unscaled).

    Entries are comparable within one query token: softmax does not see what a whole row shares. For
    an MLP-derived head the key is the same for every token and the value is the neuron's
    pre-activation: which tokens make it fire. For a virtual head the keys are read through the
    earlier heads (see ``VirtualHead``); where it ends in a neuron the value is the pre-activation on
    the query token after the earlier heads have moved the key token to it.

    Args:
        model: the converted model.
        head: label such as ``L1H2``, ``L0N7`` or ``L0H1 > L1H4``, or a ``Head`` (virtual ones too).
        top_k: how many entries; per row or column where ``over`` says so. By default 10, or all where
            there are fewer.
        over: rank ``"all"`` entries together, every query token's ``"rows"``, or every key token's
            ``"columns"``.
        sources: only these query tokens (texts of one token, or ids).
        largest: False for the most negative entries.
        offset: the key stands this many tokens before the query, for rotary heads (negative, behind
            it, in bidirectional models); None leaves rotations out.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.
        precision: of the search (float64 where it is small or the model is); the entries listed
            are always computed again in float64.
        max_bytes: memory beyond the model's that may be used, the table included.

    Raises:
        MechInterpError: no such head or token, or top_k or offset out of range.
    """
    circuit = qk_circuit(model, finite_head(model, head), offset=offset)
    return _top(_scan(circuit, top_k, over, sources, special_tokens), largest, precision, max_bytes)


@dataclass(frozen=True)
class _Scan:
    """What is searched of a circuit: rows and columns (None for all), and how many entries are kept of
    at most how many, over everything or over each row or column.
    """

    circuit: VocabularyCircuit
    over: Over
    special_tokens: bool
    ids: Tensor | None
    others: Tensor | None
    shape: tuple[int, int, int]
    limit: int
    top_k: int

    @property
    def work(self) -> int:
        return math.prod(self.shape)

    def plan(self) -> Plan:
        rows, _, columns = self.shape
        of = {"all": 1, "rows": rows, "columns": 1 if self.circuit.own_token else columns}
        return plan_product(
            f"{self.circuit.which} circuit of {self.circuit.head.label} over {rows:,} x {columns:,} tokens",
            self.shape,
            self.circuit.model.W_E.device,
            each_row=self.over != "all",
            listed=of[self.over] * self.top_k,
        )


def _scan(
    circuit: VocabularyCircuit,
    top_k: int | None,
    over: Over,
    sources: Tokens | None,
    special_tokens: bool,
) -> _Scan:
    model = circuit.model
    output = circuit.which == "OV"
    ids = listed(model, special_tokens) if sources is None else token_ids(model, sources, circuit.shape[0])
    others = None if circuit.own_token else listed(model, special_tokens, output=output)
    rows, columns = size_of(ids, circuit.shape[0]), size_of(others, circuit.shape[1])
    limit = {"all": rows * columns, "rows": columns, "columns": rows}
    if circuit.own_token:
        limit = {"all": rows, "rows": 1, "columns": 1}
    if over not in limit:
        raise MechInterpError(f"over={over!r}; expected 'all', 'rows' or 'columns'")
    shape = rows, circuit.rank, 1 if circuit.own_token else columns
    most = limit[over]
    return _Scan(circuit, over, special_tokens, ids, others, shape, most, how_many(top_k, most))


@torch.no_grad()
def _top(scan: _Scan, largest: bool, precision: Precision, max_bytes: int) -> TokenPairs:
    within(scan.plan(), max_bytes, "fewer sources or a smaller top_k")
    circuit, over, ids, others, top_k = scan.circuit, scan.over, scan.ids, scan.others, scan.top_k
    model, work, rows = circuit.model, scan.work, scan.shape[0]
    exact = model.W_E.dtype == torch.float64 or (work < SMALL and precision == "float32")
    dtype = torch.float64 if exact else torch.bfloat16 if precision == "bfloat16" else torch.float32
    narrow = torch.float64 if exact else torch.float32
    left = circuit.left(ids, narrow).to(dtype)
    right = circuit.right(others, narrow).to(dtype).contiguous()
    bar = f"{circuit.which} {circuit.head.label}" if work > 5e10 else None
    search: dict[str, Any] = {"sign": 1 if largest else -1, "progress": bar}
    wanted = min(top_k + SPARE, scan.limit)
    with matmul_precision(precision):
        if circuit.own_token:
            found = _diagonal(left, right, ids, wanted if over == "all" else rows, largest)
            found = found if over == "all" else Entries(*(part[found.row.argsort()] for part in found))
        elif over == "all":
            found = top_entries(left, right, wanted, **search)
        elif over == "rows":
            found = top_of_rows(left, right, wanted, **search)
        else:
            turned = top_of_rows(right.T.contiguous(), left.T.contiguous(), wanted, **search)
            found = Entries(turned.column, turned.row, turned.value)
    found = Entries(original(ids, found.row), original(others, found.column), found.value)
    exact_value = circuit.at(found.row, found.column)
    error = float((exact_value - found.value).abs().max())
    kept, exact_value = _ranked(
        found, exact_value, wanted if over != "all" else len(found.row), top_k, largest
    )
    scale = max(1.0, float(exact_value.abs().max()))
    used = "float64" if exact else precision
    check = Check(f"{used} search against float64 entries", error, UNIT_ROUNDOFF[used] * scale)
    source_ids, other_ids = kept.row.cpu().numpy(), kept.column.cpu().numpy()
    frame = pd.DataFrame(
        {
            "source": _texts(model, source_ids),
            "source_id": source_ids,
            "token": _texts(model, other_ids, output=circuit.which == "OV"),
            "token_id": other_ids,
            "value": exact_value.cpu().numpy(),
            "rank": np.arange(len(other_ids)) % top_k + 1,
        }
    )
    notes = (
        circuit.notes
        | {"dtype": f"values float64, search {used}"}
        | listed_note(model, scan.special_tokens)
    )
    return TokenPairs(
        frame=frame,
        receipt=Receipt((check,), notes),
        head=circuit.head.label,
        circuit=circuit.which,
    )


def _texts(model: AttentionOnlyModel, ids: np.ndarray, *, output: bool = False) -> pd.Series:
    """The text of every id; each is made once, however many rows it stands in."""
    some, place = np.unique(ids, return_inverse=True)
    texts = pd.Series(token_texts(model, some.tolist(), output=output))
    return texts.take(place).reset_index(drop=True)


def _diagonal(left: Tensor, right: Tensor, ids: Tensor | None, k: int, largest: bool) -> Entries:
    """The best entries of tokens with themselves, of which row ``i`` is the ``ids[i]``-th column."""
    column = torch.arange(len(left), device=left.device) if ids is None else ids
    value, row = (left * right.T[column]).sum(-1).topk(k, largest=largest)
    return Entries(row, column[row], value)


def _ranked(found: Entries, exact: Tensor, group: int, top_k: int, largest: bool) -> tuple[Entries, Tensor]:
    """The ``top_k`` of every group of found entries, ranked anew by their float64 values."""
    value, order = exact.view(-1, group).topk(min(top_k, group), largest=largest)
    pick = (order + torch.arange(0, len(exact), group, device=order.device)[:, None]).flatten()
    return Entries(found.row[pick], found.column[pick], found.value[pick]), value.flatten()
