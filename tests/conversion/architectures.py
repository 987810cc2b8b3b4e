"""A tiny, randomly initialised Hugging Face model of every architecture, and what converting it gives.

One table for the tests and for the page "Supported models": docs/supported.md is written from it.
"""

from __future__ import annotations

from typing import Any

V = 37  # the tokenizer's vocabulary, see families.py
_IDS = dict(vocab_size=V, bos_token_id=1, eos_token_id=2, pad_token_id=0)
_PLAIN = _IDS | dict(
    hidden_size=16, num_hidden_layers=2, num_attention_heads=4, intermediate_size=24,
    max_position_embeddings=64,
)  # fmt: skip
_LLAMA = _PLAIN | dict(num_key_value_heads=2)
_WIDE = _LLAMA | dict(head_dim=8)
_FULL = _LLAMA | dict(num_key_value_heads=4)
_OLD = _IDS | dict(n_embd=16, n_layer=2, n_head=4, n_positions=64)
_EXPERTS = _LLAMA | dict(num_experts_per_tok=2, moe_intermediate_size=8)
_MAMBA = dict(
    mamba_d_state=4, mamba_expand=2, mamba_n_heads=4, mamba_d_head=8, mamba_d_ssm=32, mamba_n_groups=1
)
_LINEAR = dict(
    linear_num_key_heads=2, linear_num_value_heads=2, linear_key_head_dim=4, linear_value_head_dim=4,
    layer_types=["linear_attention", "full_attention"],
)  # fmt: skip
_LATENT = dict(
    num_key_value_heads=4, n_routed_experts=4, kv_lora_rank=4, q_lora_rank=6, qk_rope_head_dim=4,
    qk_nope_head_dim=4, v_head_dim=4,
)  # fmt: skip
_SSM = _IDS | dict(hidden_size=16, num_hidden_layers=2)


def _rope(kind: str, theta: float = 10000.0, **more: Any) -> dict[str, Any]:
    return dict(rope_parameters=dict(rope_type=kind, rope_theta=theta, **more))


def _by_kind(**kinds: Any) -> dict[str, Any]:
    return dict(rope_parameters=kinds)


_SLIDING = dict(sliding_window=5, layer_types=["sliding_attention", "full_attention"])
_YARN = _rope("yarn", factor=4.0, original_max_position_embeddings=16)
_LLAMA3 = _rope(
    "llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=16
)
_LONG = _rope(
    "longrope", short_factor=[1.0, 1.1], long_factor=[2.0, 3.0], original_max_position_embeddings=32
)
_TWO_ROPES = _by_kind(
    sliding_attention=dict(rope_type="default", rope_theta=100.0),
    full_attention=dict(rope_type="linear", rope_theta=10000.0, factor=4.0),
)

