"""A masked softmax head and a sublayer, as the paper defines them.

    h(X) = softmax_rows(mask(X W_QK X^T)) X W_OV          sublayer(X) = X + sum_h h(X)

``SoftmaxHeads`` is a stack of heads that share a mask, so that the l heads of an MLP are one object;
a single head is a stack of one. Scores are not scaled: what a model divides them by is in W_QK.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.low_rank import LowRank
from mechinterp_attn.theorems.masks import MaskRule, check_rows, everything, forbidding
from mechinterp_attn.theorems.stream import Layout

PATTERN_BYTES = 128 * 2**20  # of the dense patterns held at a time


@dataclass(frozen=True, eq=False)
class SoftmaxHeads:
    """Masked softmax heads on an augmented stream.

    Attributes:
        layout: how the stream is laid out.
        W_Q, W_K: ``[head, width, rank]``; ``W_QK = W_Q @ W_K.T``. A rank of 0 attends evenly to
            what the mask allows. W_K may have one entry that all heads share.
        W_V: ``[head, width, d_head]``.
        W_O: ``[head, d_head, width]``;  ``W_OV = W_V @ W_O``.
        mask: the rule for who sees whom.
        penalty: ``Omega * B [positions, positions]`` where the mask is written into the weights: it
            is the block of W_QK that reads the one-hot position coordinates.
        turn: rotary positions: what turns queries and keys ``[..., head, row, rank]`` by row. None
            for heads of the paper's own kind; neuron heads never have it.
    """

    layout: Layout
    W_Q: Float[Tensor, "head width rank"] = field(repr=False)
    W_K: Float[Tensor, "key_head width rank"] = field(repr=False)
    W_V: Float[Tensor, "head width d_head"] = field(repr=False)
    W_O: Float[Tensor, "head d_head width"] = field(repr=False)
    mask: MaskRule = field(repr=False)
    penalty: Float[Tensor, "position position"] | None = field(default=None, repr=False)
    turn: Callable[[Tensor], Tensor] | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        width, heads = self.layout.width, len(self.W_V)
        wrong = [
            f"{name} has shape {tuple(W.shape)}, expected {expected}"
            for name, W, expected in (
                ("W_Q", self.W_Q, (heads, width, self.W_Q.shape[-1])),
                ("W_K", self.W_K, (len(self.W_K), width, self.W_Q.shape[-1])),
                ("W_V", self.W_V, (heads, width, self.W_V.shape[-1])),
                ("W_O", self.W_O, (heads, self.W_V.shape[-1], width)),
            )
            if tuple(W.shape) != expected
        ]
        if len(self.W_K) not in (1, heads):
            wrong.append(f"W_K has {len(self.W_K)} heads, expected 1 or {heads}")
        if wrong:
            raise MechInterpError("heads that do not fit their stream: " + "; ".join(wrong))

    def __len__(self) -> int:
        return len(self.W_V)

    def __getitem__(self, index: int) -> SoftmaxHeads:
        """One head, as a stack of one."""
        i = range(len(self))[index]
        k = i if len(self.W_K) > 1 else 0
        return replace(
            self,
            W_Q=self.W_Q[i : i + 1],
            W_K=self.W_K[k : k + 1],
            W_V=self.W_V[i : i + 1],
            W_O=self.W_O[i : i + 1],
        )

    @property
    def W_QK(self) -> LowRank:
        """``W_QK`` of a single head, the block of a mask in the weights included.

        Raises:
            MechInterpError: this is a stack of several heads; take one.
        """
        self._single("W_QK")
        A, B = self.W_Q[0], self.W_K[0]
        if self.penalty is not None:
            at = self.layout.positions_at
            one_hot = torch.eye(len(at), dtype=A.dtype, device=A.device)
            A = torch.cat([A, self.layout.embed(one_hot, at, dim=0)], dim=1)
            B = torch.cat([B, self.layout.embed(self.penalty.T, at, dim=0)], dim=1)
        return LowRank(A, B.T)

    @property
    def W_OV(self) -> LowRank:
        """``W_OV`` of a single head.

        Raises:
            MechInterpError: this is a stack of several heads; take one.
        """
        self._single("W_OV")
        return LowRank(self.W_V[0], self.W_O[0])

    def _single(self, what: str) -> None:
        if len(self) != 1:
            raise MechInterpError(f"{what} of {len(self)} heads; take one of them: heads[i].{what}")

    def scores(self, X: Float[Tensor, "*batch row width"]) -> Float[Tensor, "*batch head row row"]:
        """``X W_QK X^T``, before the mask rule (a mask in the weights is part of W_QK).

        Args:
            X: the augmented stream, ``[..., row, width]``.
        """
        q, k = project(X, self.W_Q), project(X, self.W_K)
        if self.turn is not None:
            q, k = self.turn(q), self.turn(k)
        return self.penalised(q @ k.mT, X)

    def penalised(
        self, scores: Float[Tensor, "*batch head row row"], X: Float[Tensor, "*batch row width"]
    ) -> Float[Tensor, "*batch head row row"]:
        """The scores with the penalty of a mask in the weights, read through X's one-hot positions.

        Args:
            scores: ``[..., head, row, row]``.
            X: the augmented stream, ``[..., row, width]``.
        """
        if self.penalty is None:
            return scores
        P = X[..., self.layout.positions_at.start : self.layout.positions_at.stop]
        return scores + (P @ self.penalty @ P.mT).unsqueeze(-3)

    def masked(self, scores: Float[Tensor, "*batch head row row"]) -> Float[Tensor, "*batch head row row"]:
        """The scores with minus infinity on what the mask rule forbids.

        Args:
            scores: ``[..., head, row, row]``.
        """
        if self.mask is everything:
            return scores
        allowed = check_rows(self.mask(scores.shape[-1])).to(scores.device)
        return scores.masked_fill(~allowed, -math.inf)

    def patterns(self, X: Float[Tensor, "*batch row width"]) -> Float[Tensor, "*batch head row row"]:
        """The dense attention patterns; rows sum to 1.

        Args:
            X: the augmented stream, ``[..., row, width]``.
        """
        return self.masked(self.scores(X)).softmax(-1)

    def __call__(self, X: Float[Tensor, "*batch row width"]) -> Float[Tensor, "*batch row width"]:
        """The sum of the heads' outputs; dense patterns of a few heads at a time.

        Raises:
            MechInterpError: rows of another width than the layout's.
        """
        if X.shape[-1] != self.layout.width:
            raise MechInterpError(f"X has shape {tuple(X.shape)}; expected [..., row, {self.layout.width}]")
        size = X.shape[:-2].numel() * X.shape[-2] ** 2 * X.element_size()
        out = torch.zeros_like(X)
        for part in self.chunks(max(1, PATTERN_BYTES // size)):
            v = project(X, part.W_V)
            out = out + torch.einsum("...hnr,hrd->...nd", part.patterns(X) @ v, part.W_O)
        return out

    def chunks(self, size: int) -> Sequence[SoftmaxHeads]:
        """The stack in pieces of at most ``size`` heads.

        Args:
            size: how many heads at most.
        """
        if size >= len(self):
            return (self,)
        pieces = []
        for start in range(0, len(self), size):
            part = slice(start, start + size)
            W_K = self.W_K[part] if len(self.W_K) > 1 else self.W_K
            pieces.append(
                replace(self, W_Q=self.W_Q[part], W_K=W_K, W_V=self.W_V[part], W_O=self.W_O[part])
            )
        return pieces

    def with_mask_in_weights(self, omega: float, *, bias_row: float = 1.0) -> SoftmaxHeads:
        """The same heads without a mask: ``W_QK'' = blockdiag(W_QK, Omega B)``.

        Args:
            omega: the penalty on a forbidden pair; see ``least_omega``.
            bias_row: the penalty on what the bias token may not see, in units of Omega. Its row is
                zero but for what leaks into it, and a norm makes that up to ``1 / sqrt(eps)`` times
                larger; twice the penalty keeps it out of sight.

        Raises:
            MechInterpError: the stream has no one-hot positions, or its dtype is below float32.
        """
        rows = self.layout.positions
        if rows == 0:
            raise MechInterpError(
                "a mask in the weights reads one-hot positions and this stream has none; use "
                "Layout(..., positions=rows) with a coordinate for every row, the bias token's too"
            )
        check_precision(self.W_Q.dtype)
        B = forbidding(check_rows(self.mask(rows))).to(self.W_Q)
        B[: self.layout.persistent] *= bias_row
        return replace(self, mask=everything, penalty=omega * B)


def project(
    X: Float[Tensor, "*batch row width"], W: Float[Tensor, "head width rank"]
) -> Float[Tensor, "*batch head row rank"]:
    """Queries, keys or values of every head."""
    return torch.einsum("...nd,hdr->...hnr", X, W)


def check_precision(
    dtype: torch.dtype,
    what: str = "masks in weights",
    why: str = "scores next to a penalty of some tens keep only one or two digits in half precision; use "
    "masks='exact', or model.float()",
) -> None:
    """Masks in weights, and whatever else lives on a number's low digits, need float32.

    Raises:
        MechInterpError: a dtype with fewer digits.
    """
    if dtype not in (torch.float32, torch.float64):
        name = str(dtype).removeprefix("torch.")
        raise MechInterpError(f"{what} need float32 or float64, got {name}: {why}")


@dataclass(frozen=True, eq=False)
class Sublayer:
    """``X + sum of heads(norm(X))``: a skip and heads, nothing else.

    Attributes:
        heads: stacks of heads; several masks may stand side by side (a parallel block is one
            sublayer of attention and neuron heads).
        norm: the norm in front of the heads, on the original coordinates only; None for none.
        skip: False leaves the skip connection out.
    """

    heads: tuple[SoftmaxHeads, ...]
    norm: Callable[[Tensor], Tensor] | None = None
    skip: bool = True

    @property
    def n_heads(self) -> int:
        """Heads in all stacks."""
        return sum(len(stack) for stack in self.heads)

    def __call__(self, X: Float[Tensor, "*batch row width"]) -> Float[Tensor, "*batch row width"]:
        """The stream behind the sublayer."""
        read = X if self.norm is None else self.norm(X)
        out = X if self.skip else torch.zeros_like(X)
        for stack in self.heads:
            out = out + stack(read)
        return out

    def with_masks_in_weights(self, omega: float) -> Sublayer:
        """The same sublayer with every mask written into weights (see ``SoftmaxHeads``).

        Args:
            omega: how strongly a mask in the weights forbids a row.
        """
        return replace(self, heads=tuple(h.with_mask_in_weights(omega) for h in self.heads))


def run(
    sublayers: Sequence[Sublayer], X: Float[Tensor, "*batch row width"]
) -> Float[Tensor, "*batch row width"]:
    """A model: a row of sublayers and nothing else.

    Args:
        sublayers: in order.
        X: the augmented stream, ``[..., row, width]``.
    """
    for sublayer in sublayers:
        X = sublayer(X)
    return X
