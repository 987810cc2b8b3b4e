"""One end-to-end path: what it is made of, run forward again by itself, its row of a table."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.frozen.goals import Goal
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.model.block import FrozenSublayer


class Step(NamedTuple):
    """A head on a path: its sublayer, its bank there, its index, its position (None: summed)."""

    depth: int
    bank: int
    head: int
    position: int | None


class Path(NamedTuple):
    """A complete path: where it starts, at which position (None: summed), its heads, earliest first.

    A source is a part of the stream's start, a sublayer's bias, or the value bias of the first head.
    """

    value: float
    source: str
    position: int | None
    steps: tuple[Step, ...]


def replay(frozen: Frozen, goal: Goal, path: Path) -> float:
    """Run one path forward: its source alone, through its heads alone."""
    depth, x = _source(frozen, path)
    if x is None:
        return goal.offset
    steps = path.steps
    if path.source == "value bias":  # it starts inside the first head
        first, steps = steps[0], steps[1:]
        bank = frozen.sublayers[first.depth].banks[first.bank]
        x, depth = _through(frozen, first, bank.z_bias), first.depth
    for step in steps:
        bank = frozen.sublayers[step.depth].banks[step.bank]
        x = _through(frozen, step, bank.read(frozen.carry(x, depth, step.depth)))
        depth = step.depth
    return float(frozen.carry(x, depth, len(frozen.sublayers))[goal.position] @ goal.direction)


def _through(
    frozen: Frozen, step: Step, z: Float[Tensor, "pos head d_head"]
) -> Float[Tensor, "pos d_model"]:
    """What one head writes, at one position or at all."""
    bank = frozen.sublayers[step.depth].banks[step.bank]
    kept = torch.zeros_like(z)
    where = slice(None) if step.position is None else step.position
    kept[where, step.head] = z[where, step.head]
    return bank.write(kept)


def _source(frozen: Frozen, path: Path) -> tuple[int, Tensor | None]:
    """The stream that a path starts as, and the sublayer it is in; None for b_U."""
    sources = dict(_sources(frozen))
    if path.source == "value bias":
        return 0, frozen.start
    depth, x = sources[path.source]
    if x is None or path.position is None:
        return depth, x
    alone = torch.zeros_like(x)
    alone[path.position] = x[path.position]
    return depth, alone


def _sources(frozen: Frozen) -> Iterator[tuple[str, tuple[int, Tensor | None]]]:
    yield "unembedding bias", (0, None)
    for name, part in frozen.parts.items():
        yield name, (0, part)
    for j, sublayer in enumerate(frozen.sublayers):
        for bank in sublayer.banks:
            yield f"L{bank.bank.layer} {bank.bank.part} bias", (j, bank.bias)
        if sublayer.out_bias is not None:
            bias = sublayer.out_bias.expand_as(sublayer.stream)
            yield norm_bias(sublayer), (j + 1, bias)


def norm_bias(sublayer: FrozenSublayer) -> str:
    last = sublayer.banks[-1].bank
    return f"L{last.layer} {last.part} norm bias"


def path_frame(frozen: Frozen, goal: Goal, found: list[Path]) -> pd.DataFrame:
    tokens = frozen.str_tokens

    def at(position: int | None) -> str:
        return "" if position is None else f"@{position}"

    def start(path: Path) -> str:
        if path.source == "embed" and path.position is not None:
            return f"{tokens[path.position]!r}{at(path.position)}"
        return f"{path.source}{at(path.position)}"

    def label(step: Step) -> str:
        bank = frozen.sublayers[step.depth].banks[step.bank].bank
        return f"{bank.label(step.head)}{at(step.position)}"

    rows = [
        (
            " > ".join([start(path), *map(label, path.steps), "logit"]),
            len(path.steps),
            path.value,
            path.value / goal.total if goal.total else float("nan"),
            path.source,
            path.position,
            None if path.position is None else tokens[path.position],
        )
        for path in found
    ]
    columns = ["path", "order", "contribution", "share", "source", "source_position", "token"]
    return pd.DataFrame(rows, columns=columns).astype({"source_position": "Int64"})
