"""The state of a streamed search in a file, so that it can be interrupted and taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from mechinterp_attn.circuits.blocks import Job, Top
from mechinterp_attn.circuits.groups import OTHER, HeadGroup
from mechinterp_attn.circuits.streaming import Entries
from mechinterp_attn.conversion.saved import write_atomic
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.heads import Side

FORMAT = "mechinterp_attn.composition"
EVERY = 15.0  # seconds between two writes
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


class SavedState:
    """A safetensors file with the pairs found so far and which units are done.

    Args:
        path: the file; it need not exist.
        job: what is searched; a file of another search, or of other weights, is refused.
    """

    def __init__(self, path: str | os.PathLike[str], job: Job, n_units: int):
        self.path = Path(path)
        self.fingerprint = _fingerprint(job, n_units)
        self.written = time.monotonic()

    def load(self, sink: Top) -> set[int]:
        """Fill a sink from the file; the numbers of the units that are done.

        Raises:
            MechInterpError: the file is not the state of this search.
        """
        if not self.path.exists():
            return set()
        try:
            with safe_open(self.path, framework="pt") as file:
                meta = json.loads((file.metadata() or {}).get("state", "{}"))
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except Exception as error:
            raise MechInterpError(f"{self.path} is not the state of a search: {error}") from error
        if meta.get("format") != FORMAT or meta.get("fingerprint") != self.fingerprint:
            raise MechInterpError(
                f"{self.path} belongs to another search (other weights, heads or options); give another "
                "file for resume=, or remove it"
            )
        device = sink.best.entries.value.device
        sink.best.merge(Entries(*(tensors[n].to(device) for n in ("row", "column", "value"))))
        sink.histogram += tensors["histogram"]
        return set(tensors["done"].tolist())

    def store(self, sink: Top, done: set[int], *, now: bool = False) -> None:
        """Write the state if the last write is a while ago, or ``now``."""
        if not now and time.monotonic() - self.written < EVERY:
            return
        tensors = {name: t.cpu().contiguous() for name, t in sink.best.entries._asdict().items()}
        tensors |= {"histogram": sink.histogram, "done": torch.tensor(sorted(done))}
        meta = {"state": json.dumps({"format": FORMAT, "fingerprint": self.fingerprint})}
        write_atomic(self.path, lambda path: save_file(tensors, path, metadata=meta))
        self.written = time.monotonic()


def _fingerprint(job: Job, n_units: int) -> str:
    """Changes with the heads, the options and any weight, and with nothing else: weights are summed as
    whole numbers (their bits), which gives the same in any order and on any number of threads."""
    options = [
        job.kind,
        job.rank_by,
        job.top_k,
        str(job.dtype),
        job.precision,
        n_units,
        job.vectors_per_unit,
    ]
    digest = hashlib.sha256(json.dumps(options).encode())
    sides: tuple[Side, Side] = (job.kind, OTHER[job.kind])
    both: tuple[tuple[Sequence[HeadGroup], tuple[Side, Side]], ...]
    both = ((job.sources, ("V", "O")), (job.readers, sides))
    for groups, used in both:
        for group in groups:
            digest.update(f"{group.name} {len(group)} {group.reads_at}".encode())
            for side in used:
                weights = group.stacked(side).contiguous()
                bits = weights.view(_SAME_SIZE[weights.element_size()])
                for sums in (bits.sum((1, 2)), bits.sum(0)):  # int64, modulo 2^64
                    digest.update(sums.cpu().numpy().tobytes())
    return digest.hexdigest()
