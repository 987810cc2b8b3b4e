"""Heads of one model beside those of another, both reading the streams of the first."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.gradients import graph
from mechinterp_attn.causal.grafts import Guests, beside, writes
from mechinterp_attn.causal.runs import run
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank


@dataclass(frozen=True, eq=False)
class Compared:
    """One model's heads beside another's, on the first one's streams.

    Attributes:
        plain: the metric of every prompt.
        output: of every head, the change of what it writes, relative to what it writes.
        estimate: of every head, what the metric gains by that change, to first order.
        error: by how much the changes of all heads and biases miss the sublayers' change, relative.
    """

    plain: Tensor
    output: Tensor
    estimate: Tensor
    error: float


def compare_streams(
    host: AttentionOnlyModel, guests: Guests, bound: Bound, rows: int, *, gradient: bool
) -> Compared:
    """Run a model on its prompts, and on its streams the heads of another one.

    Args:
        host: the model that runs.
        guests: the other model's bank for each of its banks.
        bound: the behaviour.
        rows: prompts at once.
        gradient: also estimate what each head's change does to the metric.
    """
    moments: dict[str, Tensor] = {}
    estimate: dict[str, Tensor] = {}
    plain, error = [], 0.0
    gradient = gradient and bound.metric != "accuracy"
    for _, part in bound.split(rows):
        kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}
        look = partial(_look, moments, kept if gradient else None, part.clean.real)
        with beside(host, guests, look):
            if gradient:
                graphed = graph(host, part, part.clean)
                grads = graphed.gradients([out for *_, out in kept.values()])
                metric = graphed.metric.detach()
            else:
                with torch.no_grad():
                    metric = part.measure(run(host, part, part.clean))
                grads = []
        plain.append(metric.cpu())
        for (path, (own, change, _)), grad in zip(kept.items(), grads, strict=True):
            bank = next(bank for bank in host.banks if bank.path == path)
            new, fixed = writes(guests(bank)), writes(guests(bank)) - writes(bank)
            along = [torch.einsum("td,hkd->thk", grad[part.clean.real], W) for W in (new, fixed)]
            total = (change * along[0] + own * along[1]).double().sum((0, 2))
            estimate[path] = estimate.get(path, 0) + total
            error = max(error, _mismatch(bank, guests(bank), own, change))
    relative, estimates = [], []
    for bank in host.banks:
        guest = guests(bank)
        new, old = writes(guest).double(), writes(bank).double()
        change, size = _norms(moments[bank.path], new, old)
        relative.append(torch.where(change == 0, 0.0, (change / size).sqrt()))
        none = torch.full((bank.n_heads,), torch.nan, dtype=torch.float64)
        estimates.append(estimate[bank.path] / len(bound) if gradient else none)
    return Compared(torch.cat(plain), torch.cat(relative).cpu(), torch.cat(estimates).cpu(), error)


def _look(
    moments: dict[str, Tensor],
    kept: dict[str, tuple[Tensor, Tensor, Tensor]] | None,
    real: Tensor,
    bank: HeadBank,
    guest: HeadBank,
    z: Tensor,
    other: Tensor,
    out: Tensor,
) -> None:
    """Add up second moments over real tokens; keep what a gradient will be multiplied with."""
    own = z.detach()[real]
    change = other[real] - own
    both = torch.cat([change, own], -1).double()
    found = torch.einsum("thk,thl->hkl", both, both)
    moments[bank.path] = moments.get(bank.path, 0) + found
    if kept is not None:
        kept[bank.path] = own, change, out


def _norms(moments: Tensor, new: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms over all tokens of the change of every head's output, ``dz O' + z dO``, and of the
    output itself, from the second moments of ``(dz, z)``.
    """
    both = torch.cat([new, new - old], 1)
    change = (moments * (both @ both.mT)).sum((1, 2)).clamp_min(0)
    half = moments.shape[1] // 2
    return change, (moments[:, half:, half:] * (old @ old.mT)).sum((1, 2))


def _mismatch(bank: HeadBank, guest: HeadBank, own: Tensor, change: Tensor) -> float:
    """Of the sum over heads of what changes, to the difference of the whole sublayers' outputs."""
    new, old = writes(guest).flatten(0, 1), writes(bank).flatten(0, 1)
    summed = change.flatten(1) @ new + own.flatten(1) @ (new - old)
    whole = (own + change).flatten(1).double() @ new.double() - own.flatten(1).double() @ old.double()
    scale = max(float(whole.abs().max()), float((own.flatten(1) @ old).abs().max()), 1e-30)
    return float((summed - whole).abs().max()) / scale
