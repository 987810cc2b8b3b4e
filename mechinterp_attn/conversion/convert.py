"""From a source model to its attention-only form."""

from __future__ import annotations

import os
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import torch

from mechinterp_attn.conversion.fidelity import check_conversion
from mechinterp_attn.conversion.fold import attention_only_weights
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.sources.bridge import read_bridge, read_object
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.sources.doors import is_saved, open_source
from mechinterp_attn.sources.saved import load_saved

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Mode = Literal["exact"]


@torch.no_grad()
def convert(
    source: TransformerBridge | Checkpoint, *, mlp: Mode = "exact", check: bool = True
) -> AttentionOnlyModel:
    """Rewrite a model so that every MLP neuron is an attention head (Huben & Morris 2023).

    Args:
        source: a native TransformerBridge, or a ``mia.Checkpoint``. It is left as it was, and the
            result shares no memory with it.
        mlp: ``"exact"``: one head per neuron, its pattern the activation's own gate; no error.
        check: run source and result on random tokens and compare logits and residual streams.

    Raises:
        UnsupportedModelError: with every part of the model that cannot be converted.
        CheckpointError: with every missing, misshapen, unknown or non-finite tensor.
        ConversionError: the result differs from the source; names the first sublayer that does.
    """
    _check_mode(mlp)
    checkpoint = _read(source)
    model = _build(checkpoint, mlp, own=True)
    if check:
        model.provenance["fidelity"] = check_conversion(model, source).summary()
    return model


@torch.no_grad()
def load(
    source: str | os.PathLike[str],
    *,
    mlp: Mode = "exact",
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
) -> AttentionOnlyModel:
    """A model by name or folder, in attention-only form, checked against its source.

    Args:
        source: the name of a bundled model (``mia.models()`` lists them), a folder made by
            ``model.save``, or a folder with a TL-convention checkpoint (config.json and
            model.safetensors).
        mlp: see ``convert``; a saved model keeps the mode it was converted with.
        dtype: of the weights; as stored by default, half precisions widened to float32.

    Raises:
        MechInterpError: no such model; the message lists the bundled names.
        UnsupportedModelError, CheckpointError, ConversionError: see ``convert``.
    """
    _check_mode(mlp)
    if is_saved(source):
        model = load_saved(Path(source), dtype)
    else:
        opened = open_source(source, dtype)
        checkpoint = _read(opened)
        model = _build(checkpoint, mlp, own=False)
        model.provenance["fidelity"] = check_conversion(model, opened).summary()
    return model if device is None else cast(AttentionOnlyModel, model.to(device))


def _build(checkpoint: Checkpoint, mlp: Mode, *, own: bool) -> AttentionOnlyModel:
    """``own``: copy the tensors that folding left as they were, so that the caller's stay apart."""
    spec = checkpoint.spec()
    weights = attention_only_weights(spec, checkpoint.state_dict)
    if own:
        given = {t.data_ptr() for t in checkpoint.state_dict.values()}
        weights = {n: t.clone() if t.data_ptr() in given else t for n, t in weights.items()}
    provenance = {
        "name": checkpoint.name,
        "mlp": mlp,
        "act_fn": spec.act_fn,
        "versions": {
            package: version(package) for package in ("mechinterp_attn", "transformer_lens", "torch")
        },
    }
    return AttentionOnlyModel(spec, weights, tokenizer=checkpoint.tokenizer, provenance=provenance)


def _read(source: Any) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if hasattr(source, "original_model") and hasattr(source, "adapter"):
        return read_bridge(source)
    if hasattr(source, "cfg") and callable(getattr(source, "state_dict", None)):
        return read_object(source)
    raise MechInterpError(
        f"cannot convert a {type(source).__name__}; give a TransformerBridge, an object with "
        "HookedTransformer's cfg and state_dict(), or mia.Checkpoint(cfg, state_dict), or pass a name or "
        "folder to mia.load"
    )


def _check_mode(mlp: str) -> None:
    if mlp != "exact":
        raise MechInterpError(f"mlp={mlp!r} is not a conversion mode; use 'exact'")
