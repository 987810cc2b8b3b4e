"""The door for Hugging Face models, wrapped in a TransformerBridge.

Weights are taken from the bridge's components, rules from the wrapped modules themselves: the
bridge's config is not right for every family (GPT-Neo's scale, OPT's width, rotary widths, ...).
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from mechinterp_attn.core.errors import CheckpointError, MechInterpError
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.sources.foreign import check_folder, check_size, unfit
from mechinterp_attn.sources.tokenizer import give_tokenizer

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# Families whose rotary pairs are neighbours; all others pair the two halves.
_ADJACENT = ("GPTJ", "CodeGen", "Cohere", "Glm")
# Families that compute parts in float32 even when they run in float64, besides all with RMS norms.
_FLOAT64 = ("GPT2", "GPTNeoX", "Bert")
_TOKENIZERS = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
_ROPE_TYPES = ("default", "linear", "llama3", "yarn", None)


def config_of(bridge: TransformerBridge) -> dict[str, Any]:
    """HookedTransformer's config names for a bridge's wrapped model; ``unsupported`` lists every
    reason against it, empty where there is none.
    """
    cfg = {name: value for name, value in vars(bridge.cfg).items() if not name.startswith("_")}
    model, hf = bridge.original_model, bridge.original_model.config
    unsupported = _unsupported_parts(bridge, hf)
    if unsupported:
        return cfg | {"unsupported": unsupported, "use_qk_norm": False}
    block = bridge.blocks[0]
    attention = [b.attn.original_component for b in bridge.blocks]
    norm = _norm_kind(getattr(block, "ln1", None))
    posts = hasattr(block, "ln1_post")
    is_bert = hasattr(bridge, "embed_ln") and cfg.get("attention_dir") == "bidirectional"
    qk_norm = getattr(block.attn, "q_norm", None)
    ln_final = getattr(bridge, "ln_final", None)
    final = _norm_kind(ln_final)
    architecture = str(cfg.get("architecture"))
    cfg |= {
        "d_mlp": block.mlp.W_in.shape[-1],
        "gated_mlp": getattr(block.mlp, "W_gate", None) is not None,
        "parallel_attn_mlp": type(block).__name__ == "ParallelBlockBridge",
        "normalization_type": norm,
        "stream_norm": norm if is_bert else None,
        "embed_norm": _norm_kind(getattr(bridge, "embed_ln", None)),
        "final_norm": final is not None,
        "final_rms": final == "RMS",
        "prediction_head": hasattr(bridge, "mlm_head"),
        "use_normalization_before_and_after": posts,
        "qk_norm": _norm_kind(qk_norm),
        "eps": _eps(block.ln1),
        "d_vocab": bridge.embed.W_E.shape[0],
        "windows": _windows(hf, attention, cfg["n_layers"]),
        "attn_scores_soft_cap": getattr(hf, "attn_logit_softcapping", None),
        "output_logits_soft_cap": getattr(hf, "final_logit_softcapping", None),
        "float32_inside": not architecture.startswith(_FLOAT64),
        "d_vocab_out": bridge.unembed.W_U.shape[-1],
        "use_local_attn": False,
        "use_NTK_by_parts_rope": False,
    }
    cfg |= _scale(attention, cfg["d_head"], architecture)
    if cfg["positional_embedding_type"] == "rotary":
        cfg |= _rotary(model, hf, architecture)
    return cfg


def _unsupported_parts(bridge: TransformerBridge, hf: Any) -> list[str]:
    """What this package cannot convert, found on the components themselves."""
    reasons = []
    if getattr(hf, "is_encoder_decoder", False):
        reasons.append("an encoder and a decoder with cross-attention")
    if not hasattr(bridge, "blocks"):
        return [*reasons, "no stack of blocks that TransformerLens knows"]
    positions = getattr(bridge.cfg, "positional_embedding_type", None)
    if positions not in ("standard", "rotary", None, "none"):
        reasons.append(f"{positions} positions")
    no_attention = [i for i, b in enumerate(bridge.blocks) if not hasattr(b, "attn")]
    if no_attention:
        kind = type(bridge.blocks[no_attention[0]]).__name__
        reasons.append(f"blocks without attention, such as block {no_attention[0]} ({kind})")
    experts = [i for i, b in enumerate(bridge.blocks) if "MoE" in type(getattr(b, "mlp", None)).__name__]
    if experts or getattr(hf, "num_local_experts", None) or getattr(hf, "num_experts", None):
        reasons.append("a mixture of experts")
    kinds = {type(b.attn).__name__ for b in bridge.blocks if hasattr(b, "attn")}
    for kind in sorted(kinds):
        if any(word in kind for word in ("MLA", "Delta", "ALiBi", "Alibi", "SSM", "Bloom")):
            reasons.append(f"attention of kind {kind}")
    for i, block in enumerate(bridge.blocks):
        attn = getattr(block, "attn", None)
        for name in ("sinks", "sink"):
            if hasattr(getattr(attn, "original_component", None), name):
                reasons.append(f"attention sinks (block {i})")
                break
        else:
            continue
        break
    rope = getattr(hf, "rope_parameters", None) or {}
    if isinstance(rope, dict) and rope.get("rope_type") not in _ROPE_TYPES:
        reasons.append(f"rotary positions of type {rope.get('rope_type')!r}, which depend on the length")
    tables = {k for m in bridge.original_model.modules() for k in dict(m.named_buffers(recurse=False))}
    if sum(name.endswith("inv_freq") and "original" not in name for name in tables) > 1:
        reasons.append("several rotary tables, one for each kind of layer")
    attn = getattr(bridge.blocks[0], "attn", None)
    q_norm = getattr(attn, "q_norm", None) or getattr(attn, "q_layernorm", None)
    if q_norm is not None:
        width, per_head = q_norm.original_component.weight.numel(), bridge.cfg.d_head
        if width != per_head:
            reasons.append(f"a norm over the queries of all heads together ({width} wide)")
        if getattr(q_norm.original_component, "bias", None) is not None:
            reasons.append("a norm on queries and keys that has a bias")
    elif getattr(hf, "qk_layernorm", False):
        reasons.append("a LayerNorm on queries and keys")
    blocks = list(bridge.blocks)
    if not no_attention and not experts:
        without = [i for i, b in enumerate(blocks) if not hasattr(b, "mlp")]
        if without:
            reasons.append(f"blocks without an MLP, such as block {without[0]}")
    return reasons


def tensors_of(bridge: TransformerBridge, cfg: dict[str, Any]) -> dict[str, Tensor]:
    """The wrapped model's weights under HookedTransformer's names; views wherever possible."""
    scale = getattr(bridge.embed.original_component, "embed_scale", None)
    W_E = bridge.embed.W_E
    if scale is not None and float(scale) != 1.0:
        W_E = W_E * torch.as_tensor(scale, dtype=W_E.dtype, device=W_E.device)
    out = {"embed.W_E": W_E, "unembed.W_U": bridge.unembed.W_U, "unembed.b_U": bridge.unembed.b_U}
    if cfg["positional_embedding_type"] == "standard":
        W_pos = bridge.W_pos
        types = getattr(bridge, "token_type_embed", None)
        if types is not None:  # every token is of type 0
            W_pos = W_pos + types.W_E[0]
        out["pos_embed.W_pos"] = W_pos[: cfg["n_ctx"]]
    if cfg["prediction_head"]:
        dense = bridge.mlm_head.original_component
        out |= {"prediction.W": dense.weight.T, "prediction.b": dense.bias}
    out |= _norm_weights(bridge, "embed_ln", "embed_norm") | _norm_weights(bridge, "ln_final", "ln_final")
    for layer, block in enumerate(bridge.blocks):
        at = f"blocks.{layer}"
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O"):
            out |= _weight(block.attn, name, f"{at}.attn")
        for name in ("W_in", "W_gate", "W_out", "b_in", "b_gate", "b_out"):
            out |= _weight(block.mlp, name, f"{at}.mlp")
        for name in ("ln1", "ln2", "ln1_post", "ln2_post"):
            out |= _norm_weights(block, name, f"{at}.{name}")
        for name in ("q_norm", "k_norm"):
            out |= _norm_weights(block.attn, name, f"{at}.attn.{name}")
    return out


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


def _windows(hf: Any, attention: list[Any], n_layers: int) -> list[int | None]:
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


def _scale(attention: list[Any], d_head: int, architecture: str) -> dict[str, Any]:
    """What scores are divided by."""
    if architecture.startswith("GPTNeoFor"):
        scales = [1.0] * len(attention)
    else:
        scales = []
        for module in attention:
            module = getattr(module, "self", module)  # BERT
            if getattr(module, "scaling", None):
                scales.append(1 / float(module.scaling))
            else:
                scales.append(float(getattr(module, "scale_attn", math.sqrt(d_head))))
    by_layer = len(scales) > 1 and all(
        math.isclose(s, scales[0] * (layer + 1)) for layer, s in enumerate(scales)
    )
    if not by_layer and any(not math.isclose(s, scales[0]) for s in scales):
        return {"unsupported": ["attention scores scaled differently in each layer"]}
    return {"use_attn_scale": True, "attn_scale": scales[0], "scale_attn_by_inverse_layer_idx": by_layer}


def _rotary(model: Any, hf: Any, architecture: str) -> dict[str, Any]:
    """Rotary rules, from the wrapped model's own table of frequencies where it has one."""
    adjacent = architecture.startswith(_ADJACENT)
    for module in model.modules():
        frequencies = getattr(module, "inv_freq", None)
        if isinstance(frequencies, Tensor):
            return {
                "rotary_dim": 2 * len(frequencies),
                "rotary_frequencies": tuple(frequencies.float().tolist()),
                "rotary_factor": float(getattr(module, "attention_scaling", 1.0)),
                "rotary_adjacent_pairs": adjacent,
            }
    return {"rotary_dim": getattr(hf, "rotary_dim", None), "rotary_adjacent_pairs": adjacent}


