"""How surprising the largest of many scores is: how many of all pairs would reach it by chance.

A z says how far one pair stands above what is expected of it; among a million pairs some stand far above
by chance alone, and rank-1 heads, whose score is the cosine of two vectors, further than a normal
distribution allows. So the tails are those of the null itself (``null.py``): a squared score is a Beta
variable of known mean and variance. Pairs are counted by their participations in a few classes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.null import beta_of, mean_and_spread

CLASSES = 16  # of participations that differ
FURTHEST, STEP = 45.0, 0.01  # z up to which tails are taken; above it nothing is expected


class Chance:
    """Expected numbers of pairs above a z, out of all that are compared.

    Args:
        pairs: participations of earlier and of later heads; all pairs of the two are compared.
        d_model: dimensions in which heads are turned.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], d_model: int):
        self.z = torch.arange(0, FURTHEST, STEP, dtype=torch.float64)
        self.compared = 0
        self.expected = torch.zeros_like(self.z)
        sides = [torch.cat(side).cpu() for side in zip(*pairs, strict=True)]
        edges = [_edges(side[side.isfinite()]) for side in sides]
        counts = torch.zeros(len(edges[0]), len(edges[1]), dtype=torch.float64)
        for pair in pairs:
            own = [
                torch.bucketize(p[p.isfinite()].cpu(), edge, right=True).sub(1).clamp_min(0)
                for p, edge in zip(pair, edges, strict=True)
            ]
            n, m = (part.bincount(minlength=len(edge)) for part, edge in zip(own, edges, strict=True))
            counts += n[:, None] * m
        self.compared = int(counts.sum())
        middle = [_middles(side[side.isfinite()], edge) for side, edge in zip(sides, edges, strict=True)]
        for i, j in counts.nonzero().tolist():
            self.expected += counts[i, j] * _tail(middle[0][i], middle[1][j], d_model, self.z)

    def above(self, z: Float[Tensor, " pair"]) -> Float[Tensor, " pair"]:
        """How many pairs would be expected to have at least this z; NaN where z is."""
        place = (z.clamp(0, FURTHEST - 2 * STEP) / STEP).nan_to_num(0)
        low = place.long()
        part = place - low
        found = self.expected[low] * (1 - part) + self.expected[low + 1] * part
        found = torch.where(z >= FURTHEST - 2 * STEP, 0.0, found)
        # Below the mean most of them lie above: no more is said than that.
        found = torch.where(z < 0, float(self.compared), found)
        return found.masked_fill(z.isnan(), torch.nan)

    def notes(self) -> dict[str, float | int]:
        """For a receipt: how many pairs were compared, and the z that one of them would reach by chance."""
        reached = self.z[self.expected >= 1]
        return {
            "compared": self.compared,
            "largest z by chance": round(float(reached[-1]), 2) if len(reached) else 0.0,
        }


def _edges(values: Tensor) -> Tensor:
    """Lower edges of the classes: the values themselves where they are few, else shares of them."""
    some = values.unique()
    if len(some) <= CLASSES:
        return some
    return values.quantile(torch.linspace(0, 1, CLASSES + 1, dtype=torch.float64)[:-1]).unique()


def _middles(values: Tensor, edges: Tensor) -> Tensor:
    """The mean of every class."""
    own = torch.bucketize(values, edges, right=True).sub(1).clamp_min(0)
    counts = own.bincount(minlength=len(edges)).clamp_min(1)
    return torch.zeros_like(edges).index_add(0, own, values) / counts


def _tail(p1: Tensor, p2: Tensor, d_model: int, z: Float[Tensor, " z"]) -> Float[Tensor, " z"]:
    """The share of randomly turned pairs of two participations that lie above every ``z``."""
    mean, spread = mean_and_spread(p1, p2, d_model)
    if float(spread) == 0:
        return torch.zeros_like(z)
    a, b = beta_of(p1, p2, d_model)
    score = mean + spread * z
    square = score.square().clamp_max(1 - 1e-12)
    # The density of a score whose square is Beta(a, b), from the far end inwards.
    log = 2 * a * score.log() - score.log() + (b - 1) * torch.log1p(-square)
    log = log + torch.lgamma(a + b) - torch.lgamma(a) - torch.lgamma(b)
    density = torch.where(score < 1, 2 * log.exp(), 0.0)
    steps = (density[:-1] + density[1:]) / 2 * spread * STEP
    return torch.cat([steps.flip(0).cumsum(0).flip(0), steps.new_zeros(1)]).clamp_max(1)
