"""A model on one prompt with its patterns and norms frozen: linear from tokens to logits.

With attention patterns, neuron gates, norm scales and soft caps fixed, every bank is a linear map of
the residual stream (Elhage et al. 2021, "freezing attention patterns"; with MLP neurons as heads,
Huben & Morris 2023, the MLPs are linear too).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.results import Receipt
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.sublayer import FrozenSublayer, Source
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.norm import FrozenNorm


class Place(NamedTuple):
    """Where a head stands: its sublayer, its bank there, its number in the bank."""

    depth: int
    bank: int
    head: int


@dataclass(frozen=True, eq=False)
class Fields:
    """What the streams of a prompt add to a direction at the end, through all frozen paths behind them.

    Attributes:
        streams: for the stream that every sublayer reads, then the last, ``[pos, d_model]`` each.
        sums: for the sum in every sublayer, in front of a norm over the stream, then the last stream.
    """

    streams: list[Float[Tensor, "pos d_model"]]
    sums: list[Float[Tensor, "pos d_model"]]

    def through(self, source: Source) -> Float[Tensor, " pos"]:
        """What a source at each position adds to the direction, over all paths that start there."""
        field = self.streams[source.reader] if source.reader == source.depth else self.sums[source.depth]
        return (source.values * field).sum(-1)


@dataclass(frozen=True, eq=False)
class Frozen:
    """The frozen linear model of one prompt.

    Attributes:
        model: the model, untouched; in half precision, one that shares its weights and computes in float32.
        tokens: ``[pos]``.
        parts: what the stream starts as: "embed" and, where positions are added, "position",
            ``[pos, d_model]`` each.
        sublayers: the banks in order, as linear maps; banks of one sublayer read the same stream
            (two in a parallel block).
        end: the last residual stream, ``[pos, d_model]``.
        final_norm: the norm before the unembedding, as a linear map.
        gate: what the activation of a prediction head (BERT) made of each coordinate in front of the
            final norm, as a factor ``[pos, d_model]``; None without one.
        cap: what a soft cap makes of each logit, as a factor ``[pos, d_vocab_out]``; None without one.
        logits: what the model itself computed, ``[pos, d_vocab_out]``.
        receipt: the frozen linear model reproduces the logits.
    """

    model: AttentionOnlyModel
    tokens: Int[Tensor, " pos"]
    parts: dict[str, Float[Tensor, "pos d_model"]]
    sublayers: tuple[FrozenSublayer, ...]
    end: Float[Tensor, "pos d_model"]
    final_norm: FrozenNorm
    gate: Float[Tensor, "pos d_model"] | None
    cap: Float[Tensor, "pos d_vocab"] | None
    logits: Float[Tensor, "pos d_vocab"]
    receipt: Receipt

    @property
    def start(self) -> Float[Tensor, "pos d_model"]:
        """The residual stream before the first bank."""
        return self.sublayers[0].stream if self.sublayers else self.end

    @property
    def banks(self) -> tuple[FrozenBank, ...]:
        """All banks in order."""
        return tuple(bank for sublayer in self.sublayers for bank in sublayer.banks)

    @property
    def residuals(self) -> tuple[Float[Tensor, "pos d_model"], ...]:
        """The stream that each sublayer read, then the last one."""
        return (*(sublayer.stream for sublayer in self.sublayers), self.end)

    @property
    def held(self) -> tuple[list[Float[Tensor, "pos head d_head"]], ...]:
        """What every head of every bank held in the run (``z``), biases included."""
        return tuple(sublayer.held for sublayer in self.sublayers)

    @cached_property
    def sources(self) -> tuple[Source, ...]:
        """What no head wrote: the start of the stream, part by part, then the sublayers' own biases."""
        starts = [Source(name, "start", None, 0, 0, part) for name, part in self.parts.items()]
        biases = [source for depth, sub in enumerate(self.sublayers) for source in sub.sources(depth)]
        return (*starts, *biases)

    def sources_at(self, depth: int, reader: int) -> list[Source]:
        """The sources that join the stream in the sum ``depth`` and are first read by ``reader``.

        Args:
            depth: the number of the sum.
            reader: the sublayer that reads first.
        """
        return self._sources_by_place.get((depth, reader), [])

    @cached_property
    def _sources_by_place(self) -> dict[tuple[int, int], list[Source]]:
        found: dict[tuple[int, int], list[Source]] = {}
        for source in self.sources:
            found.setdefault((source.depth, source.reader), []).append(source)
        return found

    def locate(self, head: str) -> Place:
        """Where a head stands.

        Args:
            head: a label (``"L0H3"``), a ``Head`` or a virtual head.

        Raises:
            MechInterpError: no such head.
        """
        own, index = self.model.heads.find(head)
        return next(
            Place(depth, i, index)
            for depth, sublayer in enumerate(self.sublayers)
            for i, bank in enumerate(sublayer.banks)
            if bank.bank is own
        )

    def bank_at(self, place: Place) -> FrozenBank:
        """The bank whose frozen view stands at a place.

        Args:
            place: where the head stands, from ``locate``.
        """
        return self.sublayers[place.depth].banks[place.bank]

    def held_at(self, place: Place) -> Float[Tensor, "pos d_head"]:
        """What a head held in the run, biases included.

        Args:
            place: where the head stands, from ``locate``.
        """
        return self.sublayers[place.depth].held[place.bank][:, place.head]

    def read_at(self, place: Place, x: Float[Tensor, "pos d_model"], start: int) -> Tensor:
        """What a head holds of a part of the sum in sublayer ``start``, ``[pos, d_head]``.

        Args:
            place: where the head stands, from ``locate``.
            x: ``[..., pos, d_model]``, a part of the stream.
            start: the sublayer to begin in.
        """
        return self.bank_at(place).read(self.carry(x, start, place.depth))[:, place.head]

    def write_at(self, place: Place, z: Float[Tensor, "pos d_head"]) -> Float[Tensor, "pos d_model"]:
        """What a head writes to the sum in its sublayer when it holds ``z``.

        Args:
            place: where the head stands, from ``locate``.
            z: ``[pos, d_head]``.
        """
        return self.bank_at(place).write_one(z, place.head)

    def read_out(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_vocab"]:
        """What a part of the residual stream adds to the logits (without b_U).

        Args:
            x: ``[..., pos, d_model]``, a part of the stream.
        """
        if self.gate is not None:
            x = (x @ self.model.prediction.W.detach()) * self.gate
        logits = self.final_norm.apply(x) @ self.model.W_U.detach()
        return logits if self.cap is None else logits * self.cap

    def read_out_at(self, x: Float[Tensor, "n d_model"], position: int) -> Float[Tensor, "n d_vocab"]:
        """``read_out`` of vectors that all stand at one position.

        Args:
            x: parts of the residual stream there.
            position: from the start.
        """
        if self.gate is not None:
            x = (x @ self.model.prediction.W.detach()) * self.gate[position]
        logits = self.final_norm.at(position).apply(x) @ self.model.W_U.detach()
        return logits if self.cap is None else logits * self.cap[position]

    def read_back(self, y: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """Carry a direction in front of the unembedding back to the last residual stream.

        Args:
            y: ``[..., pos, d_model]``, in front of the unembedding.
        """
        y = self.final_norm.adjoint(y)
        return y if self.gate is None else (y * self.gate) @ self.model.prediction.W.detach().T

    def offset(self) -> Float[Tensor, "pos d_vocab"]:
        """What the biases behind the last residual stream add to the logits."""
        offset = self.model.b_U.detach().expand_as(self.logits)
        if self.gate is not None:
            bias = self.final_norm.apply(self.model.prediction.b.detach() * self.gate)
            offset = offset + bias @ self.model.W_U.detach()
        return offset if self.cap is None else offset * self.cap

    def loss(self, logits: Float[Tensor, "*batch pos d_vocab"]) -> Float[Tensor, "*batch"]:
        """Mean next-token loss (nats) of the prompt under given logits; NaN where there is none.

        Args:
            logits: ``[..., pos, d_vocab]``.
        """
        if len(self.tokens) < 2 or self.model.spec.no_next_token is not None:
            return logits.new_full(logits.shape[:-2], float("nan"))
        logp = logits[..., :-1, :].log_softmax(-1)
        targets = self.tokens[1:].expand(*logp.shape[:-1])
        return -logp.gather(-1, targets[..., None])[..., 0].mean(-1)

    def forward(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """The last residual stream, for a stream ``x`` at the start.

        Args:
            x: ``[..., pos, d_model]``, the stream at the start.
        """
        for sublayer in self.sublayers:
            x = sublayer.forward(x)
        return x

    def backward(self, y: Float[Tensor, "pos d_model"]) -> Fields:
        """Carry a direction on the last residual stream back to every earlier one.

        Args:
            y: ``[..., pos, d_model]``, a direction on the stream.
        """
        streams, sums = [y], [y]
        for sublayer in reversed(self.sublayers):
            at_sum, y = sublayer.backward(y)
            sums.append(at_sum)
            streams.append(y)
        return Fields(streams[::-1], sums[::-1])

    def carry(self, x: Float[Tensor, "*batch pos d_model"], start: int, stop: int) -> Tensor:
        """What becomes of a part of the stream that no head reads, from the sum in sublayer ``start``
        to the stream that sublayer ``stop`` reads. It stays as it is but for norms over the whole
        stream (BERT), and ends where features write the stream anew.

        Args:
            x: ``[..., pos, d_model]``, a part of the stream.
            start: the sublayer to begin in.
            stop: the sublayer to end in front of.
        """
        for depth in range(start, stop):
            sublayer = self.sublayers[depth]
            x = sublayer.carry(x if depth == start else sublayer.kept(x))
        return x

    def carry_back(self, y: Float[Tensor, "*batch pos d_model"], start: int, stop: int) -> Tensor:
        """The transpose of ``carry``.

        Args:
            y: ``[..., pos, d_model]``, a direction on the stream.
            start: the sublayer to begin in.
            stop: the sublayer to end in front of.
        """
        for depth in reversed(range(start, stop)):
            y = self.sublayers[depth].carry_back(y)
            y = y if depth == start else self.sublayers[depth].kept(y)
        return y

    def carry_rank_one(
        self, w: Float[Tensor, "*n pos"], v: Float[Tensor, "*n d_model"], start: int, stop: int
    ) -> tuple[Tensor, Tensor]:
        """``carry_back`` for rank-one fields: weights over positions times one vector.

        Args:
            w: ``[n, pos]``, weights over positions.
            v: ``[n, d_model]``, one direction each.
            start: the sublayer to begin in.
            stop: the sublayer to end in front of.
        """
        for depth in reversed(range(start, stop)):
            w, v = self.sublayers[depth].carry_rank_one(w, v)
            w = w if depth == start else self.sublayers[depth].kept(w)
        return w, v

    @property
    def str_tokens(self) -> list[str]:
        """The tokens' texts; those that share a character all show it."""
        return self.model.to_readable_tokens(self.tokens)

    def __repr__(self) -> str:
        return f"Frozen({len(self.tokens)} tokens, {len(self.banks)} banks; {self.receipt})"


def sum_tolerance(frozen: Frozen) -> float:
    """What rounding may make of a sum of terms, in logits: as for conversions, by dtype."""
    scale = float(frozen.logits.abs().max())
    return TOLERANCE[frozen.logits.dtype] * max(scale, 1.0)
