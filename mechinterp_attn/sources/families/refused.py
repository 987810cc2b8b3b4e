"""What cannot be converted, found on the components themselves: every reason, and none twice."""

from __future__ import annotations

from typing import Any

from mechinterp_attn.sources.families.experts import unfit_experts
from mechinterp_attn.sources.families.rotary import BY_LENGTH, PLAIN
from mechinterp_attn.sources.families.table import family_of

_POSITIONS = ("standard", "rotary", "alibi", None, "none")
# Attention that is no softmax over scores of a query with keys, or whose keys are not read from the stream.
_ATTENTION = {
    "MLA": "keys and values read through a narrower latent (MLA)",
    "Delta": "linear attention (delta rule)",
    "SSM": "a state-space layer",
    "Sparse": "sparse attention",
}


def refused_parts(bridge: Any, hf: Any) -> list[str]:
    """Every part that this package cannot convert; empty where there is none."""
    if getattr(hf, "is_encoder_decoder", False):
        return ["an encoder and a decoder with cross-attention"]
    if not hasattr(bridge, "blocks"):
        return ["no row of blocks that read one stream one after the other"]
    blocks = list(bridge.blocks)
    reasons = []
    positions = getattr(bridge.cfg, "positional_embedding_type", None)
    if positions not in _POSITIONS:
        reasons.append(f"{positions} positions")
    if without := [i for i, b in enumerate(blocks) if not hasattr(b, "attn")]:
        reasons.append(f"blocks without attention (state-space or convolution), such as block {without[0]}")
    family = family_of(str(getattr(bridge.cfg, "architecture", "")))
    if experts := unfit_experts(blocks, hf, family):
        reasons.append(experts)
    elif lacking := [i for i, b in enumerate(blocks) if hasattr(b, "attn") and not hasattr(b, "mlp")]:
        reasons.append(f"blocks without an MLP, such as block {lacking[0]}")
    kinds = sorted({type(b.attn).__name__ for b in blocks if hasattr(b, "attn")})
    reasons += [what for word, what in _ATTENTION.items() if any(word in kind for kind in kinds)]
    return reasons + _rotary(bridge, hf) + _extra(bridge, hf, blocks)


def _rotary(bridge: Any, hf: Any) -> list[str]:
    rope = getattr(hf, "rope_parameters", None) or {}
    types = [rope.get("rope_type")] + [p.get("rope_type") for p in rope.values() if isinstance(p, dict)]
    unknown = sorted({str(t) for t in types if t not in (*PLAIN, *BY_LENGTH)})
    reasons = [f"rotary positions of type {kind!r}" for kind in unknown]
    widths = set()
    for module in bridge.original_model.modules():
        for name, table in module.named_buffers(recurse=False):
            if name.endswith("inv_freq") and "original" not in name:
                widths.add(len(table))
    return reasons + (["rotary tables of different widths"] if len(widths) > 1 else [])


def _extra(bridge: Any, hf: Any, blocks: list[Any]) -> list[str]:
    """Parts that some families add to an ordinary block."""
    reasons = []
    if hasattr(bridge, "prediction_head"):
        reasons.append("a norm in front of the prediction head")
    if getattr(hf, "num_kv_shared_layers", 0):
        reasons.append("layers that share the keys and values of earlier ones")
    if getattr(hf, "hidden_size_per_layer_input", 0):
        reasons.append("an embedding of its own for every layer")
    names = {name.split(".")[-1] for b in blocks[:1] for name, _ in b.named_modules()}
    if "mamba" in names and hasattr(blocks[0], "attn"):
        reasons.append("a state-space layer beside the attention")
    if names & {"attn_sub_norm", "ffn_sub_norm"}:
        reasons.append("norms between the heads and the weights behind them (sub-norms)")
    return reasons
