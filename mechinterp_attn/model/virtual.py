"""Virtual heads: several heads one after the other, which together act as one.

Where a later head moves what an earlier one wrote, the pair moves ``W_OV1 W_OV2`` along the product
of their patterns (Elhage et al. 2021, "virtual attention heads"). A ``VirtualHead`` is a ``Head``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import reduce
from itertools import pairwise

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.heads import Head, Side
from mechinterp_attn.model.low_rank import LowRank
from mechinterp_attn.model.on_a_run import Cache

JOIN = " > "  # L0H1 > L1H4: first L0H1 acts, then L1H4 on what it wrote


@dataclass(frozen=True, eq=False)
class VirtualHead(Head):
    """Heads in a row as one head; every norm between them is left out but its gain.

    ``OV`` is the product of their OV circuits, in the order in which they act. ``QK`` is what the
    last head's score makes of what the earlier heads moved: its keys are read through their OV
    circuits (the K-composition term; for a previous-token head followed by an induction head, the
    circuit that matches tokens). A neuron at the end has no key to read with: its score is its
    pre-activation, with what the earlier heads moved to its token beside the token itself
    (``NeuronBank.after``). ``pattern`` is the product of the patterns on a cache.

    Attributes:
        heads: the heads, first to last.
    """

    heads: tuple[Head, ...] = field(repr=False)

    @property
    def chain(self) -> tuple[Head, ...]:
        """The heads in the order in which they act."""
        return self.heads

    @property
    def reads_at(self) -> int:
        """The sublayer that the first head reads in."""
        return self.heads[0].reads_at

    @property
    def writes_at(self) -> int:
        """The sublayer that the last head writes in."""
        return self.heads[-1].writes_at

    @property
    def mixes_positions(self) -> bool:
        """Whether any head of the chain moves information between positions."""
        return any(head.mixes_positions for head in self.heads)

    def gram(self, side: Side) -> Float[Tensor, "d_head d_head"]:
        """As ``Head.gram``, of the chain's first or last head as the side asks.

        Args:
            side: "Q", "K", "V" or "O".
        """
        W = {"Q": self.W_Q, "K": self.W_K, "V": self.W_V, "O": self.W_O}[side].double()
        if side == "O":
            W = self.bank.seen(W)
            return W @ W.T
        return W.T @ W

    def pattern(self, cache: Cache, batch: int = 0) -> Float[Tensor, "query key_plus_bias"]:
        """The product of the heads' patterns; the last column is what ends on the bias token.

        Args: as for ``Head.pattern``.

        Args:
            cache: of a run of the model.
            batch: which text of the batch.
        """
        chain = None
        for head in reversed(self.heads):
            own = F.pad(head.pattern(cache, batch), (0, 0, 0, 1))  # the bias token's own row:
            own[-1, -1] = 1  # it sees only itself
            chain = own if chain is None else chain @ own
        assert chain is not None
        return chain[:-1]


@torch.no_grad()
def compose(heads: Sequence[Head]) -> VirtualHead:
    """Several heads in a row as one head (Elhage et al. 2021, "virtual attention heads").

    Args:
        heads: two or more, in the order in which they act; virtual ones are taken apart.

    Raises:
        MechInterpError: fewer than two, or one that does not read what the one before it writes.
    """
    if len(heads) < 2:
        names = [head.label for head in heads]
        raise MechInterpError(f"a virtual head needs at least 2 heads, got {len(heads)}: {names}")
    parts = [part for head in heads for part in head.chain]
    for one, two in pairwise(parts):
        if one.writes_at >= two.reads_at:
            raise MechInterpError(
                f"{two.label} does not read what {one.label} writes: it comes before it or beside it; "
                f"give the heads in the order in which they act"
            )
    # The product of all OVs, cut at the narrowest head: [d_model, r] and [r, d_model].
    cut = min(range(len(parts)), key=lambda i: parts[i].W_V.shape[1])
    before = _product([*(h.OV for h in parts[:cut])], parts[cut].W_V, left=True)
    last, moves = parts[-1], [h.OV for h in parts[:-1]]
    after = last.W_O  # as any head's: what stands behind its sublayer is not in it yet
    if cut < len(parts) - 1:
        circuits = [*moves[cut + 1 :], LowRank(last.W_V, last.W_O)]
        after = _product(circuits, parts[cut].bank.behind(parts[cut].W_O), left=False)
    scores = last.bank.after(last.index, lambda side: _product(moves, side, left=True))
    return VirtualHead(
        label=JOIN.join(head.label for head in parts),
        kind="virtual",
        layer=last.layer,
        index=last.index,
        W_V=before,
        W_O=after,
        b_V=torch.zeros_like(before[0]),
        bank=last.bank,
        model=last.model,
        heads=tuple(parts),
        **scores,
    )


def _product(circuits: Sequence[LowRank], end: Tensor, *, left: bool) -> Tensor:
    """``OV_1 OV_2 ... end`` (``left``) or ``end OV_1 OV_2 ...``, factor by factor, float64 inside."""
    wide = end.double()
    if left:
        wide = reduce(lambda x, ov: ov.A.double() @ (ov.B.double() @ x), reversed(circuits), wide)
    else:
        wide = reduce(lambda x, ov: (x @ ov.A.double()) @ ov.B.double(), circuits, wide)
    return wide.to(end.dtype)
