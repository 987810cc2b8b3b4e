"""Runs of one model beside the heads of another: every head of a guest reads what the host's reads.

A forward hook on a bank of the host runs the guest's bank on the same normalised stream, so that what
differs is that bank's own doing and nothing that came to it from earlier layers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.causal.runs import wide
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.features import Copy
from mechinterp_attn.model.heads import HeadBank

Guests = Callable[[HeadBank], HeadBank]  # the bank that stands beside one of the host
# With a bank, its guest, what the heads of both hold ``[batch, pos, head, d_head]``, and the sublayer's
# output ``[batch, pos, d_model]``; gives another output, or None to leave it.
Look = Callable[[HeadBank, HeadBank, Tensor, Tensor, Tensor], Tensor | None]


def guests_of(model: AttentionOnlyModel) -> Guests:
    """The banks of another model of the same shapes."""
    banks = {bank.path: bank for bank in model.banks}
    return lambda bank: banks[bank.path]


@contextmanager
def beside(
    host: AttentionOnlyModel, guests: Guests, look: Look, paths: Sequence[str] | None = None
) -> Iterator[None]:
    """While this is open, ``look`` is called in every run of the host, bank by bank.

    Args:
        paths: of the host's banks; None: all.
    """
    handles = []
    points: list[tuple[Any, Any]] = []
    seen: dict[str, Tensor] = {}

    def watch(bank: HeadBank, name: str) -> tuple[Any, Any]:
        point = bank.point("z")
        return point, point.add_hook(lambda z, hook: seen.__setitem__(name, z))

    def hook(bank: HeadBank, args: tuple[Any, ...], out: Tensor) -> Tensor | None:
        inside = any(isinstance(arg, Copy) for arg in args)  # features once more, in an error
        if inside or "guest" in seen:  # a guest that is the host itself
            return None
        own, guest = seen.pop(bank.path), guests(bank)
        entry = watch(guest, "guest")
        try:
            with torch.no_grad():
                guest(*(arg.detach() if isinstance(arg, Tensor) else arg for arg in args))
        finally:
            _unwatch(*entry)
        return look(bank, guest, wide(own), wide(seen.pop("guest")), out)

    try:
        for bank in host.banks:
            if paths is None or bank.path in paths:
                points.append(watch(bank, bank.path))
                handles.append(bank.register_forward_hook(hook))
        yield
    finally:
        for handle in handles:
            handle.remove()
        for entry in points:
            _unwatch(*entry)


def _unwatch(point: Any, handle: Any) -> None:
    handle.hook.remove()
    point.fwd_hooks.remove(handle)


@contextmanager
def grafted(host: AttentionOnlyModel, guests: Guests, heads: Mapping[str, Sequence[int]]) -> Iterator[None]:
    """While this is open, some heads of the host are the guest's, weights and all.

    Args:
        heads: their numbers, by the path of their bank.
    """

    def swap(bank: HeadBank, guest: HeadBank, z: Tensor, other: Tensor, out: Tensor) -> Tensor:
        own = torch.as_tensor(heads[bank.path], device=out.device)
        return out + written_change(bank, guest, z[..., own, :], other[..., own, :], own)

    with beside(host, guests, swap, list(heads)):
        yield


def writes(bank: HeadBank, heads: Tensor | slice = slice(None)) -> Tensor:
    """``W_O`` ``[head, d_head, d_model]`` as it is, in front of any norm behind the sublayer."""
    return bank._stacked("O", heads)


def written_change(bank: HeadBank, guest: HeadBank, z: Tensor, other: Tensor, heads: Tensor) -> Tensor:
    """What the guest's heads write more than the host's, ``[batch, pos, d_model]``: small differences are
    taken before they are multiplied.
    """
    own, new = writes(bank, heads), writes(guest, heads)
    return (other - z).flatten(-2) @ new.flatten(0, 1) + z.flatten(-2) @ (new - own).flatten(0, 1)
