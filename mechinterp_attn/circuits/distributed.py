"""A streamed composition search on the workers of a Ray cluster (the ``ray`` extra).

Units are independent: each worker gets the job once, runs whole units and gives back the best pairs
and histogram of each, which are merged as they come. The order does not matter to the result.
"""

from __future__ import annotations

from collections.abc import Iterator

from mechinterp_attn.circuits.blocks import Job, Top, Unit, run_unit
from mechinterp_attn.errors import MechInterpError


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

    @ray.remote  # type: ignore[untyped-decorator]
    def work(shared: Job, unit: Unit) -> Top:
        part = Top(shared)
        run_unit(shared, unit, part)
        shared.held.clear()
        return part

    try:
        shared = ray.put(job)
        waiting = {work.remote(shared, unit): number for number, unit in units}
        while waiting:
            (done, *_), _ = ray.wait(list(waiting))
            yield waiting.pop(done), ray.get(done)
    finally:
        if started:
            ray.shutdown()
