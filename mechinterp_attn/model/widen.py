"""Models in half precision, computed in float32 where terms are added up."""

from __future__ import annotations

from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.half import HALF


def widened(model: AttentionOnlyModel) -> AttentionOnlyModel:
    """The same model with a float32 residual stream; the model itself where its weights are no halves.

    What stands around the blocks, the vocabulary's two matrices above all, is a float32 copy. The blocks
    share the model's own weights and compute in float32, one at a time (``half.through``).

    Args:
        model: the converted model, left as it is.
    """
    if model.W_E.dtype not in HALF:
        return model
    shared = "blocks." if not model.spec.dictionaries else ()  # an error is taken outside its block
    return AttentionOnlyModel(
        model.spec,
        {
            name: weight.detach() if name.startswith(shared) else weight.detach().float()
            for name, weight in model.state_dict().items()
        },
        tokenizer=model.tokenizer,
        provenance=model.provenance,
        shared=True,
        default_prepend_bos=bool(model.cfg.default_prepend_bos),
    )
