"""A pass over a corpus on the workers of a Ray cluster (the ``ray`` extra).

This process reads and tokenises, the workers count. The pieces and the order in which they are added
up are those of a pass in one process, so the result is too.
"""

from __future__ import annotations

import os
import warnings
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.detect.tally import Tally
from mechinterp_attn.detect.texts import Window
from mechinterp_attn.model.attention_only import AttentionOnlyModel

if TYPE_CHECKING:
    from mechinterp_attn.detect.corpus import Settings

AHEAD = 4  # pieces a worker that are read but not yet added up
RETRIES = 2  # how often the piece of a worker that died is counted again


def count_on_ray(
    model: AttentionOnlyModel, pieces: Iterator[list[Window]], settings: Settings, workers: int
) -> Iterator[Tally]:
    """The tallies of the pieces, in order. At most ``AHEAD`` pieces a worker are held at a time.

    An initialised cluster is used as it is, or the one at ``RAY_ADDRESS``; otherwise a local one is
    started and stopped again. Where the model is on a GPU, every worker asks for one.

    Raises:
        MechInterpError: Ray is not installed, or the model has hooks, which workers would not have.
    """
    try:
        import ray
    except ImportError as error:
        raise MechInterpError(
            "workers= needs Ray: pip install 'mechinterp_attn[ray]', or leave workers out"
        ) from error
    hooked = [name for name, point in model.hook_dict.items() if point.has_hooks()]
    if hooked:
        raise MechInterpError(
            f"the model has hooks at {', '.join(hooked[:5])}, which stay in this process; remove them "
            "(model.reset_hooks()) or leave workers out"
        )
    started = not ray.is_initialized()
    if started:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            own = {} if "RAY_ADDRESS" in os.environ else {"num_cpus": workers}
            ray.init(include_dashboard=False, log_to_driver=False, **own)
    try:
        weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
        device = model.W_E.device.type
        made = ray.put((model.spec, weights, device, settings))
        options = {"num_gpus": int(device == "cuda"), "max_restarts": RETRIES, "max_task_retries": RETRIES}
        worker = ray.remote(**options)(_Worker)
        yield from _in_order(ray, [worker.remote(made) for _ in range(workers)], pieces)
    finally:
        if started:
            ray.shutdown()


def _in_order(ray: Any, workers: list[Any], pieces: Iterator[list[Window]]) -> Iterator[Tally]:
    """Each piece to the next idle worker; their tallies in the order of the pieces."""
    idle = deque(workers)
    running: dict[Any, tuple[int, Any]] = {}
    done: dict[int, Tally] = {}
    sent = given = 0
    left = True
    while left or running or done:
        while left and idle and sent - given < AHEAD * len(workers):
            piece = next(pieces, None)
            if piece is None:
                left = False
            else:
                worker = idle.popleft()
                running[worker.count.remote(piece)] = sent, worker
                sent += 1
        if running:
            (ready, *_), _ = ray.wait(list(running))
            number, worker = running.pop(ready)
            done[number] = ray.get(ready)
            idle.append(worker)
        while given in done:
            yield done.pop(given)
            given += 1


class _Worker:
    """The model in a worker process, ready to count pieces."""

    def __init__(self, made: Any):
        spec, weights, device, self.settings = made
        weights = {name: tensor.clone().to(device) for name, tensor in weights.items()}
        self.model = AttentionOnlyModel(spec, weights)

    def count(self, piece: list[Window]) -> Tally:
        from mechinterp_attn.detect.corpus import count

        with torch.no_grad():
            return count(self.model, piece, self.settings)
