"""A streamed composition search on the workers of a Ray cluster (the ``ray`` extra).

Units are independent: each worker gets the job once, runs whole units and gives back the best pairs
and histogram of each, which are merged as they come. The order does not matter to the result.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from mechinterp_attn.circuits.blocks import Job, Top, Unit, run_unit
from mechinterp_attn.circuits.groups import OTHER
from mechinterp_attn.core.errors import MechInterpError


def run_on_ray(job: Job, units: list[tuple[int, Unit]]) -> Iterator[tuple[int, Top]]:
    """Numbered units on Ray's workers, in the order in which they finish.

    An initialised cluster is used as it is; otherwise a local one is started and stopped again.

    Raises:
        MechInterpError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MechInterpError(
            "engine='ray' needs Ray, which is not installed: pip install 'mechinterp_attn[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        ray.init(include_dashboard=False, log_to_driver=False)

    work = ray.remote(_work)
    try:
        shared = ray.put(_of_plain_tensors(job))
        waiting = {work.remote(shared, unit): number for number, unit in units}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            yield waiting.pop(done), ray.get(done)
    finally:
        if started:
            ray.shutdown()


def _work(job: Job, unit: Unit) -> Top:
    """One unit on a worker; a function of this module, so that it travels by name."""
    part = Top(job)
    run_unit(job, unit, part)
    job.release()
    return part


def _of_plain_tensors(job: Job) -> Job:
    """The same job with the weights it needs and nothing else: no bank, no hook of the caller's."""
    return replace(
        job,
        sources=tuple(group.apart(("O",), ("O", "V")) for group in job.sources),
        readers=tuple(group.apart((job.kind,), (job.kind, OTHER[job.kind])) for group in job.readers),
        held={},
        scratch=[],
    )
