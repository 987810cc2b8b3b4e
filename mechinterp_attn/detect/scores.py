"""Scores of every head, attention and MLP-derived alike, from its pattern on random tokens."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.detect.probes import Probe, pairs_by_name, random_repeats, weights_of
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Check, Receipt, Result

if TYPE_CHECKING:
    from plotly.graph_objects import Figure


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class HeadScores(Result):
    """Mean attention of every head on the pairs that define each kind of head.

    Attributes:
        frame: one row per head: ``head, layer, index, kind``, then ``previous_token,
            current_token, first_token, duplicate_token, induction``: mean attention in [0, 1].
        probe: the tokens they were measured on.
    """

    title: ClassVar[str] = "Head scores on repeated random tokens"
    sort_by: ClassVar[str | None] = "induction"
    probe: Probe

    def plot(self, score: str = "induction") -> Figure:
        """A heatmap of one score over attention heads by layer."""
        from mechinterp_attn.view.figures.detect import score_heatmap

        return score_heatmap(self, score)


@torch.no_grad()
def score_heads(model: AttentionOnlyModel, *, seed: int = 0, draws: int = 10) -> HeadScores:
    """Score every head as previous-token, current-token, first-token, duplicate or induction head.

    On random tokens drawn from the model's vocabulary (25 of them, 4 times, after a BOS where the
    model has one; less where the context is short), averaged over draws. ``induction`` is prefix
    matching in its row-sum form (Olsson et al. 2022): the attention from a token to all tokens that
    followed its earlier occurrences, averaged over the tokens that have one.

    An MLP-derived head sees only its own token and the bias token, so its current-token score is
    its mean gate and the other scores are zero.

    Args:
        seed: of the random tokens.
        draws: how many random sequences.

    Raises:
        MechInterpError: context or vocabulary too small for repeated tokens.
    """
    probe = random_repeats(model, draws=draws, seed=seed)
    pairs = pairs_by_name(probe)
    device = model.W_E.device
    weights = {name: weights_of(p).to(device) for name, p in pairs.items()}
    columns: dict[str, list[Float[Tensor, " head"]]] = {name: [] for name in pairs}
    total = []
    _, cache = model.run_with_cache(
        probe.tokens, return_type=None, names_filter=lambda name: name.endswith("hook_pattern")
    )
    everything = torch.ones_like(weights["current_token"]) / probe.tokens.shape[1]
    for bank in model.banks:
        pattern = cache[f"{bank.path}.hook_pattern"]
        for name, w in weights.items():
            columns[name].append(bank.attention_on(pattern, w))
        if bank.kind == "attention":
            total.append(bank.attention_on(pattern, everything))
    frame = model.heads.frame[["head", "layer", "index", "kind"]]
    for name, parts in columns.items():
        frame[name] = torch.cat(parts).double().cpu().numpy()
    error = float((torch.cat(total) - 1).abs().max())
    check = Check("every attention head's row sums to 1", error, 1e-4)
    notes = {
        "seed": seed,
        "draws": draws,
        "tokens": f"{'BOS + ' if probe.bos else ''}{probe.period} random tokens x {probe.repeats}",
        "dtype": str(model.W_E.dtype).removeprefix("torch."),
    }
    return HeadScores(frame=frame, receipt=Receipt((check,), notes), probe=probe)
