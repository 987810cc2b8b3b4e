"""Dictionaries: sparse features that describe a part of a model, and the public files they come in.

A transcoder (Dunefsky et al. 2024) reads what an MLP reads and writes, through features of which few are
active at a time, nearly what the MLP writes; a skip-transcoder (Paulo et al. 2025) has a linear part too. A
sparse autoencoder (SAE; Bricken et al. 2023, Huben et al. 2024) reads and writes the residual stream.
"""

from __future__ import annotations

import os
import re
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from mechinterp_attn.core.errors import CheckpointError, MechInterpError, listing
from mechinterp_attn.core.files import write_folder
from mechinterp_attn.core.reading import read_json
from mechinterp_attn.sources.zoo import bundled_dictionaries, bundled_folder, bundled_names

NAMES = ("W_enc", "b_enc", "W_dec", "b_dec")
OWN = "dictionary.safetensors"
MLP, STREAM = PLACES = ("mlp", "resid_post")  # from what an MLP reads to what it writes; behind a block
HOOK = re.compile(r"blocks\.(\d+)\.(.+)")  # TransformerLens's name of a place


SAES = ("standard", "jumprelu", "topk", "batchtopk")  # SAELens's names of those that are known


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A transcoder or an SAE: ``gate(x @ W_enc + b_enc) @ W_dec + b_dec (+ x @ W_skip)``.

    Attributes:
        W_enc: ``[d_model, feature]``.
        b_enc: ``[feature]``.
        W_dec: ``[feature, d_model]``.
        b_dec: ``[d_model]``.
        threshold: ``[feature]``: features below theirs are silent (JumpReLU, BatchTopK); None for 0 (ReLU).
        k: only the k largest are active (TopK); 0 for no such limit.
        W_skip: ``[d_model, d_model]``, rows multiply from the left; None without a linear part.
        card: where it comes from and how good it is, as JSON can hold it: "layer", "at", "model" are
            compared with where it is attached.

    Raises:
        MechInterpError: shapes that do not fit, or numbers that are not finite; all of them.
    """

    W_enc: Float[Tensor, "d_model feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_model"]
    b_dec: Float[Tensor, " d_model"]
    threshold: Float[Tensor, " feature"] | None = None
    k: int = 0
    W_skip: Float[Tensor, "d_model d_model"] | None = None
    card: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        wrong = [f"W_enc has shape {tuple(self.W_enc.shape)}, expected [d_model, feature]"]
        if self.W_enc.ndim == 2:
            d, n = self.W_enc.shape
            expected = {"b_enc": (n,), "W_dec": (n, d), "b_dec": (d,), "threshold": (n,), "W_skip": (d, d)}
            wrong = [
                f"{name} has shape {tuple(tensor.shape)}, expected {expected[name]}"
                for name, tensor in self.tensors.items()
                if name in expected and tuple(tensor.shape) != expected[name]
            ]
            if not 0 <= self.k <= n:
                wrong.append(f"k={self.k}, expected 0 to {n}")
        for name, tensor in self.tensors.items():
            if not bool((finite := torch.isfinite(tensor)).all()):
                wrong.append(f"{name} is not finite at {(~finite).nonzero()[0].tolist()}")
        if wrong:
            raise MechInterpError(listing("this dictionary cannot be used", wrong))

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Its tensors by name, those that it has."""
        named = {name: getattr(self, name) for name in (*NAMES, "threshold", "W_skip")}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def d_model(self) -> int:
        """The width of what it reads and writes."""
        return int(self.W_enc.shape[0])

    @property
    def n_features(self) -> int:
        """How many features it has."""
        return int(self.W_enc.shape[1])

    def folded(
        self, gain: Float[Tensor, " d_model"], bias: Float[Tensor, " d_model"] | None = None
    ) -> Dictionary:
        """The same dictionary, reading in front of a norm's gain and bias instead of behind them.

        A converted model has these folded into its weights; a dictionary that was trained on a model that
        has not (most public ones) reads what it expects after this.

        Args:
            gain: of the norm in front of the MLP in the source, ``[d_model]``.
            bias: its bias.

        Raises:
            MechInterpError: a gain or bias of another width.
        """
        for name, given in (("gain", gain), ("bias", bias)):
            if given is not None and tuple(given.shape) != (self.d_model,):
                raise MechInterpError(
                    f"{name} has shape {tuple(given.shape)}, expected [{self.d_model}], as wide as the "
                    "dictionary"
                )
        gain = gain.to(self.W_enc)
        b_enc, b_dec, skip = self.b_enc, self.b_dec, self.W_skip
        if bias is not None:
            b_enc = b_enc + bias.to(self.W_enc) @ self.W_enc
            b_dec = b_dec if skip is None else b_dec + bias.to(skip) @ skip
        skip = None if skip is None else gain[:, None] * skip
        return replace(self, W_enc=gain[:, None] * self.W_enc, b_enc=b_enc, b_dec=b_dec, W_skip=skip)

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write ``dictionary.safetensors`` and ``card.json``; ``Dictionary.load`` reads them back.

        Args:
            folder: where to.

        Raises:
            MechInterpError: it cannot be written.
        """
        import json

        tensors = {name: t.detach().contiguous().cpu() for name, t in self.tensors.items()}
        if self.k:
            tensors["k"] = torch.tensor(self.k)
        card = json.dumps(dict(self.card), indent=1)
        write_folder(
            folder,
            {
                OWN: lambda path: save_file(tensors, path),
                "card.json": lambda path: path.write_text(card, encoding="utf-8"),
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str], layer: int | None = None) -> Dictionary:
        """Read a dictionary; never a pickle.

        Args:
            path: a bundled model's name, such as ``"gelu-2l"``, for a dictionary trained on it; a folder
                made by ``save``; a folder of circuit-tracer's (``config.yaml`` and
                ``layer_{i}.safetensors``), of which one layer is read; a folder of SAELens's (``cfg.json``
                and ``sae_weights.safetensors``); or GemmaScope's ``params.npz``, the file or its folder.
            layer: which of a bundled model's or of circuit-tracer's.

        Raises:
            CheckpointError: it is none of these, or lacks something; all that is wrong with it.
            MechInterpError: its tensors do not fit together, or are not finite.
        """
        if isinstance(path, str) and bundled_folder(path) is not None:
            return _bundled(path, layer)
        folder = Path(path)
        if folder.suffix == ".npz" and folder.is_file():
            return _gemma_scope(folder)
        if (folder / OWN).is_file():
            card = read_json(folder / "card.json") if (folder / "card.json").is_file() else {}
            return _made(folder, _tensors(folder / OWN), card if isinstance(card, dict) else {})
        if (folder / "params.npz").is_file():
            return _gemma_scope(folder / "params.npz")
        if (folder / "cfg.json").is_file():
            return _sae_lens(folder)
        if (folder / "config.yaml").is_file() or list(folder.glob("layer_*.safetensors")):
            return _circuit_tracer(folder, layer)
        if (folder / "W_enc_0.safetensors").is_file():
            reason = "it holds a cross-layer transcoder, whose features write at several layers"
            raise CheckpointError(str(folder), [f"{reason}; expected one whose features write at one"])
        expected = f"{OWN}, params.npz, cfg.json or config.yaml with layer_0.safetensors"
        raise CheckpointError(str(folder), [f"it holds no dictionary; expected {expected}"])

    def __repr__(self) -> str:
        kind = f"top {self.k}" if self.k else "ReLU" if self.threshold is None else "JumpReLU"
        skip = "" if self.W_skip is None else ", with a linear part"
        return f"Dictionary({self.n_features} features of width {self.d_model}, {kind}{skip})"


def _bundled(name: str, layer: int | None) -> Dictionary:
    folder = bundled_dictionaries(name)
    if folder is None:
        others = [other for other in bundled_names() if bundled_dictionaries(other) is not None]
        raise CheckpointError(name, [f"no dictionary is bundled for it; there are some for {others}"])
    there = sorted(int(one.name.removeprefix("layer_")) for one in folder.iterdir())
    if layer not in there:
        raise CheckpointError(name, [f"layer={layer}; it has layers {there}: give layer="])
    return Dictionary.load(folder / f"layer_{layer}")


def _tensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(str(file.parent), [f"{file.name} is damaged or not safetensors"]) from error


def _made(where: Path, tensors: Mapping[str, Tensor], card: Mapping[str, Any], k: int = 0) -> Dictionary:
    """A dictionary of tensors under their usual names, in float32 where they are halves."""
    missing = [f"it has no {name}" for name in NAMES if name not in tensors]
    if missing:
        raise CheckpointError(str(where), missing)
    wide = {
        name: t if t.dtype == torch.float64 else t.float()
        for name, t in tensors.items()
        if name in (*NAMES, "threshold", "W_skip")
    }
    if "threshold" in wide:
        wide["threshold"] = wide["threshold"].clamp_min(0)  # a JumpReLU is a ReLU first
    return Dictionary(**wide, k=int(tensors["k"]) if "k" in tensors else k, card=card)


def _gemma_scope(file: Path) -> Dictionary:
    try:
        with np.load(file, allow_pickle=False) as arrays:
            tensors = {name: torch.from_numpy(arrays[name]) for name in arrays.files}
    except (OSError, ValueError, TypeError, zipfile.BadZipFile) as error:
        reason = f"{file.name} is damaged, or holds objects, which are not read"
        raise CheckpointError(str(file.parent), [reason]) from error
    if "threshold" not in tensors:
        raise CheckpointError(str(file.parent), [f"{file.name} has no threshold"])
    return _made(file.parent, tensors, {"format": "GemmaScope"})


def _circuit_tracer(folder: Path, layer: int | None) -> Dictionary:
    config: Any = {}
    if (folder / "config.yaml").is_file():
        try:
            config = yaml.safe_load((folder / "config.yaml").read_text(encoding="utf-8"))
        except (yaml.YAMLError, UnicodeDecodeError) as error:
            raise CheckpointError(str(folder), ["config.yaml is not YAML"]) from error
    config = config if isinstance(config, dict) else {}
    there = sorted(int(f.stem[6:]) for f in folder.glob("layer_*.safetensors") if f.stem[6:].isdigit())
    if layer not in there:
        raise CheckpointError(str(folder), [f"layer={layer}; it has layers {there}: give layer="])
    tensors = _tensors(folder / f"layer_{layer}.safetensors")
    if "activation_function.threshold" in tensors:
        tensors["threshold"] = tensors.pop("activation_function.threshold")
    tensors |= {name: tensors[name].T.contiguous() for name in ("W_enc", "W_skip") if name in tensors}
    activation, k = config.get("activation"), config.get("k", 0)
    out = str(config.get("feature_output_hook", "hook_mlp_out"))
    wrong = []
    if activation not in (None, "relu", "jump_relu", "jumprelu", "topk"):
        wrong.append(f"config.yaml has activation={activation!r}, expected relu, jump_relu or topk")
    if activation == "topk" and "k" not in tensors and not (isinstance(k, int) and k > 0):
        wrong.append(f"config.yaml has activation topk and k={k!r}, expected how many are active")
    if out not in ("hook_mlp_out", "mlp.hook_out"):
        wrong.append(f"config.yaml has feature_output_hook={out!r}, expected hook_mlp_out: no transcoder")
    if wrong:
        raise CheckpointError(str(folder), wrong)
    card = {"format": "circuit-tracer", "layer": layer, "reads": config.get("feature_input_hook")}
    return _made(folder, tensors, card, k=k if activation == "topk" else 0)


def _sae_lens(folder: Path) -> Dictionary:
    cfg: Any = read_json(folder / "cfg.json")
    if not isinstance(cfg, dict):
        raise CheckpointError(str(folder), ["cfg.json is not a JSON object"])
    if not (folder / "sae_weights.safetensors").is_file():
        raise CheckpointError(str(folder), ["it has no sae_weights.safetensors"])
    meta = {**cfg, **(cfg["metadata"] if isinstance(cfg.get("metadata"), dict) else {})}
    kind = str(cfg.get("architecture", "standard"))
    is_sae = "transcoder" not in kind
    card: dict[str, Any] = {"format": "SAELens", "reads": meta.get("hook_name")}
    wrong = []
    if is_sae and kind not in SAES:
        wrong.append(f"cfg.json has architecture={kind!r}, expected a transcoder or {', '.join(SAES)}")
    if is_sae:
        card |= _stream(meta.get("hook_name"), wrong)
    else:
        card |= {"writes": meta.get("hook_name_out"), "at": MLP}
    if cfg.get("normalize_activations", "none") != "none":
        wrong.append(
            f"cfg.json has normalize_activations={cfg['normalize_activations']!r}, expected 'none'"
        )
    if wrong:
        raise CheckpointError(str(folder), wrong)
    tensors = _tensors(folder / "sae_weights.safetensors")
    k = cfg.get("k", 0)
    made = _made(folder, tensors, card, k=k if isinstance(k, int) and "threshold" not in tensors else 0)
    if cfg.get("rescale_acts_by_decoder_norm"):  # the largest of what they write, not of what they hold
        norm = made.W_dec.norm(dim=1)
        norm = torch.where(norm > 0, norm, 1.0)
        made = replace(
            made, W_enc=made.W_enc * norm, b_enc=made.b_enc * norm, W_dec=made.W_dec / norm[:, None]
        )
    if is_sae and cfg.get("apply_b_dec_to_input", True):
        made = replace(made, b_enc=made.b_enc - made.b_dec @ made.W_enc)
    return made


def _stream(hook: Any, wrong: list[str]) -> dict[str, Any]:
    """Where an SAE is attached: the stream behind a block is what the next one reads."""
    found = HOOK.fullmatch(str(hook))
    behind = {"hook_resid_post": 0, "hook_resid_pre": 1}
    if found is None or found[2] not in behind or int(found[1]) < behind[found[2]]:
        wrong.append(
            f"cfg.json has hook_name={hook!r}, expected the residual stream behind a block, such as "
            "'blocks.5.hook_resid_post'"
        )
        return {}
    return {"layer": int(found[1]) - behind[found[2]], "at": STREAM}
