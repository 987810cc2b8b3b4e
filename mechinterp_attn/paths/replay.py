"""One end-to-end path: what it is made of, run forward again by itself, its row of a table."""

from __future__ import annotations

from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.frozen.goals import Goal
from mechinterp_attn.frozen.prompt import Frozen, Place
from mechinterp_attn.frozen.sublayer import Source


class Step(NamedTuple):
    """A head on a path, and its position there (None: summed)."""

    place: Place
    position: int | None


class Path(NamedTuple):
    """A complete path: where it starts, at which position (None: summed), its heads, earliest first.

    It starts at a source, or inside its first head at the head's value bias (source None); without a
    source and heads it is the bias of the unembedding.
    """

    value: float
    source: Source | None
    position: int | None
    steps: tuple[Step, ...]

    @property
    def start(self) -> str:
        if self.source is not None:
            return self.source.name
        return "value bias" if self.steps else "unembedding bias"


def replay(frozen: Frozen, goal: Goal, path: Path) -> float:
    """Run one path forward: its source alone, through its heads alone."""
    steps = path.steps
    if path.source is not None:
        depth, x = path.source.depth, _alone(path.source.values, path.position)
    elif steps:
        (place, position), *rest = steps
        z = frozen.bank_at(place).z_bias[:, place.head]
        depth, x, steps = place.depth, frozen.write_at(place, _alone(z, position)), tuple(rest)
    else:
        return goal.offset
    for place, position in steps:
        x = frozen.write_at(place, _alone(frozen.read_at(place, x, depth), position))
        depth = place.depth
    return float(frozen.carry(x, depth, len(frozen.sublayers))[goal.position] @ goal.direction)


def _alone(x: Float[Tensor, "pos d"], position: int | None) -> Float[Tensor, "pos d"]:
    """What stands at one position, zero elsewhere; None: at all."""
    if position is None:
        return x
    alone = torch.zeros_like(x)
    alone[position] = x[position]
    return alone


def path_frame(frozen: Frozen, goal: Goal, found: list[Path]) -> pd.DataFrame:
    """One row for each path found, as ``TopPaths.frame`` has them."""
    tokens = frozen.str_tokens

    def at(position: int | None) -> str:
        return "" if position is None else f"@{position}"

    def start(path: Path) -> str:
        embedded = path.source is not None and path.source.name == "embed"
        if embedded and path.position is not None:
            return f"{tokens[path.position]!r}{at(path.position)}"
        return f"{path.start}{at(path.position)}"

    def label(step: Step) -> str:
        return f"{frozen.bank_at(step.place).bank.label(step.place.head)}{at(step.position)}"

    rows = [
        (
            " > ".join([start(path), *map(label, path.steps), "logit"]),
            len(path.steps),
            path.value,
            path.value / goal.total if goal.total else float("nan"),
            path.start,
            path.position,
            None if path.position is None else tokens[path.position],
        )
        for path in found
    ]
    columns = ["path", "order", "contribution", "share", "source", "source_position", "token"]
    return pd.DataFrame(rows, columns=columns).astype({"source_position": "Int64"})
