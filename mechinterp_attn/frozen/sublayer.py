"""One sublayer on one prompt, everything but the residual stream frozen.

The equation of a sublayer stands here, once, and every analysis of frozen prompts goes through it::

    x  ->  out(kept(x) + sum_i (heads_i(x) + bias_i)) + out_bias

``heads_i`` are the heads of one bank with their value biases, ``bias_i`` is what the bank adds beside
them, and ``out`` is a norm over the whole stream with bias ``out_bias`` (BERT); in most models it is
the identity. ``kept`` is the identity too, but for features that describe the stream itself: they and their
error write it anew, and nothing passes them by.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, reduce
from typing import Literal

import torch
from jaxtyping import Float, Int
from torch import Tensor

import mechinterp_attn.frozen.attention
import mechinterp_attn.frozen.neurons
import mechinterp_attn.frozen.wide  # noqa: F401  (they tell freeze_bank about their kinds)
from mechinterp_attn.frozen.bank import FrozenBank, freeze_bank
from mechinterp_attn.model.block import Sublayer
from mechinterp_attn.model.norm import IDENTITY, FrozenNorm, Norm
from mechinterp_attn.model.on_a_run import Cache

ROWS = 256  # positions that go through a bank at once: short prompts read its weights once for many orders


@dataclass(frozen=True, eq=False)
class Source:
    """A part of the residual stream that no head wrote.

    Attributes:
        name: "embed", "position", "L0 attn bias", "L0 mlp norm bias", ... (for display only).
        kind: "start" for what the stream starts as, "bias" for what a sublayer adds beside its heads.
        layer: the block of a bias; None for the start.
        depth: the sublayer in whose sum the part first stands; ``Frozen.carry`` takes it on from there.
        reader: the first sublayer that reads it.
        values: ``[pos, d_model]``.
    """

    name: str
    kind: Literal["start", "bias"]
    layer: int | None
    depth: int
    reader: int
    values: Float[Tensor, "pos d_model"]


@dataclass(frozen=True, eq=False)
class FrozenSublayer:
    """A sublayer on one prompt, as an affine map of residual streams.

    Attributes:
        banks: its banks as linear maps, the norms around them included.
        stream: the residual stream they read in the run, ``[pos, d_model]``.
        out: the norm over the whole stream behind them; the identity in most models.
        out_bias: what that norm adds, ``[d_model]``, or None.
        anew: the banks write the stream anew.
    """

    banks: tuple[FrozenBank, ...]
    stream: Float[Tensor, "pos d_model"]
    out: FrozenNorm
    out_bias: Float[Tensor, " d_model"] | None
    anew: bool = False

    def kept(self, x: Tensor) -> Tensor:
        """What passes the heads by: all of the stream, or nothing. Its own transpose."""
        return torch.zeros_like(x) if self.anew else x

    def forward(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """The stream behind the sublayer, for a stream ``x`` in front of it."""
        return self.after(x, self.holds(x))

    def holds(self, x: Float[Tensor, "*batch pos d_model"]) -> list[Tensor]:
        """What the heads of each bank hold (``z``) for a stream ``x``, biases included."""
        return [bank.read(x) + bank.z_bias for bank in self.banks]

    def after(self, x: Float[Tensor, "*batch pos d_model"], held: Sequence[Tensor]) -> Tensor:
        """The stream behind the sublayer when the heads of each bank hold ``held``."""
        written = (bank.write(z) for bank, z in zip(self.banks, held, strict=True))
        return self.carry(sum(written, self.kept(x))) + self.beside

    @cached_property
    def held(self) -> list[Float[Tensor, "pos head d_head"]]:
        """What the heads of each bank held in the run."""
        return self.holds(self.stream)

    @cached_property
    def beside(self) -> Float[Tensor, "pos d_model"]:
        """What the sublayer adds to the stream behind it beside its heads."""
        added = self.carry(reduce(torch.add, [bank.bias for bank in self.banks]))
        return added if self.out_bias is None else added + self.out_bias

    def backward(self, y: Float[Tensor, "*batch pos d_model"]) -> tuple[Tensor, Tensor]:
        """Carry a field on the stream behind back: to the sum in the sublayer, and to the stream in
        front of it. The transpose of ``forward`` without its biases.
        """
        at_sum = self.carry_back(y)
        return at_sum, sum((bank.adjoint(at_sum) for bank in self.banks), self.kept(at_sum))

    def carry(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """What becomes of a part of the sum that no head reads: only a norm over the stream changes it."""
        return self.out.apply(x)

    def carry_back(self, y: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """The transpose of ``carry``."""
        return self.out.adjoint(y)

    def carry_at(self, x: Float[Tensor, "n d_model"], position: Int[Tensor, " n"]) -> Tensor:
        """``carry`` for single vectors at given positions."""
        return self.out.at(position).apply(x)

    def carry_rank_one(
        self, w: Float[Tensor, "*n pos"], v: Float[Tensor, "*n d_model"]
    ) -> tuple[Tensor, Tensor]:
        """``carry_back`` for rank-one fields: weights over positions times one vector."""
        return self.out.weigh(w), self.out.turn_back(v)

    def carry_bound(self, m: Float[Tensor, " pos"]) -> Float[Tensor, " pos"]:
        """A bound on the norms that ``carry`` gives, from norms ``m`` of what it is given."""
        gain = self.out.gain
        return self.out.weigh(m) * (1.0 if gain is None else float(gain.abs().max()))

    def graded(
        self, streams: Float[Tensor, "order pos d_model"], climb: Callable[[FrozenBank], int | None]
    ) -> tuple[list[Tensor], Tensor]:
        """``forward`` on a stream that is kept as a polynomial, one part per order of its paths.

        Args:
            streams: the parts; the last one holds its own order and all higher ones.
            climb: by how many orders passing through a bank lifts a path; None where its heads are silent.

        Returns:
            what each bank writes, by order, as it stands in the sum; and the streams behind.
        """
        last = len(streams) - 1
        # High orders are empty in the first sublayers.
        filled = (
            streams[: int(streams.flatten(1).any(1).nonzero().max()) + 1] if streams.any() else streams[:0]
        )
        written = []
        for bank in self.banks:
            own = torch.zeros_like(streams)
            if (lift := climb(bank)) is not None:
                at_once = max(1, ROWS // streams.shape[1])
                for first, part in enumerate(filled.split(at_once)):
                    for order, moved in enumerate(bank.apply(part), start=first * at_once):
                        own[min(order + lift, last)] += moved
                own[min(lift, last)] += bank.constant
            written.append(own)
        behind = self.carry(sum(written, self.kept(streams)))
        behind = behind.clone() if behind is streams else behind
        behind[0] += self.beside
        return written, behind

    def sources(self, depth: int) -> list[Source]:
        """What the sublayer adds beside its heads, bank by bank, given its place ``depth``."""
        found = [
            Source(
                f"L{bank.bank.layer} {bank.bank.part} bias",
                "bias",
                bank.bank.layer,
                depth,
                depth + 1,
                bank.bias,
            )
            for bank in self.banks
        ]
        if self.out_bias is not None:
            last = self.banks[-1].bank
            bias = self.out_bias.expand_as(self.stream)
            name = f"L{last.layer} {last.part} norm bias"
            found.append(Source(name, "bias", last.layer, depth + 1, depth + 1, bias))
        return found


def freeze_sublayer(sublayer: Sublayer, cache: Cache) -> FrozenSublayer:
    """A sublayer with the patterns and norm scales that it had on one cached sequence.

    Args:
        cache: activations of one sequence without a batch dimension: the pattern of the banks,
            ``hook_scale`` of the norms, and the stream in front.
    """

    def frozen(norm: Norm, path: str) -> FrozenNorm:
        return norm.freeze(None if norm.kind is None else cache[f"{path}.hook_scale"])

    banks = tuple(
        freeze_bank(
            bank,
            bank.cached_pattern(cache, 0),
            frozen(*sublayer.norm),
            frozen(*post),
            cache[sublayer.stream],
        )
        for bank, post in zip(sublayer.banks, sublayer.posts, strict=True)
    )
    if sublayer.out is None:
        return FrozenSublayer(banks, cache[sublayer.stream], IDENTITY, None, sublayer.anew)
    bias, stream = sublayer.out[0].b, cache[sublayer.stream]
    out = frozen(*sublayer.out)
    return FrozenSublayer(banks, stream, out, None if bias is None else bias.detach().to(stream.dtype))
