"""What composition scores random heads have.

Turn two heads against each other at random and the mean of the squared score is exactly 1 / d_model,
whatever their singular values; its variance is ``2 (p1 - 1/d)(p2 - 1/d) / ((d - 1)(d + 2))``, where p, the
participation, is the sum of the fourth powers of the singular values of a head scaled to norm 1 (1
for a rank-1 head, 1/r for r equal ones). The squared score is taken as a Beta variable of that mean
and variance; for two rank-1 heads it is one, the squared cosine of random vectors.
"""

from __future__ import annotations

from functools import cache
from statistics import NormalDist

import torch
from torch import Tensor


def random_participation(d_model: int, rank: int) -> float:
    """The participation of ``A @ B`` with Gaussian ``A [d_model, rank]``, ``B [rank, d_model]``: expected
    fourth powers over the squared expected second powers.
    """
    if rank == 1:
        return 1.0
    d, r = d_model, rank
    return ((d + 1) * (d + r + 1) + r * d + 2) / (d * d * r)


def mean_and_spread(p1: Tensor, p2: Tensor, d_model: int) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the score of randomly turned heads of given participations.

    Args:
        p1, p2: participations, float64, any shapes that broadcast.
    """
    d = d_model
    if d == 1:
        return torch.ones_like(p1 * p2), torch.zeros_like(p1 * p2)
    mean = 1 / d
    variance = 2 * (p1 - mean).clamp_min(0) * (p2 - mean).clamp_min(0) / ((d - 1) * (d + 2))
    variance = variance.clamp(1e-30, 0.999 * mean * (1 - mean))
    size = mean * (1 - mean) / variance - 1  # of the Beta: a + b
    a, total = mean * size, size
    # E sqrt(x) = B(a + 1/2, b) / B(a, b)
    log = torch.lgamma(a + 0.5) - torch.lgamma(a) + torch.lgamma(total) - torch.lgamma(total + 0.5)
    score = log.exp()
    flat = a > 1e6  # lgamma differences lose their digits: the delta method has them
    score = torch.where(flat, mean**0.5 * (1 - variance / (8 * mean**2)), score)
    spread = torch.where(flat, variance.sqrt() / (2 * mean**0.5), (mean - score**2).clamp_min(0).sqrt())
    return score, spread


@cache
def shape_null(d_model: int, rank1: int, rank2: int) -> tuple[float, float]:
    """Mean and spread of the score of random Gaussian heads of given inner dimensions."""
    p1, p2 = (torch.tensor(random_participation(d_model, r), dtype=torch.float64) for r in (rank1, rank2))
    mean, spread = mean_and_spread(p1, p2, d_model)
    return float(mean), float(spread)


def expected_maximum(n: int) -> float:
    """What the largest of ``n`` independent standard normal numbers is expected to be (Blom 1958)."""
    return NormalDist().inv_cdf((n - 0.375) / (n + 0.25)) if n > 1 else 0.0


def largest_by_chance(n: int) -> dict[str, float | int]:
    """For a receipt: of how many comparisons a z is one, and how large the largest is by chance alone."""
    return {"compared": n, "largest z by chance": round(expected_maximum(n), 2)}
