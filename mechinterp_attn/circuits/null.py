"""What composition scores random heads have.

Turn two heads against each other at random and the mean of the squared score is exactly 1 / d_model,
whatever their singular values; its variance is ``2 (p1 - 1/d)(p2 - 1/d) / ((d - 1)(d + 2))``, where p, the
participation, is the sum of the fourth powers of the singular values of a head scaled to norm 1 (1
for a rank-1 head, 1/r for r equal ones). The squared score is taken as a Beta variable of that mean
and variance; for two rank-1 heads it is one, the squared cosine of random vectors.
"""

from __future__ import annotations

from statistics import NormalDist

import torch
from torch import Tensor


def mean_and_spread(p1: Tensor, p2: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the score of randomly turned heads of given participations.

    Args:
        p1, p2: participations, float64, any shapes that broadcast.
    """
    if d_model == 1:
        return torch.ones_like(p1 * p2), torch.zeros_like(p1 * p2)
    mean, variance = 1 / d_model, _variance(p1, p2, d_model)
    a, b = beta_of(p1, p2, d_model)
    total = a + b
    # E sqrt(x) = B(a + 1/2, b) / B(a, b)
    log = torch.lgamma(a + 0.5) - torch.lgamma(a) + torch.lgamma(total) - torch.lgamma(total + 0.5)
    score = log.exp()
    flat = a > 1e6  # lgamma differences lose their digits: the delta method has them
    score = torch.where(flat, mean**0.5 * (1 - variance / (8 * mean**2)), score)
    spread = torch.where(flat, variance.sqrt() / (2 * mean**0.5), (mean - score**2).clamp_min(0).sqrt())
    return score, spread


def beta_of(p1: Tensor, p2: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
    """The parameters of the Beta distribution of the squared score; arguments as of ``mean_and_spread``."""
    mean = 1 / d_model
    size = mean * (1 - mean) / _variance(p1, p2, d_model) - 1
    return mean * size, (1 - mean) * size


def _variance(p1: Tensor, p2: Tensor, d_model: int) -> Tensor:
    mean = 1 / d_model
    squares = (p1 - mean).clamp_min(0) * (p2 - mean).clamp_min(0)
    return (2 * squares / ((d_model - 1) * (d_model + 2))).clamp(1e-30, 0.999 * mean * (1 - mean))


def expected_maximum(n: int) -> float:
    """What the largest of ``n`` independent standard normal numbers is expected to be (Blom 1958)."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def largest_by_chance(n: int) -> dict[str, float | int]:
    """For a receipt: of how many comparisons a z is one, and how large the largest is by chance alone."""
    return {"compared": n, "largest z by chance": round(expected_maximum(n), 2)}
