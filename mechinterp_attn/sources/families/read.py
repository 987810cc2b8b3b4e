"""A bridge around a Hugging Face model, as a config and tensors under HookedTransformer's names.

Weights are taken from the bridge's components, rules from the wrapped modules themselves: the
bridge's config is not right for every family (GPT-Neo's scale, OPT's width, rotary widths, ...).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp_attn.sources.families.attention import attention_of, qk_gains, qk_norms, slopes_of
from mechinterp_attn.sources.families.experts import experts_config, experts_tensors
from mechinterp_attn.sources.families.refused import refused_parts
from mechinterp_attn.sources.families.rotary import rotation_of
from mechinterp_attn.sources.families.table import Family, family_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_NORMS = ("ln1", "ln2", "ln1_post", "ln2_post")


def config_of(bridge: TransformerBridge) -> dict[str, Any]:
    """HookedTransformer's config names for a bridge's wrapped model; ``unsupported`` lists every
    reason against it, empty where there is none.
    """
    cfg = {name: value for name, value in vars(bridge.cfg).items() if not name.startswith("_")}
    model, hf = bridge.original_model, bridge.original_model.config
    family = family_of(str(cfg.get("architecture")))
    unsupported = refused_parts(bridge, hf)
    if unsupported:
        return cfg | {"unsupported": unsupported, "use_qk_norm": False}
    block = bridge.blocks[0]
    attention = [b.attn.original_component for b in bridge.blocks]
    around = next(getattr(block, name) for name in _NORMS if hasattr(block, name))
    norm, final = _norm_kind(around), _norm_kind(getattr(bridge, "ln_final", None))
    over_stream = norms_stream(bridge)
    cfg |= {
        "parallel_attn_mlp": type(block).__name__ == "ParallelBlockBridge",
        "normalization_type": norm,
        "pre_norm": hasattr(block, "ln1"),
        "stream_norm": norm if over_stream else None,
        "embed_norm": family.embed_norm or _norm_kind(getattr(bridge, "embed_ln", None)),
        "final_norm": final is not None,
        "final_rms": final == "RMS",
        "prediction_head": hasattr(bridge, "mlm_head"),
        "use_normalization_before_and_after": hasattr(block, "ln1_post"),
        "eps": _eps(around),
        "d_vocab": bridge.embed.W_E.shape[0],
        "float32_inside": not family.float64,
        "d_vocab_out": bridge.unembed.W_U.shape[-1],
        "use_local_attn": False,
        "use_NTK_by_parts_rope": False,
    }
    if family.experts:
        cfg |= experts_config(block, hf, family)
    else:
        cfg["d_mlp"] = block.mlp.W_in.shape[-1]
        cfg["gated_mlp"] = getattr(block.mlp, "W_gate", None) is not None
    if family.act_fn:
        cfg["act_fn"] = family.act_fn
    if reason := _bridge_differs(hf, attention[0], cfg):
        cfg["bridge_differs"] = reason
    if _counts_padding(bridge):
        cfg["no_position"] = bridge.pos_embed.original_component.padding_idx
    if getattr(hf, "is_decoder", False):  # BERT as a language model
        cfg["attention_dir"] = "causal"
    cfg |= attention_of(hf, attention, cfg["d_head"], family)
    if cfg["positional_embedding_type"] == "rotary":
        cfg |= rotation_of(model, hf, attention, family)
    elif cfg["positional_embedding_type"] == "alibi":
        cfg |= {
            "alibi_slopes": slopes_of(model, hf, cfg["n_heads"]),
            "alibi_bfloat16": family.alibi_bfloat16,
        }
    return cfg


def _bridge_differs(hf: Any, attention: Any, cfg: dict[str, Any]) -> str | None:
    """Why a bridge does not compute what its own model does, where it is known not to."""
    if getattr(attention, "scale_attn_weights", True) is False:
        return "TransformerLens's bridge scales the scores that this model leaves unscaled"
    if cfg["positional_embedding_type"] == "alibi" and getattr(hf, "alibi", False):
        return "TransformerLens's bridge adds ALiBi's scores of this model twice"
    return None


def _counts_padding(bridge: Any) -> bool:
    """Whether positions count the tokens that are no padding (RoBERTa), so that padding takes none."""
    embed = getattr(bridge, "pos_embed", None)
    return getattr(getattr(embed, "original_component", None), "padding_idx", None) is not None


def norms_stream(bridge: Any) -> bool:
    """Whether norms are taken of the whole stream behind each sublayer (BERT, OpenAI's GPT)."""
    hf = getattr(getattr(bridge, "original_model", None), "config", None)
    family = family_of(str(getattr(bridge.cfg, "architecture", "")))
    return family.norms_stream or getattr(hf, "do_layer_norm_before", True) is False


def tensors_of(bridge: TransformerBridge, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The wrapped model's weights under HookedTransformer's names; views wherever possible."""
    hf, family = bridge.original_model.config, family_of(str(cfg.get("architecture")))
    W_E, W_U = bridge.embed.W_E, bridge.unembed.W_U
    scale = getattr(bridge.embed.original_component, "embed_scale", None)
    W_E = _times(W_E, 1.0 if scale is None else float(scale))
    if hasattr(bridge, "project_in"):  # OPT-350m: a narrower embedding
        W_E = W_E @ bridge.project_in.original_component.weight.T
        W_U = bridge.project_out.original_component.weight.T @ W_U
    logits = _factor(hf, family.times_logits) / _factor(hf, family.over_logits)
    out = {
        "embed.W_E": _times(W_E, _factor(hf, family.times_embedding)),
        "unembed.W_U": _times(W_U, logits),
        "unembed.b_U": _times(bridge.unembed.b_U, logits),
    }
    if cfg["positional_embedding_type"] == "standard":
        out["pos_embed.W_pos"] = _positions(bridge, cfg)
    if cfg["prediction_head"]:
        dense = bridge.mlm_head.original_component
        out |= {"prediction.W": dense.weight.T, "prediction.b": dense.bias}
    out |= _norm_weights(bridge, "embed_ln", "embed_norm") | _norm_weights(bridge, "ln_final", "ln_final")
    for layer, block in enumerate(bridge.blocks):
        out |= _block(block, f"blocks.{layer}", family, _factor(hf, family.times_residual))
    return out


def _block(block: Any, at: str, family: Family, residual: float) -> dict[str, Tensor]:
    out: dict[str, Tensor] = {}
    for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
        out |= _weight(block.attn, name, f"{at}.attn")
    if family.experts:
        out |= {f"{at}.mlp.{name}": tensor for name, tensor in experts_tensors(block).items()}
    else:
        for name in ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"):
            out |= _weight(block.mlp, name, f"{at}.mlp")
    for name in ("attn.W_O", "attn.b_O", "mlp.W_out", "mlp.b_out"):
        if f"{at}.{name}" in out:
            out[f"{at}.{name}"] = _times(out[f"{at}.{name}"], residual)
    for name in _NORMS:
        out |= _norm_weights(block, name, f"{at}.{name}")
    attention = block.attn.original_component
    for side, norm in zip("qk", qk_norms(attention) or (), strict=False):
        bridge, module = norm, getattr(norm, "original_component", norm)
        offset = bool(getattr(bridge, "uses_weight_offset", False))
        gains = qk_gains(module, offset=offset)
        out |= {f"{at}.attn.{side}_norm.{part}": tensor for part, tensor in gains.items()}
    if isinstance(sinks := getattr(attention, "sinks", None), Tensor):
        out[f"{at}.attn.sinks"] = sinks
    return out


def _positions(bridge: Any, cfg: dict[str, Any]) -> Tensor:
    """One vector per position, the rows before the first position dropped."""
    n_ctx = cfg["n_ctx"]
    embed = getattr(bridge, "pos_embed", None)
    if embed is None:  # XGLM: sines, computed
        sines = bridge.original_model.model.embed_positions
        return sines.weights[sines.offset : sines.offset + n_ctx]
    W_pos = embed.W_pos
    counts = _counts_padding(bridge)
    W_pos = W_pos[embed.original_component.padding_idx + 1 :] if counts else bridge.W_pos
    types = getattr(bridge, "token_type_embed", None)
    if types is not None:  # every token is of type 0
        W_pos = W_pos + types.W_E[0]
    return W_pos[:n_ctx]


def _factor(hf: Any, field: str | None) -> float:
    return 1.0 if field is None else float(getattr(hf, field))


def _times(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _weight(component: Any, name: str, at: str) -> dict[str, Tensor]:
    """A weight where the component has it: accessors raise, or give None, where it has none."""
    try:
        value = getattr(component, name)
    except AttributeError:
        return {}
    return {f"{at}.{name}": value} if isinstance(value, Tensor) else {}


def _norm_weights(owner: Any, name: str, at: str) -> dict[str, Tensor]:
    bridge = getattr(owner, name, None)
    module = getattr(bridge, "original_component", None)
    if bridge is None or module is None:
        return {}
    out = {}
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if weight is not None:
        out[f"{at}.w"] = weight + 1 if bridge.uses_weight_offset else weight
    if isinstance(bias, Tensor):
        out[f"{at}.b"] = bias
    return out


def _norm_kind(bridge: Any) -> str | None:
    if bridge is None or isinstance(bridge.original_component, torch.nn.Identity):
        return None
    return "RMS" if bridge.uses_rms_norm else "LN"


def _eps(bridge: Any) -> float:
    module = bridge.original_component
    for name in ("eps", "variance_epsilon"):
        if getattr(module, name, None) is not None:
            return float(getattr(module, name))
    return 1e-5
