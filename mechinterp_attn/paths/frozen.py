"""A model on one prompt with its patterns and norms frozen: linear from tokens to logits.

With attention patterns, neuron gates and norm scales fixed, every bank is a linear map of the
residual stream (Elhage et al. 2021, "freezing attention patterns"; with MLP neurons as heads,
Huben & Morris 2023, the MLPs are linear too).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.banks.norm import FrozenNorm
from mechinterp_attn.conversion.fidelity import TOLERANCE
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.heads import FrozenBank
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Check, Receipt


@dataclass(frozen=True, eq=False)
class Frozen:
    """The frozen linear model of one prompt.

    Attributes:
        model: the model, untouched.
        tokens: ``[pos]``.
        start: embedding plus positions, ``[pos, d_model]``.
        banks: the model's banks in order, as linear maps.
        residuals: the residual stream that each bank read, ``[pos, d_model]`` each, then the last.
        final_norm: the norm before the unembedding, as a linear map.
        logits: what the model itself computed, ``[pos, d_vocab_out]``.
        receipt: the frozen linear model reproduces the logits.
    """

    model: AttentionOnlyModel
    tokens: Int[Tensor, " pos"]
    start: Float[Tensor, "pos d_model"]
    banks: tuple[FrozenBank, ...]
    residuals: tuple[Float[Tensor, "pos d_model"], ...]
    final_norm: FrozenNorm
    logits: Float[Tensor, "pos d_vocab"]
    receipt: Receipt

    def read_out(self, x: Float[Tensor, "*batch pos d_model"]) -> Float[Tensor, "*batch pos d_vocab"]:
        """What a part of the residual stream adds to the logits (without b_U)."""
        return self.final_norm.apply(x) @ self.model.W_U.detach()

    def loss(self, logits: Float[Tensor, "*batch pos d_vocab"]) -> Float[Tensor, "*batch"]:
        """Mean next-token loss (nats) of the prompt under given logits."""
        logp = logits[..., :-1, :].log_softmax(-1)
        targets = self.tokens[1:].expand(*logp.shape[:-1])
        return -logp.gather(-1, targets[..., None])[..., 0].mean(-1)

    @property
    def str_tokens(self) -> list[str]:
        return self.model.to_str_tokens(self.tokens)

    def __repr__(self) -> str:
        return f"Frozen({len(self.tokens)} tokens, {len(self.banks)} banks; {self.receipt})"


@torch.no_grad()
def freeze(model: AttentionOnlyModel, tokens: str | Tensor) -> Frozen:
    """Run a prompt once and fix every pattern and norm scale.

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
        ids, names_filter=lambda name: name.endswith(wanted), return_cache_object=False
    )
    cache = {name: tensor[0] for name, tensor in cache.items()}
    banks, residuals = [], []
    for bank in model.banks:
        norm, path = model.norm_of(bank)
        frozen_norm = norm.freeze(cache.get(f"{path}.hook_scale"))
        banks.append(bank.freeze(bank.cached_pattern(cache, 0), frozen_norm))
        residuals.append(cache[model.stream_of(bank)])
    last = cache[f"blocks.{model.spec.n_layers - 1}.hook_resid_post"]
    final_norm = model.ln_final.freeze(cache.get("ln_final.hook_scale"))
    frozen = Frozen(
        model=model,
        tokens=ids[0],
        start=residuals[0],
        banks=tuple(banks),
        residuals=(*residuals, last),
        final_norm=final_norm,
        logits=logits[0],
        receipt=Receipt(),
    )
    return _with_receipt(frozen)


def sum_tolerance(frozen: Frozen) -> float:
    """What rounding may make of a sum of terms, in logits: as for conversions, by dtype."""
    scale = float(frozen.logits.abs().max())
    return TOLERANCE[frozen.logits.dtype] * max(scale, 1.0)


def _with_receipt(frozen: Frozen) -> Frozen:
    x = frozen.start
    for bank in frozen.banks:
        x = x + bank.apply(x) + bank.constant + bank.bank.b_O.detach()
    logits = frozen.read_out(x) + frozen.model.b_U.detach()
    error = float((logits - frozen.logits).abs().max())
    check = Check("the frozen linear model gives the model's logits", error, sum_tolerance(frozen))
    notes = {"dtype": str(frozen.logits.dtype).removeprefix("torch.")}
    return Frozen(**{**vars(frozen), "receipt": Receipt((check,), notes)})
