"""How well attached dictionaries describe a model, measured on real activations.

A dictionary is good when few features are active at a token, what they write is nearly what the MLP writes,
and the model predicts as well without the rest (Gao et al. 2024, section 4; Lieberum et al. 2024, section
4).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, cast

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch, Input, as_batch, plan_sequences, rows_within
from mechinterp_attn.causal.cuts import next_token
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.block import Block, Located
from mechinterp_attn.model.features import FeatureBank

ALL = "all"  # the row in which no dictionary has its error


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Reconstruction(Result):
    """How well attached dictionaries describe a model on some prompts.

    Attributes:
        frame: one row per dictionary, and ``all`` where there are several: ``dictionary`` (``L5``),
            ``layer`` (-1 for all), ``features``, ``l0`` (features active at a token, mean), ``fve``
            (fraction of variance explained: 1 - squared error / squared distance from the mean, of what is
            described: what the MLP writes, or the stream), ``dead`` (share of the features that are active
            at no token here), ``loss`` (of the model, nats per token), ``loss_without_error``,
            ``loss_ablated`` (with what is described at zero), ``loss_recovered`` (how much of the way from
            the last to the first is left without the error) and ``kl`` (from the model's next-token
            distribution to the one without the error, nats). The first token of a prompt counts for none of
            the features' measures; a model without a next-token loss has NaN where it needs one.
        n_tokens: how many tokens the features' measures are over.
    """

    title: ClassVar[str] = "Reconstruction by dictionaries"
    n_tokens: int


def _plan(model: AttentionOnlyModel, prompts: Input, max_bytes: int) -> Plan:
    batch = as_batch(model, prompts)
    n = len(model.spec.dictionaries)
    return plan_sequences(model, f"{n} dictionaries", batch, max_bytes, runs=2 + 2 * (n + (n > 1)))


@plans(_plan)
@torch.no_grad()
def reconstruction(
    model: AttentionOnlyModel, prompts: Input, *, max_bytes: int = MAX_BYTES
) -> Reconstruction:
    """Measure how well attached dictionaries describe a model: sparsity, reconstruction, loss.

    The receipt compares with each dictionary computed another way, in float64 from its tensors: with the
    errors it must give what it describes in a run that looks at no feature. Tokens at which rounding
    decides whether a feature is active are left out of that, and counted.

    Args:
        model: a model with dictionaries, from ``mia.attach``.
        prompts: a text, texts, or tokens ``[batch, pos]``; thousands of tokens, for ``dead`` to mean much.
        max_bytes: memory beyond the model's that may be used.

    Raises:
        MechInterpError: no dictionary is attached, no prompt has a second token, or one sequence needs more
            than max_bytes.
    """
    if not model.spec.dictionaries:
        raise MechInterpError("no dictionary is attached to this model; see mia.attach")
    batch = as_batch(model, prompts)
    if not bool(batch.predicts.any()):
        raise MechInterpError("no prompt has a second token; features are measured from it on")
    within(_plan(model, prompts, max_bytes), max_bytes, "fewer or shorter sequences")
    layers = sorted(one.layer for one in model.spec.dictionaries)
    tallies = {layer: _Tally(cast(Block, model.blocks[layer])) for layer in layers}
    changes = _Changes.of(layers)
    for part in batch.split(rows_within(model, batch.tokens.shape[1], max_bytes)):
        for tally in tallies.values():
            tally.add(model, part)
        changes.add(model, part)
    rows = [tally.row() for tally in tallies.values()]
    if len(rows) > 1:
        sums = {name: sum(row[name] for row in rows) for name in ("features", "l0")}
        rows.append({"dictionary": ALL, "layer": -1, **sums})
    frame = pd.DataFrame([row | changes.columns(row["layer"]) for row in rows])
    n = int(batch.predicts.sum())
    error = max(tally.error for tally in tallies.values())
    unclear = sum(tally.unclear for tally in tallies.values())
    what = "dictionaries from their tensors, in float64, and errors make what they describe"
    check = Check(what, error, TOLERANCE[model.W_E.dtype])
    notes = {"tokens": f"{n:,}", "dtype": str(model.W_E.dtype).removeprefix("torch.")}
    if unclear:
        notes["left out of the check, at a threshold"] = f"{unclear:,} tokens"
    return Reconstruction(
        frame=frame,
        receipt=Receipt((check,) if all(tally.clear for tally in tallies.values()) else (), notes),
        n_tokens=n,
    )


class _Tally:
    """Sums over the tokens of one layer's dictionary."""

    def __init__(self, block: Block):
        self.layer, self.bank, self.skip = block.layer, block.features, getattr(block, "skip", None)
        self.read_at, self.norm = _read_by(block)
        self.wrote_at, self.rest = _described_at(block), block.error.hook("z")
        d, n = self.bank.W_out.shape[1], self.bank.n_heads
        self.n, self.left, self.square, self.active_in_all = 0, 0.0, 0.0, 0
        self.sum = torch.zeros(d, dtype=torch.float64)
        self.ever = torch.zeros(n, dtype=torch.bool)
        self.error, self.unclear, self.clear = 0.0, 0, 0

    def add(self, model: AttentionOnlyModel, part: Batch) -> None:
        names = [self.read_at, self.wrote_at]
        plain = _cached(model, part, names)
        split = _cached(model, part, [self.rest])
        read = self.norm[0].plain(plain[self.read_at])
        wrote = plain[self.wrote_at].double()
        out, active, clear = _by_tensors(self.bank, self.skip, read)
        rest = split[self.rest][..., 0, :].double()
        here = part.real & clear
        self.unclear += int((part.real & ~clear).sum())
        self.clear += int(here.sum())
        off = (out + rest - wrote)[here].abs()
        scale = wrote[part.real].abs().max().clamp_min(1e-30)
        self.error = max(self.error, float(off.max() / scale) if len(off) else 0.0)
        counted = torch.cat([torch.zeros_like(part.real[:, :1]), part.predicts], 1)
        y, left, on = wrote[counted], (wrote - out)[counted], active[counted]
        self.n += len(y)
        self.left += float(left.square().sum())
        self.square += float(y.square().sum())
        self.sum += y.sum(0).cpu()
        self.active_in_all += int(on.sum())
        self.ever |= on.any(0).cpu()

    def row(self) -> dict[str, Any]:
        variance = self.square - float(self.sum.square().sum()) / self.n
        return {
            "dictionary": f"L{self.layer}",
            "layer": self.layer,
            "features": len(self.ever),
            "l0": self.active_in_all / self.n,
            "fve": 1 - self.left / variance if variance else math.nan,
            "dead": 1 - float(self.ever.double().mean()),
        }


