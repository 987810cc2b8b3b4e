"""Hugging Face folders and GGUF files from strangers: what is looked at before anything is made of them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mechinterp_attn.core.errors import CheckpointError
from mechinterp_attn.core.fields import short
from mechinterp_attn.sources.folder import read_config, tensor_shapes

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "encoder_layers", "decoder_layers")
_WIDTHS = (
    *("hidden_size", "n_embd", "d_model", "word_embed_proj_dim", "vocab_size", "intermediate_size"),
    *(
        "n_inner",
        "ffn_dim",
        "num_attention_heads",
        "n_head",
        "num_heads",
        "num_key_value_heads",
        "head_dim",
    ),
)
_CONTEXTS = ("max_position_embeddings", "n_positions", "n_ctx")
_LAYER = re.compile(r"\.(\d+)\.")
_LONGEST = 2**24  # tokens of context; some families make tables of it


def check_folder(folder: Path) -> None:
    """Refuse a Hugging Face folder whose config asks for more than its tensors can fill, or whose weights
    are not plain safetensors files of this folder.

    Raises:
        CheckpointError: with every reason.
    """
    config, shapes = read_config(folder), tensor_shapes(folder)
    reasons = []
    if (folder / "adapter_config.json").exists():
        reasons.append(
            "it has an adapter (adapter_config.json); merge it into its model (peft's merge_and_unload) "
            "and give that"
        )
    reasons += [f"it has {file.name}, part of a checkpoint of many processes" for file in _parts(folder)]
    if config.get("transformers_weights"):
        reasons.append("config.json names a file of weights (transformers_weights); expected none")
    widest = max((max(shape, default=1) for shape in shapes.values()), default=0)
    for name, value in _numbers(config):
        most = len(shapes) if name in _DEPTHS else widest if name in _WIDTHS else _LONGEST
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            reasons.append(f"config.json has {name}={short(value)}, expected a positive integer")
        elif value > most:
            held = {len(shapes): f"it has {most} tensors", widest: f"the widest tensor is {most} wide"}
            expected = f"expected at most {most:,}" if most == _LONGEST else f"but {held[most]}"
            reasons.append(f"config.json has {name}={short(value)}, {expected}")
    if reasons:
        raise CheckpointError(str(folder), reasons)


def check_size(file: Path, config: Any) -> None:
    """Refuse a GGUF file that is too short for as many layers as it says.

    Args:
        config: the Hugging Face config that was read from it.

    Raises:
        CheckpointError: it is too short.
    """
    layers, width = getattr(config, "num_hidden_layers", 0), getattr(config, "hidden_size", 0)
    if layers * width > file.stat().st_size:  # a norm of each layer alone would be larger
        raise CheckpointError(str(file), [f"it is too short for {layers:,} layers that are {width:,} wide"])


def _parts(folder: Path) -> list[Path]:
    """Files that transformers would read in place of ``model.safetensors``."""
    return sorted(folder.glob("shard-*-model-*-of-*.safetensors"))[:1]


def _numbers(config: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    """Every size that a config states, at any depth; None stands for a default."""
    rest: list[Any] = [config]
    while rest:
        one = rest.pop()
        if isinstance(one, Mapping):
            known = [name for name in (*_DEPTHS, *_WIDTHS, *_CONTEXTS) if one.get(name) is not None]
            yield from ((name, one[name]) for name in known)
            rest += one.values()
        elif isinstance(one, list):
            rest += one


def unfit(loaded: Mapping[str, Any], n_layers: int) -> list[str]:
    """What does not fit between a config and the tensors that transformers has loaded for it.

    Args:
        loaded: its ``loading_info``.
        n_layers: what the config says. Tensors of later layers are not passed over, as others are that a
            model has no use for.
    """
    wrong = [f"missing tensor {name}" for name in sorted(loaded.get("missing_keys", ()))]
    wrong += [
        f"{name} has shape {tuple(found)}, expected {tuple(expected)}"
        for name, found, expected in sorted(loaded.get("mismatched_keys", ()))
    ]
    for name in sorted(loaded.get("unexpected_keys", ())):
        layer = _LAYER.search(name)
        if layer and int(layer[1]) >= n_layers:
            wrong.append(f"tensor {name}, but config.json says that there are {n_layers} layers")
    return wrong
