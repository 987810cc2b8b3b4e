"""Who may see whom: masks as rules, and masks written into the weights.

A mask rule gives, for ``rows`` rows of an augmented sequence (bias token first), the allowed
(query, key) pairs. A mask in weights adds ``Omega * B`` to the scores through one-hot position
coordinates, B = -1 on forbidden pairs and 0 on allowed ones (Huben & Morris 2023, theorem on
masks). Adding +Omega on allowed pairs instead would be the same softmax and lose the scores'
low digits.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError

MaskRule = Callable[[int], Bool[Tensor, "row row"]]


def everything(rows: int) -> Bool[Tensor, "row row"]:
    """No mask: every row sees every row."""
    return torch.ones(rows, rows, dtype=torch.bool)


def self_only(rows: int) -> Bool[Tensor, "row row"]:
    """Every row sees itself."""
    return torch.eye(rows, dtype=torch.bool)


def self_and_bias(rows: int) -> Bool[Tensor, "row row"]:
    """Every row sees itself and the bias token: the mask of neuron heads."""
    mask = torch.eye(rows, dtype=torch.bool)
    mask[:, 0] = True
    return mask


def causal(rows: int) -> Bool[Tensor, "row row"]:
    """Original causal heads: real rows see the real rows up to themselves; the bias token itself."""
    mask = torch.ones(rows, rows, dtype=torch.bool).tril()
    mask[1:, 0] = False
    return mask


def bidirectional(rows: int) -> Bool[Tensor, "row row"]:
    """Original heads without causal mask: real rows see all real rows; the bias token itself."""
    mask = torch.ones(rows, rows, dtype=torch.bool)
    mask[1:, 0] = False
    mask[0, 1:] = False
    return mask


def windowed(rule: MaskRule, window: int) -> MaskRule:
    """Another rule, real rows seeing only the last ``window`` rows, themselves included."""

    def narrowed(rows: int) -> Bool[Tensor, "row row"]:
        row = torch.arange(rows)
        near = (row[:, None] - row < window) | (row == 0)
        return rule(rows) & near

    return narrowed


def fixed(pattern: Bool[Tensor, "row key"]) -> MaskRule:
    """Any pattern given as a table; shorter sequences take its upper left corner.

    Raises:
        MechInterpError: not square, or a row with nothing allowed (its softmax does not exist).
    """
    if pattern.ndim != 2 or pattern.shape[0] != pattern.shape[1]:
        raise MechInterpError(f"a mask of shape {tuple(pattern.shape)}; expected [row, row]")
    check_rows(pattern)
    table = pattern.detach().clone()

    def rule(rows: int) -> Bool[Tensor, "row row"]:
        if rows > len(table):
            raise MechInterpError(f"{rows} rows, but the mask given is for {len(table)} at most")
        return check_rows(table[:rows, :rows])

    return rule


def check_rows(mask: Bool[Tensor, "row row"]) -> Bool[Tensor, "row row"]:
    """The mask itself, if every row allows something.

    Raises:
        MechInterpError: names the rows that see nothing.
    """
    empty = (~mask.any(-1)).nonzero().flatten().tolist()
    if empty:
        raise MechInterpError(
            f"mask rows {empty[:8]} allow nothing to attend to; every row needs at least one key, such "
            "as the row itself or the bias token (row 0)"
        )
    return mask


def forbidding(mask: Bool[Tensor, "row row"]) -> Float[Tensor, "row row"]:
    """``B``: -1 on forbidden pairs, 0 on allowed ones (float64)."""
    return -(~mask).double()


def mask_rank(mask: Bool[Tensor, "row row"]) -> int:
    """Rank of ``B``: how much the head's QK rank grows when the mask is written into its weights."""
    return int(torch.linalg.matrix_rank(forbidding(mask)))
