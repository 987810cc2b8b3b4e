"""The config as TransformerLens's tools read it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from transformer_lens import TransformerBridgeConfig

from mechinterp_attn.model.spec import Spec


def common_fields(spec: Spec) -> dict[str, Any]:
    """The fields that a model with MLPs and one of heads only have in common."""
    return dict(
        d_model=spec.d_model,
        d_head=spec.d_head,
        n_heads=spec.n_heads,
        n_layers=spec.n_layers,
        n_ctx=spec.n_ctx,
        d_vocab=spec.d_vocab,
        d_vocab_out=spec.d_vocab_out,
        d_mlp=spec.d_mlp or None,
        act_fn=spec.act_fn or "relu",
        attn_only=spec.attn_only,
        gated_mlp=spec.gated,
        eps=spec.eps,
        final_rms=spec.final_norm == "RMS",
        attention_dir="causal" if spec.causal else "bidirectional",
    )


def transformer_lens_config(
    spec: Spec, provenance: Mapping[str, Any], default_prepend_bos: bool
) -> TransformerBridgeConfig:
    """The folded norms are TransformerLens's LNPre and RMSPre."""
    cfg = TransformerBridgeConfig(
        **common_fields(spec),
        normalization_type=None if spec.norm is None else f"{spec.norm}Pre",
        positional_embedding_type=spec.positions or "none",
        n_key_value_heads=spec.n_kv_heads if spec.n_kv_heads != spec.n_heads else None,
        parallel_attn_mlp=spec.parallel,
        architecture="AttentionOnlyModel",
        model_name=str(provenance.get("name", "unnamed")),
        tokenizer_prepends_bos=False,
        init_weights=False,
    )
    cfg.default_prepend_bos = default_prepend_bos
    return cfg
