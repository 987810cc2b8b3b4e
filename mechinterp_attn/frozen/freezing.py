"""Freezing a prompt: one run, with every pattern, norm scale and soft cap of it kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.frozen.prompt import Frozen, sum_tolerance
from mechinterp_attn.frozen.sublayer import freeze_sublayer
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.model.half import HALF
from mechinterp_attn.model.widen import widened

Prompt = str | Sequence[int] | Tensor


def _plan(model: AttentionOnlyModel, tokens: Prompt, attention_mask: Any) -> Plan:
    """Patterns, streams and logits; the run that they come from, and the check that they are right."""
    ids = model.as_tokens(tokens)
    n, spec = ids.shape[1], model.spec
    real = n if attention_mask is None else len(_real(model, ids, attention_mask))
    mixing, widest = 0, 0
    streams = (3 * len(model.sublayers()) + 4) * spec.d_model
    kept = n * (streams + (1 if spec.logit_cap is None else 2) * spec.d_vocab_out)
    for bank in model.banks:
        kept += n * bank.n_heads * (n + 1 if bank.mixes_positions else 1)
        kept += n * bank.n_heads * bank.d_head  # held values, made when they are asked for
        mixing = max(mixing, bank.n_heads * n * n if bank.mixes_positions else 0)
        widest = max(widest, bank.n_heads * bank.d_head)
    half = model.W_E.dtype in HALF  # frozen in float32; blocks are widened one at a time
    size = 4 if half else model.W_E.element_size()
    blocks = [sum(weight.numel() for weight in block.parameters()) for block in model.blocks]
    rest = sum(weight.numel() for weight in model.parameters()) - sum(blocks)
    copied, one = (4 * rest, 4 * max(blocks, default=0)) if half else (0, 0)
    return plan_runs(
        model,
        f"a prompt of {n:,} tokens, frozen",
        runs=2 if real == n else 3,
        rows=1,
        positions=n,
        bytes=copied
        + one
        + size * (kept + 4 * mixing + n * (6 * widest + 3 * spec.d_vocab_out + 8 * spec.d_model)),
        result=copied + size * kept,
    )


@plans(_plan)
@torch.no_grad()
def freeze(
    model: AttentionOnlyModel,
    tokens: Prompt,
    *,
    attention_mask: Tensor | Sequence[Any] | None = None,
    max_bytes: int = MAX_BYTES,
) -> Frozen:
    """Run a prompt once and fix every pattern, norm scale and soft cap.

    A model in half precision is run and frozen in float32: sums of thousands of terms in bfloat16 say
    nothing. Its embedding and unembedding are copied for that; the weights of each bank are widened while
    they are used. The receipt compares with the model's own logits too.

    Args:
        model: the converted model.
        tokens: a text, or token ids ``[pos]`` or ``[1, pos]``.
        attention_mask: for ids: 0 on padding, in their shape. Padding is left out: positions of the frozen
            prompt count the real tokens, and the receipt compares with the padded run.
        max_bytes: memory beyond the model's that may be used, the frozen prompt included.

    Raises:
        MechInterpError: more than one prompt, unusable tokens, a mask that does not fit, hooks on the model
            (the frozen model would describe neither the edited nor the original one), or it needs more
            than max_bytes.
    """
    ids = padded = model.as_tokens(tokens)
    if ids.shape[0] != 1:
        raise MechInterpError(
            f"freeze takes one prompt, got a batch of {ids.shape[0]}; freeze them one by one, each with "
            "its own row of the attention mask"
        )
    if attention_mask is not None:
        if isinstance(tokens, str):
            raise MechInterpError("attention_mask is for ids; a text has no padding")
        ids = ids[:, _real(model, ids, attention_mask)]
    within(_plan(model, tokens, attention_mask), max_bytes, "a shorter prompt")
    hooked = [name for name, point in model.hook_dict.items() if point.has_hooks()]
    if hooked:
        raise MechInterpError(
            f"the model has hooks at {', '.join(hooked[:5])}; remove them (model.reset_hooks()) "
            "before freezing"
        )
    given, model = model, widened(model)
    names = {bank.hook("pattern") for bank in model.banks} | {"hook_embed", "hook_pos_embed"}
    wanted = ("hook_scale", "hook_resid_pre", "hook_resid_mid", "hook_resid_post")
    logits, cache = model.run_with_cache(
        ids,
        names_filter=lambda name: name.endswith(wanted) or name in names,
        return_cache_object=False,
    )
    cache = {name: tensor[0] for name, tensor in cache.items()}
    parts = _parts(model, cache)
    last = f"blocks.{model.spec.n_layers - 1}.hook_resid_post"
    end = cache[last] if model.spec.n_layers else sum(parts.values(), torch.zeros_like(parts["embed"]))
    frozen = Frozen(
        model=model,
        tokens=ids[0],
        parts=parts,
        sublayers=tuple(freeze_sublayer(sublayer, cache) for sublayer in model.sublayers()),
        end=end,
        final_norm=model.ln_final.freeze(cache.get("ln_final.hook_scale")),
        gate=_prediction_gate(model, end),
        cap=None,
        logits=logits[0],
        receipt=Receipt(),
    )
    frozen = _with_receipt(_with_cap(frozen), given)
    if padded.shape != ids.shape:
        frozen = _held_to_padded(frozen, padded, attention_mask)
    if not isinstance(tokens, str):
        return frozen
    notes = dict(frozen.receipt.notes) | {"special tokens": model.added_text}
    return replace(frozen, receipt=replace(frozen.receipt, notes=notes))


def _real(model: AttentionOnlyModel, ids: Tensor, attention_mask: Any) -> Int[Tensor, " real"]:
    """The positions that are no padding.

    Raises:
        MechInterpError: a mask of another shape or with other values; nothing real; padding inside the
            prompt, or in front of it where positions count it, so that the rest alone is another prompt.
    """
    mask = torch.as_tensor(attention_mask, device=ids.device)
    mask = mask[None] if mask.ndim == 1 else mask
    if mask.shape != ids.shape:
        raise MechInterpError(
            f"attention_mask has shape {tuple(mask.shape)}; expected that of the tokens, {tuple(ids.shape)}"
        )
    if other := [value for value in mask.unique().tolist() if value not in (0, 1)]:
        raise MechInterpError(f"attention_mask holds {other[0]:g}; expected 0 on padding and 1 elsewhere")
    real = mask[0].nonzero()[:, 0]
    if not len(real):
        raise MechInterpError("attention_mask is 0 everywhere: there is no token to freeze")
    if len(real) != int(real[-1] - real[0]) + 1:
        raise MechInterpError(
            f"attention_mask has zeros between real tokens ({int(real[0])} to {int(real[-1])}); expected "
            "padding at the ends only"
        )
    if int(real[0]) and not model.spec.causal and model.spec.positions == "standard":
        raise MechInterpError(
            f"{int(real[0])} tokens of padding in front: the positions of this bidirectional model count "
            "them, so that the prompt alone is another one; pad on the right"
        )
    return real


def _held_to_padded(frozen: Frozen, padded: Tensor, attention_mask: Any) -> Frozen:
    """The check that leaving padding out is what the model does with it."""
    model = frozen.model
    mask = torch.as_tensor(attention_mask, device=padded.device).reshape(padded.shape)
    apart = model(padded, attention_mask=mask)[0, mask[0].bool()] - frozen.logits
    check = Check("the padded prompt has the same logits", float(apart.abs().max()), sum_tolerance(frozen))
    notes = dict(frozen.receipt.notes) | {"padding left out": f"{int((mask == 0).sum())} tokens"}
    return replace(frozen, receipt=Receipt((*frozen.receipt.checks, check), notes))


def _parts(model: AttentionOnlyModel, cache: dict[str, Tensor]) -> dict[str, Tensor]:
    embed = cache["hook_embed"]
    if not model.spec.n_layers:  # no block to read the stream at; no known model has an embed norm then
        position = cache.get("hook_pos_embed")
        return {"embed": embed} if position is None else {"embed": embed, "position": position}
    start = cache["blocks.0.hook_resid_pre"]
    if model.spec.embed_norm is not None:
        return {"embed": start}
    position = start - embed
    return {"embed": embed, "position": position} if bool(position.any()) else {"embed": embed}


def _prediction_gate(model: AttentionOnlyModel, end: Tensor) -> Float[Tensor, "pos d_model"] | None:
    """The activation of a prediction head as the factor it was on this prompt."""
    if not model.spec.prediction_head:
        return None
    z = end @ model.prediction.W.detach() + model.prediction.b.detach()
    return torch.where(z == 0, 0.0, model.prediction(end[None])[0] / z)


def _with_cap(frozen: Frozen) -> Frozen:
    """A soft cap on the logits as the factor it was on this prompt."""
    cap = frozen.model.spec.logit_cap
    if cap is None:
        return frozen
    raw = frozen.read_out(frozen.end) + frozen.offset()
    return replace(frozen, cap=torch.where(raw == 0, 1.0, cap * torch.tanh(raw / cap) / raw))


def _with_receipt(frozen: Frozen, given: AttentionOnlyModel) -> Frozen:
    logits = frozen.read_out(frozen.forward(frozen.start)) + frozen.offset()
    error = float((logits - frozen.logits).abs().max())
    check = Check("the frozen linear model gives the model's logits", error, sum_tolerance(frozen))
    notes = {"dtype": str(frozen.logits.dtype).removeprefix("torch.")}
    if given is not frozen.model:
        notes["weights"] = str(given.W_E.dtype).removeprefix("torch.")
        off = float((given(frozen.tokens[None])[0] - frozen.logits).abs().max())
        notes["the model's own logits, in that precision, are off by"] = f"{off:.2g}"
    return replace(frozen, receipt=Receipt((check,), notes))
