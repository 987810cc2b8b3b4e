"""What a heavy call would cost, before it runs: one estimate for the whole package, and one limit.

A heavy function is decorated with ``@plans(estimate)``. The estimate takes those of the function's own
arguments that it names, runs nothing heavy, and gives a ``Plan``. ``plan(function, ...)`` asks for it, and
the function itself holds it against ``max_bytes`` with ``within`` before it begins.
"""

from __future__ import annotations

import inspect
import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from typing import Any, ParamSpec, TypeVar

import torch

from mechinterp_attn.core.errors import MechInterpError

MAX_BYTES = 2**31  # of memory beyond the model's that a call may take unless it is told otherwise
TABLE = 8  # columns of a table, about
CELL = 8  # bytes of a number, or of a reference to a text, in a table

P = ParamSpec("P")
R = TypeVar("R")
# A function, and what it is called with.
Call = tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class Plan:
    """The cost of a call, without running it.

    Attributes:
        what: what would be computed.
        flops: multiplications and additions.
        bytes: memory at its peak beyond the model's, what is given back included.
        chunks: how many pieces the work is cut into.
        seconds: flops at the rate that a short multiplication of this very shape reaches here.
        result: bytes, out of ``bytes``, of what is given back.
    """

    what: str
    flops: int
    bytes: int
    chunks: int
    seconds: float
    result: int = 0

    def left(self, max_bytes: int) -> int:
        """What the work may use of ``max_bytes`` beside the result.

        Args:
            max_bytes: what the call may use.
        """
        return max_bytes - self.result

    def __str__(self) -> str:
        kept = f" ({size(self.result)} of it the result)" if self.result else ""
        blocks = f"{self.chunks:,} block" + ("" if self.chunks == 1 else "s")
        return (
            f"{self.what}: {self.flops / 1e9:,.1f} GFLOP in {blocks}, {size(self.bytes)} beyond the "
            f"model{kept}, about {duration(self.seconds)}"
        )


def plans(
    estimate: Callable[..., Plan], *, option: bool = False
) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Say what a heavy function would cost.

    Args:
        estimate: takes arguments of the function, by name, and gives its ``Plan``.
        option: the function took ``plan=True`` in the last release, and still does, with a warning.
    """

    def register(function: Callable[P, R]) -> Callable[P, R]:
        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            if option and "plan" in kwargs:
                warnings.warn(
                    f"plan= changes what {function.__name__} gives back and will go; use "
                    f"mia.plan({function.__name__}, ...), which takes the same arguments",
                    FutureWarning,
                    stacklevel=2,
                )
                if kwargs.pop("plan"):
                    return plan(call, *args, **kwargs)  # type: ignore[return-value]
            return function(*args, **kwargs)

        call.estimate = estimate  # type: ignore[attr-defined]
        return call

    return register


def plan(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Plan:
    """What a heavy call would cost, without running it.

    Args:
        function: such as ``mia.circuits.composition`` or a method such as ``task.score``.
        args: as the function takes them.
        kwargs: as the function takes them.

    Returns:
        operations, memory and time. The memory is an upper bound that ``max_bytes`` is held against; the
        time is a rough one, from a multiplication measured here.

    Raises:
        MechInterpError: the function has no plan, arguments do not fit it, or are wrong in a way that it
            would refuse.
    """
    if inspect.ismethod(function):
        return plan(function.__func__, function.__self__, *args, **kwargs)
    estimate = getattr(function, "estimate", None)
    name = getattr(function, "__name__", repr(function))
    if estimate is None:
        raise MechInterpError(
            f"there is no plan of {name}: it is quick, or it is not a function of this package"
        )
    signature = inspect.signature(function)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise MechInterpError(f"{name}: {error}") from error
    bound.apply_defaults()
    given = dict(bound.arguments)
    for parameter in signature.parameters.values():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            given |= given.pop(parameter.name)
    with torch.no_grad():
        found = estimate(**{name: given[name] for name in inspect.signature(estimate).parameters})
    assert isinstance(found, Plan)
    return found


def within(made: Plan, max_bytes: int, instead: str = "") -> Plan:
    """Refuse a call that needs more memory than it may take.

    Args:
        made: what it needs, its result included.
        max_bytes: what it may take.
        instead: what else would help, such as ``"a smaller top_k"``.

    Returns:
        the plan.

    Raises:
        MechInterpError: it needs more.
    """
    if made.bytes > max_bytes:
        other = f"give {instead}, or " if instead else "give "
        raise MechInterpError(
            f"{made.what}: needs about {size(made.bytes)}, more than max_bytes={max_bytes:,}; "
            f"{other}max_bytes={made.bytes:,}"
        )
    return made


def joined(what: str, parts: Sequence[Plan], result: int = 0) -> Plan:
    """The plan of several calls, one after the other, whose results are kept till the end.

    Args:
        what: what all of them are for.
        parts: their plans, in order; at least one.
        result: bytes of what is made of them.
    """
    peak = kept = 0
    for part in parts:
        peak = max(peak, kept + part.bytes)
        kept += part.result
    return Plan(
        what=what,
        flops=sum(part.flops for part in parts),
        bytes=peak + result,
        chunks=sum(part.chunks for part in parts),
        seconds=sum(part.seconds for part in parts),
        result=result or kept,
    )


def make_plan(
    *,
    what: str,
    flops: int,
    bytes: int,
    device: torch.device,
    shape: tuple[int, int, int],
    chunks: int = 1,
    result: int = 0,
    exact: bool = False,
) -> Plan:
    """A Plan whose time comes from a measured multiplication.

    Args:
        what, flops, bytes, chunks, result: as in ``Plan``.
        device: where it runs.
        shape: ``(n, k, m)`` of the multiplications ``[n, k] @ [k, m]`` that take the time.
        exact: they are made in float64, at half the rate.
    """
    n, k, m = (max(1, min(length, 4096)) for length in shape)
    rate = measured_rate(device, (n, k, m), torch.get_num_threads()) / (2 if exact else 1)
    return Plan(what, int(flops), int(bytes), int(chunks), flops / rate, int(result))


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
    for length, unit in ((86400, "days"), (3600, "hours"), (60, "minutes")):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.2g} seconds"


def size(bytes: int) -> str:
    """Bytes in the unit a person would use."""
    return f"{bytes / 2**30:,.1f} GiB" if bytes >= 2**30 else f"{bytes / 2**20:,.1f} MiB"
