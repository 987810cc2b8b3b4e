"""One head's circuit over the vocabulary, as two thin factors (Elhage et al. 2021).

``OV``: ``W_E W_OV W_U``, what attending to a token does to the logits, each against the average logit.
``QK``: ``(W_E W_Q + b_Q) W_K^T W_E^T``, which token attends to which. The query's bias decides between keys
as a token's query does; what shifts all scores of a query alike, such as the key's bias, is left out.
Gains of the norms, in front of the head and behind it, are folded in; their per-position scales, the
positions and the layers between are left out (``ends.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.circuits.ends import BIASES, CHUNK, LOGITS, as_read, average_unembedding, norms_note
from mechinterp_attn.circuits.streaming import top_of_rows
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.given import integers, single_id
from mechinterp_attn.model.heads import Head
from mechinterp_attn.model.select import resolve_head

Which = Literal["OV", "QK"]
Tokens = Sequence[str | int] | str | int


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TokenBlock(Result):
    """Chosen rows and columns of a circuit.

    Attributes:
        head: its label.
        circuit: "OV" or "QK".
        values: ``[source, token]``, float64.
        frame: one row per source token, one column per token.
    """

    title: ClassVar[str] = "Circuit between chosen tokens"
    head: str
    circuit: Which
    values: Float[Tensor, "source token"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CircuitStatistics(Result):
    """Summary statistics of a whole circuit.

    Attributes:
        head: its label.
        circuit: "OV" or "QK".
        frame: one row per ``statistic`` with its ``value``: ``frobenius_norm``, ``spectral_norm``,
            ``mean``, ``diagonal_mean``, ``diagonal_share`` (of the squared norm), ``positive_diagonal``
            (share of tokens), ``top1_on_diagonal`` (share of the tokens looked at whose largest entry
            is their own), ``copying_score``. The last five need equal input and output vocabularies.
    """

    title: ClassVar[str] = "Statistics of a circuit over the vocabulary"
    head: str
    circuit: Which

    def __getitem__(self, name: str) -> Any:
        """The value of a statistic, or a column of ``frame``."""
        values = dict(zip(self.frame["statistic"], self.frame["value"], strict=True))
        return float(values[name]) if name in values else super().__getitem__(name)


@dataclass(frozen=True, eq=False)
class VocabularyCircuit:
    """A head's circuit over the vocabulary, kept as factors and never computed as a whole.

    Attributes:
        model, head: what it was made from.
        which: "OV" or "QK".
        offset: how many tokens before the query the key stands, for rotary heads; None leaves
            rotations out.
    """

    model: AttentionOnlyModel
    head: Head
    which: Which
    offset: int | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        spec = self.model.spec
        return spec.d_vocab, spec.d_vocab_out if self.which == "OV" else spec.d_vocab

    @property
    def own_token(self) -> bool:
        """Whether every query has one key only, its own token."""
        return self.which == "QK" and not self.head.mixes_positions

    def left(
        self, ids: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "source rank"]:
        """The rows' factor: what the head reads from every source (OV) or query (QK) token.

        Args:
            ids: some tokens; all by default.
            dtype: the arithmetic.
        """
        return _by_chunks(self.model.W_E.detach(), ids, self._left, dtype)

    def right(
        self, ids: Tensor | None = None, dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "rank token"]:
        """The columns' factor: what the head writes to every logit, or reads from every key token.

        Args:
            ids: some tokens; all by default.
            dtype: the arithmetic.
        """
        table = self.model.W_U.detach().T if self.which == "OV" else self.model.W_E.detach()
        return _by_chunks(table, ids, self._right, dtype).T

    def _left(self, x: Tensor) -> Tensor:
        if self.which == "OV":
            return as_read(self.model, x) @ self.head.W_V.to(x.dtype)
        return self._turned(
            self.head.query_read(as_read(self.model, x, bias=True)), max(self.offset or 0, 0)
        )

    def _right(self, x: Tensor) -> Tensor:
        if self.which == "OV":
            x = x - self._average_unembedding.to(x.dtype)
            return x @ self.head.bank.behind(self.head.W_O.to(x.dtype)).T
        return self._turned(self.head.key_read(as_read(self.model, x)), max(-(self.offset or 0), 0))

    @cached_property
    def _average_unembedding(self) -> Tensor:
        return average_unembedding(self.model)

    @property
    def notes(self) -> dict[str, str]:
        """What the entries hold and what they leave out, for a receipt."""
        about = {"logits": LOGITS} if self.which == "OV" else {"biases": BIASES}
        return {
            "head": self.head.label,
            "circuit": self.which,
            "norms": norms_note(self.model),
            **about,
        }

    def _turned(self, x: Tensor, position: int) -> Tensor:
        return x if self.offset is None else self.head.bank.turned(x, position)

    def at(self, rows: Tensor, columns: Tensor) -> Float[Tensor, " entry"]:
        """Single entries ``M[rows[i], columns[i]]``, one by one in float64.

        Args:
            rows: ``[n]`` ids of source or query tokens.
            columns: ``[n]`` ids of output or key tokens.
        """
        some_rows, row = rows.unique(return_inverse=True)
        some_columns, column = columns.unique(return_inverse=True)
        left, right = self.left(some_rows), self.right(some_columns).T.contiguous()
        parts = zip(row.split(CHUNK), column.split(CHUNK), strict=True)
        return torch.cat([torch.linalg.vecdot(left[i], right[j]) for i, j in parts])

    def entry(self, source: str | int, token: str | int) -> float:
        """One entry, in float64.

        Args:
            source: the row: text or id of one token.
            token: the column: text or id of one token.

        Raises:
            MechInterpError: a text that is several tokens, or an id outside the vocabulary.
        """
        row = token_ids(self.model, source, self.shape[0])
        column = token_ids(self.model, token, self.shape[1])
        return float(self.at(row, column)[0])

    def block(self, sources: Tokens, tokens: Tokens) -> TokenBlock:
        """Chosen rows and columns as a table and a heatmap.

        Args:
            sources: texts or ids of the rows.
            tokens: texts or ids of the columns.

        Raises:
            MechInterpError: a text that is several tokens, or an id outside the vocabulary.
        """
        rows = token_ids(self.model, sources, self.shape[0])
        columns = token_ids(self.model, tokens, self.shape[1])
        values = self.left(rows) @ self.right(columns)
        frame = pd.DataFrame(
            values.cpu().numpy(),
            index=pd.Index(token_texts(self.model, rows.tolist()), name="source"),
            columns=pd.Index(
                token_texts(self.model, columns.tolist(), output=self.which == "OV"), name="token"
            ),
        )
        again = self.at(rows[:1], columns[-1:])[0]
        error = float((again - values[0, -1]).abs())
        check = Check("a corner computed on its own", error, 1e-10 * max(1.0, float(values.abs().max())))
        notes = self.notes | {"dtype": "float64"}
        return TokenBlock(
            frame=frame,
            receipt=Receipt((check,), notes),
            head=self.head.label,
            circuit=self.which,
            values=values,
        )

    @torch.no_grad()
    def statistics(self, *, tokens: int | None = 2048, seed: int = 0) -> CircuitStatistics:
        """Norms, how much stands on the diagonal, and the copying score, of what softmax sees: logits
        against the average logit, keys against the average key.

        Args:
            tokens: how many source tokens, drawn at random, ``top1_on_diagonal`` looks at; None for
                all (a vocabulary x vocabulary product).
            seed: of that draw.
        """
        left, right = self.left(), self.right()
        if self.which == "QK" and self.head.compares_keys:
            right = right - right.mean(1, keepdim=True)
        rows, columns = self.shape
        singular = singular_values(left, right)
        norm = float(singular.pow(2).sum().sqrt())
        numbers = {
            "frobenius_norm": norm,
            "spectral_norm": float(singular[0]),
            "mean": float(left.mean(0) @ right.mean(1)),
        }
        if rows == columns:
            diagonal = (left * right.T).sum(-1)
            eigenvalues = torch.linalg.eigvals(right @ left)
            picked = torch.randperm(rows, generator=torch.Generator().manual_seed(seed))[:tokens]
            picked = picked.sort().values.to(left.device)
            top = top_of_rows(left[picked], right, 1)
            numbers |= {
                "diagonal_mean": float(diagonal.mean()),
                "diagonal_share": float(diagonal.pow(2).sum()) / max(norm**2, 1e-300),
                "positive_diagonal": float((diagonal > 0).double().mean()),
                "top1_on_diagonal": float((picked == top.column).double().mean()),
                "copying_score": positive_share(eigenvalues),
            }
        frame = pd.DataFrame({"statistic": list(numbers), "value": list(numbers.values())})
        gram = float(((left.T @ left) * (right @ right.T)).sum().clamp_min(0).sqrt())
        check = Check(
            "norm by singular values and by Gram matrices", abs(gram - norm), 1e-6 * max(1.0, norm)
        )
        notes = self.notes | {"dtype": "float64"}
        if self.which == "QK" and self.head.compares_keys:
            notes["keys"] = "against the average key, which softmax does not see"
        if tokens is not None and tokens < rows:
            notes["top1_on_diagonal"] = f"over {tokens} random tokens, seed {seed}"
        return CircuitStatistics(
            frame=frame, receipt=Receipt((check,), notes), head=self.head.label, circuit=self.which
        )

    def __repr__(self) -> str:
        rows, columns = self.shape
        return f"{self.which} circuit of {self.head.label}: {rows} x {columns}, rank <= {self.rank}"

    @property
    def rank(self) -> int:
        """The rank of the product, at most."""
        return self.head.W_V.shape[1] if self.which == "OV" else self.head.W_Q.shape[1]


def ov_circuit(model: AttentionOnlyModel, head: str | Head) -> VocabularyCircuit:
    """A head's ``W_E W_OV W_U``, logits against their average: entries, blocks and statistics of it.

    Args:
        model: the converted model.
        head: a label (``"L0H3"``), a ``Head`` or a virtual head.

    Raises:
        MechInterpError: no such head.
    """
    return VocabularyCircuit(model, resolve_head(model, head), "OV")


def qk_circuit(
    model: AttentionOnlyModel, head: str | Head, *, offset: int | None = None
) -> VocabularyCircuit:
    """A head's ``(W_E W_Q + b_Q) W_K^T W_E^T`` (unscaled): entries, blocks and statistics of it. For a
    neuron, its pre-activation.

    Args:
        model: the converted model.
        head: a label (``"L0H3"``), a ``Head`` or a virtual head.
        offset: the key stands this many tokens before the query (rotary heads turn with it); negative,
            behind it, in bidirectional models.

    Raises:
        MechInterpError: no such head, or an offset outside the context.
    """
    last = model.spec.n_ctx - 1
    first = 0 if model.spec.causal else -last
    if offset is not None and not first <= offset <= last:
        raise MechInterpError(f"offset={offset}; expected {first} to {last} tokens")
    return VocabularyCircuit(model, resolve_head(model, head), "QK", offset)


def token_ids(model: AttentionOnlyModel, tokens: Tokens, size: int) -> Tensor:
    """Ids of tokens given as texts of one token or ids, checked against a vocabulary's size.

    Raises:
        MechInterpError: none given, a text of several tokens, or ids outside the vocabulary.
    """
    given = list(tokens) if isinstance(tokens, Iterable) and not isinstance(tokens, str) else [tokens]
    ids = [model.to_single_token(t) if isinstance(t, str) else single_id(t) for t in given]
    bad = [i for i in ids if not 0 <= i < size]
    if bad or not ids:
        raise MechInterpError(f"tokens {bad or given}: expected at least one, out of 0..{size - 1}")
    return torch.tensor(ids, device=model.W_E.device)


def ids_of_text(model: AttentionOnlyModel, text: str | Tensor, size: int) -> Int[Tensor, " pos"]:
    """The ids of a text of any length, given as a text or as ids, on the CPU.

    Args:
        size: of the vocabulary.

    Raises:
        MechInterpError: neither, several texts, fewer than two tokens, or ids outside the vocabulary.
    """
    ids = model.to_tokens(text, prepend_bos=False)[0] if isinstance(text, str) else integers(text)
    ids = (ids[0] if ids.ndim == 2 and len(ids) == 1 else ids).cpu()
    if ids.ndim != 1 or len(ids) < 2 or int(ids.min()) < 0 or int(ids.max()) >= size:
        raise MechInterpError(
            f"a text of tokens {tuple(ids.shape)}; expected at least 2 [pos], with ids out of 0..{size - 1}"
        )
    return ids


def token_texts(model: AttentionOnlyModel, ids: Sequence[int], *, output: bool = False) -> list[str]:
    """The text of every id, each made once; ids in brackets for outputs that are no input tokens."""
    some = sorted(set(ids))
    named = model.output_texts if output else model.to_str_tokens
    texts = dict(zip(some, named(some), strict=True)) if some else {}
    return [texts[i] for i in ids]


def singular_values(
    left: Float[Tensor, "row rank"], right: Float[Tensor, "rank column"]
) -> Float[Tensor, " least"]:
    """Singular values of ``left @ right`` through QR of the thin factors, largest first."""
    return torch.linalg.svdvals(torch.linalg.qr(left).R @ torch.linalg.qr(right.T).R.T)


def positive_share(eigenvalues: Tensor) -> float:
    """``sum(lambda) / sum(|lambda|)``, between -1 and 1; NaN where all are zero (Elhage et al. 2021)."""
    size = float(eigenvalues.abs().sum())
    return float(eigenvalues.real.sum()) / size if size > 0 else float("nan")


@torch.no_grad()
def _by_chunks(
    table: Tensor, ids: Tensor | None, f: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Tensor:
    """``f`` of the table's rows in a dtype, a few thousand rows widened at a time."""
    n = len(table) if ids is None else len(ids)
    pick = slice if ids is None else lambda a, b: ids[a:b]
    return torch.cat([f(table[pick(a, a + CHUNK)].to(dtype)) for a in range(0, n, CHUNK)])
