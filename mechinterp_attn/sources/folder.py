"""Reading folders that come from outside: JSON and safetensors, nothing that can run code."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mechinterp_attn.core.errors import CheckpointError
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.sources.tokenizer import read_tokenizer


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a folder.

    Raises:
        CheckpointError: there is none, or it is not a JSON object.
    """
    path = folder / "config.json"
    if not path.is_file():
        raise CheckpointError(str(folder), ["it has no config.json"])
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise CheckpointError(str(folder), [f"config.json cannot be read ({error})"]) from error
    if not isinstance(config, dict):
        raise CheckpointError(str(folder), ["config.json is not a JSON object"])
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """``model.safetensors`` of a folder, or the shards that its index names; never a pickle.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found: dict[str, Tensor] = {}
    for name in Progress(_weight_files(folder), desc="reading weights"):
        try:
            found |= load_file(folder / name)
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(
                str(folder), [f"{name} is damaged or not safetensors ({error})"]
            ) from error
    return found


def _weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a folder's tensors."""
    single, index = "model.safetensors", "model.safetensors.index.json"
    if (folder / single).is_file():
        return [single]
    if not (folder / index).is_file():
        raise CheckpointError(str(folder), [f"it has no {single} and no {index} (pickles are not read)"])
    try:
        names = sorted(set(json.loads((folder / index).read_text(encoding="utf-8"))["weight_map"].values()))
    except (ValueError, OSError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(str(folder), [f"{index} cannot be read ({error!r})"]) from error
    reasons = [
        f"{index} names {name!r}, which is no file of this folder"
        for name in names
        if not isinstance(name, str) or Path(name).name != name or not (folder / name).is_file()
    ]
    if reasons:
        raise CheckpointError(str(folder), reasons)
    return names


def read_checkpoint(folder: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """A TL-convention checkpoint folder: config.json, model.safetensors, maybe tokenizer.json.

    Args:
        dtype: of the weights; by default as stored, half precisions widened to float32.
    """
    config = read_config(folder)
    tensors = read_tensors(folder)
    return Checkpoint(
        cfg=config,
        state_dict={name: t.to(dtype or wide_dtype(t.dtype)) for name, t in tensors.items()},
        tokenizer=read_tokenizer(folder / "tokenizer.json", config.get("bos_token")),
        name=folder.name,
    )


def wide_dtype(stored: torch.dtype) -> torch.dtype:
    """float32 for weights that were only stored in half precision."""
    return torch.float32 if stored in (torch.float16, torch.bfloat16) else stored
