"""The one noun of the package: a bank of heads.

A ``HeadBank`` holds all heads of one sublayer that share a rule for their attention pattern. A
``Head`` is one of them. Attention heads (``L0H3``) and heads derived from MLP neurons (``L0N152``)
have the same attributes, so everything downstream treats them alike (Huben & Morris 2023).

Row vectors multiply from the left: a head reads ``x @ W_V`` and writes ``z @ W_O``.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Literal, Protocol, runtime_checkable

import pandas as pd
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import Page, draw

Kind = Literal["attention", "mlp", "virtual"]
Side = Literal["Q", "K", "V", "O"]


@runtime_checkable
class Cache(Protocol):
    """Activations by hook name: a TransformerLens ActivationCache or a dict."""

    def __getitem__(self, name: str, /) -> Any: ...


@dataclass(frozen=True, eq=False)
class LowRank:
    """A matrix kept as the product ``A @ B``; never multiplied out unless ``dense()`` is asked for.

    Attributes:
        A: left factor ``[rows, rank]``.
        B: right factor ``[rank, columns]``.
    """

    A: Float[Tensor, "rows rank"]
    B: Float[Tensor, "rank columns"]

    @property
    def shape(self) -> tuple[int, int]:
        return self.A.shape[0], self.B.shape[1]

    @property
    def rank(self) -> int:
        """The bound on the rank that the factors give: their inner dimension."""
        return self.A.shape[1]

    @property
    def T(self) -> LowRank:
        return LowRank(self.B.T, self.A.T)

    def dense(self) -> Float[Tensor, "rows columns"]:
        return self.A @ self.B

    def norm(self) -> float:
        """Frobenius norm, from the two rank x rank Gram matrices (float64)."""
        A, B = self.A.double(), self.B.double()
        return float(((A.T @ A) * (B @ B.T)).sum().clamp_min(0).sqrt())

    def eigenvalues(self) -> Tensor:
        """The ``rank`` eigenvalues that can differ from zero: eig(AB) = eig(BA) (complex128)."""
        return torch.linalg.eigvals(self.B.double() @ self.A.double())

    def __repr__(self) -> str:
        return f"LowRank({self.shape[0]} x {self.shape[1]}, rank <= {self.rank})"


@dataclass(frozen=True, eq=False)
class Head:
    """One head of a bank: an attention head, or an MLP neuron seen as a head of dimension 1.

    The weights have the norm in front folded in (its gain and, for LayerNorm, its centring), so
    they act on the normalised residual stream. For a neuron the key is the constant 1 on every
    real token and 0 on the bias token: ``W_K`` is zero and ``b_K`` is one.

    Attributes:
        W_Q, W_K, W_V: ``[d_model, d_head]``;  b_Q, b_K, b_V: ``[d_head]``.
        W_O: ``[d_head, d_model]``. (Values and outputs of a virtual head may be narrower.)
        model: the model it was taken from with ``model["L0H3"]``; None where a bank gave it.
    """

    label: str
    kind: Kind
    layer: int
    index: int
    W_Q: Float[Tensor, "d_model d_head"] = field(repr=False)
    W_K: Float[Tensor, "d_model d_head"] = field(repr=False)
    W_V: Float[Tensor, "d_model d_value"] = field(repr=False)
    W_O: Float[Tensor, "d_value d_model"] = field(repr=False)
    b_Q: Float[Tensor, " d_head"] = field(repr=False)
    b_K: Float[Tensor, " d_head"] = field(repr=False)
    b_V: Float[Tensor, " d_value"] = field(repr=False)
    bank: HeadBank = field(repr=False)
    model: Any = field(default=None, repr=False, kw_only=True)

    @property
    def OV(self) -> LowRank:
        """``W_V @ W_O``: what moves from a source token to the residual stream it is read into."""
        return LowRank(self.W_V, self.W_O)

    @property
    def QK(self) -> LowRank:
        """``W_Q @ W_K.T`` (unscaled): which token attends to which, read on the residual stream."""
        return LowRank(self.W_Q, self.W_K.T)

    @property
    def reads_at(self) -> int:
        """The step (``HeadBank.step``) at which the head reads the residual stream."""
        return self.bank.step

    @property
    def writes_at(self) -> int:
        """The step at which the head writes; heads with a later ``reads_at`` see it."""
        return self.bank.step

    def query_read(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_head"]:
        """The query side of the QK circuit for residual vectors ``x``."""
        return self.bank.query_read(self.index, x)

    def key_read(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_head"]:
        """The key side of the QK circuit for residual vectors ``x``."""
        return self.bank.key_read(self.index, x)

    def gram(self, side: Side) -> Float[Tensor, "d_head d_head"]:
        """``W.T @ W`` of one side's weights in float64 (``W @ W.T`` for O); see ``HeadBank.gram``."""
        return self.bank.gram(side, slice(self.index, self.index + 1))[0]

    def pattern(self, cache: Cache, batch: int = 0) -> Float[Tensor, "query key_plus_bias"]:
        """The dense attention picture of this head on a cached run.

        Args:
            cache: what ``model.run_with_cache`` returned, with or without a batch dimension.
            batch: which sequence of the batch.

        Returns:
            ``[query, key + 1]``: one column per real token, then the bias token's column. An
            attention head puts nothing on the bias token; a neuron puts ``gate`` on itself and
            ``1 - gate`` there (Huben & Morris 2023).
        """
        return self.bank.dense_pattern(self.bank.cached_pattern(cache, batch), self.index)

    def show(self, prompt: str | list[int] | Tensor, *, positions: slice = slice(None)) -> Page:
        """The head's attention on a prompt, as a CircuitsVis view that works offline and when saved.

        Args:
            prompt: a text, or token ids ``[pos]``.
            positions: which tokens to show, such as ``slice(-40, None)``; at most 64.

        Raises:
            MechInterpError: the head was taken from a bank and not from a model, an unusable prompt,
                or too many tokens to show.
        """
        if self.model is None:
            raise MechInterpError(
                f"this {self.label} was taken from a bank, which cannot run a prompt; take it from the "
                f"model: model[{self.label!r}].show(prompt)"
            )
        return draw(self, prompt, form="page", positions=positions)


