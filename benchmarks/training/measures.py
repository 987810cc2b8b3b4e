"""What is measured on the way (`scores.csv`) and in the end (`card.json`)."""

from __future__ import annotations

from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Generator, Tensor

from . import novels as corpus
from .dense import Weights, forward, loss_per_token

N_AT_ONCE = 128
"""Documents in a forward pass."""
EARLY, LATE = slice(8, 16), slice(112, 128)
"""Predicted tokens, counted from 0 after the BOS, whose losses make the in-context-learning score."""


def measure(weights: Weights, cfg: dict[str, Any], held_out: Int[Tensor, "document pos"]) -> dict[str, Any]:
    """Losses in nats per token (`loss` is the one on the held-out novels) and the best heads, which a
    model without layers has not."""
    found = natural_losses(weights, cfg, held_out) | repeat_losses(weights, cfg)
    if cfg["n_layers"] == 0:
        return found
    induction, induction_head = best_head(induction_scores(weights, cfg))
    previous, previous_head = best_head(previous_token_scores(weights, cfg, held_out[:N_AT_ONCE]))
    return found | {
        "induction_score": induction,
        "induction_head": induction_head,
        "previous_token_score": previous,
        "previous_token_head": previous_head,
    }


@torch.no_grad()
def natural_losses(
    weights: Weights, cfg: dict[str, Any], held_out: Int[Tensor, "document pos"]
) -> dict[str, float]:
    """Mean loss in nats per token on the held-out novels, in float32, and the in-context-learning
    score (Olsson et al. 2022): the loss late in the context less the loss early in it, both over a
    few positions.
    """
    losses = torch.cat([loss_per_token(weights, cfg, chunk) for chunk in held_out.split(N_AT_ONCE)])
    late, early = losses[:, LATE].mean(), losses[:, EARLY].mean()
    return {"loss": losses.mean().item(), "in_context_learning": (late - early).item()}


@torch.no_grad()
def repeat_losses(weights: Weights, cfg: dict[str, Any], *, draws: int = 16) -> dict[str, float]:
    """Loss in nats on random tokens seen for the first time, and on their later repeats.

    Mean over periods from 10 to 60. The first token of the second pass belongs to neither: that
    the span starts over cannot be known before it has.
    """
    generator = Generator().manual_seed(0)
    first, later = [], []
    for period in (10, 20, 30, 40, 50, 60):
        documents = corpus.random_repeats(draws, period, cfg["n_ctx"] // period, generator)
        loss = loss_per_token(weights, cfg, documents)
        first.append(loss[:, :period].mean())
        later.append(loss[:, period + 1 :].mean())
    return {
        "loss_first_pass": torch.stack(first).mean().item(),
        "loss_later_passes": torch.stack(later).mean().item(),
    }


@torch.no_grad()
def induction_scores(
    weights: Weights, cfg: dict[str, Any], *, period: int = 25, n_repeats: int = 4, draws: int = 10
) -> Float[Tensor, "layer head"]:
    """Prefix-matching score of every head (Olsson et al. 2022, "In-context Learning and Induction
    Heads"): on distinct random tokens repeated, how much a head attends from a token of a later
    pass to the tokens that followed its earlier occurrences. In [0, 1], mean over draws.
    """
    documents = corpus.random_repeats(draws, period, n_repeats, Generator().manual_seed(0))
    query, key = torch.meshgrid(*[torch.arange(documents.shape[1])] * 2, indexing="ij")
    # Key 1 is skipped: it follows the BOS, not an earlier occurrence of the query's token.
    followed = ((query - key + 1) % period == 0) & (key > 1) & (key < query)
    pattern = torch.stack(forward(weights, cfg, documents)[1], dim=1)
    return (pattern * followed).sum(-1)[..., period + 1 :].mean((0, -1))


@torch.no_grad()
def previous_token_scores(
    weights: Weights, cfg: dict[str, Any], documents: Int[Tensor, "document pos"]
) -> Float[Tensor, "layer head"]:
    """Mean attention of every head to the token just before, in [0, 1]."""
    pattern = torch.stack(forward(weights, cfg, documents[:, : cfg["n_ctx"]])[1], dim=1)
    # Query 1 is skipped: it has only itself and the BOS to look at.
    return pattern.diagonal(-1, dim1=-2, dim2=-1)[..., 1:].mean((0, -1))


def best_head(scores: Float[Tensor, "layer head"]) -> tuple[float, str]:
    """The highest score and the label of its head, such as 0.93 and "L1H2"."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return scores[layer, head].item(), f"L{layer}H{head}"
