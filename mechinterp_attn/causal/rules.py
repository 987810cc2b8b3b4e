"""How a backward pass goes through patterns, gates and norms: the difference between the methods.

The gradient of a metric says what an infinitesimal change does. A counterfactual is no such thing:
softmaxes saturate, norms rescale, gates switch. Each method below is the same backward pass with
other local derivatives:

- gradient: the model's own (attribution patching, Nanda 2023; EAP, Syed et al. 2023).
- frozen: patterns, gates and norm scales are constants, as in ``paths.freeze``.
- relp: norm scales and patterns are constants, activations are their chord through the origin, a
  gated product gives half to each factor (Jafari et al. 2025, "RelP"; the rules are those of LRP).
- secant: every operation has the slope of its chord between the clean and the counterfactual run, as
  DeepLIFT's rescale rule (Shrikumar et al. 2017) has for activations alone. Sums, products (the mean of
  both factors), softmax (with the logarithmic mean of both patterns) and norms have such chords in closed
  form, so that the attributions of the inputs add up to the metric's difference exactly, in one backward
  pass, where integrated gradients come close in many.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.block import PredictionHead
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.norm import Norm

Hook = tuple[str, Callable[..., Any]]


@dataclass(frozen=True)
class Rules:
    """Local derivatives of one backward pass.

    Attributes:
        norm: of norm scales: "true", "fixed" (constants), "secant".
        gate: of the neurons' patterns: "true", "fixed", "half" (the chord through the origin; a gated
            product gives half to each factor), "secant".
        pattern: of attention: "true", "fixed", "half" (the softmax's own gradient, half to each factor of
            the products before and behind it; Achtibat et al. 2024, "AttnLRP"), "secant".
    """

    norm: Literal["true", "fixed", "secant"] = "true"
    gate: Literal["true", "fixed", "half", "secant"] = "true"
    pattern: Literal["true", "fixed", "half", "secant"] = "true"

    @property
    def paired(self) -> bool:
        """Whether the clean and the counterfactual run are needed side by side."""
        return "secant" in (self.norm, self.gate, self.pattern)


TRUE = Rules()
FROZEN = Rules("fixed", "fixed", "fixed")
RELP = Rules("fixed", "half", "fixed")
SECANT = Rules("secant", "secant", "secant")


@contextmanager
def applied(model: AttentionOnlyModel, rules: Rules) -> Iterator[list[Hook]]:
    """The hooks that put the rules in force, to be given to ``model.hooks``; what hangs on norms itself is
    removed on leaving. With ``rules.paired`` the batch is the clean prompts, then their counterfactuals.
    """
    hooks: list[Hook] = []
    for bank in model.banks:
        if bank.mixes_positions:
            hooks += _pattern(bank, rules.pattern)
        elif bank.has_gate:
            hooks += _gate(bank, rules.gate)
        elif not bank.has_circuit and rules.gate == "fixed":  # nothing of it is linear
            hooks.append((bank.hook("z"), lambda z, hook: z.detach().requires_grad_()))
    for inside in model.inside:
        hooks += _gate(inside, rules.gate)
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if isinstance(module, Norm) and module.kind is not None:
                if rules.norm == "fixed":
                    hooks.append((f"{name}.hook_scale", lambda scale, hook: scale.detach()))
                elif rules.norm == "secant":
                    stack.enter_context(_on(module, _norm_chord))
            elif isinstance(module, PredictionHead) and rules.gate == "secant":
                stack.enter_context(_on(module, _prediction_chord))
        yield hooks


@contextmanager
def _on(module: nn.Module, hook: Callable[..., Any]) -> Iterator[None]:
    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def averaged(x: Tensor) -> Tensor:
    """A view whose gradient is the mean of both runs', given to both: the midpoint rule for a product."""
    x = x.view_as(x)
    if x.requires_grad:
        x.register_hook(lambda g: _both(g.unflatten(0, (2, -1)).mean(0)))
    return x


def _both(half: Tensor) -> Tensor:
    """The same for both runs."""
    return half.repeat(2, *[1] * (half.ndim - 1))


def _half(x: Tensor, hook: Any = None) -> Tensor:
    return 0.5 * x + 0.5 * x.detach()


def _average(x: Tensor, hook: Any = None) -> Tensor:
    return averaged(x)


def _pattern(bank: HeadBank, rule: str) -> list[Hook]:
    if rule == "fixed":
        return [(bank.hook("pattern"), lambda pattern, hook: pattern.detach())]
    if rule == "half":
        return [(bank.hook("attn_scores"), _half), (bank.hook("z"), _half)]
    if rule == "secant":
        seen: dict[str, Tensor] = {}

        def scores(x: Tensor, hook: Any) -> None:
            seen["scores"] = x

        def pattern(p: Tensor, hook: Any) -> Tensor:
            return averaged(_with_sink(bank, seen.pop("scores"), p))

        return [
            *((bank.hook(side), _average) for side in "qkv"),
            (bank.hook("attn_scores"), scores),
            (bank.hook("pattern"), pattern),
        ]
    return []


