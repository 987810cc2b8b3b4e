"""Reading folders that come from outside: JSON and safetensors, nothing that can run code."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NotRequired

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from typing_extensions import TypedDict

from mechinterp_attn.core.errors import CheckpointError, MechInterpError
from mechinterp_attn.core.fields import wrong_fields
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.reading import read_json
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.sources.config import check_fields
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
        config = read_json(path)
    except MechInterpError as error:
        raise CheckpointError(str(folder), [str(error).replace(str(path), "config.json")]) from error
    if not isinstance(config, dict):
        raise CheckpointError(str(folder), ["config.json is not a JSON object"])
    return config


def read_tensors(folder: Path) -> dict[str, Tensor]:
    """``model.safetensors`` of a folder, or the shards that its index names; never a pickle.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    found: dict[str, Tensor] = {}
    for name in Progress(weight_files(folder), desc="reading weights"):
        with _reading(folder, name):
            found |= load_file(folder / name)
    return found


def tensor_shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Names and shapes of a folder's tensors, without reading them.

    Raises:
        CheckpointError: as for ``read_tensors``.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name in weight_files(folder):
        with _reading(folder, name), safe_open(folder / name, framework="pt") as file:
            found |= {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    return found


@contextlib.contextmanager
def _reading(folder: Path, name: str) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(str(folder), [f"{name} is damaged or not safetensors ({error})"]) from error


def weight_files(folder: Path) -> list[str]:
    """Names of the files that hold a folder's tensors; all of them in this folder, and safetensors.

    Raises:
        CheckpointError: there is none, or an index names others.
    """
    single, index = "model.safetensors", "model.safetensors.index.json"
    if (folder / single).is_file():
        return [single]
    if not (folder / index).is_file():
        raise CheckpointError(str(folder), [f"it has no {single} and no {index} (pickles are not read)"])
    try:
        held = read_json(folder / index)
    except MechInterpError as error:
        raise CheckpointError(str(folder), [f"{index} cannot be read ({error})"]) from error
    if wrong := wrong_fields(_Index, held, what=f"{index} has "):
        raise CheckpointError(str(folder), wrong)
    names = sorted(set(held["weight_map"].values()))
    reasons = [
        f"{index} names {name!r}, which is no safetensors file of this folder"
        for name in names
        if Path(name).name != name or not name.endswith(".safetensors") or not (folder / name).is_file()
    ]
    if reasons:
        raise CheckpointError(str(folder), reasons)
    return names


class _Index(TypedDict):
    weight_map: dict[str, str]
    metadata: NotRequired[dict[str, Any]]


def read_checkpoint(folder: Path, dtype: torch.dtype | None = None) -> Checkpoint:
    """A TL-convention checkpoint folder: config.json, model.safetensors, maybe tokenizer.json.

    Args:
        dtype: of the weights; by default as stored, half precisions widened to float32.

    Raises:
        CheckpointError: a file is missing or damaged, or the config has impossible values.
    """
    config = read_config(folder)
    check_fields(config, str(folder))
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