class HeadBank(nn.Module, ABC):
    """All heads of one sublayer that share a rule for their pattern.

    Subclasses hold the weights. Whatever differs between attention and neurons is a method here;
    nothing downstream asks what kind of bank it has.

    Attributes:
        kind: "attention" or "mlp";  letter: "H" or "N", as in labels.
        part: the bank's name inside its block, ``blocks.{layer}.{part}``.
        b_O: the bias of the whole sublayer, added beside the heads, ``[d_model]``.
        place: which sublayer of its block this is, counted from 0.
        parallel: the block's sublayers all read the same stream.
        mixes_positions: whether heads can attend to tokens other than their own.
        parts: how many heads stand for one attention head or neuron of the source.
        sides: what the heads read from the stream; a neuron's key is constant.
    """

    kind: ClassVar[Kind]
    letter: ClassVar[str]
    part: ClassVar[str]
    place: ClassVar[int]
    mixes_positions: ClassVar[bool]
    parallel: bool = False
    parts: int = 1
    sides: ClassVar[tuple[Side, ...]] = ("Q", "V")

    layer: int
    n_heads: int
    d_head: int
    d_model: int
    b_O: Any

    @property
    def path(self) -> str:
        """Where the bank stands in the model and in its caches: ``blocks.0.attn``."""
        return f"blocks.{self.layer}.{self.part}"

    @property
    def step(self) -> int:
        """When the bank reads and writes: a head reads what banks of smaller steps have written."""
        return 2 * self.layer + (0 if self.parallel else self.place)

    @property
    def reads(self) -> dict[str, Float[Tensor, "head d_model d_head"]]:
        """What every head reads its queries, keys and values with, the weights in front of ``hook_q``,
        ``hook_k`` and ``hook_v``, detached; without what is the same whatever the stream holds."""
        return {side: self.stacked(side) for side in self.sides}

    @property
    @abstractmethod
    def z_constant(self) -> Shaped[Tensor, head * d_head]:
        """What every head holds (``z``) whatever it looks at, in the shape that ``hook_z`` gives it."""

    def label(self, index: int) -> str:
        return f"L{self.layer}{self.letter}{index}"

    def labels(self) -> list[str]:
        return [self.label(i) for i in range(self.n_heads)]

    def head(self, index: int) -> Head:
        """One head, its weights detached views of the bank's (no copy)."""
        weights = self.weights(index)
        return Head(
            label=self.label(index),
            kind=self.kind,
            layer=self.layer,
            index=index,
            bank=self,
            **{name: w.detach() for name, w in weights.items()},
        )

    @abstractmethod
    def weights(self, index: int) -> dict[str, Tensor]:
        """``W_Q W_K W_V W_O b_Q b_K b_V`` of one head, as views."""

    @abstractmethod
    def stacked(
        self, side: Side, heads: slice | Int[Tensor, " head"] = slice(None)
    ) -> Float[Tensor, "head rows columns"]:
        """``W_Q``, ``W_K``, ``W_V`` ``[head, d_model, d_head]`` or ``W_O`` ``[head, d_head, d_model]``
        of many heads at once, detached; shared keys and values (GQA) are given to every head."""

    def gram(
        self,
        side: Side,
        heads: slice | Int[Tensor, " head"] = slice(None),
        dtype: torch.dtype = torch.float64,
    ) -> Float[Tensor, "head d_head d_head"]:
        """Inner products of the columns of ``W_Q``, ``W_K`` or ``W_V`` (rows of ``W_O``), taken in a dtype;
        those of vectors, which cost little, always in float64.

        A neuron's key is the constant coordinate of the bias-token construction (Huben & Morris
        2023), which is not part of d_model: its key Gram is 1 although its ``W_K`` is zero.
        """
        W = self.stacked(side, heads)
        if self.d_head == 1:
            # Some at a time: a bank of vectors in float64 may be larger than all that is kept of it.
            parts = (part.flatten(1).double() for part in W.split(256))
            return torch.cat([torch.linalg.vecdot(part, part) for part in parts])[:, None, None]
        W = W.to(dtype)
        return W @ W.mT if side == "O" else W.mT @ W

    @property
    def score_scale(self) -> float:
        """What scores are divided by before the softmax."""
        return 1.0

    def turned(self, x: Float[Tensor, "*n d_head"], position: int) -> Float[Tensor, "*n d_head"]:
        """Queries or keys as they are at a position: rotary heads turn them, others leave them."""
        return x

    @abstractmethod
    def cached_pattern(self, cache: Cache, batch: int) -> Tensor:
        """The bank's compact pattern for one sequence, out of a cache."""

    @abstractmethod
    def dense_pattern(self, pattern: Tensor, index: int) -> Float[Tensor, "query key_plus_bias"]:
        """One head's [query, key + bias column] picture from the compact pattern."""

    @abstractmethod
    def attention_on(
        self,
        pattern: Tensor,
        pairs: Shaped[Tensor, "*batch query key"],
        moved: Float[Tensor, "batch key head"] | None = None,
    ) -> Float[Tensor, " head"]:
        """Sum over the batch and its (query, key) of pattern times ``pairs``, for every head.

        Args:
            pattern: the bank's compact pattern of a batch.
            pairs: weights of pairs of real tokens, the same for the whole batch or one by one.
            moved: weights of keys, such as the norm of what the head moves from there.
        """

    @abstractmethod
    def entropy(self, pattern: Tensor) -> Float[Tensor, "batch pos head"]:
        """Entropy (nats) of every row of the pattern, the bias token included; NaN where a row is
        no distribution, as the gate of a gated neuron."""

    @abstractmethod
    def moved(self, cache: Cache) -> Float[Tensor, "batch pos head"]:
        """Norm of what every head would write if it attended to one position alone, out of a cache
        with ``hook_v``."""

    @abstractmethod
    def written(self, cache: Cache) -> Float[Tensor, "batch pos head"]:
        """Norm of what every head writes at every position, out of a cache with ``hook_z``."""

    @abstractmethod
    def key_read(self, index: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_head"]:
        """The key side of a head's QK circuit for residual vectors ``x``, without key biases."""

    @abstractmethod
    def query_read(self, index: int, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_head"]:
        """The query side of a head's QK circuit for residual vectors ``x``."""


_LABEL = re.compile(r"L(\d+)([A-Z])(\d+)(?:\.(\d+))?")


@dataclass(frozen=True, eq=False)
class HeadIndex(Sequence[str]):
    """The heads of a model in order: labels, a table, and lookup by label."""

    banks: tuple[HeadBank, ...]

    def __len__(self) -> int:
        return sum(bank.n_heads for bank in self.banks)

    def __iter__(self) -> Iterator[str]:
        return (label for bank in self.banks for label in bank.labels())

    def __getitem__(self, index: Any) -> Any:
        return list(iter(self))[index]

    def required(self) -> None:
        """For analyses of heads, which have nothing to say about a model without any.

        Raises:
            MechInterpError: there is no head.
        """
        if not self.banks:
            raise MechInterpError(
                "this model has no layers and so no heads to analyse; circuits.bigrams reads its table"
            )

    @property
    def frame(self) -> pd.DataFrame:
        """One row per head: ``head, layer, kind, index``."""
        parts = [
            pd.DataFrame(
                {
                    "head": bank.labels(),
                    "layer": bank.layer,
                    "kind": bank.kind,
                    "index": range(bank.n_heads),
                }
            )
            for bank in self.banks
        ]
        none = pd.DataFrame({"head": [], "layer": [], "kind": [], "index": []})  # a model of no layers
        return pd.concat(parts, ignore_index=True) if parts else none

    def find(self, label: str) -> tuple[HeadBank, int]:
        """The bank and index behind a label such as ``L0H3``, ``L1N152`` or, where a neuron is several
        heads, ``L1N152.0``.

        Raises:
            MechInterpError: the label is malformed or names no head; the message says which exist.
        """
        match = _LABEL.fullmatch(label) if isinstance(label, str) else None
        if match is None:
            raise MechInterpError(
                f"{label!r} is not a head label; write L<layer>H<head> for an attention head or "
                f"L<layer>N<neuron> for an MLP-derived head; this model has {self._ranges()}"
            )
        layer, letter, number = int(match[1]), match[2], int(match[3])
        part = None if match[4] is None else int(match[4])
        for bank in self.banks:
            if bank.layer == layer and bank.letter == letter:
                index = number * bank.parts + (part or 0)
                if (part is not None) == (bank.parts > 1) and (part or 0) < bank.parts:
                    if index < bank.n_heads:
                        return bank, index
                elif part is None and index < bank.n_heads:
                    first, last = bank.label(index), bank.label(index + bank.parts - 1)
                    raise MechInterpError(f"neuron {label} is {bank.parts} heads: {first}..{last}")
        raise MechInterpError(f"no head {label}; this model has {self._ranges()}")

    def _ranges(self) -> str:
        return ", ".join(f"{b.label(0)}..{b.label(b.n_heads - 1)}" for b in self.banks) or "none"

    def _repr_html_(self) -> str:
        return self.frame.to_html(max_rows=12, index=False)

    def __repr__(self) -> str:
        return f"{len(self)} heads: {self._ranges()}"
