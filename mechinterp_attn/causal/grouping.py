"""Groups of vectors by their direction, and how good and how real they are."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Generator, Tensor

STARTS, ROUNDS = 20, 100


def grouped(
    x: Float[Tensor, "n d"], k: int, generator: Generator
) -> tuple[Int[Tensor, " n"], Float[Tensor, "k d"]]:
    """Spherical k-means: which group each vector is in, the largest group first, and the groups' mean
    directions. The best of several starts, each from vectors far from one another (Arthur and Vassilvitskii
    2007).
    """
    x = F.normalize(x, dim=1)
    best = None
    for _ in range(STARTS):
        centres = _start(x, k, generator)
        own = (x @ centres.T).argmax(1)
        for _ in range(ROUNDS):
            sums = torch.zeros_like(centres).index_add(0, own, x)
            empty = own.bincount(minlength=k) == 0
            centres = torch.where(empty[:, None], centres, F.normalize(sums, dim=1))
            moved = (x @ centres.T).argmax(1)
            if torch.equal(moved, own):
                break
            own = moved
        quality = float((x @ centres.T).amax(1).sum())
        if best is None or quality > best[0] + 1e-12:
            best = quality, own, centres
    assert best is not None
    _, own, centres = best
    order = own.bincount(minlength=k).argsort(descending=True, stable=True)
    return order.argsort()[own], centres[order]


def _start(x: Float[Tensor, "n d"], k: int, generator: Generator) -> Float[Tensor, "k d"]:
    chosen = [int(torch.randint(len(x), (1,), generator=generator))]
    while len(chosen) < k:
        far = (1 - (x @ x[chosen].T).amax(1)).clamp_min(1e-12)
        chosen.append(int(torch.multinomial(far, 1, generator=generator)))
    return x[chosen]


def silhouette(x: Float[Tensor, "n d"], own: Int[Tensor, " n"]) -> float:
    """The mean silhouette of groups, distances being 1 less the cosine (Rousseeuw 1987); a vector that is a
    group by itself counts 0.
    """
    x = F.normalize(x, dim=1)
    member = F.one_hot(own).to(x.dtype)
    size = member.sum(0)
    sums = (1 - x @ x.T) @ member  # [n, group]
    inside = sums.gather(1, own[:, None])[:, 0] / (size[own] - 1).clamp_min(1)
    mean = (sums / size.clamp_min(1)).masked_fill(size == 0, torch.inf)
    outside = mean.scatter(1, own[:, None], torch.inf).amin(1)
    values = (outside - inside) / torch.maximum(outside, inside).clamp_min(1e-30)
    values = torch.where((size[own] > 1) & outside.isfinite(), values, 0.0)
    return float(values.mean())


def shuffled(x: Float[Tensor, "n d"], generator: Generator) -> Float[Tensor, "n d"]:
    """Every column in an order of its own: what single columns hold is kept, what rows have in common is
    not.
    """
    order = torch.rand(x.shape, generator=generator).argsort(0)
    return x.gather(0, order)


def adjusted_rand(one: Sequence[Any], two: Sequence[Any]) -> float:
    """Agreement of two groupings of the same things beyond chance (Hubert and Arabie 1985)."""
    table = pd.crosstab(pd.Series(list(one)), pd.Series(list(two))).to_numpy()
    both = sum(comb(int(count), 2) for count in table.flat)
    rows = sum(comb(int(count), 2) for count in table.sum(1))
    columns = sum(comb(int(count), 2) for count in table.sum(0))
    chance = rows * columns / comb(len(one), 2)
    most = (rows + columns) / 2
    return 1.0 if most == chance else (both - chance) / (most - chance)
