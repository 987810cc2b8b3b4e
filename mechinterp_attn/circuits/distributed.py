"""A streamed composition search on the workers of a Ray cluster (the ``ray`` extra).

Units are independent: each worker gets the job once, runs whole units and gives back the best pairs
and the histogram of each.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from mechinterp_attn.circuits.blocks import Job, Top, Unit, run_unit
from mechinterp_attn.circuits.groups import OTHER
from mechinterp_attn.core.cluster import run_on_ray


def units_on_ray(job: Job, units: Sequence[tuple[int, Unit]], workers: int) -> Iterator[tuple[int, Top]]:
    """Numbered units on Ray's workers, in their order.

    Raises:
        MechInterpError: Ray is not installed.
    """
    parts = run_on_ray(
        _worker,
        _of_plain_tensors(job),
        [unit for _, unit in units],
        workers=workers,
        gpu=job.device.type == "cuda",
    )
    numbers = [number for number, _ in units]
    return zip(numbers, parts, strict=True)


def _worker(job: Job) -> Callable[[Unit], Top]:
    """What a worker does with a unit; a function of this module, so that it travels by name."""
    job = replace(job, held={}, scratch=[])

    def work(unit: Unit) -> Top:
        part = Top(job)
        run_unit(job, unit, part)
        return part

    return work


def _of_plain_tensors(job: Job) -> Job:
    """The same job with the weights it needs and nothing else: no bank, no hook of the caller's."""
    return replace(
        job,
        sources=tuple(group.apart(("O",), ("O", "V")) for group in job.sources),
        readers=tuple(group.apart((job.kind,), (job.kind, OTHER[job.kind])) for group in job.readers),
        held={},
        scratch=[],
    )
