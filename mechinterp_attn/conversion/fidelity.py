"""Does the converted model compute what its source computes? Measured, not assumed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.conversion.reference import run_checkpoint
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.half import HALF
from mechinterp_attn.sources.bridge import run_bridge
from mechinterp_attn.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_AT_ONCE = 2**18  # logits compared in float64 at a time: 2 MiB


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Fidelity(Result):
    """How closely a converted model follows its source on some tokens.

    Attributes:
        max_logit_error, mean_logit_error: absolute differences of the logits.
        logit_scale: the largest absolute logit of the source.
        kl: mean KL divergence from the source's next-token distribution to the model's (nats).
        loss_source, loss_model: mean next-token loss (nats); NaN where there is none.
        top1_agreement: share of positions where both predict the same token.
        worst_position: (sequence, position) of the largest logit error.
        frame: residual stream after every sublayer: ``sublayer, max_error, scale, relative``.
        tolerance: largest ``max_logit_error / logit_scale`` that passes, by dtype.
        dtype: the dtype that the comparison ran in.
        n_tokens: how many positions were compared.
        longest: tokens of the longest sequence that was compared.
        unreached: lengths at which something about the model changes, and which the conversion's own check
            did not reach, because that would have been too much work; ``mia.verify`` does it.
    """

    title: ClassVar[str] = "Fidelity of the conversion"
    verdict: ClassVar[bool] = True
    max_logit_error: float
    mean_logit_error: float
    logit_scale: float
    kl: float
    loss_source: float
    loss_model: float
    top1_agreement: float
    worst_position: tuple[int, int]
    tolerance: float
    dtype: str
    n_tokens: int
    longest: int
    unreached: tuple[int, ...] = ()

    @property
    def per_layer(self) -> pd.DataFrame:
        """The table, ``frame``."""
        return self.frame

    @property
    def relative_error(self) -> float:
        """``max_logit_error / logit_scale``."""
        return self.max_logit_error / self.logit_scale

    @property
    def ok(self) -> bool:
        """Whether the logits agree within the tolerance."""
        return self.relative_error <= self.tolerance  # False for NaN

    @property
    def first_difference(self) -> str | None:
        """The first sublayer after which the residual streams differ beyond the tolerance."""
        off = self.per_layer[~(self.per_layer["relative"] <= self.tolerance)]
        return None if off.empty else str(off.iloc[0]["sublayer"])

    def summary(self) -> dict[str, Any]:
        """The numbers of the card, as JSON can hold them: None for a loss that there is not."""
        left_out = ("frame", "receipt", "worst_position")
        numbers = {name: value for name, value in vars(self).items() if name not in left_out}
        plain = {n: None if isinstance(x, float) and math.isnan(x) else x for n, x in numbers.items()}
        return plain | {"unreached": list(self.unreached), "ok": self.ok}

    def _repr_html_(self) -> str:
        from mechinterp_attn.core.table import html_table

        sequence, position = self.worst_position
        facts = {
            "max logit error": f"{self.max_logit_error:.2e}",
            "mean logit error": f"{self.mean_logit_error:.2e}",
            "largest logit of the source": f"{self.logit_scale:.3g}",
            "max error / largest logit": f"{self.relative_error:.1e} (tolerance {self.tolerance:.0e})",
            "KL divergence (nats)": f"{self.kl:.1e}",
            **self._loss("loss of source and model (nats)", ", "),
            "same top token": f"{self.top1_agreement:.2%} of {self.n_tokens:,} positions",
            "worst position": f"sequence {sequence}, token {position}",
            "compared in": self.dtype,
            "longest sequence": f"{self.longest:,} tokens",
        }
        if self.unreached:
            facts["lengths not reached"] = ", ".join(f"{n:,}" for n in self.unreached)
        verdict = "✓ equal within tolerance" if self.ok else "✗ NOT equal within tolerance"
        table = html_table(pd.DataFrame({"": facts.keys(), " ": facts.values()}))
        return (
            '<div style="font-family:system-ui,sans-serif;font-size:13px;max-width:100%;overflow-x:auto">'
            f'<div><b>{self.title}</b>: {verdict}</div>{table}<details style="opacity:.85"><summary>'
            f"Residual stream after every sublayer</summary>{html_table(self.frame)}</details></div>"
        )

    def _loss(self, name: str, between: str) -> dict[str, str]:
        """Both losses under a name; nothing where there is none."""
        if math.isnan(self.loss_source):
            return {}
        return {name: f"{self.loss_source:.4f}{between}{self.loss_model:.4f}"}

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        verdict = "equal" if self.ok else "NOT EQUAL"
        losses = "".join(f"{name} {both}, " for name, both in self._loss("loss", " -> ").items())
        return (
            f"{verdict}: max logit error {self.max_logit_error:.2e} = {self.relative_error:.1e} of "
            f"the logit scale (tolerance {self.tolerance:.0e}, {self.dtype}), KL {self.kl:.1e}, "
            f"{losses}same top token at "
            f"{self.top1_agreement:.1%} of {self.n_tokens} positions"
        )


@torch.no_grad()
def verify(
    model: AttentionOnlyModel,
    source: TransformerBridge | Checkpoint,
    tokens: Int[Tensor, "batch pos"] | str,
) -> Fidelity:
    """Compare a converted model with its source on tokens or a text; neither is changed.

    Args:
        model: the converted model.
        source: what it was converted from: a bridge, run as it is, or a checkpoint, run by a plain
            dense implementation that shares no code with the banks.
        tokens: token ids ``[pos]`` or ``[batch, pos]``, or a text.

    Raises:
        MechInterpError: the tokens are not usable, or the source gives logits of another shape.
    """
    return compare(model, expected_of(source, model.as_tokens(tokens)))


@dataclass(frozen=True, eq=False)
class Expected:
    """What a source computed on some tokens; the source itself is not needed any more to compare with it.

    Attributes:
        tokens: ``[batch, pos]``.
        logits: ``[batch, pos, d_vocab]``.
        streams: the residual stream after every sublayer by its hook name.
    """

    tokens: Int[Tensor, "batch pos"]
    logits: Float[Tensor, "batch pos d_vocab"]
    streams: dict[str, Float[Tensor, "batch pos d_model"]]


@torch.no_grad()
def expected_of(source: TransformerBridge | Checkpoint, tokens: Int[Tensor, "batch pos"]) -> Expected:
    """Run a source on tokens.

    Args:
        source: as for ``verify``.
        tokens: ``[batch, pos]``.
    """
    run = run_checkpoint if isinstance(source, Checkpoint) else run_bridge
    return Expected(tokens, *run(source, tokens))


@torch.no_grad()
def compare(model: AttentionOnlyModel, expected: Expected) -> Fidelity:
    """Compare a converted model with what its source computed.

    Args:
        model: the converted model.
        expected: from ``expected_of``.

    Raises:
        MechInterpError: the source gives logits of another shape.
    """
    ids, given = expected.tokens, expected.logits
    streams = {name: stream for name, stream in expected.streams.items() if name in model.hook_dict}
    logits, cache = model.run_with_cache(ids, names_filter=lambda name: name in streams)
    own = {name: cache[name] for name in streams}
    if logits.shape != given.shape:
        raise MechInterpError(
            f"the source's logits have shape {tuple(given.shape)}, the model's "
            f"{tuple(logits.shape)}: this is not the model's source"
        )
    rounding = 0.0
    off = float((logits - given).abs().max()) / float(given.abs().max())
    if model.W_E.dtype in HALF and off > TOLERANCE[model.W_E.dtype]:
        wide = model(model(ids, stop_at_layer=0).float(), start_at_layer=0)  # a float32 stream
        rounding = float((wide - logits).abs().max())
    return _compare(model, logits, given, own, streams, ids, rounding)


def _compare(
    model: AttentionOnlyModel,
    logits: Float[Tensor, "batch pos d_vocab"],
    expected: Float[Tensor, "batch pos d_vocab"],
    own: dict[str, Tensor],
    streams: dict[str, Tensor],
    tokens: Int[Tensor, "batch pos"],
    rounding: float,
) -> Fidelity:
    errors = _position_errors(expected, logits, tokens, model.spec.no_next_token is None)
    worst = errors["max"].argmax()
    dtype = model.W_E.dtype
    # A source that takes its norms in float32 is no float64 model, whatever its weights are.
    inside = TOLERANCE[torch.float32] if model.spec.float32_inside else 0.0
    scale = float(errors["scale"].max())
    # Half precision leaves each of the two as far from the exact logits as it leaves this one.
    tolerance = max(TOLERANCE[dtype], inside, 3 * rounding / scale)
    relative = float(errors["max"].max()) / scale
    check = Check("logits of model and source, of the largest logit", relative, tolerance)
    return Fidelity(
        frame=_residual_errors(own, streams),
        receipt=Receipt((check,), {"dtype": str(dtype), "tokens": tokens.numel()}),
        max_logit_error=float(errors["max"].max()),
        mean_logit_error=float(errors["mean"].mean()),
        logit_scale=float(errors["scale"].max()),
        kl=float(errors["kl"].mean()),
        loss_source=float(errors["loss_source"][:, :-1].mean()),  # NaN for a single token
        loss_model=float(errors["loss_model"][:, :-1].mean()),
        top1_agreement=float(errors["same_top"].mean()),
        worst_position=(int(worst) // tokens.shape[1], int(worst) % tokens.shape[1]),
        tolerance=tolerance,
        dtype=str(dtype).removeprefix("torch."),
        n_tokens=tokens.numel(),
        longest=tokens.shape[1],
    )


def _position_errors(
    expected: Float[Tensor, "batch pos d_vocab"],
    logits: Float[Tensor, "batch pos d_vocab"],
    tokens: Int[Tensor, "batch pos"],
    predicts: bool,
) -> dict[str, Float[Tensor, "batch pos"]]:
    """What each position has to say, in float64, some positions at a time: the logits of a long text
    over a large vocabulary are never held in float64 whole.

    The losses are those of the next token, meaningless at a sequence's last position and NaN where
    logits are not of next tokens.
    """
    rows, given = expected.flatten(0, 1), logits.flatten(0, 1)
    following = tokens.roll(-1, 1).flatten()
    is_class = predicts and int(tokens.max()) < rows.shape[-1]
    found: dict[str, list[Tensor]] = {}
    for start in range(0, len(rows), step := max(1, _AT_ONCE // rows.shape[-1])):
        at = slice(start, start + step)
        p, q = rows[at].double(), given[at].double()
        error = (q - p).abs()
        numbers = {
            "max": error.amax(-1),
            "mean": error.mean(-1),
            "scale": p.abs().amax(-1),
            "same_top": (q.argmax(-1) == p.argmax(-1)).double(),
        }
        p, q = F.log_softmax(p, -1), F.log_softmax(q, -1)
        numbers["kl"] = (p.exp() * (p - q)).sum(-1)
        for name, log_prob in (("loss_source", p), ("loss_model", q)):
            numbers[name] = (
                -log_prob.gather(-1, following[at, None])[:, 0]
                if is_class
                else torch.full_like(numbers["kl"], float("nan"))
            )
        for name, values in numbers.items():
            found.setdefault(name, []).append(values)
    return {name: torch.cat(values).view(tokens.shape) for name, values in found.items()}


def _residual_errors(own: dict[str, Tensor], streams: dict[str, Tensor]) -> pd.DataFrame:
    rows = []
    for name, stream in streams.items():
        error = float((own[name].double() - stream.double()).abs().max())
        scale = float(stream.double().abs().max())
        block, _, hook = name.rpartition(".")
        has_neurons = f"{block}.hook_resid_mid" in streams
        part = "neurons" if hook == "hook_resid_post" and has_neurons else "attn"
        relative = error / scale if scale else error
        rows.append((f"{block}.{part}", error, scale, relative))
    return pd.DataFrame(rows, columns=["sublayer", "max_error", "scale", "relative"])
