"""Heads that look at their own token and at the bias token, and at nothing else."""

from __future__ import annotations

from abc import ABC
from typing import ClassVar

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.on_a_run import Cache


class OwnTokenBank(HeadBank, ABC):
    """Their pattern is one number at each token, ``[batch, pos, head]``: the weight on the token itself.
    The bias token has the rest.
    """

    mixes_positions: ClassVar[bool] = False

    def cached_pattern(self, cache: Cache, batch: int) -> Float[Tensor, "pos head"]:
        pattern = cache[self.hook("pattern")]
        return pattern[batch] if pattern.ndim == 3 else pattern

    def dense_pattern(self, pattern: Tensor, index: int) -> Float[Tensor, "query key_plus_bias"]:
        own = pattern[:, index]
        return torch.cat([own.diag(), (1 - own)[:, None]], dim=1)

    def attention_on(
        self,
        pattern: Float[Tensor, "batch pos head"],
        pairs: Shaped[Tensor, "*batch query key"],
        moved: Float[Tensor, "batch key head"] | None = None,
    ) -> Float[Tensor, " head"]:
        own = pairs.diagonal(dim1=-2, dim2=-1)  # no other token is seen
        own = own.to(pattern.dtype).expand(len(pattern), -1)
        if moved is not None:
            pattern = pattern * moved
        return own.flatten() @ pattern.flatten(0, 1)
