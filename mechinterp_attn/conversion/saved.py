"""Converted models on disk: safetensors + JSON, written whole or not at all."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

from mechinterp_attn.core.errors import CheckpointError, MechInterpError
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.sources.folder import read_config, read_tensors, read_tokenizer

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

FORMAT = "mechinterp_attn.model.attention_only"
VERSION = 1
_SPECIAL = ("bos_token", "eos_token", "pad_token", "unk_token")


def save(model: AttentionOnlyModel, folder: str | os.PathLike[str]) -> None:
    """Write ``config.json``, ``model.safetensors`` and ``tokenizer.json`` into a folder.

    The folder is made if only its last part is missing. Files are written under temporary names and
    renamed, the config last, so that a torn write never looks like a model.

    Raises:
        MechInterpError: the folder cannot be made or written.
    """
    target = output_folder(folder)
    weights = {name: t.detach().contiguous().cpu() for name, t in model.state_dict().items()}
    write_atomic(target / "model.safetensors", lambda path: save_file(weights, path))
    files = ["model.safetensors"]
    if model.tokenizer is not None:
        backend = model.tokenizer.backend_tokenizer
        write_atomic(target / "tokenizer.json", lambda path: backend.save(str(path)))
        files.append("tokenizer.json")
    config = {
        "format": FORMAT,
        "version": VERSION,
        "spec": model.spec.to_json(),
        "provenance": model.provenance,
        "special_tokens": {name: getattr(model.tokenizer, name, None) for name in _SPECIAL},
        "sha256": {file: _sha256(target / file) for file in files},
    }
    text = json.dumps(config, indent=1)
    write_atomic(target / "config.json", lambda path: path.write_text(text, encoding="utf-8"))


def load_saved(folder: Path, dtype: torch.dtype | None = None) -> AttentionOnlyModel:
    """Read a folder made by ``save``; without ``dtype`` the round trip is bit-exact.

    Raises:
        CheckpointError: a file is missing, damaged, or not the one that was saved.
    """
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

    config = read_config(folder)
    if config.get("version") != VERSION:
        raise CheckpointError(
            str(folder), [f"format version {config.get('version')!r}, this release reads {VERSION}"]
        )
    sums = config.get("sha256", {})
    for file in {"model.safetensors": None} | sums:
        if (folder / file).is_file() and _sha256(folder / file) != sums.get(file):
            raise CheckpointError(
                str(folder), [f"{file} is damaged or not the file that was saved (its checksum differs)"]
            )
    weights = read_tensors(folder)
    missing = [f"{file} is missing" for file in sums if not (folder / file).is_file()]
    if missing:
        raise CheckpointError(str(folder), missing)
    spec = Spec.from_json(config.get("spec", {}))
    try:
        return AttentionOnlyModel(
            spec,
            {name: t.to(dtype) if dtype else t for name, t in weights.items()},
            tokenizer=read_tokenizer(folder / "tokenizer.json", **config.get("special_tokens", {})),
            provenance=config.get("provenance", {}),
        )
    except KeyError as error:
        raise CheckpointError(str(folder), [f"missing tensor {error.args[0]}"]) from error


def output_folder(folder: str | os.PathLike[str]) -> Path:
    """A folder that exists and can be written; made if only its last part is missing.

    Raises:
        MechInterpError: says what is in the way.
    """
    target = Path(folder)
    if target.exists() and not target.is_dir():
        raise MechInterpError(f"{target} is a file; give a folder")
    if not target.exists() and not target.resolve().parent.is_dir():
        raise MechInterpError(f"the folder {target.resolve().parent} does not exist; make it first")
    try:
        target.mkdir(exist_ok=True)
    except OSError as error:
        raise MechInterpError(f"cannot make the folder {target}: {error.strerror}") from error
    return target


def write_atomic(path: Path, write: Callable[[Path], Any]) -> None:
    """Let ``write`` fill a temporary file beside ``path``, then rename it over ``path``.

    Raises:
        MechInterpError: the folder is missing or cannot be written.
    """
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
    except OSError as error:
        raise MechInterpError(
            f"cannot write {path}: {error.strerror} ({path.parent}); choose a folder that exists "
            "and is writable"
        ) from error
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o644)
        temporary.replace(path)
    except OSError as error:
        raise MechInterpError(f"cannot write {path}: {error.strerror}") from error
    finally:
        temporary.unlink(missing_ok=True)


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
