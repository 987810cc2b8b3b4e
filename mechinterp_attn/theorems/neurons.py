"""MLP neurons as heads of rank 1, MLP sublayers as sums of them, and biases as heads.

A neuron with input direction v1, bias b1 and output direction v2 is the head with
``W_QK = slope [v1; b1] e_const^T`` and ``W_OV = scale [v1; b1] v2^T`` that sees itself and the bias
token: scores (slope z, 0), value scale z (Huben & Morris 2023, theorem on MLP neurons).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.theorems.activations import SoftmaxActivation, softmax_activation
from mechinterp_attn.theorems.heads import SoftmaxHeads, Sublayer
from mechinterp_attn.theorems.masks import self_and_bias, self_only
from mechinterp_attn.theorems.stream import Layout

Activation = str | SoftmaxActivation


def neuron_heads(
    layout: Layout,
    W_in: Float[Tensor, "columns neuron"],
    W_out: Float[Tensor, "neurons out_columns"],
    b_in: Float[Tensor, " neuron"] | None = None,
    *,
    activation: Activation = "silu",
    read: range | None = None,
    write: range | None = None,
) -> SoftmaxHeads:
    """The l neurons of ``act(x @ W_in + b_in) @ W_out`` as l heads of rank 1 (paper, A1).

    Args:
        layout: the augmented stream the heads live in.
        W_in: input directions, one column per neuron.
        W_out: output directions, one row per neuron.
        b_in: input biases; none by default.
        activation: SiLU is exact, GELU and ReLU by the paper's parameters; an activation of K terms
            gives K heads per neuron, neuron by neuron.
        read, write: coordinates that W_in reads and W_out writes; the original ones by default.

    Raises:
        MechInterpError: shapes that do not fit, or an activation outside the class.
    """
    if W_in.shape[1] != W_out.shape[0]:
        raise MechInterpError(
            f"W_in {tuple(W_in.shape)} has {W_in.shape[1]} neurons and W_out {tuple(W_out.shape)} has "
            f"{W_out.shape[0]}"
        )
    act = softmax_activation(activation)
    z = layout.affine(W_in, b_in, read).T  # [neuron, width]
    shift = z.new_zeros(layout.width)
    shift[layout.constant] = 1
    query = torch.stack([slope * z + b * shift for _, slope, b in act.terms], dim=1).flatten(0, 1)
    value = torch.stack([scale * z for scale, _, _ in act.terms], dim=1).flatten(0, 1)
    out = layout.embed(W_out, layout.data if write is None else write, dim=1)
    return SoftmaxHeads(
        layout=layout,
        W_Q=query[..., None],
        W_K=constant_key(layout, z),
        W_V=value[..., None],
        W_O=out.repeat_interleave(len(act.terms), 0)[:, None],
        mask=self_and_bias,
    )


def constant_key(layout: Layout, like: Tensor) -> Float[Tensor, "1 width 1"]:
    """``e_const``: the key that is 1 on real tokens and 0 on the bias token, shared by all heads."""
    key = like.new_zeros(1, layout.width, 1)
    key[:, layout.constant] = 1
    return key


def bias_head(layout: Layout, b: Float[Tensor, " columns"], *, write: range | None = None) -> SoftmaxHeads:
    """A bias added to every real row, as one self-only head with ``W_QK = 0``, ``W_OV = e_const b``.

    Args:
        layout: how the augmented stream is laid out.
        b: the bias, as wide as ``write``.
        write: coordinates written; the original ones by default.
    """
    value = b.new_zeros(1, layout.width, 1)
    value[:, layout.constant] = 1
    out = layout.embed(b[None], layout.data if write is None else write, dim=1)
    none = b.new_zeros(1, layout.width, 0)
    return SoftmaxHeads(layout=layout, W_Q=none, W_K=none, W_V=value, W_O=out[None], mask=self_only)


def mlp_sublayer(
    layout: Layout,
    W_in: Float[Tensor, "d_model neuron"],
    W_out: Float[Tensor, "neuron d_model"],
    b_in: Float[Tensor, " neuron"] | None = None,
    b_out: Float[Tensor, " d_model"] | None = None,
    *,
    activation: Activation = "silu",
) -> Sublayer:
    """``X + act(X W_in + b_in) W_out + b_out`` as one sublayer of heads (paper, A1).

    Args:
        layout: how the augmented stream is laid out.
        W_in: ``[d_model, neuron]``.
        W_out: ``[neuron, d_model]``.
        b_in: ``[neuron]``, or none.
        b_out: ``[d_model]``, or none.
        activation: its name, or a sum of softmax gates.
    """
    stacks = [neuron_heads(layout, W_in, W_out, b_in, activation=activation)]
    if b_out is not None:
        stacks.append(bias_head(layout, b_out))
    return Sublayer(tuple(stacks))
