"""What a family's attention does to scores, queries, keys and values, from its own modules."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.sources.families.table import Family

QK_NORMS = (("q_norm", "k_norm"), ("q_layernorm", "k_layernorm"), ("query_layernorm", "key_layernorm"))


def lengths_of(hf: Any) -> tuple[int, ...]:
    """The lengths that a config names and beyond which something may change."""
    rope = getattr(hf, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict)), vars(hf)]
    fields = ("original_max_position_embeddings", "sliding_window", "window_size")
    found = {part.get(field) for part in parts for field in fields}
    return tuple(sorted(n for n in found if isinstance(n, int)))


def attention_of(hf: Any, attention: list[Any], d_head: int, family: Family) -> dict[str, Any]:
    """The config fields for scores, windows, norms on queries and keys, clamping and sinks."""
    rope = getattr(hf, "rope_parameters", None) or {}
    growth, first = rope.get("llama_4_scaling_beta"), attention[0]
    clip = getattr(first, "clip_qkv", None) or getattr(hf, "clip_qkv", None)
    return {
        "windows": _windows(hf, attention),
        "lengths": lengths_of(hf),
        "attn_scores_soft_cap": getattr(hf, "attn_logit_softcapping", None),
        "output_logits_soft_cap": getattr(hf, "final_logit_softcapping", None),
        "qkv_clip": clip,
        "sinks": hasattr(first, "sinks"),
        "query_growth": (float(growth), int(rope["original_max_position_embeddings"])) if growth else None,
        **_scale(attention, d_head, family),
        **_qk_norm(first, d_head, family),
    }


def slopes_of(model: Any, hf: Any, n_heads: int) -> tuple[float, ...]:
    """How fast scores fall with the distance (ALiBi), head by head, from the model's own function."""
    module = importlib.import_module(type(model).__module__)
    if hasattr(module, "build_mpt_alibi_tensor"):
        table = module.build_mpt_alibi_tensor(n_heads, 2, hf.attn_config.alibi_bias_max)
    else:
        table = module.build_alibi_tensor(torch.ones(1, 2), n_heads, torch.float32)
    first, second = table.reshape(n_heads, 2).double().unbind(-1)
    return tuple((second - first).tolist())


def qk_norms(component: Any) -> tuple[Any, Any] | None:
    """The norms on queries and keys of an attention module, as the bridge or Hugging Face holds them."""
    for names in QK_NORMS:
        q, k = (getattr(component, name, None) for name in names)
        if q is not None and k is not None:
            return q, k
    return None


def qk_gains(norm: Any, *, offset: bool) -> dict[str, Tensor]:
    """Gain and bias of such a norm: ``w`` and ``b``, one row per head where heads have their own."""
    parts = list(norm.norms) if hasattr(norm, "norms") else [norm]  # StableLM: a norm per head
    found: dict[str, Tensor] = {}
    for name, field in (("w", "weight"), ("b", "bias")):
        own = [tensor for part in parts if isinstance(tensor := getattr(part, field, None), Tensor)]
        if own:
            found[name] = torch.stack(own) if hasattr(norm, "norms") else own[0]
    if offset and "w" in found:
        found["w"] = found["w"] + 1
    return found


def _qk_norm(module: Any, d_head: int, family: Family) -> dict[str, Any]:
    norms = qk_norms(module)
    if norms is None:
        return {"qk_norm": None, "use_qk_norm": False}
    norm = getattr(norms[0], "original_component", norms[0])
    gain = qk_gains(norm, offset=False).get("w")
    over = "head" if gain is None or gain.shape == (d_head,) else "each" if gain.ndim == 2 else "all"
    kind = "RMS" if "rms" in type(norm).__name__.lower() else "LN"
    return {"qk_norm": kind, "qk_norm_over": over, "qk_norm_last": family.qk_norm_last}


def _windows(hf: Any, attention: list[Any]) -> list[int | None]:
    """How far back each layer sees."""
    size = getattr(hf, "sliding_window", None)
    types = getattr(hf, "layer_types", None)
    if types is not None:
        return [size if kind == "sliding_attention" else None for kind in types]
    kinds = getattr(hf, "attention_layers", None)
    if kinds is not None:  # GPT-Neo
        return [hf.window_size if kind == "local" else None for kind in kinds]
    if getattr(hf, "use_sliding_window", True) is False:
        size = None
    return [getattr(module, "sliding_window", size) for module in attention]


def _scale(attention: list[Any], d_head: int, family: Family) -> dict[str, Any]:
    """What scores are divided by."""
    scales = [_divisor(getattr(module, "self", module), d_head, family) for module in attention]
    by_layer = len(scales) > 1 and all(
        math.isclose(s, scales[0] * (layer + 1)) for layer, s in enumerate(scales)
    )
    if not by_layer and any(not math.isclose(s, scales[0]) for s in scales):
        return {"unsupported": ["attention scores scaled differently in each layer"]}
    return {"use_attn_scale": True, "attn_scale": scales[0], "scale_attn_by_inverse_layer_idx": by_layer}


def _divisor(module: Any, d_head: int, family: Family) -> float:
    if family.unscaled:
        return 1.0
    for name in ("scaling", "softmax_scale", "inv_norm_factor"):
        if getattr(module, name, None):
            return 1 / float(getattr(module, name))
    return float(getattr(module, "scale_attn", math.sqrt(d_head)))