def _gate(bank: Any, rule: str) -> list[Hook]:
    if rule == "fixed":
        return [(bank.hook("pattern"), lambda pattern, hook: pattern.detach())]
    if rule == "true":
        return []
    seen: dict[str, Tensor] = {}
    gated = bank.gated

    def query(q: Tensor, hook: Any) -> Tensor:
        q = averaged(q) if rule == "secant" else q.view_as(q)
        seen["q"] = q
        return q

    def pattern(p: Tensor, hook: Any) -> Tensor:
        q = seen.pop("q")
        if rule == "secant":
            return averaged(p if bank.over_others else _gate_chord(bank, q, p))
        if not gated:  # act(z) = (act(z) / z) z: the gate is the chord's slope
            return p.detach()
        slope = torch.where(q.abs() > 1e-6, p / q, torch.zeros_like(p)).detach()
        return p.detach() + slope * (q - q.detach())

    hooks: list[Hook] = [(bank.hook("q"), query), (bank.hook("pattern"), pattern)]
    if rule == "secant":
        hooks.append((bank.hook("v"), _average))
    elif gated:
        hooks.append((bank.hook("z"), _half))
    return hooks


def _with_sink(bank: HeadBank, scores: Tensor, pattern: Tensor) -> Tensor:
    """``_softmax_chord`` over the tokens, and the bias token where it has a score (a sink)."""
    sinks = getattr(bank, "sinks", None)
    if sinks is None:
        return _softmax_chord(scores, pattern)
    sink = sinks.detach()[:, None, None].expand(*scores.shape[:-1], 1)
    whole = torch.cat([pattern, 1 - pattern.sum(-1, keepdim=True)], -1)
    return _softmax_chord(torch.cat([scores, sink], -1), whole)[..., :-1]


def _softmax_chord(scores: Tensor, pattern: Tensor) -> Tensor:
    """``dp = L (ds - sum(L ds) / sum(L))`` with L the logarithmic mean of both patterns, ``(p - q) / (log p
    - log q)``: it takes the difference of the scores to the difference of the patterns.
    """
    one, two = pattern.detach().unflatten(0, (2, -1))
    masked = scores.isinf()
    finite = scores.masked_fill(masked, 0.0)
    change = finite - finite.detach()
    log_one, log_two = scores.detach().log_softmax(-1).masked_fill(masked, 0.0).unflatten(0, (2, -1))
    gap = (log_one - log_two).abs()
    # From the gap of the logarithms, so that patterns too small for a ratio have one too.
    share = torch.where(gap > 0, -torch.expm1(-gap) / torch.where(gap > 0, gap, 1.0), 1.0)
    mean = _both(torch.maximum(one, two) * share)
    shift = (mean * change).sum(-1, keepdim=True) / mean.sum(-1, keepdim=True)
    return pattern.detach() + mean * (change - shift)


def _gate_chord(bank: Any, q: Tensor, p: Tensor) -> Tensor:
    one, two = q.detach().unflatten(0, (2, -1))
    p_one, p_two = p.detach().unflatten(0, (2, -1))
    slope = _chord(one, two, p_one, p_two, bank.rule.weight)
    return p.detach() + _both(slope) * (q - q.detach())


def _chord(x: Tensor, y: Tensor, fx: Tensor, fy: Tensor, f: Callable[[Tensor], Tensor]) -> Tensor:
    """Slope of a function between two points, its derivative between them where they are too close."""
    gap = x - y
    far = gap.abs() > 1e-2
    middle = ((x + y) / 2).detach().requires_grad_()
    with torch.enable_grad():
        value = f(middle).sum()
    tangent = torch.autograd.grad(value, middle)[0] if value.requires_grad else torch.zeros_like(x)
    return torch.where(far | (tangent == 0), (fx - fy) / torch.where(gap == 0, 1.0, gap), tangent)


def _norm_chord(norm: Norm, args: Any, out: Tensor) -> Tensor:
    x = args[0] if args[0].dtype == torch.float64 else args[0].float()
    if norm.kind == "LN":
        x = x - x.mean(-1, keepdim=True)
    change = x - x.detach()
    one, two = x.detach().unflatten(0, (2, -1))
    s, t = ((half.square().mean(-1, keepdim=True) + norm.eps).sqrt() for half in (one, two))

    moved = _both((1 / s + 1 / t) / 2) * change
    rescaled = -(_both(one + two) * change).mean(-1, keepdim=True) / _both(s * t * (s + t))
    linear = (moved + _both((one + two) / 2) * rescaled).to(out.dtype)
    return out.detach() + (linear if norm.w is None else linear * norm.w.detach())


def _prediction_chord(head: PredictionHead, args: Any, out: Tensor) -> Tensor:
    z = args[0] @ head.W.detach() + head.b.detach()
    one, two = z.detach().unflatten(0, (2, -1))
    f_one, f_two = out.detach().unflatten(0, (2, -1))
    slope = _chord(one, two, f_one, f_two, head._act)
    return out.detach() + _both(slope) * (z - z.detach())
