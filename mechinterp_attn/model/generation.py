"""Text from a model, token by token, with a key-value cache."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.model.step import KeyValueCache

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel


@torch.no_grad()
def generate(
    model: AttentionOnlyModel,
    input: str | Int[Tensor, "batch pos"],
    *,
    max_new_tokens: int,
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    stop_at_eos: bool,
    attention_mask: Tensor | None,
    use_past_kv_cache: bool,
    generator: torch.Generator | None,
    verbose: bool,
) -> Int[Tensor, "batch longer"]:
    """The input and what follows it; see ``AttentionOnlyModel.generate``."""
    if not model.spec.causal:
        raise MechInterpError("a bidirectional model cannot continue a text")
    if model.spec.d_vocab_out != model.spec.d_vocab:
        raise MechInterpError(
            f"this model reads {model.spec.d_vocab} tokens and predicts {model.spec.d_vocab_out} classes: "
            "it cannot continue a text"
        )
    if max_new_tokens < 0 or temperature < 0 or (top_k is not None and top_k < 1):
        raise MechInterpError(
            f"max_new_tokens={max_new_tokens}, temperature={temperature}, top_k={top_k}; expected at least "
            "0, 0 and 1"
        )
    if top_p is not None and not 0 < top_p <= 1:
        raise MechInterpError(f"top_p={top_p}; expected a number in (0, 1]")
    tokens = model.as_tokens(input)
    room = model.spec.n_ctx - tokens.shape[1]
    if max_new_tokens > room:
        raise MechInterpError(
            f"{tokens.shape[1]} tokens and {max_new_tokens} new ones are more than this model's context of "
            f"{model.spec.n_ctx}; ask for at most {room}"
        )
    eos = getattr(model.tokenizer, "eos_token_id", None) if stop_at_eos else None
    done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
    mask = None if attention_mask is None else torch.as_tensor(attention_mask, device=tokens.device).bool()
    cache = KeyValueCache() if use_past_kv_cache else None
    unread = tokens
    for _ in Progress(range(max_new_tokens), desc="tokens", show=verbose):
        logits = model(unread, attention_mask=mask, past_kv_cache=cache)[:, -1]
        new = _choose(logits, temperature, top_k, top_p, generator)
        if eos is not None:
            new = torch.where(done, eos, new)
            done = done | (new == eos)
        tokens = torch.cat([tokens, new[:, None]], 1)
        if mask is not None:
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
        if bool(done.all()):
            break
        unread = tokens if cache is None else new[:, None]
    return tokens


def _choose(
    logits: Float[Tensor, "batch d_vocab"],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
    generator: torch.Generator | None,
) -> Int[Tensor, " batch"]:
    """The most likely token at temperature 0, else a draw from the (cut) distribution."""
    if temperature == 0:
        return logits.argmax(-1)
    logits = logits.float() / temperature
    if top_k is not None:
        floor = logits.topk(min(top_k, logits.shape[-1]), -1).values[:, -1:]
        logits = logits.masked_fill(logits < floor, -torch.inf)
    if top_p is not None:
        ordered, index = logits.sort(-1, descending=True)
        before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
        cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= top_p)
        logits = logits.masked_fill(cut, -torch.inf)
    return torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
