"""A bank on one prompt, its pattern and norms frozen: what ``paths/`` and ``detect/`` compute with.

``freeze_bank`` makes one; ``frozen/attention.py`` and ``frozen/neurons.py`` hold the kinds.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import singledispatch

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.norm import FrozenNorm


class FrozenBank(ABC):
    """A bank on one prompt with its pattern and norm frozen: linear in the residual stream.

    ``bank(x) = apply(x) + constant + bias``: ``constant`` is what the heads' own biases write (it
    passes through the heads), ``bias`` is added beside them. A frozen head is a Kronecker product
    ``S (x) OV``: ``S[query, key]`` holds the pattern and the frozen norm scales, OV is the same
    everywhere. So it reads any output direction ``v`` at a query position as a rank-one field over
    the input stream: weights over positions (``spread``) times one vector (``pull``).

    Attributes:
        pattern: the bank's compact pattern.
    """

    bank: HeadBank

    def __init__(self, bank: HeadBank, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm):
        self.bank = bank
        self.pattern = pattern
        self._norm = norm
        self._post = post

    def wide(self, W: Tensor) -> Tensor:
        """Weights of the bank in the dtype of the run: half precision is widened where it is used, so that
        one bank's weights at most are held twice.

        Args:
            W: a parameter of the bank, or the part of one that is needed.
        """
        return W.detach().to(self.pattern.dtype)

    @property
    @abstractmethod
    def most_terms(self) -> int:
        """How many rank-one terms ``read_groups`` may need for one group."""

    @property
    @abstractmethod
    def z_bias(self) -> Float[Tensor, "pos head d_head"]:
        """What the heads' value biases add to ``read``."""

    @abstractmethod
    def read(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos head d_head"]:
        """What every head holds at every query position (``z``), without its bias."""

    @abstractmethod
    def unread(self, z: Float[Tensor, "*batch pos head d_head"]) -> Float[Tensor, "*batch pos d_model"]:
        """The transpose of ``read``."""

    @abstractmethod
    def write(self, z: Float[Tensor, "*batch pos head d_head"]) -> Float[Tensor, "*batch pos d_model"]:
        """The sum of what the heads write when they hold ``z``."""

    @abstractmethod
    def unwrite(self, y: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos head d_head"]:
        """The transpose of ``write``."""

    @abstractmethod
    def write_at(
        self, z: Float[Tensor, "n d_head"], index: Int[Tensor, " n"], position: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """What single heads write at single positions when they hold ``z``."""

    def write_one(self, z: Float[Tensor, "pos d_head"], index: int) -> Float[Tensor, "pos d_model"]:
        """What one head writes when it holds ``z``, one row per position."""
        position = torch.arange(len(z), device=z.device)
        return self.write_at(z, torch.full_like(position, index), position)

    @abstractmethod
    def pull(self, v: Float[Tensor, "n d_model"], index: Int[Tensor, " n"]) -> Float[Tensor, "n d_model"]:
        """The vectors along which single heads read their input, for output directions ``v``."""

    @abstractmethod
    def spread(self, w: Float[Tensor, "n pos"], index: Int[Tensor, " n"]) -> Float[Tensor, "n pos"]:
        """``w @ S``: weights over query positions become weights over key positions."""

    @abstractmethod
    def write_groups(
        self, z: Float[Tensor, "n head d_head"], position: Int[Tensor, " n"]
    ) -> Float[Tensor, "n d_model"]:
        """What groups of heads, each at one position, write when all heads hold ``z`` (zero: no member)."""

    @abstractmethod
    def read_groups(
        self,
        y: Float[Tensor, "n d_model"],
        position: Int[Tensor, " n"],
        members: Bool[Tensor, "n head"],
    ) -> tuple[Int[Tensor, " terms"], Float[Tensor, "terms pos"], Float[Tensor, "terms d_model"]]:
        """What groups of heads, each at one position, read of the stream for output directions ``y``.

        Returns:
            the fields of the groups as rank-one terms (weights over positions times one vector), and
            before them the group that each term belongs to. Heads that look at the same positions,
            as neurons do, share a term.
        """

    @abstractmethod
    def reach(self, m: Float[Tensor, " pos"], *, summed: bool) -> Float[Tensor, "pos head"]:
        """The sum or the maximum over key positions of ``|S[query, key]| m[key]``."""

    @abstractmethod
    def hold(self, v: Float[Tensor, "n d_model"]) -> Float[Tensor, "n head d_head"]:
        """``unwrite`` without what depends on the position."""

    def weigh_out(self, w: Float[Tensor, "*n pos"]) -> Float[Tensor, "*n pos"]:
        """Weights over query positions, divided by the scale of a norm behind the heads, if any."""
        return self._post.weigh(w)

    @abstractmethod
    def pull_norms(self, held: Float[Tensor, "n head d_head"]) -> Float[Tensor, "n head"]:
        """Norms of what ``pull`` gives for all heads, from ``hold``."""

    @abstractmethod
    def write_norms(self, z: Float[Tensor, "pos head d_head"]) -> Float[Tensor, "pos head"]:
        """Norm of what every single head writes at every position when it holds ``z``."""

    @abstractmethod
    def norms(self) -> Float[Tensor, " head"]:
        """Spectral norm of every head's OV (norm scales left out: they are in S)."""

    @abstractmethod
    def score_sides(self, index: int, x: Float[Tensor, "pos d_model"]) -> ScoreSides:
        """The two linear sides of a head's scores, scales and rotations frozen at the stream ``x``."""

    @property
    def bias(self) -> Float[Tensor, "pos d_model"]:
        """What the sublayer adds beside its heads."""
        return self._post.apply(self.wide(self.bank.b_O).expand(self.pattern.shape[-2], -1))

    @property
    def constant(self) -> Float[Tensor, "pos d_model"]:
        """What the heads write because of their own value biases."""
        return self.write(self.z_bias)

    def apply(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """Sum of the heads' outputs for residual streams ``x``, without biases."""
        return self.write(self.read(x))

    def adjoint(self, y: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """The transpose of ``apply``: carries a direction on the output back to the input."""
        return self.unread(self.unwrite(y))

    def along(
        self, x: Float[Tensor, "pos d_model"], y: Float[Tensor, "pos d_model"]
    ) -> Float[Tensor, "pos head"]:
        """How much each head writes along ``y`` at each position, its own bias included."""
        return ((self.read(x) + self.z_bias) * self.unwrite(y)).sum(-1)

    def head_outputs_along(
        self, x: Float[Tensor, "pos d_model"], position: int, direction: Float[Tensor, " d_model"]
    ) -> Float[Tensor, " head"]:
        """How much each head writes along ``direction`` at ``position``, its own bias included."""
        y = torch.zeros_like(x)
        y[position] = direction
        return self.along(x, y)[position]


@dataclass(frozen=True, eq=False)
class ScoreSides:
    """A head's score on one prompt as ``query side . key side``, each side linear in its input.

    ``score[q, k] = (query(x) + query_bias)[q] . (key(x) + key_bias)[k]``. The softmax scale is in the
    query side; rotations and query/key norm scales are frozen in both. For a neuron the score is
    its pre-activation: the key side is the constant 1.

    Attributes:
        query, key: linear maps ``[*n, pos, d_model] -> [*n, pos, rank]``.
        query_bias, key_bias: ``[pos, rank]``.
        allowed: which pairs the mask lets see each other, ``[query, key]``.
        to_pattern: what a softmax head makes of its scores ``[query, key]``; None for other rules.
        distance: what the distance alone adds to the scores, ``[query, key]`` (ALiBi), or None.
    """

    query: Callable[[Tensor], Tensor]
    key: Callable[[Tensor], Tensor]
    query_bias: Float[Tensor, "pos rank"]
    key_bias: Float[Tensor, "pos rank"]
    allowed: Bool[Tensor, "query key"]
    to_pattern: Callable[[Tensor], Tensor] | None
    distance: Float[Tensor, "query key"] | None = None


@singledispatch
def freeze_bank(
    bank: HeadBank, pattern: Tensor, norm: FrozenNorm, post: FrozenNorm, stream: Tensor
) -> FrozenBank:
    """A bank as a linear map of residual streams.

    A new kind of bank says how with ``freeze_bank.register``.

    Args:
        pattern: the bank's compact pattern on one prompt.
        norm: the norm in front, with its scales of the run.
        post: the one on what the bank writes.
        stream: the residual stream that the bank read in the run, ``[pos, d_model]``.
    """
    raise TypeError(f"no frozen form of a {type(bank).__name__}; give one with freeze_bank.register")
