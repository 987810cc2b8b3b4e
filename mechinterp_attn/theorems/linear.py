"""Row-wise linear maps and activation functions as heads, and an MLP made of the two.

Each of an MLP's three steps is a sublayer of attention heads by itself (Huben & Morris 2023,
theorems on linear maps and on activation functions); put side by side they give the MLP once more,
through scratch coordinates, where ``neurons.mlp_sublayer`` needs one sublayer and none.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.theorems.activations import SoftmaxActivation, softmax_activation
from mechinterp_attn.theorems.heads import SoftmaxHeads, Sublayer
from mechinterp_attn.theorems.masks import self_and_bias, self_only
from mechinterp_attn.theorems.neurons import bias_head, constant_key
from mechinterp_attn.theorems.stream import Layout


def linear_heads(
    layout: Layout,
    W: Float[Tensor, "columns out_columns"],
    *,
    d_head: int | None = None,
    read: range | None = None,
    write: range | None = None,
) -> SoftmaxHeads:
    """Heads that add ``x[read] @ W`` to ``x[write]`` of their own row (paper, A2).

    Self-only, ``W_QK = 0``; W is split by its singular vectors into heads of dimension d_head, as
    many as its rank asks for.

    Args:
        read: coordinates read; the original ones by default.
        write: coordinates written; those read by default.
        layout: the augmented stream the heads live in.
        W: the linear map; rows multiply from the left.
        d_head: dimension of each head; by default one head of the full width.

    Raises:
        MechInterpError: d_head below 1, or W does not fit the coordinates.
    """
    if d_head is not None and d_head < 1:
        raise MechInterpError(f"d_head={d_head}; expected at least 1")
    U, S, V = torch.linalg.svd(W, full_matrices=False)
    negligible = S.max() * max(W.shape) * torch.finfo(W.dtype).eps
    rank = max(1, int(S.gt(negligible).sum()))
    size = d_head or rank
    n_heads = -(-rank // size)
    pad = n_heads * size - rank
    left = torch.nn.functional.pad((U * S)[:, :rank], (0, pad))
    right = torch.nn.functional.pad(V[:rank], (0, 0, 0, pad))
    left = layout.embed(left, layout.data if read is None else read, dim=0)
    right = layout.embed(right, layout.data if write is None else write, dim=1)
    none = W.new_zeros(n_heads, layout.width, 0)
    return SoftmaxHeads(
        layout=layout,
        W_Q=none,
        W_K=none,
        W_V=left.unflatten(1, (n_heads, size)).transpose(0, 1),
        W_O=right.unflatten(0, (n_heads, size)),
        mask=self_only,
    )


def linear_sublayer(
    layout: Layout,
    W: Float[Tensor, "d_model d_model"],
    *,
    d_head: int | None = None,
    skip: bool = True,
) -> Sublayer:
    """``X -> X W`` as a sublayer: ``W_OV = W - I`` beside the skip, W without it (paper, A2).

    Without the skip the constant and the other coordinates of the augmented stream are not carried
    on: it is the last sublayer of its kind.

    Args:
        layout: how the augmented stream is laid out.
        W: ``[d_model, d_model]``.
        d_head: the width of each head; all in one by default.
        skip: whether the sublayer keeps its skip connection.
    """
    if skip:
        W = W - torch.eye(len(W), dtype=W.dtype, device=W.device)
    return Sublayer((linear_heads(layout, W, d_head=d_head),), skip=skip)


def activation_heads(
    layout: Layout, at: range, *, activation: str | SoftmaxActivation = "silu", dtype: torch.dtype
) -> tuple[SoftmaxHeads, ...]:
    """Heads that turn ``x[k]`` into ``act(x[k])`` in place, for every coordinate k of ``at`` (A3).

    Beside the skip the heads must write ``act(z) - z``. Where ``a1 a2 = 1`` (SiLU, GELU, ReLU) that
    is ``-z sigmoid(-a2 z)``: one head per coordinate that removes its own token's value. Otherwise
    one head per coordinate and term, and one self-only head for ``-z``.

    Args:
        layout: how the augmented stream is laid out.
        at: the coordinates to transform.
        activation: its name, or a sum of softmax gates.
        dtype: the arithmetic.
    """
    act = softmax_activation(activation)
    n = len(at)
    pick = layout.embed(torch.eye(n, dtype=dtype), at, dim=1)  # [coordinate, width]
    key = constant_key(layout, pick)
    in_place = len(act.terms) == 1 and act.terms[0][0] == 1.0 and act.terms[0][2] == 0.0
    if in_place:
        slope = act.terms[0][1]
        removing = SoftmaxHeads(
            layout=layout,
            W_Q=-slope * pick[..., None],
            W_K=key,
            W_V=-pick[..., None],
            W_O=pick[:, None],
            mask=self_and_bias,
        )
        return (removing,)
    constant = key[0, :, 0]
    query = torch.stack([slope * pick + b * constant for _, slope, b in act.terms], 1).flatten(0, 1)
    value = torch.stack([scale * pick for scale, _, _ in act.terms], 1).flatten(0, 1)
    adding = SoftmaxHeads(
        layout=layout,
        W_Q=query[..., None],
        W_K=key,
        W_V=value[..., None],
        W_O=pick.repeat_interleave(len(act.terms), 0)[:, None],
        mask=self_and_bias,
    )
    return adding, clearing_head(layout, at, pick)


def clearing_head(layout: Layout, at: range, like: Tensor) -> SoftmaxHeads:
    """One self-only head that writes ``-x[at]``: beside the skip, it sets those coordinates to 0.

    Args:
        layout: the augmented stream the heads live in.
        at: the coordinates to clear.
        like: a tensor of the dtype and device that the head is to have.
    """
    one = torch.eye(len(at), dtype=like.dtype, device=like.device)
    none = like.new_zeros(1, layout.width, 0)
    return SoftmaxHeads(
        layout=layout,
        W_Q=none,
        W_K=none,
        W_V=layout.embed(-one, at, dim=0)[None],
        W_O=layout.embed(one, at, dim=1)[None],
        mask=self_only,
    )


def three_sublayers(
    layout: Layout,
    W_in: Float[Tensor, "d_model neuron"],
    W_out: Float[Tensor, "neuron d_model"],
    b_in: Float[Tensor, " neuron"] | None = None,
    b_out: Float[Tensor, " d_model"] | None = None,
    *,
    activation: str | SoftmaxActivation = "silu",
    d_head: int | None = None,
) -> tuple[Sublayer, ...]:
    """``X + act(X W_in + b_in) W_out + b_out`` as linear, activation, linear: three sublayers.

    The hidden layer stands in scratch coordinates, which are zero again afterwards.

    Args:
        layout: how the augmented stream is laid out.
        W_in: ``[d_model, neuron]``.
        W_out: ``[neuron, d_model]``.
        b_in: ``[neuron]``, or none.
        b_out: ``[d_model]``, or none.
        activation: its name, or a sum of softmax gates.
        d_head: the width of each head; all in one by default.

    Raises:
        MechInterpError: the stream has fewer scratch coordinates than there are neurons.
    """
    hidden = scratch(layout, W_in.shape[1])
    first = [linear_heads(layout, W_in, d_head=d_head, write=hidden)]
    if b_in is not None:
        first.append(bias_head(layout, b_in, write=hidden))
    last = [
        linear_heads(layout, W_out, d_head=d_head, read=hidden),
        clearing_head(layout, hidden, W_in),
    ]
    if b_out is not None:
        last.append(bias_head(layout, b_out))
    middle = activation_heads(layout, hidden, activation=activation, dtype=W_in.dtype)
    return Sublayer(tuple(first)), Sublayer(middle), Sublayer(tuple(last))


def scratch(layout: Layout, n: int) -> range:
    """The first n scratch coordinates.

    Raises:
        MechInterpError: there are fewer.
    """
    if layout.scratch < n:
        raise MechInterpError(
            f"this construction needs {n} scratch coordinates and the stream has {layout.scratch}; use "
            f"Layout(..., scratch={n})"
        )
    return layout.scratch_at[:n]
