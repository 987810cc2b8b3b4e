"""A dictionary's features as heads of a model, in place of a layer's neurons or of the stream behind it."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from mechinterp_attn.conversion.dictionary import MLP, PLACES, STREAM, Dictionary
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.spec import At, Attached


def attach(
    model: AttentionOnlyModel, dictionary: Dictionary, *, layer: int, at: str = MLP
) -> AttentionOnlyModel:
    """The same model with a dictionary's features as heads, ``L5F1234``.

    What the dictionary does not reconstruct is one more head, the error ``L5E0``, so the new model gives
    the logits of the old one. A patched feature changes what it writes and nothing else: the error stays
    what it is. A transcoder's features stand in place of a layer's neurons, which are inside the error and
    no longer heads; its linear part is the head ``L5S0``. Features of an SAE on the residual stream stand
    behind the block: they and the error write the stream anew, so that all that was written before reaches
    what comes behind through them.

    Args:
        model: the converted model; unchanged. The new one shares its weights.
        dictionary: from ``Dictionary.load`` or made of tensors. A transcoder reads the MLP's normalised
            input in front of the norm's gain, which conversion folds into weights: see
            ``Dictionary.folded``.
        layer: where.
        at: "mlp": from what the MLP reads to what it writes, the norm behind it (Gemma 2) included; or
            "resid_post": the residual stream behind the block.

    Returns:
        a new model; attach to it again for more layers.

    Raises:
        MechInterpError: another width, layer, hook point or model than the dictionary's; all that is wrong.
    """
    spec, card = model.spec, dictionary.card
    wrong = []
    if at not in PLACES:
        wrong.append(f"at={at!r}, expected {' or '.join(map(repr, PLACES))}")
    if at == MLP and spec.attn_only:
        wrong.append("this model has no MLPs")
    elif not 0 <= layer < spec.n_layers:
        wrong.append(f"layer={layer}, expected 0 to {spec.n_layers - 1}")
    elif spec.dictionary(layer) is not None:
        wrong.append(f"layer {layer} has a dictionary already; attach to the model without it")
    if at == STREAM and dictionary.W_skip is not None:
        wrong.append("a dictionary with a linear part, which one on the stream cannot have")
    if at == STREAM and spec.stream_norm is not None:
        wrong.append("this model has norms over the residual stream; at='resid_post' needs one without")
    if dictionary.d_model != spec.d_model:
        wrong.append(f"the dictionary has width {dictionary.d_model}, the model {spec.d_model}")
    given = {"layer": layer, "at": at, "model": model.provenance.get("name")}
    wrong += [
        f"the dictionary's card says {name} {card[name]!r}, not {value!r}"
        for name, value in given.items()
        if card.get(name) is not None and card[name] != value
    ]
    if wrong:
        raise MechInterpError(listing("the dictionary cannot be attached", wrong))
    place = cast(At, at)
    attached = Attached(layer, dictionary.n_features, dictionary.k, dictionary.W_skip is not None, place)
    own = _weights(dictionary, layer, model.W_E)
    described = {key: value for key, value in card.items() if isinstance(value, str | int | float | bool)}
    attachments = {**model.provenance.get("dictionaries", {}), str(layer): described}
    return AttentionOnlyModel(
        replace(spec, dictionaries=(*spec.dictionaries, attached)),
        {name: tensor.detach() for name, tensor in model.state_dict().items()} | own,
        tokenizer=model.tokenizer,
        provenance={**model.provenance, "dictionaries": attachments},
        shared=True,
        default_prepend_bos=bool(model.cfg.default_prepend_bos),
    )


def _weights(dictionary: Dictionary, layer: int, like: Tensor) -> dict[str, Tensor]:
    threshold = dictionary.threshold
    tensors = {
        "features.W_in": dictionary.W_enc,
        "features.b_in": dictionary.b_enc,
        "features.W_out": dictionary.W_dec,
        "features.b_out": dictionary.b_dec,
        "features.threshold": torch.zeros_like(dictionary.b_enc) if threshold is None else threshold,
    }
    if dictionary.W_skip is not None:
        tensors["skip.W_skip"] = dictionary.W_skip
    return {f"blocks.{layer}.{name}": t.detach().to(like, copy=True) for name, t in tensors.items()}
