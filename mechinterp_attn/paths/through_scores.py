"""The way back from what a bank of attention heads holds to its queries and keys, through its softmax.

The frozen pass holds patterns fixed. To ask what decides where a head looks, the softmax is replaced by its
derivative at the pattern of the run, ``dp = p (ds - sum(p ds))``: to first order, what a part of the stream
adds to a score changes the target by so much. Everything else stays frozen.
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.frozen.attention import FrozenAttention
from mechinterp_attn.paths.score import pullback

FLOATS = 2**24  # gradients at scores that are held at a time


class Entered(NamedTuple):
    """What stands in front of a head that is entered by its queries or keys.

    Attributes:
        field: on the stream that the head reads.
        bias: what the head's own bias of that side brings.
        pair: the query and the key whose score the target depends on the most.
    """

    field: Float[Tensor, "pos d_model"]
    bias: float
    pair: tuple[int, int]


class Scores:
    """The scores of one bank on a prompt.

    Attributes:
        scores: products of queries and keys, ``[head, query, key]``, without what distances add; 0 where
            the mask hides the key.
    """

    def __init__(self, bank: FrozenAttention, x: Float[Tensor, "pos d_model"]):
        self._bank, self._x, self._values = bank, x, bank.values
        self.scores = torch.zeros_like(bank.pattern)
        self._slope: Tensor | None = None  # of the soft cap
        cap = bank.bank.score_cap
        if cap is not None:
            self._slope = torch.ones_like(bank.pattern)
        for head in range(bank.bank.n_heads):
            sides = bank.score_sides(head, x)
            own = (sides.query(x) + sides.query_bias) @ (sides.key(x) + sides.key_bias).T
            self.scores[head] = own.masked_fill(~sides.allowed, 0.0)
            if cap is not None and self._slope is not None:
                whole = own if sides.distance is None else own + sides.distance
                self._slope[head] = 1 - torch.tanh(whole / cap).square()

    def carried(self, held: Float[Tensor, "row pos head d_head"]) -> Float[Tensor, "row head"]:
        """What all that a head's queries read brings to the target, and just as well all that its keys
        read, for fields on what heads hold.
        """
        at_once = max(1, FLOATS // self.scores.numel())
        parts = [(self._gradient(part) * self.scores).sum((2, 3)) for part in held.split(at_once)]
        return torch.cat(parts)

    def entered(
        self, head: int, side: Literal["Q", "K"], held: Float[Tensor, "pos head d_head"]
    ) -> Entered:
        """The field in front of one head's queries or keys, for a field on what the heads hold."""
        gradient = self._gradient(held[None, :, [head]], [head])[0, 0]
        sides, x = self._bank.score_sides(head, self._x), self._x
        if side == "Q":
            linear, bias = sides.query, sides.query_bias
            along = gradient @ (sides.key(x) + sides.key_bias)
        else:
            linear, bias = sides.key, sides.key_bias
            along = gradient.T @ (sides.query(x) + sides.query_bias)
        query, key = divmod(int(gradient.abs().argmax()), len(x))
        return Entered(pullback(linear, along, x), float((along * bias).sum()), (query, key))

    def _gradient(self, held: Tensor, heads: list[int] | None = None) -> Tensor:
        """At the scores, ``[row, head, query, key]``."""
        chosen = slice(None) if heads is None else heads
        pattern = self._bank.pattern[chosen]
        moved = torch.einsum("rqhd,khd->rhqk", held, self._values[:, chosen])
        out = pattern * (moved - (pattern * moved).sum(-1, keepdim=True))
        return out if self._slope is None else out * self._slope[chosen]
