"""Where circuits begin and end: the embedding as the first head reads it, and logits as softmax sees them.

A norm behind the embedding (BERT) is folded in as norms in front of heads are: its gain, centring and
bias, its scale left out. Where every reader of the residual stream centres it (LayerNorm), so are the
vectors that go in. Softmax does not see what is added to all logits alike, so the unembedding is taken
against its average over the vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.given import integers

CHUNK = 4096  # tokens whose embedding is widened to float64 at a time
BIASES = "query biases take part; key biases, which shift a query's scores alike, and value biases do not"
LOGITS = "against the average over the vocabulary, which softmax does not see"


def norms_note(model: AttentionOnlyModel) -> str:
    """What circuits make of the model's norms, for a receipt."""
    spec = model.spec
    note = "gains folded, scales left out"
    if spec.stream_norm is not None:
        note += "; norms over the stream left out with the layers in between"
    left_out = {
        "the prediction head": spec.prediction_head,
        "clamping of queries, keys and values": spec.qkv_clip is not None,
        "the growth of queries with their position": spec.query_growth is not None,
        "the router's weights": bool(spec.experts),
        "the order of turning and norming queries and keys": spec.qk_norm_last,
    }
    return note + "".join(f"; {part} left out" for part, present in left_out.items() if present)


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


def alignment(model: AttentionOnlyModel, align: Sequence[int] | Tensor | None) -> Int[Tensor, " output"]:
    """The input token that each output, from the first on, stands for.

    Args:
        align: those ids; None: the first ones, one for one, as many as both vocabularies have.

    Raises:
        MechInterpError: more of them than outputs, none, or ids outside the vocabulary.
    """
    spec, device = model.spec, model.W_E.device
    if align is None:
        return torch.arange(min(spec.d_vocab, spec.d_vocab_out), device=device)
    ids = integers(align)
    most = f"1 to {spec.d_vocab_out} ids of input tokens 0..{spec.d_vocab - 1}, one for each output"
    if ids.ndim != 1 or not 1 <= len(ids) <= spec.d_vocab_out or ids.dtype.is_floating_point:
        raise MechInterpError(f"align has shape {tuple(ids.shape)} and dtype {ids.dtype}; expected {most}")
    if int(ids.min()) < 0 or int(ids.max()) >= spec.d_vocab:
        raise MechInterpError(f"align has ids from {int(ids.min())} to {int(ids.max())}; expected {most}")
    return ids.to(device, torch.long)


def alignment_note(model: AttentionOnlyModel, align: Sequence[int] | Tensor | None) -> dict[str, str]:
    """Which outputs are compared with which inputs, for a receipt; nothing where they are the same."""
    n = len(alignment(model, align))
    if align is not None:
        return {"alignment": f"{n:,} outputs with the input tokens given in align"}
    if model.spec.d_vocab == model.spec.d_vocab_out:
        return {}
    return {"alignment": f"outputs 0..{n - 1} with input tokens 0..{n - 1} (align= names others)"}


def unembed_embed(
    model: AttentionOnlyModel, inputs: Int[Tensor, " output"]
) -> Float[Tensor, "d_model d_model"]:
    """``W_U @ W_E`` as softmax and heads see them: its eigenvalues with ``W_OV`` between are those of
    ``W_E W_OV W_U``. Float64, a few thousand tokens at a time.

    Args:
        model: the converted model.
        inputs: from ``alignment``: which token's embedding goes with each output.
    """
    W_U, W_E, mean = model.W_U.detach(), model.W_E.detach(), average_unembedding(model)[:, None]
    out = mean.new_zeros(len(W_U), len(W_U))
    for a in range(0, len(inputs), CHUNK):
        part = slice(a, min(a + CHUNK, len(inputs)))
        out += (W_U[:, part].double() - mean) @ as_read(model, W_E[inputs[part]].double())
    return out


def seen_width(model: AttentionOnlyModel) -> int:
    """Dimensions of the residual stream that its readers see: one less where all of them centre it."""
    return model.spec.d_model - (1 if model.spec.mean_unseen else 0)
