"""How large Omega must be: the error of masks written into weights, and its bound.

With the mask as a penalty, a share ``leak <= n exp(Delta - Omega)`` of a row's attention reaches the
n forbidden rows, where Delta is the largest forbidden score minus the largest allowed one. What
remains is the masked pattern times ``1 - leak``, so a head's output moves by at most

    2 n exp(Delta - Omega) max_j |x_j W_OV|

(Huben & Morris 2023, theorem on masks). The bound of a sublayer is the sum over its heads. It is
``exp(log_leak - Omega)``: one number per sublayer and input says it for every Omega.
"""

from __future__ import annotations

import math

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.theorems.heads import SoftmaxHeads, Sublayer, project


@torch.no_grad()
def log_leak(heads: SoftmaxHeads, X: Float[Tensor, "*batch row width"]) -> Float[Tensor, "*batch row"]:
    """Logarithm of ``sum over heads of 2 n exp(Delta) max|x W_OV|``, for every row of X (natural).

    The error of row i (largest coordinate) with the masks in weights is at most
    ``exp(log_leak[i] - Omega)``. Minus infinity where nothing is forbidden.

    Args:
        heads: with the mask as a rule (not in the weights).
        X: the augmented stream that the heads read.
    """
    rows = X.shape[-2]
    allowed = heads.mask(rows).to(X.device)
    n_forbidden = (~allowed).sum(-1).to(X.dtype)
    total = X.new_full(X.shape[:-1], -math.inf)
    for part in heads.chunks(256):
        scores = part.scores(X)
        delta = scores.masked_fill(allowed, -math.inf).amax(-1) - scores.masked_fill(
            ~allowed, -math.inf
        ).amax(-1)
        v = project(X, part.W_V)
        if v.shape[-1] == 1:  # |v W_O| without the product
            moved = v[..., 0].abs().amax(-1) * part.W_O[:, 0].abs().amax(-1)
        else:
            moved = torch.einsum("...hnr,hrd->...hnd", v, part.W_O).abs().amax((-1, -2))
        terms = delta + (2 * n_forbidden).log() + moved.log()[..., None]
        total = torch.logaddexp(total, terms.logsumexp(-2))
    return total


@torch.no_grad()
def sublayer_log_leak(sublayer: Sublayer, X: Float[Tensor, "*batch row width"]) -> float:
    """The largest ``log_leak`` over the rows of X, all stacks of a sublayer together."""
    read = X if sublayer.norm is None else sublayer.norm(X)
    total = torch.stack([log_leak(stack, read) for stack in sublayer.heads]).logsumexp(0)
    return float(total.max())


def mask_error_bound(sublayer: Sublayer, X: Float[Tensor, "*batch row width"], omega: float) -> float:
    """The largest error that masks in weights with this Omega can make in one sublayer's output.

    Args:
        sublayer: whose masks are in the weights.
        X: the augmented stream, ``[..., row, width]``.
        omega: how strongly a mask in the weights forbids a row.
    """
    return math.exp(sublayer_log_leak(sublayer, X) - omega)


@renamed_arguments(tol="tolerance")
def least_omega(log_leak: float, tolerance: float) -> float:
    """The least Omega whose bound is ``tolerance`` (for one sublayer's output).

    Args:
        log_leak: the logarithm of what the masked rows weigh at Omega 0 (``sublayer_log_leak``).
        tolerance: the largest error of a sublayer's output that is let through.

    Raises:
        MechInterpError: the tolerance is not positive.
    """
    if not tolerance > 0:
        raise MechInterpError(f"tolerance={tolerance}; expected a positive error")
    return max(log_leak - math.log(tolerance), 0.0)


@renamed_arguments(tol="tolerance")
def check_omega(omega: float, log_leak: float, tolerance: float) -> None:
    """Whether Omega keeps the tolerance.

    Args:
        omega: how strongly a mask in the weights forbids a row.
        log_leak: the logarithm of what the masked rows weigh at Omega 0 (``sublayer_log_leak``).
        tolerance: the largest error of a sublayer's output that is let through.

    Raises:
        MechInterpError: it does not; says the least that would.
    """
    least = least_omega(log_leak, tolerance)
    if omega < least:
        raise MechInterpError(
            f"omega={omega:g} bounds the error of the masks by {math.exp(log_leak - omega):.1e} only, "
            f"more than tolerance={tolerance:.1e}; the least omega that does is {least:.2f}"
        )
