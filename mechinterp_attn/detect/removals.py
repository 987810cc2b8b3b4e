"""What is lost when heads are cut, beside what a removal that means nothing costs: the losses of repeated
tokens, or the metric of a behaviour.
"""

from __future__ import annotations

from dataclasses import dataclass

import pandas as pd
from torch import Tensor

from mechinterp_attn.causal.head_effects import Effects, effects
from mechinterp_attn.causal.metrics import LARGER_IS_WORSE
from mechinterp_attn.causal.runs import ready
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.detect.ablation import Ablations, ablate
from mechinterp_attn.detect.losses import token_losses
from mechinterp_attn.detect.null import random_removals, random_removals_for
from mechinterp_attn.detect.probes import Probe
from mechinterp_attn.model.attention_only import AttentionOnlyModel

NULL_SEQUENCES = 4  # how many of the sequences the null of the losses is taken on


@dataclass(frozen=True, eq=False)
class Removals:
    """Cuts of single heads, as a view of a circuit takes them.

    Attributes:
        lost: by head: how much worse it gets.
        null: by head: ``mean`` and ``std`` of that, of random directions of the same size.
        gain: what the behaviour is worth, in the same unit, and ``gain_z``, in standard errors.
        result: the cuts.
    """

    lost: pd.Series
    null: pd.DataFrame
    gain: float
    gain_z: float
    result: Ablations | Effects


def removals_from_repeats(
    model: AttentionOnlyModel, probe: Probe, *, neurons: int, seed: int, max_bytes: int
) -> Removals:
    """All heads that move between positions and some neurons, cut on repeated random tokens.

    Args:
        neurons: how many, by their estimates.
    """
    estimate = ablate(model, probe.tokens, exact=0, where=probe.repeated, max_bytes=max_bytes).frame
    heads = _chosen(model, estimate, neurons)
    cut = ablate(model, probe.tokens, heads=heads, where=probe.repeated, max_bytes=max_bytes)
    losses = token_losses(model, probe.batch, max_bytes=max_bytes)
    first = losses[:, : probe.period - 1 + probe.front]
    gain, gain_z = _gain(first, losses[probe.repeated])
    null = random_removals(
        model, next(probe.batch.split(NULL_SEQUENCES)), probe.repeated[:NULL_SEQUENCES], heads, seed=seed,
        max_bytes=max_bytes,
    )  # fmt: skip
    return Removals(cut.frame.set_index("head")["loss_change"], null, gain, gain_z, cut)


def removals_from_task(
    model: AttentionOnlyModel, task: Task, *, neurons: int, seed: int, max_bytes: int
) -> Removals:
    """The same for a behaviour, whose worth is how far its counterfactuals are from its prompts.

    Raises:
        MechInterpError: no counterfactuals, a single prompt, or whatever does not fit the model.
    """
    bound = ready(model, bound_to(model, task), max_bytes)
    bound.counterfactual("what the behaviour is worth")
    if len(task) < 2:
        raise MechInterpError("a task of 1 prompt has no standard error; give at least 2 prompts")
    estimate = effects(model, task, patch="zero", exact=0, max_bytes=max_bytes)
    heads = _chosen(model, estimate.frame, neurons)
    cut = effects(model, task, heads, "zero", max_bytes=max_bytes)
    sign = -1 if task.metric in LARGER_IS_WORSE else 1
    clean, corrupt = cut.standing.clean.double(), cut.standing.corrupt
    assert corrupt is not None
    change = sign * (clean - corrupt)
    error = float(change.std()) / len(change) ** 0.5
    gain = float(change.mean())
    null = random_removals_for(model, bound, heads, seed=seed, max_bytes=max_bytes)
    lost = sign * cut.frame.set_index("head")["effect"]
    return Removals(lost, null, gain, gain / max(error, 1e-12), cut)


def _chosen(model: AttentionOnlyModel, estimate: pd.DataFrame, neurons: int) -> list[str]:
    """Heads that move between positions, and others with the largest estimates, which come first."""
    mixing = list(model.heads.between_positions)
    return [*mixing, *estimate[~estimate["head"].isin(mixing)].head(neurons)["head"]]


def _gain(first: Tensor, repeats: Tensor) -> tuple[float, float]:
    """Mean loss of the first tokens minus that of their repeats, and that in standard errors."""
    first, repeats = first.double(), repeats.double()
    gain = float(first.mean() - repeats.mean())
    error = float((first.var() / first.numel() + repeats.var() / repeats.numel()).sqrt())
    return gain, gain / error
