"""Heads of one bank as two stacks of small matrices: how they write and how they read.

Composition asks for ``|W_OV1 M2|`` with ``M2 = W_QK2``, ``W_QK2^T`` or ``W_OV2``. With ``W_OV1 = A B`` the
norm depends on A only through its Gram matrix: ``|A B X| = |sqrt(A^T A) B X|``. So a head writes as an
``[r, d_model]`` matrix, reads as a ``[d_model, r]`` one, and every composition is a product of two of
those. For a rank-1 head both are vectors and the composition is the cosine between them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.heads import Head, HeadBank, Side
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.virtual import VirtualHead, resolve_head

Composition = Literal["Q", "K", "V"]
Select = str | Iterable[str | Head] | None
KEPT = 2**18  # numbers of a group's Gram matrices that are kept
_OTHER: dict[Composition, Side] = {"Q": "K", "K": "Q", "V": "O"}  # the other factor of the circuit


@dataclass(frozen=True, eq=False)
class HeadGroup:
    """Heads that read at one step and write at one step, with one inner dimension.

    Attributes:
        name: of the bank, such as ``L0H`` or ``L3N``; of a virtual head, its label.
        heads: their places in the bank (a slice for all of them).
    """

    name: str
    labels: tuple[str, ...]
    reads_at: int
    writes_at: int
    rank: int
    bank: HeadBank | VirtualHead
    heads: slice | Tensor
    _grams: dict[Side, Tensor] = field(default_factory=dict, repr=False)

    def __len__(self) -> int:
        return len(self.labels)

    def members(self) -> list[Head]:
        """The heads one by one."""
        if isinstance(self.bank, VirtualHead):
            return [self.bank]
        places = range(len(self)) if isinstance(self.heads, slice) else self.heads.tolist()
        return [self.bank.head(i) for i in places]

    def writes(
        self, part: slice | Tensor = slice(None), dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "head rank d_model"]:
        """How heads write, each scaled to Frobenius norm 1 (0 where a head writes nothing)."""
        root = _root(self._gram("V", part)).mT.to(dtype)
        return _unit(_scaled(root, self.stacked("O", part).to(dtype)))

    def reads(
        self, kind: Composition, part: slice | Tensor = slice(None), dtype: torch.dtype = torch.float64
    ) -> Float[Tensor, "head d_model rank"]:
        """How heads read for Q-, K- or V-composition, each scaled to Frobenius norm 1."""
        root = _root(self._gram(_OTHER[kind], part)).to(dtype)
        return _unit(_scaled(self.stacked(kind, part).to(dtype), root))

    def write_norms(self) -> Float[Tensor, " head"]:
        """Frobenius norms of the OV circuits (float64)."""
        return self.read_norms("V")

    def read_norms(self, kind: Composition) -> Float[Tensor, " head"]:
        """Frobenius norms of the OV circuits (V) or QK circuits (Q and K), float64."""
        grams = self._gram(kind, slice(None)) * self._gram(_OTHER[kind], slice(None))
        return grams.sum((1, 2)).clamp_min(0).sqrt()

    def participation(
        self, kind: Composition, part: slice | Tensor = slice(None)
    ) -> Float[Tensor, " head"]:
        """Sum of the fourth powers of the singular values, their squares scaled to sum to 1; of the
        OV circuits (V) or QK circuits (Q and K). NaN for a head that reads or writes nothing."""
        product = self._gram(kind, part) @ self._gram(_OTHER[kind], part)  # eigenvalues: squares
        trace = product.diagonal(dim1=1, dim2=2).sum(-1)
        return (product * product.mT).sum((1, 2)) / trace.square()

    def reads_stream(self, kind: Composition) -> bool:
        """Whether these heads read the residual stream at all on this side."""
        return bool(self.stacked(kind, slice(0, 1)).any())

    def stacked(self, side: Side, part: slice | Tensor = slice(None)) -> Tensor:
        """``W_Q``, ``W_K``, ``W_V`` or ``W_O`` of the heads, as ``HeadBank.stacked``."""
        if isinstance(self.bank, VirtualHead):
            return getattr(self.bank, f"W_{side}")[None][part]
        return self.bank.stacked(side, self._places(part))

    def _gram(self, side: Side, part: slice | Tensor) -> Tensor:
        if isinstance(self.bank, VirtualHead):
            return self.bank.gram(side)[None][part]
        if len(self) * self.rank**2 > KEPT:
            return self.bank.gram(side, self._places(part))
        if side not in self._grams:
            self._grams[side] = self.bank.gram(side, self.heads)
        return self._grams[side][part]

    def _places(self, part: slice | Tensor) -> slice | Tensor:
        return part if isinstance(self.heads, slice) else self.heads[part]


def groups_of(model: AttentionOnlyModel, select: Select) -> list[HeadGroup]:
    """Heads as groups, in the order of the banks.

    Args:
        select: None for all heads, "attention" or "mlp" for all of a kind, or labels and heads.

    Raises:
        MechInterpError: no such head, or none selected.
    """
    if select is None or isinstance(select, str):
        banks = [bank for bank in model.banks if select in (None, bank.kind)]
        if banks:
            return [_group(bank, slice(None), tuple(bank.labels())) for bank in banks]
        select = [str(select)]
    heads = [resolve_head(model, head) for head in select]
    if not heads:
        raise MechInterpError("no heads selected; give labels, 'attention', 'mlp' or None for all")
    plain: dict[HeadBank, dict[int, str]] = {}
    groups = []
    for head in heads:
        if isinstance(head, VirtualHead):
            rank = head.W_V.shape[1]
            ends = (head.reads_at, head.writes_at)
            groups.append(HeadGroup(head.label, (head.label,), *ends, rank, head, slice(None)))
        else:
            plain.setdefault(head.bank, {})[head.index] = head.label
    for bank in model.banks:
        if chosen := plain.get(bank):
            places = torch.tensor(sorted(chosen), device=model.W_E.device)
            groups.append(_group(bank, places, tuple(chosen[i] for i in sorted(chosen))))
    return sorted(groups, key=lambda group: group.writes_at)


def refuse_non_finite(groups: Sequence[HeadGroup]) -> None:
    """Raises:
    MechInterpError: names every bank tensor that holds a NaN or an infinity, and where."""
    wrong = []
    for bank in {id(g.bank): g.bank for g in groups if isinstance(g.bank, HeadBank)}.values():
        for name, tensor in bank.named_parameters():
            if not bool(tensor.sum().isfinite()) and not bool((finite := torch.isfinite(tensor)).all()):
                where = [int(i) for i in (~finite).nonzero()[0]]
                wrong.append(f"{bank.path}.{name} at {where}")
    if wrong:
        raise MechInterpError("weights that are not finite: " + "; ".join(wrong))


def _group(bank: HeadBank, heads: slice | Tensor, labels: tuple[str, ...]) -> HeadGroup:
    name = f"L{bank.layer}{bank.letter}"
    return HeadGroup(name, labels, bank.step, bank.step, bank.d_head, bank, heads)


def _root(gram: Float[Tensor, "head r r"]) -> Float[Tensor, "head r r"]:
    """``L`` with ``L @ L.T = gram``: Cholesky factors, or eigenvectors where one is singular."""
    if gram.shape[-1] == 1:
        return gram.clamp_min(0).sqrt()
    root, singular = torch.linalg.cholesky_ex(gram)
    if bool(singular.any()):
        values, vectors = torch.linalg.eigh(gram)
        return vectors * values.clamp_min(0).sqrt()[:, None]
    return root


def _scaled(x: Tensor, y: Tensor) -> Tensor:
    """``x @ y``; for a rank-1 head one of them is a number."""
    return x * y if x.shape[1:] == (1, 1) or y.shape[1:] == (1, 1) else x @ y


def _unit(x: Float[Tensor, "head a b"]) -> Float[Tensor, "head a b"]:
    size = torch.linalg.matrix_norm(x)[:, None, None]
    return x / torch.where(size > 0, size, 1)
