"""What a ranking over the vocabulary lists: which tokens, and how many of them."""

from __future__ import annotations

from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel

TOP = 10  # entries of a ranking where no number is given


def listed(
    model: AttentionOnlyModel, special_tokens: bool, *, output: bool = False
) -> Int[Tensor, " id"] | None:
    """The ids that a ranking may list, on the model's device; None for all of them.

    Args:
        special_tokens: list special tokens and ids that no text stands for, too.
        output: of logits. Outputs that are no tokens of the input are all listed.
    """
    spec = model.spec
    if special_tokens or (output and spec.d_vocab_out != spec.d_vocab):
        return None
    ids = model.text_ids
    return ids.to(model.W_E.device) if 0 < len(ids) < spec.d_vocab else None


def listed_note(model: AttentionOnlyModel, special_tokens: bool) -> dict[str, str]:
    """What a ranking leaves out, for a receipt; nothing where it lists every id."""
    ids = listed(model, special_tokens)
    if ids is None:
        return {}
    left_out = model.spec.d_vocab - len(ids)
    return {"left out": f"{left_out:,} ids of special tokens or without a text (special_tokens=True)"}


def size_of(ids: Tensor | None, whole: int) -> int:
    """How many ids are listed out of a vocabulary."""
    return whole if ids is None else len(ids)


def fewest(model: AttentionOnlyModel, special_tokens: bool = False) -> int:
    """How many ids are listed of the vocabulary, input or output, of which fewer are."""
    spec = model.spec
    inputs = size_of(listed(model, special_tokens), spec.d_vocab)
    return min(inputs, size_of(listed(model, special_tokens, output=True), spec.d_vocab_out))


def original(ids: Tensor | None, places: Tensor) -> Tensor:
    """The ids that stand at some places of a list."""
    return places if ids is None else ids[places]


def how_many(top_k: int | None, most: int, *, default: int = TOP) -> int:
    """The entries that a ranking lists: as many as asked for, or the default as far as there are so many.

    Raises:
        MechInterpError: more are asked for than there are, or none.
    """
    if top_k is None:
        return min(default, most)
    if not 1 <= top_k <= most:
        raise MechInterpError(f"top_k={top_k} is out of range; expected 1 to {most}")
    return top_k
