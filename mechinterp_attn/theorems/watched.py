"""Literal heads through the hooks of their banks: the same sums, step by step, where somebody looks.

A hook sees what it would see on the practical form: real rows only, one of every group of heads that
share keys, a neuron's weight on its own token. What an edit leaves alone stays literal: dense scores,
the bias token's row, masks in the weights.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.model.attention import AttentionBank
from mechinterp_attn.model.neurons import MLPNames
from mechinterp_attn.theorems.built import Neurons
from mechinterp_attn.theorems.gated import default_eps
from mechinterp_attn.theorems.heads import PATTERN_BYTES, SoftmaxHeads, project

Rows = Float[Tensor, "batch row head"]


def through_attention(
    bank: AttentionBank, stack: SoftmaxHeads, read: Float[Tensor, "batch row width"]
) -> Float[Tensor, "batch row width"]:
    """``stack(read)`` through the bank's hooks: real rows, [batch, pos, head, d_head]."""
    scale = bank.scale
    q = _real(bank.point("q"), project(read, stack.W_Q) * scale) / scale
    k = _real(bank.hook_k, project(read, stack.W_K), bank.group)
    v = _real(bank.point("v"), project(read, stack.W_V), bank.group)
    if stack.turn is not None:
        q = _real(bank.hook_rot_q, stack.turn(q) * scale) / scale
        k = _real(bank.hook_rot_k, stack.turn(k), bank.group)
    scores = stack.masked(stack.penalised(q @ k.mT, read))
    pattern = _corner(bank.hook_attn_scores, scores).softmax(-1)
    pattern = _corner(bank.point("pattern"), pattern)
    z = _real(bank.point("z"), pattern @ v)
    return torch.einsum("bhnr,hrd->bnd", z, stack.W_O)


def through_neurons(
    built: Neurons,
    names: MLPNames,
    products: Sequence[SoftmaxHeads],
    heads: SoftmaxHeads,
    read: Float[Tensor, "batch row width"],
) -> Float[Tensor, "batch row width"]:
    """The neurons' heads through the bank's hooks, [batch, pos, head], and TransformerLens's.

    ``products`` are the heads of the sublayer in front, if the neurons have one; what they write to
    scratch is read here and left out of the result.
    """
    bank, layout = built.bank, heads.layout
    gate, value = built.reads(layout)
    query = moved = _rows(names.hook_pre, read @ gate)
    if bank.gated:
        moved = _rows(names.hook_pre_linear, read @ value)
    scales, slopes, shifts = (read.new_tensor(c) for c in zip(*built.activation.terms, strict=True))
    constant = read[..., layout.constant, None, None]

    def scores(g: Tensor) -> Rows:
        return (g[..., None] * slopes + constant * shifts).flatten(-2)

    def per_head(u: Tensor) -> Rows:
        return (u[..., None] * scales).flatten(-2)

    if products:
        query, moved = _rows(bank.point("q"), query), _rows(bank.point("v"), moved)
        small = default_eps(read.dtype)
        rising, steady = products
        own, made = _attend(rising, read, small * query, 4 / small * moved)
        own_steady, made_steady = _attend(steady, read, None, -2 / small * moved)
        weights, written = _attend(heads, read, scores(query), per_head(made + made_steady))
        own = (4 / small * own - 2 / small * own_steady) * (
            weights.unflatten(-1, (-1, len(scales))) @ scales
        )
        written = written.unflatten(-1, (-1, len(scales))).sum(-1)
    else:
        query, moved = _rows(bank.point("q"), scores(query)), _rows(bank.point("v"), per_head(moved))
        own, written = _attend(heads, read, query, moved)
    if bank.point("pattern").has_hooks():  # what an edit takes from the token, the bias token gets
        change = _rows(bank.point("pattern"), own) - own
        written = written + change * (moved - moved[:, :1])
    written = _rows(bank.point("z"), written)
    post = _rows(names.hook_post, written.unflatten(-1, (bank.n_neurons, -1)).sum(-1))
    return post @ heads.W_O[:: len(scales), 0]


def _attend(stack: SoftmaxHeads, read: Tensor, q: Rows | None, v: Rows) -> tuple[Rows, Rows]:
    """Heads of dimension 1 with these queries and values: their weight on their own row, and what they
    take in; dense patterns of a few heads at a time. Queries None: scores of 0.
    """
    k = project(read, stack.W_K)
    own, taken = [], []
    size = read[..., 0].numel() * read.shape[-2] * read.element_size()
    for part in torch.arange(len(stack), device=read.device).split(max(1, PATTERN_BYTES // size)):
        values = v[..., part].transpose(1, 2)[..., None]
        if q is None:
            scores = (values @ values.mT).mul_(0)
        else:
            scores = q[..., part].transpose(1, 2)[..., None] @ k.mT
        pattern = stack.masked(stack.penalised(scores, read)).softmax(-1)
        own.append(pattern.diagonal(dim1=-2, dim2=-1))
        taken.append((pattern @ values)[..., 0])
    return torch.cat(own, 1).transpose(1, 2), torch.cat(taken, 1).transpose(1, 2)


def _rows(hook: HookPoint, x: Rows) -> Rows:
    """``[batch, row, head]`` through a hook that sees the real rows."""
    return torch.cat([x[:, :1], hook(x[:, 1:])], dim=1) if hook.has_hooks() else x


def _real(hook: HookPoint, x: Tensor, group: int = 1) -> Tensor:
    """``[batch, head, row, rank]`` through a hook that sees ``[batch, pos, head, rank]`` of the real
    rows (one of every ``group`` heads that share keys).
    """
    if not hook.has_hooks():
        return x
    seen = hook(x[:, ::group, 1:].transpose(1, 2))
    x = x.clone()
    x[:, :, 1:] = seen.transpose(1, 2).repeat_interleave(group, 1)
    return x


def _corner(hook: HookPoint, x: Tensor) -> Tensor:
    """``[batch, head, row, row]`` through a hook that sees the real rows and columns."""
    if not hook.has_hooks():
        return x
    x = x.clone()
    x[..., 1:, 1:] = hook(x[..., 1:, 1:])
    return x
