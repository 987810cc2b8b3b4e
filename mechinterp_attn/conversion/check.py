"""The check inside ``convert``: source and model run on the same tokens, also past the lengths at which
something begins.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.conversion.fidelity import Expected, Fidelity, compare, expected_of
from mechinterp_attn.core.errors import ConversionError
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_LARGE_VOCABULARY = 2**15
_USUAL = 64  # tokens
_BEYOND = 8  # tokens after the last length that the config names
_MOST_WORK = 10**12  # multiplications, about as many as a minute on one core gives
_MOST_NUMBERS = 2**28  # in one tensor: logits, or the scores of a layer


@dataclass(frozen=True, eq=False)
class Sample:
    """What a source computed for the check of its conversion.

    Attributes:
        runs: on random tokens; one sequence runs past every length that the config names, and comes first.
        unreached: of those lengths, the ones that would have been too much work.
    """

    runs: list[Expected]
    unreached: tuple[int, ...]


def sample_source(source: TransformerBridge | Checkpoint, checkpoint: Checkpoint, spec: Spec) -> Sample:
    """Run random tokens through a source, also past every length that the config names (windows, what
    rotary positions, positions of queries or ALiBi depend on), unless that is too much work.

    Args:
        source: a bridge or a checkpoint.
        checkpoint: what was read of the source. It is run instead of a bridge that is known not to compute
            what its own model does.
        spec: what the model is.
    """
    against = checkpoint if checkpoint.cfg.get("bridge_differs") else source
    avoid = checkpoint.cfg.get("no_position")
    lengths = named_lengths(spec, checkpoint)
    reached = [n for n in lengths if _affordable(spec, checkpoint, n + _BEYOND)]
    prompts = [random_tokens(spec, avoid=avoid)]
    if reached and max(reached) >= prompts[0].shape[1]:
        length = min(max(reached) + _BEYOND, spec.n_ctx)
        prompts.insert(0, random_tokens(spec, (1, length), avoid=avoid))
    unreached = tuple(n for n in lengths if n not in reached)
    return Sample([expected_of(against, tokens) for tokens in prompts], unreached)


def check_conversion(model: AttentionOnlyModel, sample: Sample) -> Fidelity:
    """The same tokens through the converted model, and an error where source and model part.

    Args:
        model: the converted model.
        sample: what the source computed.

    Raises:
        ConversionError: names the first sublayer after which the residual streams differ.
    """
    for run in sample.runs:
        fidelity = compare(model, run)
        if not fidelity.ok:
            raise ConversionError(
                f"the converted {model.cfg.model_name} does not compute what its source computes on "
                f"{run.tokens.shape[1]} tokens ({fidelity}); the residual streams first part after "
                f"{fidelity.first_difference or 'the last sublayer, in the final norm or unembedding'}."
                " If the source was edited by hooks, remove them; otherwise please report its config"
            )
    return replace(fidelity, longest=sample.runs[0].tokens.shape[1], unreached=sample.unreached)


def named_lengths(spec: Spec, checkpoint: Checkpoint) -> list[int]:
    """The lengths below the context beyond which something about a model changes, smallest first."""
    found = {*spec.windows, *(table.until for table in spec.rotaries), *checkpoint.cfg.get("lengths", ())}
    found |= {spec.query_growth[1]} if spec.query_growth else set()
    found |= {256} if spec.alibi_bfloat16 else set()  # larger integers are rounded
    return sorted(n for n in found if n is not None and n < spec.n_ctx)


def random_tokens(
    spec: Spec, shape: tuple[int, int] | None = None, *, avoid: int | None = None
) -> Int[Tensor, "batch pos"]:
    """Tokens, the same ones every time; two sequences of up to 64 if no shape is given.

    Up to 32 where the vocabulary is large: source and model give a row of logits for every token, and
    the check should need little memory beside the weights.

    Args:
        avoid: a token that takes no position in the source (RoBERTa's padding).
    """
    if shape is None:
        shape = (2, min(spec.n_ctx, _USUAL if spec.d_vocab_out < _LARGE_VOCABULARY else 32))
    tokens = torch.randint(spec.d_vocab, shape, generator=torch.Generator().manual_seed(0))
    return tokens if avoid is None else torch.where(tokens == avoid, (avoid + 1) % spec.d_vocab, tokens)


def _affordable(spec: Spec, checkpoint: Checkpoint, length: int) -> bool:
    tensors = checkpoint.state_dict.items()
    weights = sum(W.numel() for name, W in tensors if not name.startswith("embed."))
    numbers = length * max(spec.d_vocab_out, spec.n_heads * length)
    return length * weights <= _MOST_WORK and numbers <= _MOST_NUMBERS
