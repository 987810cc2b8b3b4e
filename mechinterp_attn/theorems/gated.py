"""Gated MLPs, products, squared ReLU and SoLU as heads.

These go beyond the paper's text; each follows from its neuron head. A softmax head's output grows
at most linearly in its input, so a product of two coordinates has no exact head; it has one whose
relative error is ``eps^2 g^2 / 12``, as small as the number format allows.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.theorems.activations import SoftmaxActivation, softmax_activation
from mechinterp_attn.theorems.heads import SoftmaxHeads, Sublayer, check_precision
from mechinterp_attn.theorems.linear import clearing_head, scratch
from mechinterp_attn.theorems.masks import MaskRule, self_and_bias, self_only
from mechinterp_attn.theorems.neurons import bias_head, constant_key
from mechinterp_attn.theorems.stream import Layout

Terms = tuple[tuple[float, float, float], ...]


def glu_heads(
    layout: Layout,
    W_gate: Float[Tensor, "d_model neuron"],
    W_in: Float[Tensor, "d_model neuron"],
    W_out: Float[Tensor, "neuron d_model"],
    b_gate: Float[Tensor, " neuron"] | None = None,
    b_in: Float[Tensor, " neuron"] | None = None,
    *,
    terms: Terms = ((1.0, 1.0, 0.0),),
) -> SoftmaxHeads:
    """``(gate(x W_gate + b_gate) * (x W_in + b_in)) W_out`` for a gate that is a sum of sigmoids: one
    exact head per neuron and term.

    The neuron head with its query untied from its value: the query is the gate.

    Args:
        layout: the augmented stream the heads live in.
        W_gate, b_gate: the gate's weights and biases.
        W_in, b_in: the values' weights and biases.
        W_out: output directions, one row per neuron.
        terms: (scale, slope, shift) of ``gate(g) = sum scale sigmoid(slope g + shift)``; by default
            the sigmoid itself (GLU).
    """
    value = layout.affine(W_in, b_in)
    return SoftmaxHeads(
        layout=layout,
        W_Q=gate_queries(layout, layout.affine(W_gate, b_gate), terms),
        W_K=constant_key(layout, value),
        W_V=torch.stack([scale * value.T for scale, _, _ in terms], 1).flatten(0, 1)[..., None],
        W_O=layout.embed(W_out, layout.data, dim=1).repeat_interleave(len(terms), 0)[:, None],
        mask=self_and_bias,
    )


def gate_queries(
    layout: Layout, gate: Float[Tensor, "width neuron"], terms: Terms
) -> Float[Tensor, "head width 1"]:
    """``slope g + shift`` of every neuron and term, as what a head reads."""
    shifted = gate.new_zeros(layout.width)
    shifted[layout.constant] = 1
    queries = [slope * gate.T + shift * shifted for _, slope, shift in terms]
    return torch.stack(queries, 1).flatten(0, 1)[..., None]


def default_eps(dtype: torch.dtype) -> float:
    """The eps at which a product's two errors balance: ``eps^2`` of the series, ``1/eps`` of rounding.

    Raises:
        MechInterpError: a dtype below float32; nothing of the product would be left.
    """
    check_precision(
        dtype,
        "products as heads",
        "they are a difference of two large numbers, of which half precision keeps nothing; use "
        "model.float()",
    )
    return float(torch.finfo(dtype).eps ** (1 / 3))


def product_gate(g: Tensor, eps: float | None = None) -> Tensor:
    """``(4/eps) sigmoid(eps g) - 2/eps``: what the heads of a product put in the place of g."""
    small = default_eps(g.dtype) if eps is None else eps
    return 4 / small * torch.sigmoid(small * g) - 2 / small


def product_heads(
    layout: Layout,
    gate: Float[Tensor, "width neuron"],
    value: Float[Tensor, "width neuron"],
    write: range,
    *,
    eps: float | None = None,
) -> tuple[SoftmaxHeads, SoftmaxHeads]:
    """Heads that add ``g u`` to the coordinates ``write``: g and u linear in the row.

    ``(4/eps) u sigmoid(eps g) - (2/eps) u = g u (1 - eps^2 g^2 / 12 + ...)``: a neuron head and a
    self-only head for each product.

    Args:
        layout: the augmented stream the heads live in.
        write: the coordinates that the products are added to.
        gate, value: what reads g and u from an augmented row (``layout.affine``).
        eps: see ``default_eps``.
    """
    small = default_eps(gate.dtype) if eps is None else eps
    out = layout.embed(torch.eye(len(write), dtype=gate.dtype, device=gate.device), write, dim=1)[:, None]
    none = gate.new_zeros(gate.shape[1], layout.width, 0)
    rising = SoftmaxHeads(
        layout=layout,
        W_Q=small * gate.T[..., None],
        W_K=constant_key(layout, gate),
        W_V=4 / small * value.T[..., None],
        W_O=out,
        mask=self_and_bias,
    )
    constant_part = SoftmaxHeads(
        layout=layout, W_Q=none, W_K=none, W_V=-2 / small * value.T[..., None], W_O=out, mask=self_only
    )
    return rising, constant_part


def gated_mlp(
    layout: Layout,
    W_gate: Float[Tensor, "d_model neuron"],
    W_in: Float[Tensor, "d_model neuron"],
    W_out: Float[Tensor, "neuron d_model"],
    b_gate: Float[Tensor, " neuron"] | None = None,
    b_in: Float[Tensor, " neuron"] | None = None,
    b_out: Float[Tensor, " d_model"] | None = None,
    *,
    activation: str | SoftmaxActivation = "silu",
    eps: float | None = None,
) -> tuple[Sublayer, Sublayer]:
    """``x + (act(g) * u) W_out + b_out`` (SwiGLU, GeGLU) as two sublayers with scratch coordinates.

    ``act(g) u = sum_k scale_k (g u) sigmoid(slope_k g + shift_k)``: the first sublayer writes the
    product g u to scratch, the second weighs it, writes it out and clears the scratch.

    Args:
        layout: how the augmented stream is laid out.
        W_gate: ``[d_model, neuron]``.
        W_in: ``[d_model, neuron]``.
        W_out: ``[neuron, d_model]``.
        b_gate: ``[neuron]``, or none.
        b_in: ``[neuron]``, or none.
        b_out: ``[d_model]``, or none.
        activation: its name, or a sum of softmax gates.
        eps: how far the products may be off; chosen for the dtype by default.

    Raises:
        MechInterpError: too few scratch coordinates, a dtype below float32, or an activation
            outside the class.
    """
    act = softmax_activation(activation)
    at = scratch(layout, W_in.shape[1])
    gate, value = layout.affine(W_gate, b_gate), layout.affine(W_in, b_in)
    first = Sublayer(product_heads(layout, gate, value, at, eps=eps))
    second = [weighing_heads(layout, gate, at, W_out, act), clearing_head(layout, at, W_in)]
    if b_out is not None:
        second.append(bias_head(layout, b_out))
    return first, Sublayer(tuple(second))


def weighing_heads(
    layout: Layout,
    gate: Float[Tensor, "width neuron"],
    at: range,
    W_out: Float[Tensor, "neuron d_model"],
    act: SoftmaxActivation,
) -> SoftmaxHeads:
    """Heads that add ``(x[at] act(g) / g) W_out``: with ``g u`` at those coordinates, the gated MLP."""
    pick = layout.embed(torch.eye(len(at), dtype=gate.dtype, device=gate.device), at, dim=1)
    return SoftmaxHeads(
        layout=layout,
        W_Q=gate_queries(layout, gate, act.terms),
        W_K=constant_key(layout, pick),
        W_V=torch.stack([scale * pick for scale, _, _ in act.terms], 1).flatten(0, 1)[..., None],
        W_O=layout.embed(W_out, layout.data, dim=1).repeat_interleave(len(act.terms), 0)[:, None],
        mask=self_and_bias,
    )


def relu_squared_mlp(
    layout: Layout,
    W_in: Float[Tensor, "d_model neuron"],
    W_out: Float[Tensor, "neuron d_model"],
    b_in: Float[Tensor, " neuron"] | None = None,
    b_out: Float[Tensor, " d_model"] | None = None,
    *,
    sharpness: float = 1000.0,
    eps: float | None = None,
) -> tuple[Sublayer, Sublayer]:
    """``x + relu(x W_in + b_in)^2 W_out + b_out``: the gated MLP ``relu(z) * z`` of itself.

    ``z^2 sigmoid(k z)`` differs from ``relu(z)^2`` by at most ``0.483 / k^2``.

    Args:
        layout: how the augmented stream is laid out.
        W_in: ``[d_model, neuron]``.
        W_out: ``[neuron, d_model]``.
        b_in: ``[neuron]``, or none.
        b_out: ``[d_model]``, or none.
        sharpness: the k of ``SiLU(k z) / k`` in the place of the ReLU.
        eps: how far the products may be off; chosen for the dtype by default.
    """
    act = softmax_activation("relu", sharpness=sharpness)
    return gated_mlp(layout, W_in, W_in, W_out, b_in, b_in, b_out, activation=act, eps=eps)


def solu_heads(
    layout: Layout,
    W_in: Float[Tensor, "d_model neuron"],
    W_out: Float[Tensor, "neuron d_model"],
    b_in: Float[Tensor, " neuron"] | None = None,
) -> tuple[SoftmaxHeads, ...]:
    """``(z * softmax(z)) W_out`` with ``z = x W_in + b_in``, exactly, in one sublayer.

    Needs one persistent row per neuron. Head i sees its own row with score z_i and value z_i, and
    the persistent row of every other neuron j with score z_j and value 0: the weight on itself is
    ``softmax(z)_i``. The rank of W_QK is the number of neurons, and every head has its own mask.

    Args:
        layout: how the augmented stream is laid out.
        W_in: ``[d_model, neuron]``.
        W_out: ``[neuron, d_model]``.
        b_in: ``[neuron]``, or none.

    Raises:
        MechInterpError: the stream lacks the persistent rows, or the positions that tell them apart.
    """
    n = W_in.shape[1]
    if layout.persistent != n or layout.positions <= n:
        raise MechInterpError(
            f"SoLU of {n} neurons needs {n} persistent rows and a one-hot position for every row; this "
            f"stream has {layout.persistent} and {layout.positions}; use Layout(..., persistent={n}, "
            f"positions={n} + tokens)"
        )
    z = layout.affine(W_in, b_in)  # [width, neuron]
    out = layout.embed(W_out, layout.data, dim=1)
    one_hot = layout.embed(torch.eye(n, dtype=z.dtype), layout.positions_at[:n], dim=0)
    heads = []
    for i in range(n):
        key = one_hot.clone()  # persistent row j has key e_j, so its score is z_j
        key[layout.constant, i] = 1  # a real row has key e_i
        heads.append(
            SoftmaxHeads(
                layout=layout,
                W_Q=z[None],
                W_K=key[None],
                W_V=z[None, :, i : i + 1],
                W_O=out[None, i : i + 1],
                mask=_self_and_others(n, i),
            )
        )
    return tuple(heads)


def _self_and_others(n: int, i: int) -> MaskRule:
    """Every row sees itself and the n persistent rows but for row i."""

    def rule(rows: int) -> Bool[Tensor, "row row"]:
        mask = torch.eye(rows, dtype=torch.bool)
        mask[:, :n] = True
        mask[n:, i] = False
        return mask

    return rule
