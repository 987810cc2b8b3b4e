"""What a family's modules do not say of themselves, one line a family."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """Facts about all models whose architecture begins with a name.

    Attributes:
        float64: everything is computed in the model's own dtype, also in float64.
        adjacent: rotary pairs are neighbours, (0, 1), (2, 3), ...; others pair the two halves.
        turns_back: rotary pairs turn the other way.
        turns_windows_only: layers without a window do not turn queries and keys, in models with windows.
        qk_norm_last: queries and keys are normed after they are turned.
        unscaled: attention scores are not divided by anything.
        norms_stream: the norms are taken of the whole stream behind each sublayer.
        embed_norm: a norm without parameters behind the embedding: "LN" or "RMS".
        act_fn: the activation, where the config's name for it means another one.
        experts: its mixture of experts is a softmax over a router's scores, of which some are chosen.
        router_renormed: the chosen ones' weights are divided by their sum, whatever the config says.
        alibi_bfloat16: see ``Spec``.
        times_embedding, times_residual, times_logits, over_logits: the config's fields that the embedding,
            what sublayers write, and the logits are multiplied with or divided by.
    """

    float64: bool = False
    adjacent: bool = False
    turns_back: bool = False
    turns_windows_only: bool = False
    qk_norm_last: bool = False
    unscaled: bool = False
    norms_stream: bool = False
    embed_norm: str | None = None
    act_fn: str | None = None
    experts: bool = False
    router_renormed: bool = False
    alibi_bfloat16: bool = False
    times_embedding: str | None = None
    times_residual: str | None = None
    times_logits: str | None = None
    over_logits: str | None = None


_FAMILIES = {
    "Bert": Family(float64=True, norms_stream=True),
    "Bloom": Family(act_fn="gelu_new"),
    "CodeGen": Family(adjacent=True),
    "Cohere": Family(adjacent=True, times_logits="logit_scale"),
    "Cohere2": Family(adjacent=True, times_logits="logit_scale", turns_windows_only=True),
    "Ernie4_5": Family(adjacent=True),
    "Exaone4": Family(turns_windows_only=True),
    "Falcon": Family(alibi_bfloat16=True, act_fn="gelu"),
    "GPT2": Family(float64=True),
    "GPTJ": Family(adjacent=True),
    "GPTNeoFor": Family(unscaled=True),
    "GPTNeoX": Family(float64=True),
    "Glm": Family(adjacent=True),
    "Granite": Family(
        times_embedding="embedding_multiplier",
        times_residual="residual_multiplier",
        over_logits="logits_scaling",
    ),
    "GraniteMoeFor": Family(
        experts=True,
        router_renormed=True,
        times_embedding="embedding_multiplier",
        times_residual="residual_multiplier",
        over_logits="logits_scaling",
    ),
    "HunYuan": Family(qk_norm_last=True),
    "FlexOlmo": Family(experts=True),
    "Mixtral": Family(experts=True, router_renormed=True),
    "Olmoe": Family(experts=True),
    "Qwen2Moe": Family(experts=True),
    "Qwen3MoeFor": Family(experts=True),
    "MPT": Family(act_fn="gelu"),
    "Mpt": Family(act_fn="gelu"),
    "NanoChat": Family(turns_back=True, qk_norm_last=True, embed_norm="RMS"),
    "OpenAIGPT": Family(float64=True, norms_stream=True, act_fn="gelu_new"),
    "Roberta": Family(float64=True, norms_stream=True),
}


def family_of(architecture: str) -> Family:
    """The facts of the longest name that an architecture begins with."""
    names = [name for name in _FAMILIES if architecture.startswith(name)]
    return _FAMILIES[max(names, key=len)] if names else Family()
