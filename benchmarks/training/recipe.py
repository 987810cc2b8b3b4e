"""What is trained: the shapes of the bundled models, and everything else that decides a run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from . import novels as corpus

_COMMON: dict[str, Any] = {
    "n_layers": 2,
    "n_heads": 4,
    "d_model": 128,
    "d_head": 32,
    "d_mlp": None,
    "n_ctx": 128,
    "d_vocab": corpus.D_VOCAB,
    "d_vocab_out": corpus.D_VOCAB,
    "act_fn": None,
    "normalization_type": "LN",
    "eps": 1e-5,
    "positional_embedding_type": "standard",
    "attention_dir": "causal",
    "attn_only": True,
}
_LLAMA: dict[str, Any] = {
    "n_key_value_heads": 2,
    "normalization_type": "RMS",
    "positional_embedding_type": "rotary",
    "rotary_dim": 32,
    "rotary_base": 10000.0,
    "rotary_adjacent_pairs": True,
    "gated_mlp": True,
}


def _mlp(act_fn: str, d_mlp: int = 512) -> dict[str, Any]:
    return {"d_mlp": d_mlp, "act_fn": act_fn, "attn_only": False}


# Where a bundled model differs from `_COMMON`.
ARCHITECTURES: dict[str, dict[str, Any]] = {
    # No norm and no positions: the logits are W_E W_U, row by row, and nothing else.
    "bigram-0l": {"n_layers": 0, "normalization_type": None, "positional_embedding_type": None},
    "attn-1l": {"n_layers": 1},
    "attn-2l": {},
    "relu-1l": {"n_layers": 1} | _mlp("relu"),
    "silu-2l": _mlp("silu"),
    "gelu-2l": _mlp("gelu"),
    # Two thirds of 4 d_model, as Llama: a gated neuron has three vectors instead of two.
    "swiglu-4l": {"n_layers": 4} | _mlp("silu", 344) | _LLAMA,
}
METHOD = {
    "optimizer": "AdamW",
    "schedule": "linear warm-up, then a cosine to zero",
    "precision": "bfloat16 autocast over float32 weights",
    "init": "boot_native, init_mode gpt2: normal, 0.8 / sqrt(d_model)",
}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, besides the shape, the corpus and the tokenizer."""

    tokens: int = 40_000_000
    seed: int = 0
    batch: int = 32
    """Documents of n_ctx tokens in a step."""
    repeated: int = 8
    """How many of them repeat a span, until the circuit has formed for sure."""
    repeated_late: int = 4
    """How many from then on, when it only has to stay and natural text is what is left."""
    late_from: int = 20_000_000
    """Tokens after which that is; the phase change came by 10 M."""
    peak_lr: float = 4e-3
    warmup_tokens: int = 1_000_000
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    """On the weight matrices, not on biases and norms."""
    clip: float = 1.0
    """Largest norm of the gradient."""


def config(name: str) -> dict[str, Any]:
    """The shape of a bundled model, in HookedTransformer's names."""
    return _COMMON | ARCHITECTURES[name]


def recipe(name: str, *, tokens: int = Recipe.tokens, seed: int = Recipe.seed) -> Recipe:
    """How a bundled model is trained.

    A model without layers reads novels only: what follows in repeated random tokens is not in its
    reach, and with them it would no longer estimate the bigrams of English.
    """
    if config(name)["n_layers"] == 0:
        return Recipe(tokens=tokens, seed=seed, repeated=0, repeated_late=0)
    return Recipe(tokens=tokens, seed=seed)


def description(cfg: dict[str, Any]) -> str:
    """A line about a shape, for the table of models."""
    n = cfg["n_layers"]
    parts = [f"{n} layer{'' if n == 1 else 's'}"]
    if n:
        shared = cfg.get("n_key_value_heads")
        parts += [
            f"{cfg['n_heads']} heads of {cfg['d_head']}"
            + (f" ({shared} for keys and values)" if shared else ""),
            "attention only"
            if cfg["attn_only"]
            else f"MLPs of {cfg['d_mlp']} {'gated ' * bool(cfg.get('gated_mlp'))}{cfg['act_fn']}",
        ]
    parts += ["RMS norms and rotary positions"] if cfg["normalization_type"] == "RMS" else []
    parts += [f"d_model {cfg['d_model']}", f"context {cfg['n_ctx']}"]
    return ", ".join(parts) + "; English novels, byte-level BPE"


def data_mix(recipe: Recipe, n_ctx: int) -> str:
    """What a step reads, in words."""
    start = f"{recipe.batch} documents of {n_ctx + 1} tokens in a step"
    if not recipe.repeated:
        return f"{start}, all passages of the novels."
    return (
        f"{start}. {recipe.repeated} of them ({recipe.repeated_late} after {recipe.late_from:,} tokens) "
        f"repeat one span of {corpus.PERIODS[0]} to {corpus.PERIODS[1]} tokens from a random phase: "
        "half of the spans are random tokens, half passages of the novels. The others are passages."
    )
