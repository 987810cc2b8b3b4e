"""What a pass over a corpus keeps: sums, and the passages where each head writes most.

Tallies of disjoint texts add up, so batches, processes and machines can each make their own.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mechinterp_attn.detect.measures import Sums
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.sources.saved import write_atomic


@dataclass(frozen=True, eq=False)
class Best:
    """The passages where each head writes most, largest first; -inf where there are fewer.

    Attributes:
        value: norm of what the head writes, ``[head, rank]``.
        place: document, token in the document (of the window's start), position in the window.
        tokens: the passage around it, -1 outside the window, ``[head, rank, 2 * context + 1]``.
    """

    value: Float[Tensor, "head rank"]
    place: Int[Tensor, "head rank 3"]
    tokens: Int[Tensor, "head rank passage"]

    @classmethod
    def empty(cls, n_heads: int, top: int, context: int) -> Best:
        return cls(
            torch.full((n_heads, top), -torch.inf),
            torch.full((n_heads, top, 3), -1, dtype=torch.int64),
            torch.full((n_heads, top, 2 * context + 1), -1, dtype=torch.int32),
        )

    def __add__(self, other: Best) -> Best:
        """The best of both; equal values in the order of the corpus, whoever found them first."""
        value = torch.cat([self.value, other.value], 1)
        place = torch.cat([self.place, other.place], 1)
        tokens = torch.cat([self.tokens, other.tokens], 1)
        order = torch.arange(value.shape[1]).expand(len(value), -1)
        for key in (place[..., 2], place[..., 1], place[..., 0]):  # least key first, each sort stable
            order = order.gather(1, key.gather(1, order).argsort(dim=1, stable=True))
        order = order.gather(1, value.gather(1, order).argsort(dim=1, descending=True, stable=True))
        order = order[:, : self.value.shape[1]]
        return Best(
            value.gather(1, order),
            place.gather(1, order[..., None].expand(-1, -1, 3)),
            tokens.gather(1, order[..., None].expand(-1, -1, tokens.shape[2])),
        )


@dataclass(frozen=True, eq=False)
class Tally:
    """Everything counted so far.

    Attributes:
        sums: of attention by role.
        loss: sum of the losses (nats), ``[1]``;  tokens: how many next tokens that is, ``[1]``.
        cut: sum of the loss changes of every cut head, ``[cut]``.
        written: sum over positions of the norm of what each head writes, ``[head]``;  positions: how
            many, ``[1]``.
        best: the passages where each head writes most.
        windows: how many windows of tokens were counted.
    """

    sums: Sums
    loss: Float[Tensor, " one"]
    tokens: Float[Tensor, " one"]
    cut: Float[Tensor, " cut"]
    written: Float[Tensor, " head"]
    positions: Float[Tensor, " one"]
    best: Best
    windows: int

    def __add__(self, other: Tally) -> Tally:
        return Tally(*(getattr(self, f.name) + getattr(other, f.name) for f in fields(self)))

    def save(self, path: Path, about: Mapping[str, Any]) -> None:
        """Write the tally, whole or not at all."""
        tensors = {f"sums.{f.name}": getattr(self.sums, f.name) for f in fields(Sums)}
        tensors |= {f"best.{f.name}": getattr(self.best, f.name) for f in fields(Best)}
        tensors |= {name: getattr(self, name) for name in ("loss", "tokens", "cut", "written", "positions")}
        tensors = {name: tensor.contiguous().cpu() for name, tensor in tensors.items()}
        metadata = {"about": json.dumps(about, sort_keys=True), "windows": str(self.windows)}
        write_atomic(path, lambda temporary: save_file(tensors, temporary, metadata))

    @classmethod
    def load(cls, path: Path, about: Mapping[str, Any]) -> Tally:
        """Read what ``save`` wrote.

        Raises:
            MechInterpError: it is no such file, or was made with another model or other options.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            found, windows = json.loads(metadata["about"]), int(metadata["windows"])
        except (SafetensorError, KeyError, ValueError, OSError) as error:
            raise MechInterpError(f"{path} is not a saved pass over a corpus: {error}") from error
        wanted = json.loads(json.dumps(about))
        other = [
            f"{key}: {found.get(key)!r} there, {wanted.get(key)!r} here"
            for key in sorted({*found, *wanted})
            if found.get(key) != wanted.get(key)
        ]
        if other:
            raise MechInterpError(
                f"{path} is a pass with other settings ({'; '.join(other)}); give another file to save "
                "to, or the same settings"
            )
        sums = Sums(**{f.name: tensors[f"sums.{f.name}"] for f in fields(Sums)})
        best = Best(**{f.name: tensors[f"best.{f.name}"] for f in fields(Best)})
        rest = {name: tensors[name] for name in ("loss", "tokens", "cut", "written", "positions")}
        return cls(sums=sums, best=best, windows=windows, **rest)