def boot(
    source: str | Path, dtype: torch.dtype | None = None, revision: str | None = None
) -> TransformerBridge:
    """A Hugging Face folder, ``.gguf`` file or hub id as a TransformerBridge in eval mode on the CPU.

    Args:
        dtype: of the weights; as stored by default, half precisions widened to float32. Quantized
            weights of a GGUF file become numbers of this dtype.
        revision: of a hub id: a branch, a tag or a commit.

    Raises:
        MechInterpError: it cannot be fetched or read, or TransformerLens has no adapter for it.
        CheckpointError: a folder asks for more than it holds, or its tokenizer is damaged.
    """
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForMaskedLM

    name = str(source)
    at: dict[str, Any] = {"revision": revision} if revision else {}
    place = name
    if is_gguf := name.endswith(".gguf"):
        _need_gguf(name)
        place, at = str(Path(name).parent), {"gguf_file": Path(name).name}
    elif Path(name).is_dir():
        check_folder(Path(name))
    at |= {"trust_remote_code": False}  # without it, users are asked whether to run a folder's code
    with _said(f"{name!r} cannot be read as a Hugging Face model"):
        config = AutoConfig.from_pretrained(place, **at)
        config.transformers_weights = config.fusion_config = (
            None  # no file and no code of a config's choice
        )
        if is_gguf:
            check_size(Path(name), config)
        kind = (getattr(config, "architectures", None) or [""])[0]
        loader = (
            AutoModelForMaskedLM
            if kind.endswith(("ForMaskedLM", "ForPreTraining"))
            else AutoModelForCausalLM
            if is_gguf or kind.endswith(("ForCausalLM", "LMHeadModel"))
            else AutoModel
        )
        stored = getattr(config, "dtype", None) or torch.float32
        wide = torch.float32 if stored in (torch.float16, torch.bfloat16) else stored
        options = at | {"dtype": dtype or wide, "attn_implementation": "eager"}
        options |= {} if is_gguf else {"use_safetensors": True}
        with _our_bars():
            model, loaded = loader.from_pretrained(
                place, config=config, output_loading_info=True, **options
            )
    if reasons := unfit(loaded, getattr(config, "num_hidden_layers", 0)):
        raise CheckpointError(name, reasons)
    model.eval()
    tokenizer = _tokenizer(Path(name), place, at)
    with (
        _said(f"TransformerLens has no bridge for {name!r} ({kind})"),
        some_tokenizer(copy.deepcopy(tokenizer), config.vocab_size) as needed,
    ):
        bridge = TransformerBridge.boot_transformers(
            place, hf_model=model, tokenizer=needed, device="cpu", dtype=dtype or wide
        )
    give_tokenizer(bridge, tokenizer)
    if is_gguf:
        bridge.cfg.model_name = Path(name).stem
    return bridge


