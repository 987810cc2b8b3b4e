"""From a source model to its attention-only form."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass, replace
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mechinterp_attn.conversion.check import Sample, check_conversion, sample_source
from mechinterp_attn.conversion.fidelity import compare
from mechinterp_attn.conversion.fold import attention_only_weights
from mechinterp_attn.conversion.modes import Mode, check_mode, mixtures_for
from mechinterp_attn.conversion.saved import load_saved
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.mapped import page_out
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.sources.bridge import read_bridge, read_object
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.sources.doors import is_saved, open_source

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@torch.no_grad()
def convert(
    source: TransformerBridge | Checkpoint | Any,
    *,
    mlp: Mode | str = "exact",
    components: int = 8,
    check: bool = True,
) -> AttentionOnlyModel:
    """Rewrite a model so that every MLP neuron is one or more attention heads (Huben & Morris 2023).

    Args:
        source: a TransformerBridge (raw or in compatibility mode), a ``mia.Checkpoint``, or any
            object with HookedTransformer's ``cfg`` and ``state_dict()``. It is left as it was. Weights
            that no norm touches are shared with it, not copied, until ``model.train()``.
        mlp: ``"exact"``: one head per neuron, its pattern the activation's own gate; no error.
            ``"silu"``: one softmax head per neuron, the paper's generalised SiLU; exact for SiLU.
            ``"mixture"``: ``components`` softmax heads per neuron, fitted to the activation.
        components: how many heads per neuron in mode ``"mixture"``; ``mia.mixtures()`` lists the fits.
        check: run source and result on random tokens and compare logits and residual streams. In the
            modes that approximate, the exact form is checked and the mode's own error recorded in
            ``model.provenance["fidelity"]``.

    Raises:
        UnsupportedModelError: with every part of the model that cannot be converted.
        CheckpointError: with every missing, misshapen, unknown or non-finite tensor.
        ConversionError: the result differs from the source; names the first sublayer that does.
    """
    check_mode(mlp, components)
    studied = _study(source, check=check)
    return _build(studied, mlp, components, owned=False)


@torch.no_grad()
def load(
    source: str | os.PathLike[str],
    *,
    mlp: Mode | str = "exact",
    components: int = 8,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    revision: str | None = None,
) -> AttentionOnlyModel:
    """A model by name or folder, in attention-only form, checked against its source.

    Args:
        device: where the weights go.
        source: the name of a bundled model (``mia.models()`` lists them), a folder made by
            ``model.save``, a folder with a TL-convention checkpoint (config.json and
            model.safetensors) or with a Hugging Face model, a ``.gguf`` file (needs the extra
            ``gguf``; its quantized weights become ordinary numbers), or a Hugging Face id
            (``owner/name``, or TransformerLens's short name such as ``gpt2``).
        mlp, components: see ``convert``; a saved model keeps the mode it was converted with.
        dtype: of the weights; as stored by default, half precisions widened to float32.
        revision: of a Hugging Face id: a branch, a tag or a commit.

    Raises:
        MechInterpError: no such model; the message lists the bundled names.
        UnsupportedModelError, CheckpointError, ConversionError: see ``convert``.
    """
    check_mode(mlp, components)
    if revision is None and is_saved(source):
        model = load_saved(Path(source), dtype)
    else:
        studied = _study(open_source(source, dtype, revision), check=True)
        gc.collect()  # nobody else holds the source: its weights go as they are folded
        model = _build(studied, mlp, components, owned=True)
    return model if device is None else cast(AttentionOnlyModel, model.to(device))


@dataclass(frozen=True, eq=False)
class _Studied:
    """All that building needs to know of a source."""

    checkpoint: Checkpoint
    spec: Spec
    sample: Sample | None
    provenance: dict[str, Any]


def _study(source: Any, *, check: bool) -> _Studied:
    checkpoint = _read(source)
    spec = checkpoint.spec()
    packages = ("mechinterp_attn", "transformer_lens", "transformers", "torch")
    provenance: dict[str, Any] = {
        "name": checkpoint.name,
        "source": _description(source),
        "act_fn": spec.act_fn,
        "versions": {package: version(package) for package in packages},
    }
    config = getattr(getattr(source, "original_model", None), "config", None)
    if revision := getattr(config, "_commit_hash", None):  # of the Hugging Face repository
        provenance["revision"] = revision
    if check and (differs := checkpoint.cfg.get("bridge_differs")):
        provenance["compared_with"] = f"a dense model of its own weights: {differs}"
    return _Studied(
        checkpoint, spec, sample_source(source, checkpoint, spec) if check else None, provenance
    )


def _build(studied: _Studied, mlp: str, components: int, *, owned: bool) -> AttentionOnlyModel:
    checkpoint, spec, sample = studied.checkpoint, studied.spec, studied.sample
    state = dict(checkpoint.state_dict)
    if owned:
        checkpoint.forget()
    weights = attention_only_weights(
        spec, state, spend=(lambda name: page_out(state.pop(name))) if owned else None
    )
    mixtures = mixtures_for(spec, weights, mlp=mlp, components=components, name=checkpoint.name)
    provenance = studied.provenance | {"mlp": mlp}
    if mixtures:
        provenance["components"] = len(mixtures[0][0])

    def made(spec: Spec) -> AttentionOnlyModel:
        return AttentionOnlyModel(
            spec,
            weights,
            tokenizer=checkpoint.tokenizer,
            provenance=provenance,
            shared=not owned,
            default_prepend_bos=checkpoint.prepends_bos,
        )

    fidelity = None if sample is None else check_conversion(made(spec), sample)
    model = made(replace(spec, mixtures=mixtures))
    if sample is not None and mixtures:
        fidelity = compare(model, sample.runs[-1])
    if model.tokenizer is not None:
        model.provenance["special_tokens"] = model.added_text
    if fidelity is not None:
        model.provenance["fidelity"] = fidelity.summary()
    return model


def _description(source: Any) -> str:
    """What kind of source it was: ``TransformerBridge (GPT2LMHeadModel)``, ``Checkpoint``, ..."""
    architecture = getattr(getattr(source, "cfg", None), "architecture", None)
    kind = type(source).__name__
    return f"{kind} ({architecture})" if architecture else kind


def _read(source: Any) -> Checkpoint:
    if isinstance(source, Checkpoint):
        return source
    if isinstance(source, AttentionOnlyModel):
        raise MechInterpError(
            f"{source.provenance.get('name', 'this model')} is already converted (mode {source.mode!r}); "
            "use it as it is, or convert its source again for another mode"
        )
    if hasattr(source, "original_model") and hasattr(source, "adapter"):
        return read_bridge(source)
    if hasattr(source, "cfg") and callable(getattr(source, "state_dict", None)):
        return read_object(source)
    raise MechInterpError(
        f"cannot convert a {type(source).__name__}; give a TransformerBridge, an object with "
        "HookedTransformer's cfg and state_dict(), or mia.Checkpoint(cfg, state_dict), or pass a name or "
        "folder to mia.load"
    )
