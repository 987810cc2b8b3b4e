"""A model on one prompt with its patterns and norms frozen: linear from tokens to logits.

With attention patterns, neuron gates, norm scales and soft caps fixed, every bank is a linear map of
the residual stream (Elhage et al. 2021, "freezing attention patterns"; with MLP neurons as heads,
Huben & Morris 2023, the MLPs are linear too).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.conversion.fidelity import TOLERANCE
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.block import FrozenSublayer
from mechinterp_attn.model.norm import FrozenNorm


@dataclass(frozen=True, eq=False)
class Frozen:
    """The frozen linear model of one prompt.

    Attributes:
        model: the model, untouched.
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

    @cached_property
    def held(self) -> tuple[tuple[Float[Tensor, "pos head d_head"], ...], ...]:
        """What every head of every bank held in the run (``z``), biases included."""
        return tuple(
            tuple(bank.read(sublayer.stream) + bank.z_bias for bank in sublayer.banks)
            for sublayer in self.sublayers
        )

    def read_out(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_vocab"]:
        """What a part of the residual stream adds to the logits (without b_U)."""
        if self.gate is not None:
            x = (x @ self.model.prediction.W.detach()) * self.gate
        logits = self.final_norm.apply(x) @ self.model.W_U.detach()
        return logits if self.cap is None else logits * self.cap

    def read_back(self, y: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_model"]:
        """Carry a direction in front of the unembedding back to the last residual stream."""
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
        """Mean next-token loss (nats) of the prompt under given logits."""
        logp = logits[..., :-1, :].log_softmax(-1)
        targets = self.tokens[1:].expand(*logp.shape[:-1])
        return -logp.gather(-1, targets[..., None])[..., 0].mean(-1)

    def gradients(self, y: Float[Tensor, "pos d_model"]) -> list[Float[Tensor, "pos d_model"]]:
        """Carry a direction on the last residual stream back to every earlier one.

        Returns:
            one field per entry of ``residuals``: how much each coordinate of that stream adds to
            the direction through all frozen paths.
        """
        fields = [y]
        for sublayer in reversed(self.sublayers):
            y = y if sublayer.out is None else sublayer.out.adjoint(y)
            y = y + sum(bank.adjoint(y) for bank in sublayer.banks)
            fields.append(y)
        return fields[::-1]

    def carry(self, x: Float[Tensor, "*batch pos d_model"], start: int, stop: int) -> Tensor:
        """What becomes of a part of the stream on the residual connection, unread by any head, from
        the sum in sublayer ``start`` to the stream that sublayer ``stop`` reads.

        Nothing, save in models with a norm over the whole stream (BERT).
        """
        for sublayer in self.sublayers[start:stop]:
            x = x if sublayer.out is None else sublayer.out.apply(x)
        return x

    def carry_back(self, y: Float[Tensor, "*batch pos d_model"], start: int, stop: int) -> Tensor:
        """The transpose of ``carry``."""
        for sublayer in reversed(self.sublayers[start:stop]):
            y = y if sublayer.out is None else sublayer.out.adjoint(y)
        return y

    def biases(self, stop: int) -> Iterator[tuple[str, int, Float[Tensor, "pos d_model"]]]:
        """What sublayers before ``stop`` add beside their heads, as it is in the stream that ``stop``
        reads: name, layer and ``[pos, d_model]`` of each."""
        for i, sublayer in enumerate(self.sublayers[:stop]):
            for bank in sublayer.banks:
                name = f"L{bank.bank.layer} {bank.bank.part} bias"
                yield name, bank.bank.layer, self.carry(bank.bias, i, stop)
            if sublayer.out_bias is not None:
                last = sublayer.banks[-1].bank
                bias = sublayer.out_bias.expand_as(sublayer.stream)
                yield f"L{last.layer} {last.part} norm bias", last.layer, self.carry(bias, i + 1, stop)

    @property
    def str_tokens(self) -> list[str]:
        return self.model.to_str_tokens(self.tokens)

    def __repr__(self) -> str:
        return f"Frozen({len(self.tokens)} tokens, {len(self.banks)} banks; {self.receipt})"


@torch.no_grad()
def freeze(model: AttentionOnlyModel, tokens: str | Tensor) -> Frozen:
    """Run a prompt once and fix every pattern, norm scale and soft cap.

    Args:
        tokens: a text, or token ids ``[pos]`` or ``[1, pos]``.

    Raises:
        MechInterpError: more than one prompt, unusable tokens, or hooks on the model (the frozen
            model would describe neither the edited nor the original one).
    """
    ids = model.as_tokens(tokens)
    if ids.shape[0] != 1:
        raise MechInterpError(f"freeze takes one prompt, got a batch of {ids.shape[0]}")
    hooked = [name for name, point in model.hook_dict.items() if point.has_hooks()]
    if hooked:
        raise MechInterpError(
            f"the model has hooks at {', '.join(hooked[:5])}; remove them (model.reset_hooks()) "
            "before freezing"
        )
    wanted = ("hook_pattern", "hook_scale", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    logits, cache = model.run_with_cache(
        ids,
        names_filter=lambda name: name.endswith(wanted) or name in ("hook_embed", "hook_pos_embed"),
        return_cache_object=False,
    )
    cache = {name: tensor[0] for name, tensor in cache.items()}
    parts = _parts(model, cache)
    last = f"blocks.{model.spec.n_layers - 1}.hook_resid_post"
    end = cache[last] if model.spec.n_layers else sum(parts.values(), torch.zeros_like(parts["embed"]))
    frozen = Frozen(
        model=model,
        tokens=ids[0],
        parts=parts,
        sublayers=tuple(sublayer.freeze(cache) for sublayer in model.sublayers()),
        end=end,
        final_norm=model.ln_final.freeze(cache.get("ln_final.hook_scale")),
        gate=_prediction_gate(model, end),
        cap=None,
        logits=logits[0],
        receipt=Receipt(),
    )
    return _with_receipt(_with_cap(frozen))


def _parts(model: AttentionOnlyModel, cache: dict[str, Tensor]) -> dict[str, Tensor]:
    embed = cache["hook_embed"]
    if not model.spec.n_layers:  # no block to read the stream at; no known model has an embed norm then
        position = cache.get("hook_pos_embed")
        return {"embed": embed} if position is None else {"embed": embed, "position": position}
    start = cache["blocks.0.hook_resid_pre"]
    if model.spec.embed_norm is not None:
        return {"embed": start}
    position = start - embed
    return {"embed": embed, "position": position} if bool(position.any()) else {"embed": embed}


def _prediction_gate(model: AttentionOnlyModel, end: Tensor) -> Float[Tensor, "pos d_model"] | None:
    """The activation of a prediction head as the factor it was on this prompt."""
    if not model.spec.prediction_head:
        return None
    z = end @ model.prediction.W.detach() + model.prediction.b.detach()
    return torch.where(z == 0, 0.0, model.prediction(end[None])[0] / z)


def _with_cap(frozen: Frozen) -> Frozen:
    """A soft cap on the logits as the factor it was on this prompt."""
    cap = frozen.model.spec.logit_cap
    if cap is None:
        return frozen
    raw = frozen.read_out(frozen.end) + frozen.offset()
    return replace(frozen, cap=torch.where(raw == 0, 1.0, cap * torch.tanh(raw / cap) / raw))


def sum_tolerance(frozen: Frozen) -> float:
    """What rounding may make of a sum of terms, in logits: as for conversions, by dtype."""
    scale = float(frozen.logits.abs().max())
    return TOLERANCE[frozen.logits.dtype] * max(scale, 1.0)


def _with_receipt(frozen: Frozen) -> Frozen:
    x = frozen.start
    for sublayer in frozen.sublayers:
        x = x + sum(bank.apply(x) + bank.constant + bank.bias for bank in sublayer.banks)
        x = x if sublayer.out is None else sublayer.out.apply(x)
        x = x if sublayer.out_bias is None else x + sublayer.out_bias
    logits = frozen.read_out(x) + frozen.offset()
    error = float((logits - frozen.logits).abs().max())
    check = Check("the frozen linear model gives the model's logits", error, sum_tolerance(frozen))
    notes = {"dtype": str(frozen.logits.dtype).removeprefix("torch.")}
    return replace(frozen, receipt=Receipt((check,), notes))