# name -> (Hugging Face's class, its config)
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _OLD | dict(n_inner=24)),
    "gpt2_untied": ("GPT2LMHeadModel", _OLD | dict(tie_word_embeddings=False)),
    "gpt2_relu": ("GPT2LMHeadModel", _OLD | dict(activation_function="relu")),
    "gpt2_unscaled": ("GPT2LMHeadModel", _OLD | dict(scale_attn_weights=False)),
    "gpt_neo": (
        "GPTNeoForCausalLM",
        _IDS | dict(hidden_size=16, num_layers=2, num_heads=4, max_position_embeddings=64,
                    attention_types=[[["global", "local"], 1]], window_size=5),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", _PLAIN | dict(rotary_pct=0.5)),
    "gpt_neox_serial": ("GPTNeoXForCausalLM", _PLAIN | dict(use_parallel_residual=False)),
    "gpt_neox_tied": ("GPTNeoXForCausalLM", _PLAIN | dict(rotary_pct=0.5, tie_word_embeddings=True)),
    "gptj": ("GPTJForCausalLM", _OLD | dict(n_head=2, rotary_dim=4)),
    "codegen": ("CodeGenForCausalLM", _OLD | dict(rotary_dim=4, n_embd=32, n_ctx=64)),
    "opt": ("OPTForCausalLM", _PLAIN | dict(ffn_dim=24, word_embed_proj_dim=16)),
    "opt_350m": (
        "OPTForCausalLM", _PLAIN | dict(ffn_dim=24, word_embed_proj_dim=8, do_layer_norm_before=False),
    ),
    "bloom": ("BloomForCausalLM", _IDS | dict(hidden_size=16, n_layer=2, n_head=4)),
    "bloom_six_heads": ("BloomForCausalLM", _IDS | dict(hidden_size=24, n_layer=2, n_head=6)),
    "mpt": ("MptForCausalLM", _IDS | dict(d_model=16, n_layers=2, n_heads=4, max_seq_len=64)),
    "mpt_clipped": (
        "MptForCausalLM",
        _IDS | dict(d_model=16, n_layers=2, n_heads=4, max_seq_len=64, attn_config=dict(clip_qkv=0.5)),
    ),
    "falcon_7b": (
        "FalconForCausalLM",
        _PLAIN | dict(new_decoder_architecture=False, multi_query=True, parallel_attn=True, alibi=False),
    ),
    "falcon_40b": ("FalconForCausalLM", _PLAIN | dict(new_decoder_architecture=True, num_kv_heads=2)),
    "falcon_rw": (
        "FalconForCausalLM",
        _PLAIN | dict(new_decoder_architecture=False, multi_query=False, parallel_attn=False, alibi=True,
                      bias=True),
    ),
    "gpt_bigcode": ("GPTBigCodeForCausalLM", _OLD),
    "gpt_bigcode_mha": ("GPTBigCodeForCausalLM", _OLD | dict(multi_query=False)),
    "openai_gpt": ("OpenAIGPTLMHeadModel", _OLD),
    "xglm": (
        "XGLMForCausalLM",
        _IDS | dict(d_model=16, num_layers=2, attention_heads=4, ffn_dim=24, max_position_embeddings=64),
    ),
    "bert": ("BertForMaskedLM", _PLAIN),
    "bert_lm": ("BertLMHeadModel", _PLAIN | dict(is_decoder=True)),
    "bert_model": ("BertModel", _PLAIN),
    "roberta": ("RobertaForMaskedLM", _PLAIN),
    "modernbert_decoder": ("ModernBertDecoderForCausalLM", _LLAMA | dict(local_attention=6)),
    "llama2": ("LlamaForCausalLM", _FULL),
    "llama3": ("LlamaForCausalLM", _LLAMA | _LLAMA3),
    "llama_biases": ("LlamaForCausalLM", _LLAMA | dict(mlp_bias=True, attention_bias=True)),
    "llama_linear": ("LlamaForCausalLM", _LLAMA | _rope("linear", factor=4.0)),
    "llama_yarn": ("LlamaForCausalLM", _LLAMA | _YARN),
    "llama_dynamic": (
        "LlamaForCausalLM", _LLAMA | dict(max_position_embeddings=32) | _rope("dynamic", factor=4.0),
    ),
    "mistral": ("MistralForCausalLM", _LLAMA | dict(sliding_window=5)),
    "mistral_nemo": ("MistralForCausalLM", _WIDE | dict(sliding_window=None)),
    "ministral3": (
        "Ministral3ForCausalLM",
        _WIDE | _rope("yarn", factor=4.0, original_max_position_embeddings=16, llama_4_scaling_beta=0.3,
                      mscale=1.0, mscale_all_dim=1.0, beta_fast=32.0, beta_slow=1.0),
    ),
    "qwen2": ("Qwen2ForCausalLM", _LLAMA),
    "qwen2_window": (
        "Qwen2ForCausalLM",
        _LLAMA | dict(use_sliding_window=True, sliding_window=5, max_window_layers=1),
    ),
    "qwen3": ("Qwen3ForCausalLM", _WIDE),
    "qwen3_yarn": ("Qwen3ForCausalLM", _WIDE | _YARN),
    "gemma": ("GemmaForCausalLM", _WIDE),
    "gemma2": (
        "Gemma2ForCausalLM",
        _WIDE | _SLIDING | dict(query_pre_attn_scalar=16, attn_logit_softcapping=5.0,
                                final_logit_softcapping=3.0),
    ),
    "gemma3": (
        "Gemma3ForCausalLM", _WIDE | _SLIDING | _TWO_ROPES | dict(query_pre_attn_scalar=16),
    ),
    "gemma3_all_full": (
        "Gemma3ForCausalLM", _WIDE | dict(layer_types=["full_attention"] * 2, query_pre_attn_scalar=16),
    ),
    "vaultgemma": (
        "VaultGemmaForCausalLM", _WIDE | _SLIDING | dict(query_pre_attn_scalar=16),
    ),
    "gemma4_text": (
        "Gemma4ForCausalLM", _WIDE | _SLIDING | dict(global_head_dim=8, vocab_size_per_layer_input=V)),
    "olmo": ("OlmoForCausalLM", _LLAMA),
    "olmo_clipped": ("OlmoForCausalLM", _LLAMA | dict(clip_qkv=0.5)),
    "olmo2": ("Olmo2ForCausalLM", _LLAMA),
    "olmo3": ("Olmo3ForCausalLM", _LLAMA | _SLIDING),
    "olmo3_yarn": ("Olmo3ForCausalLM", _LLAMA | _SLIDING | _YARN),
    "phi": ("PhiForCausalLM", _LLAMA | dict(partial_rotary_factor=0.5)),
    "phi_qk_norm": ("PhiForCausalLM", _LLAMA | dict(partial_rotary_factor=0.5, qk_layernorm=True)),
    "phi3": ("Phi3ForCausalLM", _LLAMA | dict(sliding_window=5)),
    "phi3_long": (
        "Phi3ForCausalLM", _LLAMA | dict(original_max_position_embeddings=32) | _LONG,
    ),
    "phi4_mini": (
        "Phi3ForCausalLM",
        _LLAMA | dict(hidden_size=32, original_max_position_embeddings=32, tie_word_embeddings=True)
        | _rope("longrope", short_factor=[1.0, 1.1, 1.2], long_factor=[2.0, 3.0, 3.5],
                original_max_position_embeddings=32, partial_rotary_factor=0.75),
    ),
    "smollm3": ("SmolLM3ForCausalLM", _LLAMA | dict(no_rope_layers=[1, 0])),
    "stablelm": ("StableLmForCausalLM", _LLAMA | dict(partial_rotary_factor=0.5)),
    "stablelm2": ("StableLmForCausalLM", _LLAMA | dict(partial_rotary_factor=0.5, use_qkv_bias=True)),
    "stablelm_12b": (
        "StableLmForCausalLM",
        _LLAMA | dict(partial_rotary_factor=0.5, qk_layernorm=True, use_parallel_residual=True),
    ),
    "stablelm_qk_norm": (
        "StableLmForCausalLM", _LLAMA | dict(partial_rotary_factor=0.5, qk_layernorm=True),
    ),
    "starcoder2": ("Starcoder2ForCausalLM", _LLAMA | dict(sliding_window=5)),
    "granite": (
        "GraniteForCausalLM",
        _LLAMA | dict(embedding_multiplier=6.0, attention_multiplier=0.3, residual_multiplier=0.4,
                      logits_scaling=4.0),
    ),
    "cohere": ("CohereForCausalLM", _LLAMA | dict(logit_scale=0.25)),
    "cohere_qk_norm": ("CohereForCausalLM", _LLAMA | dict(logit_scale=0.25, use_qk_norm=True)),
    "cohere2": ("Cohere2ForCausalLM", _LLAMA | _SLIDING | dict(logit_scale=0.25)),
    "glm": ("GlmForCausalLM", _WIDE | dict(partial_rotary_factor=0.5)),
    "glm4": ("Glm4ForCausalLM", _WIDE | dict(partial_rotary_factor=0.5)),
    "nemotron": ("NemotronForCausalLM", _WIDE | dict(partial_rotary_factor=0.5)),
    "seed_oss": ("SeedOssForCausalLM", _WIDE),
    "arcee": ("ArceeForCausalLM", _LLAMA),
    "apertus": ("ApertusForCausalLM", _LLAMA),
    "ernie4_5": ("Ernie4_5ForCausalLM", _WIDE),
    "exaone4": ("Exaone4ForCausalLM", _WIDE | _SLIDING | dict(sliding_window_pattern=2)),
    "hunyuan_dense": ("HunYuanDenseV1ForCausalLM", _WIDE),
    "jais2": ("Jais2ForCausalLM", _LLAMA),
    "nanochat": ("NanoChatForCausalLM", _LLAMA),
    "bitnet": ("BitNetForCausalLM", _LLAMA),
    "youtu": (
        "YoutuForCausalLM",
        _LLAMA | dict(num_key_value_heads=4, kv_lora_rank=4, q_lora_rank=6, qk_rope_head_dim=4,
                      qk_nope_head_dim=4, v_head_dim=4),
    ),
    "hrm_text": ("HrmTextForCausalLM", _LLAMA),
    "mixtral": ("MixtralForCausalLM", _LLAMA | dict(num_local_experts=4)),
    "qwen2_moe": (
        "Qwen2MoeForCausalLM", _EXPERTS | dict(num_experts=4, shared_expert_intermediate_size=12)),
    "qwen3_moe": ("Qwen3MoeForCausalLM", _EXPERTS | dict(num_experts=4, head_dim=8)),
    "olmoe": ("OlmoeForCausalLM", _EXPERTS | dict(num_experts=4)),
    "flex_olmo": ("FlexOlmoForCausalLM", _EXPERTS | dict(num_experts=4)),
    "gpt_oss": ("GptOssForCausalLM", _WIDE | _SLIDING | dict(num_local_experts=4, num_experts_per_tok=2)),
    "phimoe": ("PhimoeForCausalLM", _LLAMA | dict(num_local_experts=4)),
    "deepseek_v2": (
        "DeepseekV2ForCausalLM",
        _EXPERTS | dict(num_key_value_heads=4, n_routed_experts=4, kv_lora_rank=4, q_lora_rank=6,
                        qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4),
    ),
    "deepseek_v3": (
        "DeepseekV3ForCausalLM",
        _EXPERTS | dict(num_key_value_heads=4, n_routed_experts=4, n_group=2, topk_group=1, kv_lora_rank=4,
                        q_lora_rank=6, qk_rope_head_dim=4, qk_nope_head_dim=4, v_head_dim=4),
    ),
    "granite_moe": ("GraniteMoeForCausalLM", _LLAMA | dict(num_local_experts=4, num_experts_per_tok=2)),
    "ernie4_5_moe": ("Ernie4_5_MoeForCausalLM", _EXPERTS | dict(moe_num_experts=4, moe_k=2)),
    "glm4_moe": ("Glm4MoeForCausalLM", _EXPERTS | dict(n_routed_experts=4, n_group=2, topk_group=1)),
    "jetmoe": ("JetMoeForCausalLM", _IDS | dict(hidden_size=16, num_hidden_layers=2, num_key_value_heads=2,
                                                kv_channels=4, intermediate_size=24, num_local_experts=4)),
    "minimax_m2": ("MiniMaxM2ForCausalLM", _WIDE | dict(num_local_experts=4, num_experts_per_tok=2)),
    "llama4_text": (
        "Llama4ForCausalLM", _WIDE | dict(num_local_experts=4, intermediate_size_mlp=24),
    ),
    "lfm2": ("Lfm2ForCausalLM", _LLAMA | dict(layer_types=["conv", "full_attention"])),
    "mamba": ("MambaForCausalLM", _SSM),
    "mamba2": ("Mamba2ForCausalLM", _SSM | dict(num_heads=4, head_dim=8, n_groups=1)),
    "rwkv": ("RwkvForCausalLM", _SSM | dict(attention_hidden_size=16)),
    "recurrent_gemma": ("RecurrentGemmaForCausalLM", _LLAMA | dict(num_hidden_layers=3)),
    "jamba": ("JambaForCausalLM", _LLAMA | dict(use_mamba_kernels=False)),
    "afmoe": ("AfmoeForCausalLM", _EXPERTS | dict(num_experts=4, head_dim=8)),
    "bamba": ("BambaForCausalLM", _LLAMA | _MAMBA),
    "falcon_h1": ("FalconH1ForCausalLM", _LLAMA | _MAMBA),
    "falcon_mamba": ("FalconMambaForCausalLM", _SSM),
    "glm4_moe_lite": ("Glm4MoeLiteForCausalLM", _EXPERTS | _LATENT | dict(n_group=2, topk_group=1)),
    "glm_moe_dsa": (
        "GlmMoeDsaForCausalLM",
        _EXPERTS | _LATENT | dict(n_group=2, topk_group=1, index_n_heads=2, index_head_dim=8, index_topk=4),
    ),
    "granite_moe_hybrid": (
        "GraniteMoeHybridForCausalLM",
        _LLAMA | _MAMBA | dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=12,
                               layer_types=["mamba", "attention"]),
    ),
    "laguna": ("LagunaForCausalLM", _EXPERTS | dict(num_experts=4)),
    "lfm2_moe": (
        "Lfm2MoeForCausalLM", _EXPERTS | dict(num_experts=4, layer_types=["conv", "full_attention"])),
    "nemotron_h": (
        "NemotronHForCausalLM", _LLAMA | _MAMBA | dict(layers_block_type=["mamba", "attention"])),
    "olmo_hybrid": ("OlmoHybridForCausalLM", _LLAMA | _LINEAR),
    "qwen3_next": (
        "Qwen3NextForCausalLM",
        _EXPERTS | _LINEAR | dict(num_experts=4, head_dim=8, shared_expert_intermediate_size=12),
    ),
    "qwen3_5": ("Qwen3_5ForCausalLM", _WIDE | _LINEAR),
    "qwen3_5_moe": (
        "Qwen3_5MoeForCausalLM",
        _EXPERTS | _LINEAR | dict(num_experts=4, head_dim=8, shared_expert_intermediate_size=12),
    ),
    "zamba2": (
        "Zamba2ForCausalLM",
        _LLAMA | dict(layers_block_type=["mamba", "hybrid"], mamba_ngroups=1, n_mamba_heads=2,
                      mamba_d_state=4, mamba_headdim=16),
    ),
    "t5": (
        "T5ForConditionalGeneration", _IDS | dict(d_model=16, d_kv=4, d_ff=24, num_layers=2, num_heads=4)),
    "bart": (
        "BartForConditionalGeneration",
        _IDS | dict(d_model=16, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
                    decoder_attention_heads=4, encoder_ffn_dim=24, decoder_ffn_dim=24),
    ),
}  # fmt: skip

