"""Converted models on disk: safetensors + JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.files import write_folder
from mechinterp_attn.model.spec import Spec

FORMAT = "mechinterp_attn.model.attention_only"
VERSION = 2
# What a tokenizer has besides its file and its named special tokens.
SETTINGS = ("extra_special_tokens", "padding_side", "truncation_side", "chat_template", "model_input_names")


def save(
    folder: str | os.PathLike[str],
    weights: Mapping[str, Tensor],
    tokenizer: Any,
    *,
    spec: Spec,
    provenance: Mapping[str, Any],
    default_prepend_bos: bool,
) -> None:
    """Write ``config.json``, ``model.safetensors`` and the tokenizer's files into a folder.

    A model that is there already is replaced as a whole; other files in the folder are kept.

    Args:
        folder: made if only its last part is missing.
        weights: the model's tensors by name.
        tokenizer: a Hugging Face tokenizer, or None.
        spec: what the model is.
        provenance: where it came from, as JSON can hold it.
        default_prepend_bos: whether texts get a BOS in front.

    Raises:
        MechInterpError: the folder cannot be made or written, or the tokenizer is of a kind that cannot
            be saved. What was there is unchanged then.
    """
    tensors = {name: t.detach().contiguous().cpu() for name, t in weights.items()}
    files: dict[str, Callable[[Path], Any]] = {"model.safetensors": lambda path: save_file(tensors, path)}
    files |= {
        name: lambda path, content=content: path.write_bytes(content)
        for name, content in _tokenizer_files(tokenizer).items()
    }
    config = {
        "format": FORMAT,
        "version": VERSION,
        "spec": spec.to_json(),
        "provenance": provenance,
        "default_prepend_bos": default_prepend_bos,
        "special_tokens": settings_of(tokenizer),
    }

    def write_config(path: Path) -> None:
        sums = {name: sha256(path.parent / name) for name in files}
        plain = json.loads(json.dumps(config))
        whole = plain | {"sha256": sums | {"config.json": sha256_of_config(plain)}}
        path.write_text(json.dumps(whole, indent=1), encoding="utf-8")

    write_folder(folder, files | {"config.json": write_config})


def _tokenizer_files(tokenizer: Any) -> dict[str, bytes]:
    """A tokenizer as files: ``tokenizer.json``, or those of its own where it is written in Python.

    Raises:
        MechInterpError: it is not Hugging Face's.
    """
    if tokenizer is None:
        return {}
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        return {"tokenizer.json": backend.to_str().encode("utf-8")}
    if not hasattr(tokenizer, "save_pretrained"):
        raise MechInterpError(
            f"a tokenizer of type {type(tokenizer).__name__} cannot be saved; expected Hugging Face's (set "
            "model.tokenizer to one, or to None and give token ids)"
        )
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        return {file.name: file.read_bytes() for file in sorted(Path(folder).iterdir()) if file.is_file()}


def settings_of(tokenizer: Any) -> dict[str, Any]:
    """What a tokenizer has besides its files, as JSON can hold it, for ``read_tokenizer``."""
    if tokenizer is None:
        return {}
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    extra = [str(token) for token in getattr(tokenizer, "extra_special_tokens", ())]
    settings = special | {name: getattr(tokenizer, name, None) for name in SETTINGS[1:]}
    return settings | ({SETTINGS[0]: extra} if extra else {})


def sha256(file: Path) -> str:
    """A file's SHA-256, in hexadecimal digits."""
    with file.open("rb") as content:
        return hashlib.file_digest(content, "sha256").hexdigest()


def sha256_of_config(config: Mapping[str, Any]) -> str:
    """Of everything in a config but the checksums themselves."""
    rest = {name: value for name, value in config.items() if name != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()
