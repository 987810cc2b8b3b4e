"""What a streamed search keeps in a file: the pairs found so far, and which units are done."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from typing import Any

from mechinterp_attn.circuits.blocks import Job, Top
from mechinterp_attn.circuits.groups import OTHER, HeadGroup
from mechinterp_attn.circuits.streaming import Entries
from mechinterp_attn.core.fingerprint import fingerprint
from mechinterp_attn.core.resume import SavedState
from mechinterp_attn.model.heads import Side


class SearchState:
    """The file of one search.

    Args:
        path: the file; it need not exist.
        job: what is searched; a file of another search, or of other weights, is refused.
        n_units: how many units the search has.
    """

    def __init__(self, path: str | os.PathLike[str], job: Job, n_units: int):
        about = {
            "weights": fingerprint(*_weights(job)),
            "kind": job.kind,
            "rank_by": job.rank_by,
            "top_k": job.top_k,
            "dtype": str(job.dtype),
            "precision": job.precision,
            "units": n_units,
            "vectors_per_unit": job.vectors_per_unit,
        }
        self.state = SavedState(path, what="a composition search", option="resume", about=about)

    def load(self, sink: Top) -> set[int]:
        """Fill a sink from the file; the numbers of the units that are done.

        Raises:
            MechInterpError: the file is not the state of this search.
        """
        found = self.state.load()
        if found is None:
            return set()
        tensors, done = found
        device = sink.best.entries.value.device
        sink.best.merge(Entries(*(tensors[n].to(device) for n in Entries._fields)))
        sink.histogram += tensors["histogram"]
        return set(done)

    def store(self, sink: Top, done: set[int], *, now: bool = False) -> None:
        """Write the state if the last write is a while ago, or ``now``."""
        tensors: dict[str, Any] = sink.best.entries._asdict() | {"histogram": sink.histogram}
        self.state.store(tensors, sorted(done), now=now)


def _weights(job: Job) -> Iterator[Any]:
    """The heads on both sides, and the bytes of every weight that the search reads."""
    sides: tuple[Side, Side] = (job.kind, OTHER[job.kind])
    both: tuple[tuple[Sequence[HeadGroup], tuple[Side, Side]], ...]
    both = ((job.sources, ("V", "O")), (job.readers, sides))
    for groups, used in both:
        for group in groups:
            yield group.name, len(group), group.reads_at, group.writes_at
            yield from (group.stacked(side) for side in used)