@contextlib.contextmanager
def _said(what: str) -> Iterator[None]:
    """Whatever a library raises about a model from outside, said as an error of ours."""
    try:
        yield
    except MechInterpError:
        raise
    except Exception as error:  # they raise of every class, down to RecursionError
        why = " ".join(str(error).split()) or type(error).__name__
        if "trust_remote_code" in why:
            why = (
                "it needs code of its own, which is not run; load it with transformers yourself and give "
                "mia.convert a bridge: TransformerBridge.boot_transformers(name, hf_model=model)"
            )
        raise MechInterpError(f"{what}: {why}") from error


def _tokenizer(file: Path, place: str, at: dict[str, Any]) -> Any:
    """The tokenizer beside a model; None where there is none.

    Raises:
        CheckpointError: a folder's tokenizer is damaged.
    """
    from transformers import AutoTokenizer

    if file.is_dir() and not any((file / name).is_file() for name in _TOKENIZERS):
        return None  # transformers gives such a folder an empty one
    try:
        return AutoTokenizer.from_pretrained(place, **at)
    except Exception as error:
        if not file.is_dir():
            return None
        raise CheckpointError(
            str(file), [f"its tokenizer is damaged or unknown ({' '.join(str(error).split())})"]
        ) from error


def _need_gguf(name: str) -> None:
    if importlib.util.find_spec("gguf") is None:
        raise MechInterpError(
            f"{name!r} is read with the package gguf, which is not installed: "
            "pip install 'mechinterp_attn[gguf]'"
        )


@contextlib.contextmanager
def _our_bars() -> Iterator[None]:
    """Transformers' progress bars look like all others here, and keep quiet when those do."""
    from transformers.utils import logging

    def bar(_factory: Any, args: tuple[Any, ...], options: dict[str, Any]) -> Progress:
        return Progress(*args, **{"desc": "loading weights"} | options)

    previous = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(previous)


@contextlib.contextmanager
def some_tokenizer(tokenizer: Any, size: int) -> Iterator[Any]:
    """Booting needs some tokenizer, readable from where it was saved, or the hub is asked for one."""
    if tokenizer is not None:
        yield tokenizer
        return
    from tokenizers import Tokenizer, models
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({f"<{i}>": i for i in range(size)}, unk_token="<0>"))
    with tempfile.TemporaryDirectory() as folder:
        PreTrainedTokenizerFast(
            tokenizer_object=backend, bos_token="<0>", eos_token="<0>", pad_token="<0>"
        ).save_pretrained(folder)
        yield AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
