"""Tables of chosen pairs of heads: scores in float64, the null, labels; and histograms of all pairs."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.blocks import Job, Top
from mechinterp_attn.circuits.groups import HeadGroup
from mechinterp_attn.circuits.null import mean_and_spread


def exact_scores(job: Job, row: Tensor, column: Tensor) -> Float[Tensor, " pair"]:
    """Scores of chosen pairs in float64, each product made on its own."""
    values = row.new_empty(len(row), dtype=torch.float64)
    i, source = _group_of(job.source_starts, row)
    j, reader = _group_of(job.reader_starts, column)
    for a in source.unique().tolist():
        for b in reader[source == a].unique().tolist():
            pairs = ((source == a) & (reader == b)).nonzero().flatten()
            first, then = job.sources[a], job.readers[b]
            size = job.d_model * (first.rank + then.reading_rank(job.kind))
            for part in pairs.split(max(1, 2**22 // size)):
                products = first.writes(i[part]) @ then.reads(job.kind, j[part])
                values[part] = torch.linalg.matrix_norm(products)
    return values


def _group_of(starts: Sequence[int], heads: Tensor) -> tuple[Tensor, Tensor]:
    """Places inside their group, and the group, of heads counted through all groups."""
    first = torch.tensor(starts, device=heads.device)
    group = torch.searchsorted(first, heads, right=True) - 1
    return heads - first[group], group


def pair_frame(job: Job, row: Tensor, column: Tensor, score: Tensor) -> pd.DataFrame:
    """A row for each chosen pair, by numbers of heads counted through all groups."""
    src, dst = _labels(job.sources, job.source_starts, row), _labels(job.readers, job.reader_starts, column)
    p1, p2 = (torch.cat(side)[at] for side, at in zip(job.spectra, (row, column), strict=True))
    mean, spread = mean_and_spread(p1, p2, job.width)
    # A K-composition into the constant key is 0 whatever the weights: no null either (p2 is NaN).
    spread = spread.masked_fill((p1 + p2).isnan(), torch.nan)
    score, mean, spread = (x.double().cpu() for x in (score, mean, spread))
    z = (score - mean) / spread
    return pd.DataFrame(
        {
            "src": src,
            "dst": dst,
            "kind": job.kind,
            "score": score.numpy(),
            "baseline": mean.numpy(),
            "spread": spread.numpy(),
            "z": z.numpy(),
            "by_chance": job.chance.above(z).numpy(),
        }
    )


def _labels(groups: Sequence[HeadGroup], starts: Sequence[int], heads: Tensor) -> np.ndarray:
    """Labels of heads counted through all groups; each made once."""
    some, back = heads.unique(return_inverse=True)
    place, group = _group_of(starts, some)
    where = zip(group.tolist(), place.tolist(), strict=True)
    labels = np.array([groups[g].label(i) for g, i in where], dtype=object)
    return labels[back.cpu().numpy()]


def pair_histograms(job: Job, sink: Top) -> pd.DataFrame:
    """The histograms of a streamed search, a row for every bin that belongs to two banks."""
    edges = job.edges().tolist()
    rows = []
    for i, source in enumerate(job.sources):
        for j, reader in enumerate(job.readers):
            counts = sink.histogram[i, j]
            if total := int(counts.sum()):
                shares = (counts.double() / total).tolist()
                rows += [
                    (source.name, reader.name, edges[b], edges[b + 1], share)
                    for b, share in enumerate(shares)
                ]
    return pd.DataFrame(rows, columns=["src", "dst", "left", "right", "share"])