_MOE = "a mixture of experts whose router or experts are of a kind of their own"
_MLA = "keys and values read through a narrower latent (MLA)"
_NO_BOOT = "TransformerLens 4.3.0 does not boot this kind of "
_NO_ATTENTION = "blocks without attention (state-space or convolution), such as block 0"
_TWO_STACKS = "an encoder and a decoder with cross-attention"

# Every case that is not exact, with each of its reasons.
REFUSED: dict[str, list[str]] = {
    "falcon_40b": [_NO_BOOT],
    "gpt_bigcode_mha": [_NO_BOOT],
    "bert_model": [_NO_BOOT],
    "phi_qk_norm": [_NO_BOOT],
    "phimoe": [_NO_BOOT],
    "modernbert_decoder": ["a norm in front of the prediction head"],
    "gemma4_text": ["rotary positions of type 'proportional'", "an embedding of its own for every layer"],
    "apertus": ["activation 'xielu'"],
    "bitnet": ["norms between the heads and the weights behind them (sub-norms)"],
    "youtu": [_MLA],
    "hrm_text": ["no row of blocks that read one stream one after the other"],
    "deepseek_v2": [_MOE, _MLA],
    "deepseek_v3": [_MOE, _MLA],
    **{
        name: [_MOE]
        for name in (
            "gpt_oss",
            "ernie4_5_moe", "glm4_moe", "jetmoe", "minimax_m2", "llama4_text",
        )
    },
    **{
        name: [_NO_ATTENTION]
        for name in (
            "lfm2", "mamba", "mamba2", "rwkv", "recurrent_gemma", "bamba", "falcon_mamba", "olmo_hybrid",
            "qwen3_5", "zamba2",
        )
    },
    **{
        name: [_NO_ATTENTION, _MOE]
        for name in ("jamba", "granite_moe_hybrid", "lfm2_moe", "nemotron_h", "qwen3_next", "qwen3_5_moe")
    },
    **{name: [_MOE] for name in ("afmoe", "glm_moe_dsa", "laguna")},
    "glm4_moe_lite": [_MOE, _MLA],
    "falcon_h1": ["a state-space layer beside the attention"],
    "t5": [_TWO_STACKS],
    "bart": [_TWO_STACKS],
}  # fmt: skip
# Hugging Face's fused attention leaves out their soft caps.
_EAGER = ("gemma2",)
EXACT = [name for name in CASES if name not in REFUSED]


def build(name: str, dtype: Any) -> Any:
    """The Hugging Face model itself, no gain of it one and no bias zero."""
    import torch
    import transformers

    from tests.conftest import jitter

    kind, options = CASES[name]
    architecture = getattr(transformers, kind)
    torch.manual_seed(0)
    config = architecture.config_class(**options)
    if name in _EAGER:
        config._attn_implementation = "eager"
    hf = architecture(config).to(dtype).eval()
    hf.config.architectures = [kind]
    jitter(hf, seed=1, noise=0.2)
    return hf
