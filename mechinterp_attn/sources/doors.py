"""The doors by name: a bundled model or a folder becomes the source that a conversion reads."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.saved import FORMAT
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.sources.folder import read_checkpoint, read_config
from mechinterp_attn.sources.huggingface import boot
from mechinterp_attn.sources.zoo import bundled_folder, bundled_names, read_bundled

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")


def open_source(
    source: str | os.PathLike[str], dtype: torch.dtype | None = None, revision: str | None = None
) -> TransformerBridge | Checkpoint:
    """The source model behind a name, with its MLPs, not yet converted.

    Args:
        source: a bundled model's name, a folder with a TL-convention checkpoint or a Hugging Face
            model, a ``.gguf`` file, or a Hugging Face id (``owner/name``, or TransformerLens's short
            name such as ``gpt2``), which is fetched.
        dtype: of the weights; as stored by default, half precisions widened to float32.
        revision: of a Hugging Face id: a branch, a tag or a commit.

    Raises:
        MechInterpError: no such model, or a model saved in attention-only form, which holds no source.
    """
    name = os.fspath(source)
    folder = Path(name)
    is_local = bundled_folder(name) is not None or folder.exists()
    if revision is not None and is_local:
        raise MechInterpError(
            f"revision={revision!r} is for models of the Hugging Face hub, and {name!r} is here on this "
            "machine: leave it out"
        )
    if bundled_folder(name) is not None:
        return read_bundled(name, dtype)
    if folder.is_file() and folder.suffix == ".gguf":
        return boot(folder, dtype)
    if not folder.is_dir():
        hub_id = None if folder.exists() else _hub_id(name)
        if hub_id is not None:
            return boot(hub_id, dtype, revision)
        raise MechInterpError(
            f"{name!r} is neither a bundled model ({', '.join(bundled_names())}) nor a folder nor a "
            ".gguf file nor a model of Hugging Face ('gpt2', 'owner/name')"
        )
    config = read_config(folder)
    if config.get("format") == FORMAT:
        raise MechInterpError(
            f"{folder} holds a model saved in attention-only form, without its source; give what it "
            "was converted from: a bundled model's name or the source's own folder"
        )
    return boot(folder, dtype) if "model_type" in config else read_checkpoint(folder, dtype)


def _hub_id(name: str) -> str | None:
    """The Hugging Face id behind a name: itself, or TransformerLens's short name (``gpt2``)."""
    if _HUB_ID.fullmatch(name):
        return name
    from transformer_lens.supported_models import get_official_model_name

    try:
        return get_official_model_name(name)
    except ValueError:
        return None


def is_saved(source: str | os.PathLike[str]) -> bool:
    """Whether this is a folder made by ``model.save``."""
    folder = Path(source)
    return folder.is_dir() and read_config(folder).get("format") == FORMAT
