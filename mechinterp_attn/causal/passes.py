"""The backward passes behind scores of heads, and the scores of every prompt."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.gradients import Backward, graph
from mechinterp_attn.causal.patches import Fill, some
from mechinterp_attn.causal.rules import Rules
from mechinterp_attn.causal.runs import rows_at_once, watched, wide
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.model.attention_only import AttentionOnlyModel


def scores_by_prompt(
    model: AttentionOnlyModel,
    bound: Bound,
    fill: Fill,
    rules: Rules,
    method: str,
    steps: int,
    max_bytes: int,
) -> Iterator[tuple[slice, Float[Tensor, "n head pos"], Float[Tensor, " n"]]]:
    """Some prompts at a time: which, their heads' scores (float64, zero on padding), their inputs' scores.

    Args:
        fill: what heads would hold instead.
        rules, method, steps: as for ``discover``.
        max_bytes: memory beyond the model's that may be used.
    """
    rows = rows_at_once(model, bound, max_bytes, backward=True)
    rows = max(1, rows // 2) if rules.paired else rows
    with Progress(desc="backward passes", total=len(bound)) as progress:
        for at, part in bound.split(rows):
            base = some(fill.base, at, part)
            passes = list(_passes(model, part, base, fill, at, rules, method, steps))
            z = passes[0].z
            other = passes[0].other_z or fill.of(model, at, part)
            found = []
            for bank in model.banks:
                gradient = sum(p.gradient[bank.path] for p in passes if bank.path in p.gradient)
                count = sum(bank.path in p.gradient for p in passes)
                change = z[bank.path] - other[bank.path].to(z[bank.path].dtype)
                score = wide(change * gradient).double().sum(-1) * base.real[..., None] / count
                found.append(score.mT.cpu())
            inputs = torch.zeros(len(part), dtype=torch.float64)
            if fill.other is not None:
                inputs = _input_scores(model, part, passes, some(fill.other, at, part)).cpu()
            yield at, torch.cat(found, 1), inputs
            progress.update(len(part))


def _input_scores(model: AttentionOnlyModel, part: Bound, passes: list[Backward], other: Any) -> Tensor:
    embed = passes[0].other_embed
    if embed is None:
        embed = watched(model, part, other, {"hook_embed"})[0]["hook_embed"]
    whole = [p for p in passes if p.embed_gradient is not None]
    gradient = sum(p.embed_gradient for p in whole) / len(whole)
    return ((passes[0].embed - embed) * gradient).double().sum((1, 2))


def _passes(
    model: AttentionOnlyModel,
    part: Bound,
    base: Any,
    fill: Fill,
    at: slice,
    rules: Rules,
    method: str,
    steps: int,
) -> Iterator[Backward]:
    """The backward passes whose mean gradient is the method's; the first has the clean run's ``z``."""
    if rules.paired:
        assert fill.other is not None
        yield graph(model, part, base, rules, other=some(fill.other, at, part)).backward()
    elif method == "eap-ig":
        assert fill.other is not None
        yield from interpolated(model, part, base, some(fill.other, at, part), rules, steps)
    elif method == "eap-ig-activations":
        yield from _between_activations(model, part, base, fill.of(model, at, part), rules, steps)
    else:
        yield graph(model, part, base, rules).backward()


def interpolated(
    model: AttentionOnlyModel, part: Bound, base: Any, other: Any, rules: Rules, steps: int
) -> Iterator[Backward]:  # fmt: skip
    """Backward passes at inputs between the counterfactual and the clean ones, at the middle of each of
    ``steps`` equal pieces; the values of ``z`` and of the embedding are the clean run's.
    """
    (seen, z), (far, _) = (watched(model, part, batch, {"hook_embed"}) for batch in (base, other))
    one, two = seen["hook_embed"], far["hook_embed"]
    for step in range(steps):
        share = (step + 0.5) / steps
        middle = two + share * (one - two)
        hooks = [("hook_embed", lambda x, hook, middle=middle: middle.clone().requires_grad_())]
        passed = graph(model, part, base, rules, hooks=hooks).backward()
        yield Backward(passed.metric, z, passed.gradient, one, passed.embed_gradient)


def _between_activations(
    model: AttentionOnlyModel, part: Bound, base: Any, other: dict[str, Tensor], rules: Rules, steps: int
) -> Iterator[Backward]:
    seen, z = watched(model, part, base, {"hook_embed"})
    embed = seen["hook_embed"]
    for bank in model.banks:
        for step in range(steps):
            share = (step + 0.5) / steps
            middle = other[bank.path] + share * (z[bank.path] - other[bank.path])
            hook = (bank.hook("z"), lambda x, hook, middle=middle: middle + 0 * x)
            passed = graph(model, part, base, rules, hooks=[hook]).backward()
            own = {bank.path: passed.gradient[bank.path]}
            yield Backward(passed.metric, z, own, embed, passed.embed_gradient)
