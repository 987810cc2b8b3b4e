"""Heads of a model, from what a user may give. ``HeadIndex`` does the work."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mechinterp_attn.model.heads import Head
from mechinterp_attn.model.index import One
from mechinterp_attn.model.virtual import VirtualHead

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel


def resolve_head(model: AttentionOnlyModel, head: One) -> Head:
    """A head from a ``Head``, a label, or a virtual head's label such as ``L0H1 > L1H4``.

    Args:
        model: the converted model.
        head: what names it; a tuple of labels is a virtual head.

    Raises:
        MechInterpError: no such head; the message names near ones.
    """
    return model.heads.one(head)


def virtual_head(model: AttentionOnlyModel, *heads: One) -> VirtualHead:
    """Several heads in a row as one head (Elhage et al. 2021, "virtual attention heads").

    Args:
        model: the converted model.
        heads: two or more labels or heads, in the order in which they act.

    Raises:
        MechInterpError: fewer than two, no such head, or one that does not read what the one before
            it writes.
    """
    return model.heads.chain(*heads)