def _read_by(block: Block) -> tuple[str, Located]:
    """The stream that a block's features read, and the norm in between."""
    sublayer = next(one for one in block.sublayers() if block.features in one.banks)
    return sublayer.stream, sublayer.norm


def _described_at(block: Block) -> str:
    """The hook of what a block's dictionary describes: what the MLP writes, or the stream behind it."""
    return f"blocks.{block.layer}.{'hook_resid_post' if block.describing else 'hook_mlp_out'}"


def _cached(model: AttentionOnlyModel, part: Batch, names: Sequence[str]) -> dict[str, Tensor]:
    padded: dict[str, Any] = {} if part.mask is None else {"attention_mask": part.mask}
    _, cache = model.run_with_cache(
        part.tokens, return_type=None, names_filter=[*names], return_cache_object=False, **padded
    )
    return cache


def _by_tensors(
    bank: FeatureBank, skip: Any, read: Float[Tensor, "batch pos d_model"]
) -> tuple[
    Float[Tensor, "batch pos d_model"], Bool[Tensor, "batch pos feature"], Bool[Tensor, "batch pos"]
]:
    """What a dictionary writes, which features are active, and at which tokens rounding decides neither."""
    x = read.double()
    z = torch.einsum("bpd,df->bpf", x, bank.W_in.double()) + bank.b_in.double()
    margin = (z - bank.threshold.double()).abs().amin(-1)
    active = z > bank.threshold.double()
    if 0 < bank.k < z.shape[-1]:
        order = z.sort(-1, descending=True).values
        margin = torch.minimum(margin, order[..., bank.k - 1] - order[..., bank.k])
        active &= z >= order[..., bank.k - 1 : bank.k]
    out = torch.einsum("bpf,fd->bpd", z * active, bank.W_out.double()) + bank.b_out.double()
    if skip is not None:
        out = out + x @ skip.W_skip.double()
    steps = bool((bank.threshold != 0).any()) or bank.k > 0  # ReLU has no step to be unsure about
    rounding = min(TOLERANCE[bank.W_in.dtype], 32 * torch.finfo(bank.W_in.dtype).eps)
    sure = margin > rounding * z.abs().amax(-1) if steps else margin >= 0
    return out, active, sure


@dataclass(eq=False)
class _Changes:
    """Losses without an error and without an MLP, by layer; -1 for all layers at once.

    Attributes:
        layers: which are changed, by row.
        sums: loss without the error, loss without the MLP, KL, by row.
        loss: of the model itself, summed.
    """

    layers: dict[int, list[int]]
    sums: dict[int, list[float]] = field(default_factory=dict)
    loss: float = 0.0
    n: int = 0

    @classmethod
    def of(cls, layers: list[int]) -> _Changes:
        rows = {layer: [layer] for layer in layers}
        return cls(rows if len(layers) == 1 else rows | {-1: layers})

    def add(self, model: AttentionOnlyModel, part: Batch) -> None:
        if model.spec.no_next_token is not None:
            return
        whole = _logits(model, part, [])
        self.loss += float(next_token(whole, part)[0].double().sum())
        self.n += int(part.predicts.sum())
        log_p = whole.log_softmax(-1)
        for row, layers in self.layers.items():
            sums = self.sums.setdefault(row, [0.0, 0.0, 0.0])
            without = _logits(model, part, [f"blocks.{layer}.error.hook_act" for layer in layers])
            silent = _logits(
                model, part, [_described_at(cast(Block, model.blocks[layer])) for layer in layers]
            )
            kl = (log_p.exp() * (log_p - without.log_softmax(-1))).sum(-1)[:, :-1]
            sums[0] += float(next_token(without, part)[0].double().sum())
            sums[1] += float(next_token(silent, part)[0].double().sum())
            sums[2] += float((kl * part.predicts).double().sum())

    def columns(self, layer: int) -> dict[str, float]:
        if not self.n:
            return dict.fromkeys(COLUMNS, math.nan)
        loss = self.loss / self.n
        without, silent, kl = (total / self.n for total in self.sums[layer])
        way = silent - loss
        recovered = (silent - without) / way if way else math.nan
        return dict(zip(COLUMNS, (loss, without, silent, recovered, kl), strict=True))


COLUMNS = ("loss", "loss_without_error", "loss_ablated", "loss_recovered", "kl")


def _logits(model: AttentionOnlyModel, part: Batch, silent: Sequence[str]) -> Tensor:
    """Logits of a run in which some hooks see zeros."""
    padded: dict[str, Any] = {} if part.mask is None else {"attention_mask": part.mask}
    hooks = [(name, lambda z, hook: torch.zeros_like(z)) for name in silent]
    return model.run_with_hooks(part.tokens, fwd_hooks=hooks, **padded)
