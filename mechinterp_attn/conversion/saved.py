"""Converted models read back from disk; ``model.saved`` writes them."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from typing_extensions import TypedDict

from mechinterp_attn.core.errors import CheckpointError, MechInterpError
from mechinterp_attn.core.fields import wrong_fields
from mechinterp_attn.model.saved import SETTINGS, VERSION, sha256, sha256_of_config
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.sources.checkpoint import Shapes, expected_shapes, wrong_tensors
from mechinterp_attn.sources.folder import read_config, read_tensors
from mechinterp_attn.sources.tokenizer import read_files, read_tokenizer

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel


def load_saved(folder: Path, dtype: torch.dtype | None = None) -> AttentionOnlyModel:
    """Read a folder made by ``save``; without ``dtype`` the round trip is bit-exact.

    Raises:
        CheckpointError: a file is missing, damaged, or not the one that was saved, or the weights are
            not those of the model that the config describes.
    """
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

    config = read_config(folder)
    _check_sums(folder, config)
    try:
        spec = Spec.from_json(config["spec"])
    except MechInterpError as error:
        raise CheckpointError(str(folder), [str(error)]) from error
    weights = read_tensors(folder)
    wrong = wrong_tensors(weights, spec, _shapes)
    if wrong:
        raise CheckpointError(str(folder), wrong)
    # Only files that were saved with this model: one that lies there besides is another model's.
    tokenizer, files = None, set(config["sha256"]) - {"model.safetensors", "config.json"}
    if files == {"tokenizer.json"}:
        tokenizer = read_tokenizer(folder / "tokenizer.json", settings=config["special_tokens"])
    elif files:
        tokenizer = read_files(folder, files, config["special_tokens"])
    return AttentionOnlyModel(
        spec,
        {name: t.to(dtype) if dtype else t for name, t in weights.items()},
        tokenizer=tokenizer,
        provenance=config["provenance"],
        default_prepend_bos=config["default_prepend_bos"],
    )


def _shapes(spec: Spec) -> tuple[Shapes, Shapes]:
    """Names and shapes of the tensors that a saved model must have, and of those it may have: as in the
    source, without the norms that are folded in, and with every bias.
    """
    required, optional = expected_shapes(spec)
    kept = {"embed_norm.b"} | {
        name for name in optional if name.endswith(("_post.w", "q_norm.b", "k_norm.b"))
    }
    if spec.stream_norm:
        kept |= {name for name in optional if name.split(".")[-2] in ("ln1", "ln2")}
    needed = {name for name in optional if ".b_" in name or "_norm.w" in name or name == "prediction.b"}
    required |= {name: optional[name] for name in needed}

    for one in spec.dictionaries:
        at = f"blocks.{one.layer}"
        features = {"W_in": (spec.d_model, one.n), "b_in": (one.n,), "threshold": (one.n,)}
        features |= {"W_out": (one.n, spec.d_model), "b_out": (spec.d_model,)}
        required |= {f"{at}.features.{name}": shape for name, shape in features.items()}
        if one.skip:
            required[f"{at}.skip.W_skip"] = (spec.d_model, spec.d_model)

    def renamed(shapes: Shapes) -> Shapes:
        return {name.replace(".mlp.", ".neurons."): shape for name, shape in shapes.items()}

    return renamed(required), renamed({name: optional[name] for name in kept & set(optional)})


class _Config(TypedDict):
    format: str
    version: int
    spec: dict[str, Any]
    provenance: dict[str, Any]
    default_prepend_bos: bool
    special_tokens: dict[str, Any]
    sha256: dict[str, str]


def _check_sums(folder: Path, config: dict[str, Any]) -> None:
    """Every file of the folder, config.json too, is the one that was saved.

    Raises:
        CheckpointError: names those that are not.
    """
    if config.get("version") != VERSION:
        raise CheckpointError(
            str(folder),
            [f"format version {config.get('version')!r}, but this release reads {VERSION}; save it again"],
        )
    wrong = wrong_fields(_Config, config, what="config.json has ")
    if not wrong:  # they become a tokenizer's arguments
        wrong = [
            f"config.json has special_tokens.{name}, which is no special token and no setting"
            for name in config["special_tokens"]
            if not name.endswith(("_token", "_special_tokens")) and name not in SETTINGS
        ]
        wrong += [
            f"config.json has a checksum of {name!r}, which is no file of this folder"
            for name in config["sha256"]
            if Path(name).name != name
        ]
    if wrong:
        raise CheckpointError(str(folder), wrong)
    for name in {"config.json", "model.safetensors"} | set(config["sha256"]):
        if not (folder / name).is_file():
            wrong.append(f"{name} is missing")
            continue
        found = sha256_of_config(config) if name == "config.json" else sha256(folder / name)
        if found != config["sha256"].get(name):
            wrong.append(f"{name} is damaged or not the file that was saved (its checksum differs)")
    if wrong:
        raise CheckpointError(str(folder), sorted(wrong))
