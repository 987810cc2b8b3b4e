"""Runs of a model on a behaviour that autograd goes back through."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.causal.batches import Batch
from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.metrics import NO_GRADIENT
from mechinterp_attn.causal.rules import TRUE, Hook, Rules, applied
from mechinterp_attn.causal.runs import keeping, run
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel


@dataclass(frozen=True, eq=False)
class Backward:
    """A forward and a backward pass over prompts.

    Attributes:
        metric: of every prompt, ``[n]``.
        other: of every counterfactual, with paired rules.
        z, gradient: what every head holds and how the metric changes with it, by path, ``[n, pos, head,
            ...]``; with paired rules, ``other_z`` is what it holds in the counterfactual run.
        embed, embed_gradient: the same of the embedding, ``[n, pos, d_model]``.
    """

    metric: Tensor
    z: dict[str, Tensor]
    gradient: dict[str, Tensor]
    embed: Tensor
    embed_gradient: Tensor
    other: Tensor | None = None
    other_z: dict[str, Tensor] | None = None
    other_embed: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Graph:
    """A run that autograd can go back through.

    Attributes:
        metric: of every prompt; with paired rules, of every counterfactual behind them.
        held: every head's ``z``, by path, and ``embed`` the embedding, both part of the graph.
    """

    metric: Tensor
    logits: Tensor
    held: dict[str, Tensor]
    embed: Tensor
    paired: bool

    @torch.enable_grad()  # the sum below is part of the graph, also where the caller wants no gradients
    def gradients(self, wanted: Sequence[Tensor]) -> list[Tensor]:
        """The metric's gradient at tensors of the graph, each prompt's own; the graph is kept."""
        out, seed = (
            (self.logits, _seed(self.metric, self.logits)) if self.paired else (self.metric.sum(), None)
        )
        found = torch.autograd.grad(out, list(wanted), seed, allow_unused=True, retain_graph=True)
        return [torch.zeros_like(x) if g is None else g for g, x in zip(found, wanted, strict=True)]

    def backward(self) -> Backward:
        """The gradient of the metric at the embedding and at what every head holds."""
        of_embed, *rest = self.gradients([self.embed, *self.held.values()])
        gradients = dict(zip(self.held, rest, strict=True))
        held = {path: z.detach() for path, z in self.held.items()}
        metric, embed = self.metric.detach(), self.embed.detach()
        if not self.paired:
            return Backward(metric, held, gradients, embed, of_embed)
        n = len(metric) // 2  # the counterfactuals stand behind the prompts
        return Backward(
            metric[:n],
            {path: z[:n] for path, z in held.items()},
            {path: g[:n] for path, g in gradients.items()},
            embed[:n],
            of_embed[:n],
            metric[n:],
            {path: z[n:] for path, z in held.items()},
            embed[n:],
        )


def graph(
    model: AttentionOnlyModel,
    part: Bound,
    batch: Batch,
    rules: Rules = TRUE,
    *,
    hooks: Sequence[Hook] = (),
    other: Batch | None = None,
) -> Graph:
    """A forward pass under given rules.

    Args:
        batch: the prompts to run.
        hooks: edits of the run, such as interpolated inputs; made before the rules.
        other: with paired rules, the run at the other end of the chords.

    Raises:
        MechInterpError: the metric does not depend on the logits.
    """
    held: dict[str, Tensor] = {}
    seen: dict[str, Tensor] = {}

    def embed(x: Tensor, hook: Any) -> Tensor:
        seen["embed"] = x if x.requires_grad else x.requires_grad_()
        return seen["embed"]

    twice = part.repeat(2) if rules.paired else part
    if rules.paired:
        assert other is not None
        batch = Batch(torch.cat([batch.tokens, other.tokens]), torch.cat([batch.real, other.real]))
    with torch.enable_grad(), applied(model, rules) as ruled:
        start = [pair for pair in hooks if pair[0] == "hook_embed"]
        rest = [pair for pair in hooks if pair[0] != "hook_embed"]
        every = [*start, ("hook_embed", embed), *rest, *ruled, *keeping(model, held)]
        logits = run(model, twice, batch, every)
        metric = twice.measure(logits)
    if not metric.requires_grad:
        raise MechInterpError(
            f"the metric {part.about} has no gradient: it does not depend on the logits, or is a step; use "
            "a smooth one such as 'logit_diff', or method='exact'"
        )
    return Graph(metric, logits, held, seen["embed"], rules.paired)


def has_gradient(model: AttentionOnlyModel, bound: Bound) -> bool:
    """Whether the metric changes smoothly with the logits; a step, such as "accuracy", does not."""
    if isinstance(bound.metric, str):
        return bound.metric not in NO_GRADIENT
    longest = bound.clean.real.sum(1).argmax()[None]
    one = bound.take(longest)
    logits = model.W_U.detach().new_zeros(1, one.clean.tokens.shape[1], model.spec.d_vocab_out)
    with torch.enable_grad():
        return one.measure(logits.requires_grad_()).requires_grad


def _seed(metric: Tensor, logits: Tensor) -> Tensor:
    """The chord of the metric itself: the mean of its gradients in both runs, at the length that takes the
    difference of the logits to the difference of the metric.
    """
    (gradient,) = torch.autograd.grad(metric.sum(), logits, retain_graph=True)
    mean = gradient.unflatten(0, (2, -1)).mean(0)
    one, two = logits.detach().unflatten(0, (2, -1))
    along = (mean * (one - two)).flatten(1).sum(-1)
    change = metric.detach().unflatten(0, (2, -1))
    length = torch.where(along.abs() > 1e-6, (change[0] - change[1]) / along, torch.ones_like(along))
    length = length.clamp(-10, 10)[:, None, None]
    return (mean * length).repeat(2, 1, 1)
