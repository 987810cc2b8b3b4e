"""Tiny, randomly initialised Hugging Face models of every family, with nothing trivial in them."""

from __future__ import annotations

import copy
import functools
import tempfile
from typing import Any

import torch

from tests.conftest import jitter

VOCAB = 37
_FOLDER = tempfile.TemporaryDirectory()  # booting reads the tokenizer again from where it was saved
_SHAPE = dict(
    vocab_size=VOCAB, hidden_size=16, num_hidden_layers=3, num_attention_heads=4, intermediate_size=24,
    max_position_embeddings=32,
)  # fmt: skip
_GPT = dict(vocab_size=VOCAB, n_embd=16, n_layer=2, n_positions=32)
_LLAMA3 = dict(
    rope_type="llama3", rope_theta=10000.0, factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=16,
)  # fmt: skip
_NO_IDS = dict(bos_token_id=1, eos_token_id=2, pad_token_id=0)

# name -> (model class, config class, config)
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", "GPT2Config", dict(**_GPT, n_head=4, n_inner=24)),
    "gpt2_by_layer": (
        "GPT2LMHeadModel", "GPT2Config", dict(**_GPT, n_head=4, scale_attn_by_inverse_layer_idx=True),
    ),
    "gpt_neo": (
        "GPTNeoForCausalLM", "GPTNeoConfig",
        dict(vocab_size=VOCAB, hidden_size=16, num_layers=2, num_heads=4, max_position_embeddings=32,
             intermediate_size=24, attention_types=[[["global", "local"], 1]], window_size=4),
    ),
    "gpt_neox": ("GPTNeoXForCausalLM", "GPTNeoXConfig", dict(**_SHAPE, rotary_pct=0.5)),
    "gpt_neox_serial": (
        "GPTNeoXForCausalLM", "GPTNeoXConfig",
        dict(**_SHAPE, rotary_pct=1.0, use_parallel_residual=False),
    ),
    "gptj": ("GPTJForCausalLM", "GPTJConfig", dict(**_GPT, n_head=2, rotary_dim=4, n_inner=24)),
    "opt": (
        "OPTForCausalLM", "OPTConfig",
        dict(vocab_size=VOCAB, hidden_size=16, num_hidden_layers=2, num_attention_heads=4, ffn_dim=24,
             max_position_embeddings=32, word_embed_proj_dim=16),
    ),
    "llama": ("LlamaForCausalLM", "LlamaConfig", dict(**_SHAPE, num_key_value_heads=2)),
    "llama3": (
        "LlamaForCausalLM", "LlamaConfig",
        dict(**_SHAPE, num_key_value_heads=2, mlp_bias=True, attention_bias=True, rope_parameters=_LLAMA3),
    ),
    "mistral": (
        "MistralForCausalLM", "MistralConfig", dict(**_SHAPE, num_key_value_heads=2, sliding_window=5),
    ),
    "qwen2": ("Qwen2ForCausalLM", "Qwen2Config", dict(**_SHAPE, num_key_value_heads=2)),
    "qwen3": ("Qwen3ForCausalLM", "Qwen3Config", dict(**_SHAPE, num_key_value_heads=2, head_dim=8)),
    "gemma": ("GemmaForCausalLM", "GemmaConfig", dict(**_SHAPE, num_key_value_heads=1, head_dim=8)),
    "gemma2": (
        "Gemma2ForCausalLM", "Gemma2Config",
        dict(**_SHAPE, num_key_value_heads=2, head_dim=8, sliding_window=5, query_pre_attn_scalar=16,
             attn_logit_softcapping=5.0, final_logit_softcapping=3.0),
    ),
    "phi": ("PhiForCausalLM", "PhiConfig", dict(**_SHAPE, partial_rotary_factor=0.5)),
    "bert": ("BertForMaskedLM", "BertConfig", dict(**_SHAPE)),
}  # fmt: skip
# Families all of whose arithmetic follows the model's dtype; the others take norms or softmaxes in
# float32 even in a float64 model.
FLOAT64 = ("gpt2", "gpt2_by_layer", "gpt_neox", "gpt_neox_serial", "opt", "phi", "bert")


@functools.cache
def hugging_face(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """The Hugging Face model itself: nobody may change it."""
    import transformers

    model, config, options = FAMILIES[family]
    torch.manual_seed(0)
    cfg = getattr(transformers, config)(**(_NO_IDS | options))
    hf = getattr(transformers, model)(cfg).to(dtype).eval()
    hf.config.architectures = [model]
    jitter(hf, seed=1, noise=0.2)
    return hf


def bridge_of(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A TransformerBridge of its own around a copy of the model."""
    return boot(copy.deepcopy(hugging_face(family, dtype)), dtype)


def boot(hf: Any, dtype: torch.dtype) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(
        f"tiny-{hf.config.model_type}", hf_model=hf, tokenizer=tokenizer(), device="cpu", dtype=dtype
    )


@functools.cache
def tokenizer() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"w{i}": i for i in range(VOCAB)}, unk_token="w0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="w1", eos_token="w2", pad_token="w0", unk_token="w0"
    ).save_pretrained(_FOLDER.name)
    return AutoTokenizer.from_pretrained(_FOLDER.name)


def some_tokens(batch: int = 2, pos: int = 12, seed: int = 3) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, pos), generator=torch.Generator().manual_seed(seed))
