"""Freezing a prompt: one run, with every pattern, norm scale and soft cap of it kept."""

from __future__ import annotations

from dataclasses import replace

import torch
from jaxtyping import Float
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


def _plan(model: AttentionOnlyModel, tokens: str | Tensor) -> Plan:
    """Patterns, streams and logits; the run that they come from, and the check that they are right."""
    n, spec = model.as_tokens(tokens).shape[1], model.spec
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
        runs=2,
        rows=1,
        positions=n,
        bytes=copied
        + one
        + size * (kept + 4 * mixing + n * (6 * widest + 3 * spec.d_vocab_out + 8 * spec.d_model)),
        result=copied + size * kept,
    )


@plans(_plan)
@torch.no_grad()
def freeze(model: AttentionOnlyModel, tokens: str | Tensor, *, max_bytes: int = MAX_BYTES) -> Frozen:
    """Run a prompt once and fix every pattern, norm scale and soft cap.

    A model in half precision is run and frozen in float32: sums of thousands of terms in bfloat16 say
    nothing. Its embedding and unembedding are copied for that; the weights of each bank are widened while
    they are used. The receipt compares with the model's own logits too.

    Args:
        model: the converted model.
        tokens: a text, or token ids ``[pos]`` or ``[1, pos]``.
        max_bytes: memory beyond the model's that may be used, the frozen prompt included.

    Raises:
        MechInterpError: more than one prompt, unusable tokens, hooks on the model (the frozen model
            would describe neither the edited nor the original one), or it needs more than max_bytes.
    """
    ids = model.as_tokens(tokens)
    if ids.shape[0] != 1:
        raise MechInterpError(f"freeze takes one prompt, got a batch of {ids.shape[0]}")
    within(_plan(model, ids), max_bytes, "a shorter prompt")
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
    if not isinstance(tokens, str):
        return frozen
    notes = dict(frozen.receipt.notes) | {"special tokens": model.added_text}
    return replace(frozen, receipt=replace(frozen.receipt, notes=notes))


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
