"""Work on a Ray cluster (the ``ray`` extra): one way for every analysis that has pieces to share out."""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Generic, TypeVar

from mechinterp_attn.core.errors import MechInterpError

Shared = TypeVar("Shared")
Piece = TypeVar("Piece")
Answer = TypeVar("Answer")
AHEAD = 4  # pieces a worker that are handed out but not yet given back
RETRIES = 2  # how often the piece of a worker that died is done again


def run_on_ray(
    prepare: Callable[[Shared], Callable[[Piece], Answer]],
    shared: Shared,
    pieces: Iterable[Piece],
    *,
    workers: int,
    gpu: bool = False,
) -> Iterator[Answer]:
    """What each piece of work gives, in the order of the pieces, computed on the workers of a cluster.

    An initialised cluster is used as it is, or the one at ``RAY_ADDRESS``; otherwise a local one is
    started, and stopped at the end. Pieces are taken as workers get idle, at most ``AHEAD`` a worker
    before their answers are given, so they may come from a stream.

    Args:
        prepare: a function of a module (it travels by name) that makes, once in each worker, the
            function that does a piece.
        shared: what ``prepare`` is called with; sent once.
        pieces: the work.
        workers: how many.
        gpu: every worker needs a GPU of its own.

    Raises:
        MechInterpError: Ray is not installed.
    """
    try:
        import ray
    except ImportError as error:
        raise MechInterpError(
            f"workers={workers} needs Ray, which is not installed: pip install 'mechinterp_attn[ray]'"
        ) from error
    started = not ray.is_initialized()
    if started:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Ray's, about its own next release
            own = {"num_cpus": workers} if "RAY_ADDRESS" not in os.environ else {}
            ray.init(include_dashboard=False, log_to_driver=False, **own)
    try:
        made = ray.put(shared)
        options = {"num_gpus": int(gpu), "max_restarts": RETRIES, "max_task_retries": RETRIES}
        worker = ray.remote(**options)(_Worker)
        yield from _in_order(ray, [worker.remote(prepare, made) for _ in range(workers)], iter(pieces))
    finally:
        if started:
            ray.shutdown()


class _Worker(Generic[Shared, Piece, Answer]):
    """What runs in a worker process."""

    def __init__(self, prepare: Callable[[Shared], Callable[[Piece], Answer]], shared: Shared):
        self.work = prepare(shared)

    def do(self, piece: Piece) -> Answer:
        return self.work(piece)


def _in_order(ray: Any, workers: list[Any], pieces: Iterator[Any]) -> Iterator[Any]:
    """Each piece to the next idle worker; the answers in the order of the pieces."""
    idle = deque(workers)
    running: dict[Any, tuple[int, Any]] = {}
    done: dict[int, Any] = {}
    sent = given = 0
    left = True
    while left or running or done:
        while left and idle and sent - given < AHEAD * len(workers):
            try:
                piece = next(pieces)
            except StopIteration:
                left = False
            else:
                worker = idle.popleft()
                running[worker.do.remote(piece)] = sent, worker
                sent += 1
        if running:
            (ready, *_), _ = ray.wait(list(running))
            number, worker = running.pop(ready)
            done[number] = ray.get(ready)
            idle.append(worker)
        while given in done:
            yield done.pop(given)
            given += 1
