"""How far the weights of a model's heads are from those of another, whatever basis they are written in.

A head is its products, not its factors: ``W_V W_O`` and ``W_Q W_K'`` are the same in every basis of the
head's own space (Elhage et al. 2021, "the notion of a low-rank circuit"), so changes are those of the
products. Biases are one more row of what is read.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank

AT_ONCE = 256  # heads that are widened to float64 together
DISTANCES = (0, 1, 4, 16)  # at which turned queries and keys are compared, in tokens


def weight_changes(bank: HeadBank, other: HeadBank) -> dict[str, Float[Tensor, " head"]]:
    """The relative change of every head's OV and QK products, in the Frobenius norm, in float64.

    OV is what the head moves: for a neuron, its reading direction times its writing direction. QK says
    where it looks or when it fires: for a neuron, the direction of its gate. Where queries and keys are
    turned by their positions, QK is the mean square over a few distances.

    Args:
        bank: the heads of the first model.
        other: the same heads of the second one.

    Returns:
        ``OV`` and ``QK``, 0 where nothing changed; infinite where there was nothing before.
    """
    found: dict[str, list[Tensor]] = {"OV": [], "QK": []}
    for start in range(0, bank.n_heads, AT_ONCE):
        heads = slice(start, min(start + AT_ONCE, bank.n_heads))
        one, two = _products(bank, heads), _products(other, heads)
        for name, pairs in one.items():
            squares = [_change(*left, *right) for left, right in zip(pairs, two[name], strict=True)]
            change, size = (sum(part) for part in zip(*squares, strict=True))
            found[name].append(torch.where(change == 0, 0.0, (change / size).sqrt()).cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def other_changes(model: AttentionOnlyModel, other: AttentionOnlyModel) -> dict[str, float]:
    """The relative change of every parameter that belongs to no single head, by name, in the Frobenius
    norm: embeddings, biases of sublayers, norms, routers.

    Args:
        model: the first model.
        other: the second one, of the same shapes.
    """
    own = {f"{bank.path}.{name}" for bank in model.banks for name in _heads_own(bank)}
    theirs: Mapping[str, Tensor] = dict(other.named_parameters())
    out = {}
    for name, weight in model.named_parameters():
        if name not in own:
            size, change = weight.detach().double().norm(), 0.0
            change = float((theirs[name].detach().double() - weight.detach().double()).norm())
            out[name] = 0.0 if change == 0 else float(change / size)
    return out


def rounded(weight: Tensor, eps: float, generator: torch.Generator) -> Tensor:
    """A weight with noise of the size that rounding to the nearest number leaves: uniform, up to half of
    the distance between neighbours.

    Args:
        weight: any tensor.
        eps: the distance of 1 to the next number, ``torch.finfo(dtype).eps``.
        generator: of the draws.
    """
    _, exponent = torch.frexp(weight.double())
    drawn = torch.rand(weight.shape, generator=generator, dtype=torch.float64).to(weight.device)
    noise = torch.ldexp((drawn - 0.5) * eps, exponent - 1)
    return (weight.double() + noise * (weight != 0)).to(weight.dtype)


def _heads_own(bank: HeadBank) -> list[str]:
    """Parameters whose slices are single heads' weights."""
    names = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "W_in", "b_in", "W_out", "W_gate", "b_gate")
    return [name for name, _ in bank.named_parameters() if name in names]


def _products(bank: HeadBank, heads: slice) -> dict[str, list[tuple[Tensor, Tensor]]]:
    """The factors of OV, and of QK at each distance: ``[head, rows, r]`` and ``[head, r, columns]``."""
    each = [bank.head(index) for index in range(heads.start, heads.stop)]

    def side(name: str) -> Tensor:
        W = bank.stacked(name, heads, torch.float64)  # type: ignore[arg-type]
        bias = torch.stack([getattr(head, f"b_{name}") for head in each]).double()
        return torch.cat([W, bias[:, None]], 1)

    q, k = side("Q"), side("K")
    if bank.compares_keys:  # what all keys share makes no difference
        k = k[:, :-1]
    try:
        turned = [bank.turned(k, distance) for distance in DISTANCES]
    except MechInterpError:  # turned after a norm, which weights alone do not know
        turned = [k]
    if torch.equal(turned[0], turned[-1]):
        turned = turned[:1]
    return {
        "OV": [(side("V"), bank.stacked("O", heads, torch.float64))],
        "QK": [(q, keys.mT) for keys in turned],
    }


def _change(A: Tensor, B: Tensor, A2: Tensor, B2: Tensor) -> tuple[Tensor, Tensor]:
    """Squared norms of ``A2 B2 - A B`` and of ``A B``, from Gram matrices of thin factors."""
    left = torch.cat([A2 - A, A], -1)
    right = torch.cat([B2, B2 - B], -2)
    change = ((left.mT @ left) * (right @ right.mT)).sum((-1, -2)).clamp_min(0)
    return change, ((A.mT @ A) * (B @ B.mT)).sum((-1, -2))
