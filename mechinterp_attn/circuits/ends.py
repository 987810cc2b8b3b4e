"""Where circuits begin and end: the embedding as the first head reads it, and logits as softmax sees them.

A norm behind the embedding (BERT) is folded in as norms in front of heads are: its gain, centring and
bias, its scale left out. Where every reader of the residual stream centres it (LayerNorm), so are the
vectors that go in. Softmax does not see what is added to all logits alike, so the unembedding is taken
against its average over the vocabulary.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.model.attention_only import AttentionOnlyModel

CHUNK = 4096  # tokens whose embedding is widened to float64 at a time
BIASES = "query biases take part; key biases, which shift a query's scores alike, and value biases do not"
LOGITS = "against the average over the vocabulary, which softmax does not see"


def norms_note(model: AttentionOnlyModel) -> str:
    """What circuits make of the model's norms, for a receipt."""
    spec = model.spec
    note = "gains folded, scales left out"
    if spec.stream_norm is not None:
        note += "; norms over the stream left out with the layers in between"
    if spec.prediction_head:
        note += "; the prediction head left out"
    return note


def as_read(
    model: AttentionOnlyModel, x: Float[Tensor, "*n d_model"], *, bias: bool = False
) -> Float[Tensor, "*n d_model"]:
    """Rows of ``W_E`` or ``W_pos`` as heads read them.

    Args:
        bias: add what a norm behind the embedding adds to every token.
    """
    if model.spec.embed_norm is not None:
        norm = model.embed_norm
        x = norm.freeze(None).turn(x)
        if bias and norm.b is not None:
            x = x + norm.b.detach().to(x.dtype)
    return x - x.mean(-1, keepdim=True) if model.spec.mean_unseen else x


def embedding(
    model: AttentionOnlyModel, ids: Tensor | None = None, *, bias: bool = False
) -> Float[Tensor, "token d_model"]:
    """``as_read`` of some tokens' embeddings, or of all, in float64."""
    W_E = model.W_E.detach()
    return as_read(model, (W_E if ids is None else W_E[ids]).double(), bias=bias)


def average_unembedding(model: AttentionOnlyModel) -> Float[Tensor, " d_model"]:
    """The mean of ``W_U`` over the vocabulary, float64."""
    parts = [part.sum(1, dtype=torch.float64) for part in model.W_U.detach().split(CHUNK, 1)]
    return torch.stack(parts).sum(0) / model.spec.d_vocab_out


def unembed_embed(model: AttentionOnlyModel) -> Float[Tensor, "d_model d_model"]:
    """``W_U @ W_E`` as softmax and heads see them: its eigenvalues with ``W_OV`` between are those of
    ``W_E W_OV W_U``. Float64, a few thousand tokens at a time.
    """
    W_U, W_E, mean = model.W_U.detach(), model.W_E.detach(), average_unembedding(model)[:, None]
    out = mean.new_zeros(len(W_U), len(W_U))
    for a in range(0, len(W_E), CHUNK):
        part = slice(a, a + CHUNK)
        out += (W_U[:, part].double() - mean) @ as_read(model, W_E[part].double())
    return out


def seen_width(model: AttentionOnlyModel) -> int:
    """Dimensions of the residual stream that its readers see: one less where all of them centre it."""
    return model.spec.d_model - (1 if model.spec.mean_unseen else 0)
