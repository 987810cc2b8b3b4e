"""Heads of one bank as two stacks of small matrices: how they write and how they read.

Composition asks for ``|W_OV1 M2|`` with ``M2 = W_QK2``, ``W_QK2^T`` or ``W_OV2``. With ``W_OV1 = A B`` the
norm depends on A only through its Gram matrix: ``|A B X| = |sqrt(A^T A) B X|``. So a head writes as an
``[r, d_model]`` matrix, reads as a ``[d_model, r]`` one, and every composition is a product of two of
those. For a rank-1 head both are vectors and the composition is the cosine between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head, HeadBank, Side
from mechinterp_attn.model.index import KINDS, Heads
from mechinterp_attn.model.select import resolve_head

Composition = Literal["Q", "K", "V"]
Select = Heads | None
KEPT = 2**18  # numbers of a group's Gram matrices that are kept
# The other factor of the circuit that a head reads with.
OTHER: dict[Composition, Side] = {"Q": "K", "K": "Q", "V": "O"}


@dataclass(frozen=True, eq=False)
class Weights:
    """Heads' weights as plain tensors, away from any bank: of a virtual head, or to be sent to another
    process.

    Attributes:
        sides: some of ``W_Q``, ``W_K``, ``W_V``, ``W_O``, stacked as by ``HeadBank.stacked``.
        grams: their Gram matrices, as by ``HeadBank.gram``.
    """

    sides: Mapping[Side, Tensor]
    grams: Mapping[Side, Tensor]

    def stacked(
        self, side: Side, heads: slice | Tensor = slice(None), dtype: torch.dtype | None = None
    ) -> Tensor:
        return self.sides[side][heads].to(dtype)

    def gram(
        self, side: Side, heads: slice | Tensor = slice(None), dtype: torch.dtype = torch.float64
    ) -> Tensor:
        return self.grams[side][heads].to(dtype)


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads that read at one step and write at one step, with one inner dimension.

    Attributes:
        name: of the bank, such as ``L0H`` or ``L3N``; of a virtual head, its label.
        layer, kind: as of its heads.
        rank: inner dimension of the OV circuits.
        qk_rank: of the QK circuits.
        bank: where the weights come from.
        heads: their places in it (a slice for all of them).
        chosen: the heads themselves, where they are not just those places of a bank.
    """

    name: str
    layer: int
    kind: str
    n_heads: int
    reads_at: int
    writes_at: int
    rank: int
    qk_rank: int
    bank: HeadBank | Weights
    heads: slice | Tensor = field(default_factory=lambda: slice(None))
    chosen: tuple[Head, ...] = ()
    _grams: dict[tuple[Side, torch.dtype], Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return self.n_heads

    @cached_property
    def labels(self) -> tuple[str, ...]:
        """Of all of them: made when asked for, since there may be hundreds of thousands."""
        if isinstance(self.heads, slice) and isinstance(self.bank, HeadBank):
            return tuple(self.bank.labels())
        return tuple(self.label(i) for i in range(len(self)))

    def label(self, index: int) -> str:
        """The label of one of the heads."""
        if not isinstance(self.bank, HeadBank):
            return self.chosen[index].label
        return self.bank.label(index if isinstance(self.heads, slice) else int(self.heads[index]))

    def members(self) -> list[Head]:
        """The heads one by one."""
        if not isinstance(self.bank, HeadBank):
            return list(self.chosen)
        places = range(len(self)) if isinstance(self.heads, slice) else self.heads.tolist()
        return [self.bank.head(i) for i in places]

    def apart(self, stacked: Sequence[Side], grams: Sequence[Side]) -> HeadGroup:
        """The same heads with plain tensors for the sides named: no bank, model or hook hangs on it."""
        sides = {side: self.stacked(side) for side in stacked}
        weights = Weights(sides, {side: self._gram(side, slice(None)) for side in grams})
        return replace(self, bank=weights, heads=slice(None), chosen=(), _grams={})

    def writes(
        self, part: slice | Tensor = slice(None), dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "head rank d_model"]:
        """How heads write, each scaled to Frobenius norm 1 (0 where a head writes nothing)."""
        if self.rank == 1:
            return self._direction("O", "V", part, dtype)
        root = _root(self._gram("V", part)).mT.to(dtype)
        return _unit(root @ self.stacked("O", part, dtype))

    def reads(
        self, kind: Composition, part: slice | Tensor = slice(None), dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "head d_model rank"]:
        """How heads read for Q-, K- or V-composition, each scaled to Frobenius norm 1."""
        if self.reading_rank(kind) == 1:
            return self._direction(kind, OTHER[kind], part, dtype)
        root = _root(self._gram(OTHER[kind], part)).mT.to(dtype)
        # Made the other way round: d_model stands last in memory, as it does in ``writes``.
        return _unit(root @ self.stacked(kind, part, dtype).mT).mT

    def squared(
        self, kind: Composition | None, dtype: torch.dtype
    ) -> tuple[Float[Tensor, "head d_model r"], Float[Tensor, "head r r"]]:
        """``X`` and ``M``: ``X M X^T`` is the symmetric matrix ``R R^T`` of how heads read, or ``W^T W`` of
        how they write (kind None). ``X`` are the weights themselves, ``M`` is scaled.
        """
        side: Side = kind or "O"
        # Products of Gram matrices in float64: those of small weights have no float32.
        middle = self._gram(OTHER[kind] if kind else "V", slice(None), dtype).double()
        trace = (self._gram(side, slice(None), dtype) * middle).sum((1, 2), keepdim=True)
        X = self.stacked(side, dtype=dtype)
        return X.mT if side == "O" else X, (middle / trace.where(trace > 0, 1)).to(dtype)

    def _direction(self, side: Side, other: Side, part: slice | Tensor, dtype: torch.dtype) -> Tensor:
        """The vectors of one side of rank-1 heads, scaled to length 1; 0 where the other side is 0. The
        Gram matrices have the lengths already: nothing as large as the weights is made but the result.
        """
        squares = self._gram(side, part)
        nothing = (squares == 0) | (self._gram(other, part) == 0)
        scale = squares.rsqrt().clamp_max(torch.finfo(dtype).max).masked_fill(nothing, 0)
        return self.stacked(side, part, dtype) * scale.to(dtype)

    def reading_rank(self, kind: Composition) -> int:
        """Inner dimension of what ``reads`` gives."""
        return self.rank if kind == "V" else self.qk_rank

    def write_norms(self) -> Float[Tensor, " head"]:
        """Frobenius norms of the OV circuits (float64)."""
        return self.read_norms("V")

    def spectral_norms(self) -> Float[Tensor, " head"]:
        """Largest singular values of the OV circuits (float64)."""
        root = _root(self._gram("V", slice(None)))
        return (
            torch.linalg.eigvalsh(root.mT @ self._gram("O", slice(None)) @ root)[:, -1].clamp_min(0).sqrt()
        )

    def read_norms(self, kind: Composition) -> Float[Tensor, " head"]:
        """Frobenius norms of the OV circuits (V) or QK circuits (Q and K), float64."""
        grams = self._gram(kind, slice(None)) * self._gram(OTHER[kind], slice(None))
        return grams.sum((1, 2)).clamp_min(0).sqrt()

    def participation(
        self, kind: Composition, part: slice | Tensor = slice(None), dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, " head"]:
        """Sum of the fourth powers of the singular values, their squares scaled to sum to 1; of the
        OV circuits (V) or QK circuits (Q and K). NaN for a head that reads or writes nothing.

        Args:
            dtype: in which the Gram matrices are taken.
        """
        # Its eigenvalues are the squares of the singular values.
        product = self._gram(kind, part, dtype).double() @ self._gram(OTHER[kind], part, dtype).double()
        trace = product.diagonal(dim1=1, dim2=2).sum(-1)
        return (product * product.mT).sum((1, 2)) / trace.square()

    def reads_stream(self, kind: Composition) -> bool:
        """Whether these heads read the residual stream at all on this side."""
        return bool((self.stacked(kind, slice(0, 1)) != 0).any())

    def stacked(
        self, side: Side, part: slice | Tensor = slice(None), dtype: torch.dtype | None = None
    ) -> Tensor:
        """``W_Q``, ``W_K``, ``W_V`` or ``W_O`` of the heads, as ``HeadBank.stacked``."""
        return self.bank.stacked(side, self._places(part), dtype)

    def _gram(self, side: Side, part: slice | Tensor, dtype: torch.dtype = torch.float64) -> Tensor:
        few = isinstance(part, Tensor) and 4 * len(part) <= len(self)
        if (side, dtype) not in self._grams:
            if few or len(self) * self.rank**2 > KEPT:
                return self.bank.gram(side, self._places(part), dtype)
            self._grams[side, dtype] = self.bank.gram(side, self.heads, dtype)
        return self._grams[side, dtype][part]

    def _places(self, part: slice | Tensor) -> slice | Tensor:
        return part if isinstance(self.heads, slice) else self.heads[part]


def groups_of(model: AttentionOnlyModel, select: Select) -> list[HeadGroup]:
    """Heads as groups, in the order of the banks.

    Args:
        select: None for all heads, "attention" or "mlp" for all of a kind, or labels and heads.

    Raises:
        MechInterpError: no such head, none selected, or a model without heads.
    """
    model.heads.required()
    kind = "all" if select is None else select
    if isinstance(kind, str) and kind in KINDS:
        banks = [bank for bank in model.heads.of(kind).banks if bank.has_circuit]
        if banks:
            return [_group(bank, slice(None)) for bank in banks]
    heads = [_with_circuit(head) for head in model.heads.select(kind)]
    plain: dict[HeadBank, set[int]] = {}
    groups = []
    for head in heads:
        if len(head.chain) > 1:
            groups.append(_alone(head))
        else:
            plain.setdefault(head.bank, set()).add(head.index)
    for bank in model.banks:
        if chosen := plain.get(bank):
            places = torch.tensor(sorted(chosen), device=model.W_E.device)
            groups.append(_group(bank, places))
    return sorted(groups, key=lambda group: group.writes_at)


def refuse_non_finite(model: AttentionOnlyModel, banks: Iterable[HeadBank | Weights]) -> None:
    """Raises:
    MechInterpError: names every tensor of the banks and of the vocabulary that holds a NaN or an
        infinity, and where.
    """
    named = [("embed.W_E", model.W_E), ("unembed.W_U", model.W_U)]
    for bank in {id(bank): bank for bank in banks if isinstance(bank, HeadBank)}.values():
        named += [(f"{bank.path}.{name}", tensor) for name, tensor in bank.named_parameters()]
    wrong = []
    for name, tensor in named:
        if not bool(tensor.sum().isfinite()) and not bool((finite := torch.isfinite(tensor)).all()):
            wrong.append(f"{name} at {[int(i) for i in (~finite).nonzero()[0]]}")
    if wrong:
        raise MechInterpError("weights that are not finite: " + "; ".join(wrong))


def finite_head(model: AttentionOnlyModel, head: str | Head) -> Head:
    """A head, from what a user may give, whose weights are known to be finite.

    Raises:
        MechInterpError: no such head, or weights that are not finite.
    """
    one = _with_circuit(resolve_head(model, head))
    refuse_non_finite(model, (part.bank for part in one.chain))
    return one


def _with_circuit(head: Head) -> Head:
    """Raises:
    MechInterpError: the head, or one of its chain, writes what is not linear in what it reads.
    """
    for part in head.chain:
        if not part.bank.has_circuit:
            raise MechInterpError(
                f"{part.label} is what a dictionary leaves out; it has no OV or QK circuit. "
                "mia.causal.effects and mia.paths measure what it does"
            )
    return head


def _group(bank: HeadBank, heads: slice | Tensor) -> HeadGroup:
    n = bank.n_heads if isinstance(heads, slice) else len(heads)
    ends = bank.step, bank.step
    ranks = bank.d_head, bank.d_head
    return HeadGroup(f"L{bank.layer}{bank.letter}", bank.layer, bank.kind, n, *ends, *ranks, bank, heads)


def _alone(head: Head) -> HeadGroup:
    """A virtual head as a group of its own."""
    written = head.bank.seen(head.W_O.double()).to(head.W_O.dtype)
    sides: dict[Side, Tensor] = {"Q": head.W_Q, "K": head.W_K, "V": head.W_V, "O": written}
    weights = Weights(
        {side: W[None] for side, W in sides.items()}, {side: head.gram(side)[None] for side in sides}
    )
    ends = head.reads_at, head.writes_at
    ranks = head.W_V.shape[1], head.W_Q.shape[1]
    return HeadGroup(head.label, head.layer, head.kind, 1, *ends, *ranks, weights, chosen=(head,))


def _root(gram: Float[Tensor, "head r r"]) -> Float[Tensor, "head r r"]:
    """``L`` with ``L @ L.T = gram``: Cholesky factors, or eigenvectors where one is singular."""
    if gram.shape[-1] == 1:
        return gram.clamp_min(0).sqrt()
    root, singular = torch.linalg.cholesky_ex(gram)
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(gram)
        return vectors * values.clamp_min(0).sqrt()[:, None]
    return root


def _unit(x: Float[Tensor, "head a b"]) -> Float[Tensor, "head a b"]:
    size = torch.linalg.matrix_norm(x)[:, None, None]
    return x / torch.where(size > 0, size, 1)
