"""A whole transformer by the paper's inductive procedure, checked step by step.

The invariant is ``X'_t = aug(X_t)``: after every sublayer the literal stream, de-augmented, is the
original one, its constant is 1 on real rows, and the bias token's row is zero (Huben & Morris 2023,
corollary on whole models).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.conversion.reference import run_checkpoint
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.sources.bridge import run_bridge
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.theorems.activations import SoftmaxActivation
from mechinterp_attn.theorems.gated import default_eps
from mechinterp_attn.theorems.heads import check_precision
from mechinterp_attn.theorems.literal import LiteralModel
from mechinterp_attn.theorems.omega import check_omega, least_omega, sublayer_log_leak
from mechinterp_attn.theorems.steps import Steps

Source = Any  # a TransformerBridge, a Checkpoint or an AttentionOnlyModel

# Largest logit error that rounding explains, as a share of the logit scale.
TOLERANCE = {torch.float64: 1e-11, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
# The same where neurons multiply: a product is off by eps^2 g^2 / 12 and by rounding 1 / eps times
# larger (``gated.product_heads``), about 1e-10 and 1e-4 of itself.
PRODUCT_TOLERANCE = {torch.float64: 1e-8, torch.float32: 1e-3}
# What masks in weights may add to a sublayer's output where omega is chosen for the caller.
MASK_TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}


@renamed_arguments(tol="tolerance")
def attention_only(
    model: Source,
    masks: Literal["exact", "weights"] = "exact",
    omega: float | None = None,
    *,
    activation: str | SoftmaxActivation | None = None,
    tolerance: float | None = None,
) -> LiteralModel:
    """A trained transformer as literal attention-only transformer, measured against the original.

    Every sublayer is a skip and a sum of masked softmax heads on the augmented stream: the original
    heads, one head per neuron (per neuron and term of ``activation``), one per output bias. The
    result's ``.steps`` is the table of the induction on random tokens.

    Args:
        model: an ``AttentionOnlyModel``, or what ``mia.convert`` takes: a TransformerBridge or a
            ``mia.Checkpoint``. It is left as it was.
        masks: "exact" for masks as masks, "weights" for masks written into ``W_QK`` through one-hot
            positions.
        omega: the size of the penalty of masks in weights; by default the least whose bound keeps
            ``tolerance`` on random tokens (see ``calibrate_omega``).
        activation: what stands for the model's activation function; by default the paper's
            generalised SiLU (exact for SiLU), or the softmax mixture the model was converted with.
        tolerance: the error that masks in weights may make in a sublayer's output.

    Raises:
        UnsupportedModelError: the model has parts that are no softmax heads; all are listed.
        MechInterpError: masks in weights below float32; omega too small for tolerance (says the least that
            would do); omega without masks in weights.
    """
    if masks not in ("exact", "weights"):
        raise MechInterpError(f"masks={masks!r}; expected 'exact' or 'weights'")
    if masks == "exact" and (omega is not None or tolerance is not None):
        raise MechInterpError("omega and tolerance are for masks='weights'; masks='exact' has no error")
    practical = _practical(model)
    exact = LiteralModel(practical, activation=activation)
    literal, tokens = exact, _random_tokens(practical)
    if masks == "weights":
        check_precision(practical.W_E.dtype)
        if omega is None or tolerance is not None:
            leak = max((leak for _, _, leak in _leaks(exact, tokens)), default=-math.inf)
            goal = MASK_TOLERANCE[practical.W_E.dtype] if tolerance is None else tolerance
            if omega is None:
                omega = least_omega(leak, goal)
            else:
                check_omega(omega, leak, goal)
        literal = LiteralModel(practical, omega=omega, activation=activation)
    literal.steps = inductive_steps(literal, model, tokens)
    return literal


@torch.no_grad()
def inductive_steps(literal: LiteralModel, source: Source, tokens: Int[Tensor, "batch pos"] | str) -> Steps:
    """Compare the literal stream with the original after every sublayer, and the logits.

    Args:
        literal: the literal model.
        tokens: a text, or token ids ``[batch, pos]``.
        source: what the literal model was made from: a bridge or checkpoint, run as it is, or the
            practical attention-only form.
    """
    ids = literal.as_tokens(tokens)
    expected, streams = _original(source, ids, literal)
    layout, rows = literal.layout, []
    original = layout.deaugment(literal.start(ids))
    for (name, X), (_, sublayer) in zip(literal.streams(ids), literal.literal_sublayers(), strict=True):
        original = streams.get(name, original)  # products leave the stream as it was
        aug = layout.augment(layout.deaugment(X))
        rows.append(
            (
                name,
                sublayer.n_heads,
                *_errors(layout.deaugment(X), original),
                float((X - aug)[..., layout.constant].abs().max()),
                float(X[..., :1, : layout.constant + 1].abs().max()),
            )
        )
    nan = float("nan")
    rows.append(("logits", 0, *_errors(literal(ids), expected), nan, nan))
    columns = ["sublayer", "heads", "max_error", "scale", "relative", "constant", "bias_row"]
    frame = pd.DataFrame(rows, columns=columns)
    dtype = literal.W_E.dtype
    notes = {
        "tokens": f"{ids.shape[0]} x {ids.shape[1]}",
        "dtype": str(dtype).removeprefix("torch."),
        "masks": "exact" if literal.omega is None else f"in weights, omega {literal.omega:g}",
        "activation": "none" if literal.activation is None else literal.activation.name,
    }
    checks: tuple[Check, ...] = ()
    if literal.exact:
        # A bridge takes RMS norms in float32 whatever its weights are.
        bridge = not isinstance(source, (AttentionOnlyModel, Checkpoint))
        narrow = bridge and "RMS" in (literal.spec.norm, literal.spec.final_norm)
        tolerances = PRODUCT_TOLERANCE if literal.layout.scratch else TOLERANCE
        tolerance = max(tolerances[dtype], TOLERANCE[torch.float32] if narrow else 0.0)
        error = float(frame["relative"].iloc[-1])
        checks = (Check("logits against the original, of their scale", error, tolerance),)
    return Steps(frame=frame, receipt=Receipt(checks, notes))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class MaskSweep(Result):
    """Masks in weights at several Omega, against masks as masks.

    Attributes:
        frame: one row per Omega and sublayer (``sublayer``, a hook name), and one per Omega for the
            ``logits``: ``omega``, ``error`` (largest difference from the exact mask, the sublayer
            reading the exact stream; for the logits, of the whole model), ``bound`` (what the theorem
            allows; NaN for the logits).
    """

    title: ClassVar[str] = "Masks in weights: error and bound"

    def slope(self, *, floor: float = 1e-12, ceiling: float = 1e-7) -> float:
        """The slope of the logarithm of the logit error against Omega, by least squares over the
        errors between ``floor`` and ``ceiling`` of the largest logit. Larger errors are no longer
        proportional to the leak, smaller ones are rounding.

        Args:
            floor: errors below are rounding and left out.
            ceiling: errors above are saturated and left out.

        Raises:
            MechInterpError: fewer than two Omega are in that range.
        """
        logits = self.frame[self.frame["sublayer"] == "logits"]
        scale = float(self.receipt.notes["logit scale"])
        used = logits[logits["error"].between(floor * scale, ceiling * scale)]
        if len(used) < 2:
            raise MechInterpError(
                f"{len(used)} of {len(logits)} errors are between {floor:g} and {ceiling:g} of the logit "
                "scale; a slope needs two: sweep over other omegas"
            )
        x, y = used["omega"], used["error"].map(math.log)
        return float(((x - x.mean()) * (y - y.mean())).sum() / ((x - x.mean()) ** 2).sum())


@torch.no_grad()
def mask_sweep(
    model: Source,
    tokens: Int[Tensor, "batch pos"] | str,
    omegas: Sequence[float | int],
    *,
    activation: str | SoftmaxActivation | None = None,
) -> MaskSweep:
    """The error of masks in weights at several Omega, sublayer by sublayer and in the logits.

    Args:
        model: the converted model.
        tokens: ids ``[batch, pos]`` or a text.
        omegas: the Omegas to try.
        activation: its name, or a sum of softmax gates.

    Raises:
        MechInterpError: the model is below float32.
    """
    practical = _practical(model)
    check_precision(practical.W_E.dtype)
    exact = LiteralModel(practical, activation=activation)
    ids = exact.as_tokens(tokens)
    leaks, logits = list(_leaks(exact, ids)), exact(ids)
    eps = torch.finfo(logits.dtype).eps
    rows, worst = [], -math.inf
    for omega in omegas:
        literal = LiteralModel(practical, omega=float(omega), activation=activation)
        for (name, X, leak), (_, sublayer) in zip(leaks, literal.literal_sublayers(), strict=True):
            wide = literal.layout.augment(exact.layout.deaugment(X[0]))
            wide[..., : exact.layout.width] = X[0]  # products in scratch, if there are any
            expected = X[1][:, 1:]
            error = float((sublayer(wide)[:, 1:, : exact.layout.width] - expected).abs().max())
            bound = math.exp(leak - omega)
            rows.append((float(omega), name, error, bound))
            # Rounding, of numbers 4 / eps times larger where the sublayer makes products.
            gain = 4 / default_eps(logits.dtype) if name.endswith("products") else 1.0
            floor = 1e3 * eps * gain * max(float(expected.abs().max()), 1.0)
            worst = max(worst, error - bound - floor)
        error = float((literal(ids) - logits).abs().max())
        rows.append((float(omega), "logits", error, float("nan")))
    frame = pd.DataFrame(rows, columns=["omega", "sublayer", "error", "bound"])
    check = Check("errors exceed their bound, above rounding, by", max(worst, 0.0), 0.0)
    notes = {
        "dtype": str(logits.dtype).removeprefix("torch."),
        "tokens": f"{ids.shape[0]} x {ids.shape[1]}",
        "logit scale": float(logits.abs().max()),
    }
    return MaskSweep(frame=frame, receipt=Receipt((check,), notes))


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class OmegaCalibration(Result):
    """The least Omega for a tolerance.

    Attributes:
        omega: the largest of the least ones over sublayers.
        frame: one row per sublayer: ``sublayer, heads, least_omega`` and ``error``, measured at
            ``omega``.
    """

    title: ClassVar[str] = "Least omega of every sublayer"
    omega: float


@torch.no_grad()
@renamed_arguments(tol="tolerance")
def calibrate_omega(
    model: Source, tokens: Int[Tensor, "batch pos"] | str, tolerance: float
) -> OmegaCalibration:
    """The least Omega that keeps the masks' error in every sublayer's output under ``tolerance``.

    By the bound ``Omega >= Delta + ln(2 n max|x W_OV| / tolerance)``, summed over the heads of a sublayer,
    with the scores and values that the model has on these tokens; then measured at that Omega.

    Args:
        model: the converted model.
        tokens: ids ``[batch, pos]`` or a text.
        tolerance: how much the masks may add to the output of a sublayer.

    Raises:
        MechInterpError: tolerance is not positive, or the model is below float32.
    """
    practical = _practical(model)
    check_precision(practical.W_E.dtype)
    exact = LiteralModel(practical)
    ids = exact.as_tokens(tokens)
    least = [least_omega(leak, tolerance) for _, _, leak in _leaks(exact, ids)]
    omega = max(least, default=0.0)
    sweep = mask_sweep(practical, ids, [omega])
    measured = sweep.frame[sweep.frame["sublayer"] != "logits"]
    heads = [sublayer.n_heads for _, sublayer in exact.literal_sublayers()]
    frame = pd.DataFrame(
        {
            "sublayer": measured["sublayer"],
            "heads": heads,
            "least_omega": least,
            "error": measured["error"],
        }
    )
    eps = torch.finfo(practical.W_E.dtype).eps
    check = Check(
        "largest error at this omega", float(frame["error"].max()) if least else 0.0, tolerance + 1e4 * eps
    )
    return OmegaCalibration(
        frame=frame, receipt=Receipt((check,), {**sweep.receipt.notes, "tolerance": tolerance}), omega=omega
    )


@torch.no_grad()
def _leaks(exact: LiteralModel, ids: Tensor) -> list[tuple[str, tuple[Tensor, Tensor], float]]:
    """For every sublayer its name, what it read and made, and its ``log_leak``."""
    X, out = exact.start(ids), []
    for name, sublayer in exact.literal_sublayers():
        made = sublayer(X)
        out.append((name, (X, made), sublayer_log_leak(sublayer, X)))
        X = made
    return out


def _practical(model: Source) -> AttentionOnlyModel:
    if isinstance(model, AttentionOnlyModel):
        return model
    from mechinterp_attn.conversion.pipeline import convert

    return convert(model)


def _random_tokens(model: AttentionOnlyModel) -> Int[Tensor, "batch pos"]:
    generator = torch.Generator().manual_seed(0)
    shape = (2, min(model.spec.n_ctx, 64))
    return torch.randint(model.spec.d_vocab, shape, generator=generator).to(model.W_E.device)


def _original(
    source: Source, ids: Tensor, literal: LiteralModel
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Tensor]]:
    if isinstance(source, Checkpoint):
        return run_checkpoint(source, ids)
    if not isinstance(source, AttentionOnlyModel):
        return run_bridge(source, ids)
    names = [name for name, _ in literal.literal_sublayers()]
    logits, cache = source.run_with_cache(ids, names_filter=lambda name: name in names)
    return logits, {name: cache[name] for name in names if name in cache}


def _errors(own: Tensor, original: Tensor) -> tuple[float, float, float]:
    error = float((own.double() - original.double()).abs().max())
    scale = float(original.double().abs().max())
    return error, scale, error / scale if scale else error
