"""What a heavy call would cost, before it runs."""

from __future__ import annotations

import time
from dataclasses import dataclass
from functools import cache

import torch


@dataclass(frozen=True)
class Plan:
    """The cost of a call, without running it.

    Attributes:
        what: what would be computed.
        flops: multiplications and additions.
        bytes: memory beyond the model's.
        chunks: blocks.
        seconds: flops at the rate that a short multiplication of this very block shape reaches here.
    """

    what: str
    flops: int
    bytes: int
    chunks: int
    seconds: float

    def __str__(self) -> str:
        return (
            f"{self.what}: {self.flops / 1e9:,.1f} GFLOP in {self.chunks:,} blocks, "
            f"{self.bytes / 2**20:,.0f} MiB beyond the model, about {duration(self.seconds)}"
        )


def make_plan(
    *,
    what: str,
    flops: int,
    bytes: int,
    chunks: int,
    device: torch.device,
    shape: tuple[int, int, int],
    exact: bool = False,
) -> Plan:
    """A Plan whose time comes from a measured multiplication of the block's shape.

    Args:
        exact: the multiplications are made in float64, at half the rate.
    """
    rate = measured_rate(device, shape, torch.get_num_threads()) / (2 if exact else 1)
    return Plan(what, flops, bytes, chunks, flops / rate)


@cache
def measured_rate(device: torch.device, shape: tuple[int, int, int], threads: int) -> float:
    """FLOP per second of ``[n, k] @ [k, m]`` in float32 on a device with so many threads: measured for
    a twentieth of a second, once.
    """
    n, k, m = shape
    left, right = torch.ones(n, k, device=device), torch.ones(k, m, device=device)
    out = left @ right
    runs, start = 0, time.perf_counter()
    while runs == 0 or time.perf_counter() - start < 0.05:
        torch.mm(left, right, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        runs += 1
    return runs * 2 * n * k * m / (time.perf_counter() - start)


def duration(seconds: float) -> str:
    """Seconds in the unit a person would use."""
    for size, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} seconds"
