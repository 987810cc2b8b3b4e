"""The check inside ``convert``: source and model run on the same tokens, also past the lengths at which
something begins.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.conversion.fidelity import Fidelity, verify
from mechinterp_attn.core.errors import ConversionError
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_LARGE_VOCABULARY = 2**15
_USUAL = 64  # tokens
_BEYOND = 8  # tokens after the last length that the config names
_MOST_WORK = 10**12  # multiplications, about as many as a minute on one core gives
_MOST_NUMBERS = 2**28  # in one tensor: logits, or the scores of a layer


def check_conversion(
    model: AttentionOnlyModel, source: TransformerBridge | Checkpoint, checkpoint: Checkpoint
) -> Fidelity:
    """Random tokens through both, and an error where source and model part.

    One sequence runs past every length that the config names (windows, what rotary positions, positions of
    queries or ALiBi depend on), unless that is too much work; ``fidelity.unreached`` says so.

    Args:
        checkpoint: what was read of the source. It is run instead of a bridge that is known not to compute
            what its own model does.

    Raises:
        ConversionError: names the first sublayer after which the residual streams differ.
    """
    against = checkpoint if checkpoint.cfg.get("bridge_differs") else source
    lengths = named_lengths(model, checkpoint)
    reached = [n for n in lengths if _affordable(model, n + _BEYOND)]
    prompts = [random_tokens(model, avoid=checkpoint.cfg.get("no_position"))]
    if reached and max(reached) >= prompts[0].shape[1]:
        length = min(max(reached) + _BEYOND, model.spec.n_ctx)
        prompts.insert(0, random_tokens(model, (1, length), avoid=checkpoint.cfg.get("no_position")))
    for tokens in prompts:
        fidelity = verify(model, against, tokens)
        if not fidelity.ok:
            raise ConversionError(
                f"the converted {model.cfg.model_name} does not compute what its source computes on "
                f"{tokens.shape[1]} tokens ({fidelity}); the residual streams first part after "
                f"{fidelity.first_difference or 'the last sublayer, in the final norm or unembedding'}."
                " If the source was edited by hooks, remove them; otherwise please report its config"
            )
    unreached = tuple(n for n in lengths if n not in reached)
    return replace(fidelity, longest=prompts[0].shape[1], unreached=unreached)


def named_lengths(model: AttentionOnlyModel, checkpoint: Checkpoint) -> list[int]:
    """The lengths below the context beyond which something about a model changes, smallest first."""
    spec = model.spec
    found = {*spec.windows, *(table.until for table in spec.rotaries), *checkpoint.cfg.get("lengths", ())}
    found |= {spec.query_growth[1]} if spec.query_growth else set()
    found |= {256} if spec.alibi_bfloat16 else set()  # larger integers are rounded
    return sorted(n for n in found if n is not None and n < spec.n_ctx)


def random_tokens(
    model: AttentionOnlyModel, shape: tuple[int, int] | None = None, *, avoid: int | None = None
) -> Int[Tensor, "batch pos"]:
    """Tokens, the same ones every time; two sequences of up to 64 if no shape is given.

    Up to 32 where the vocabulary is large: source and model give a row of logits for every token, and
    the check should need little memory beside the weights.

    Args:
        avoid: a token that takes no position in the source (RoBERTa's padding).
    """
    if shape is None:
        shape = (2, min(model.spec.n_ctx, _USUAL if model.spec.d_vocab_out < _LARGE_VOCABULARY else 32))
    tokens = torch.randint(model.spec.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    return (
        tokens if avoid is None else torch.where(tokens == avoid, (avoid + 1) % model.spec.d_vocab, tokens)
    )


def _affordable(model: AttentionOnlyModel, length: int) -> bool:
    spec = model.spec
    weights = sum(p.numel() for name, p in model.named_parameters() if not name.startswith("embed."))
    numbers = length * max(spec.d_vocab_out, spec.n_heads * length)
    return length * weights <= _MOST_WORK and numbers <= _MOST_NUMBERS
