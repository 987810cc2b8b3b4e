"""Models in half precision, computed in float32 where terms are added up."""

from __future__ import annotations

import torch

from mechinterp_attn.model.attention_only import AttentionOnlyModel

HALF = (torch.bfloat16, torch.float16)


def widened(model: AttentionOnlyModel) -> AttentionOnlyModel:
    """The same model with float32 weights, a copy; the model itself where its weights are no halves.

    Every bfloat16 or float16 number is a float32 number, so nothing is rounded.

    Args:
        model: the converted model, left as it is.
    """
    if model.W_E.dtype not in HALF:
        return model
    return AttentionOnlyModel(
        model.spec,
        {name: weight.detach().float() for name, weight in model.state_dict().items()},
        tokenizer=model.tokenizer,
        provenance=model.provenance,
        default_prepend_bos=bool(model.cfg.default_prepend_bos),
    )
