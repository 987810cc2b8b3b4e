"""A plain dense transformer with MLPs: what a TL-convention checkpoint computes, written directly.

Used to check conversions of checkpoints. It shares no code with the banks on purpose: norms keep
their gains, the MLP is an MLP, attention is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import UnsupportedModelError
from mechinterp_attn.model.spec import NormKind, Spec
from mechinterp_attn.sources.checkpoint import Checkpoint

_ACT: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": torch.relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_python": F.gelu,
    **dict.fromkeys(
        ("gelu_new", "gelu_fast", "gelu_accurate", "gelu_python_tanh", "gelu_pytorch_tanh"),
        lambda x: 0.5 * x * (1 + torch.tanh(x * 0.7978845608028654 * (1 + 0.044715 * x * x))),
    ),
    "quick_gelu": lambda x: x / (1 + torch.exp(-1.702 * x)),
    "relu2": lambda x: torch.relu(x).square(),
    "relu_squared": lambda x: torch.relu(x).square(),
    "linear": lambda x: x,
    "sigmoid": torch.sigmoid,
    "solu": lambda x: x * x.softmax(-1),
    "solu_ln": lambda x: x * x.softmax(-1),
}


@torch.no_grad()
def run_checkpoint(
    checkpoint: Checkpoint, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Float[Tensor, "batch pos d_model"]]]:
    """Logits, and the residual stream after every sublayer by its hook name."""
    spec = checkpoint.spec()
    sd = checkpoint.state_dict

    def norm(name: str, x: Tensor, kind: NormKind) -> Tensor:
        return _norm(checkpoint, name, x, kind, spec.eps)

    x = sd["embed.W_E"][tokens]
    if spec.positions == "standard":
        x = x + sd["pos_embed.W_pos"][: tokens.shape[1]]
    x = norm("embed_norm", x, spec.embed_norm)
    streams = {}
    for layer in range(spec.n_layers):
        at = f"blocks.{layer}"
        start = x
        y = _attention(checkpoint, spec, layer, norm(f"{at}.ln1", x, spec.norm))
        x = x + norm(f"{at}.ln1_post", y, spec.post_norm)
        x = norm(f"{at}.ln1", x, spec.stream_norm)
        if not spec.attn_only:
            if not spec.parallel:
                streams[f"{at}.hook_resid_mid"] = start = x
            own_norm = not spec.parallel or f"{at}.ln2.w" in sd or f"{at}.ln2.b" in sd
            y = _mlp(checkpoint, spec, at, norm(f"{at}.ln{2 if own_norm else 1}", start, spec.norm))
            x = x + norm(f"{at}.ln2_post", y, spec.post_norm)
            x = norm(f"{at}.ln2", x, spec.stream_norm)
        streams[f"{at}.hook_resid_post"] = x
    if spec.prediction_head:
        x = _activation(spec)(x @ sd["prediction.W"] + sd.get("prediction.b", 0.0))
    x = norm("ln_final", x, spec.final_norm)
    logits = x @ sd["unembed.W_U"] + sd.get("unembed.b_U", 0.0)
    if spec.logit_cap is not None:
        logits = torch.tanh(logits / spec.logit_cap) * spec.logit_cap
    return logits, streams


def _activation(spec: Spec) -> Callable[[Tensor], Tensor]:
    if spec.act_fn not in _ACT:
        raise UnsupportedModelError(
            "the dense model that conversions are compared with",
            [f"activation {spec.act_fn!r} is not written there (known: {', '.join(_ACT)})"],
        )
    return _ACT[spec.act_fn]


def _norm(checkpoint: Checkpoint, name: str, x: Tensor, kind: NormKind, eps: float) -> Tensor:
    if kind is None:
        return x
    if kind == "LN":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return x * checkpoint.state_dict.get(f"{name}.w", 1.0) + checkpoint.state_dict.get(f"{name}.b", 0.0)


def _mlp(checkpoint: Checkpoint, spec: Spec, at: str, x: Tensor) -> Tensor:
    sd = checkpoint.state_dict
    y = x @ sd[f"{at}.mlp.W_in"] + sd.get(f"{at}.mlp.b_in", 0.0)
    if spec.gated:
        gate = x @ sd[f"{at}.mlp.W_gate"] + sd.get(f"{at}.mlp.b_gate", 0.0)
        y = _activation(spec)(gate) * y
        if spec.experts:
            y = y * _expert_weights(checkpoint, spec, at, x)
    else:
        y = _activation(spec)(y)
    if spec.act_fn == "solu_ln":
        y = _norm(checkpoint, f"{at}.mlp.ln", y, "LN", spec.eps)
    return y @ sd[f"{at}.mlp.W_out"] + sd.get(f"{at}.mlp.b_out", 0.0)


def _expert_weights(checkpoint: Checkpoint, spec: Spec, at: str, x: Tensor) -> Tensor:
    """What every neuron is multiplied with: its expert's weight, 0 where the token goes to others."""
    sd = checkpoint.state_dict
    share = (x @ sd[f"{at}.mlp.W_router"] + sd.get(f"{at}.mlp.b_router", 0.0)).softmax(-1)
    least = share.sort(-1, descending=True).values[..., spec.experts_used - 1, None]
    share = share * (share >= least)
    if spec.router_renormed:
        share = share / share.sum(-1, keepdim=True)
    shared = x.new_ones(*x.shape[:-1], spec.d_mlp - spec.experts * spec.d_expert)
    if spec.shared_gate:
        reading = x @ sd[f"{at}.mlp.W_shared"] + sd.get(f"{at}.mlp.b_shared", 0.0)
        shared = shared / (1 + torch.exp(-reading))
    own = [share[..., i // spec.d_expert, None] for i in range(spec.experts * spec.d_expert)]
    return torch.cat([*own, shared], -1)


def _attention(checkpoint: Checkpoint, spec: Spec, layer: int, x: Tensor) -> Tensor:
    sd, at = checkpoint.state_dict, f"blocks.{layer}"

    def read(name: str) -> Tensor:
        y = x
        if spec.positions == "shortformer" and name != "V":
            y = y + sd["pos_embed.W_pos"][: x.shape[1]]
        y = torch.einsum("bpd,hdk->bhpk", y, sd[f"{at}.attn.W_{name}"])
        bias = sd.get(f"{at}.attn.b_{name}")
        y = y if bias is None else y + bias[:, None]
        if spec.qkv_clip is not None:
            bound = torch.full_like(y, spec.qkv_clip)
            y = torch.minimum(torch.maximum(y, -bound), bound)
        if name != "V":
            turn, norm = _rotate(spec, layer), _heads_normed(spec, sd, f"{at}.attn.{name.lower()}_norm")
            y = norm(turn(y)) if spec.qk_norm_last else turn(norm(y))
        return y.repeat_interleave(spec.n_heads // y.shape[1], 1)

    q, k, v = read("Q"), read("K"), read("V")
    scores = q @ k.mT / spec.attn_scale
    n = x.shape[1]
    if spec.query_growth is not None:
        beta, length = spec.query_growth
        grown = 1 + beta * torch.log((torch.arange(n) // length + 1).float())
        scores = scores * grown.to(scores)[:, None]
    if spec.positions == "alibi":
        fall = torch.tensor(spec.alibi)[:, None] * torch.arange(n)
        if spec.alibi_bfloat16:
            fall = (torch.tensor(spec.alibi).bfloat16()[:, None] * torch.arange(n)) / spec.attn_scale
        scores = scores + fall.to(scores)[:, None]
    if spec.scale_by_layer:
        scores = scores / (layer + 1)
    if spec.score_cap is not None:
        scores = torch.tanh(scores / spec.score_cap) * spec.score_cap
    if spec.causal:
        future = torch.triu(torch.ones_like(scores[0, 0], dtype=torch.bool), 1)
        scores = scores.masked_fill(future, -math.inf)
    window = spec.windows[layer] if spec.windows else None
    if window is not None:
        too_old = torch.tril(torch.ones_like(scores[0, 0], dtype=torch.bool), -window)
        scores = scores.masked_fill(too_old, -math.inf)
    weights = scores.exp() if spec.sinks else scores.softmax(-1)
    if spec.sinks:
        weights = weights / (weights.sum(-1, keepdim=True) + sd[f"{at}.attn.sinks"].exp()[:, None, None])
    out = torch.einsum("bhqk,bhkd,hdm->bqm", weights, v, sd[f"{at}.attn.W_O"])
    return out + sd.get(f"{at}.attn.b_O", 0.0)


def _heads_normed(spec: Spec, sd: Mapping[str, Tensor], name: str) -> Callable[[Tensor], Tensor]:
    """The norm on queries or keys ``[batch, head, pos, d_head]``."""

    def normed(x: Tensor) -> Tensor:
        if spec.qk_norm is None:
            return x
        heads, dims = x.shape[1], ((1, 3) if spec.qk_norm_over == "all" else (3,))
        if spec.qk_norm == "LN":
            x = x - x.mean(dims, keepdim=True)
        x = x / ((x * x).mean(dims, keepdim=True) + spec.eps).sqrt()
        for part, act in (("w", torch.mul), ("b", torch.add)):
            if f"{name}.{part}" in sd:
                own = sd[f"{name}.{part}"].reshape(-1, spec.d_head)
                x = act(x, own.expand(heads, -1)[:, None])
        return x

    return normed


def _rotate(spec: Spec, layer: int) -> Callable[[Tensor], Tensor]:
    """Rotary positions by complex multiplication, for ``[batch, head, pos, d_head]``."""
    which = 0 if not spec.rotary_of else spec.rotary_of[layer]
    if spec.positions != "rotary" or which is None:
        return lambda x: x
    dim = spec.rotary_dim

    def turned(x: Tensor) -> Tensor:
        n, factor = x.shape[2], 1.0
        frequency = 1.0 / (spec.rotary_base ** (torch.arange(0, dim, 2).float() / dim))
        if spec.rotaries:
            table = spec.rotaries[which]
            frequency, factor = torch.tensor(table.frequencies), table.factor
            if table.until is not None and n > table.until:
                frequency = torch.tensor(table.beyond)
                if table.stretch is not None:
                    base, s = table.stretch
                    base *= (s * n / table.until - s + 1) ** (dim / (dim - 2))
                    frequency = base ** -(torch.arange(0, dim, 2).float() / dim)
        angle = torch.outer(torch.arange(n).float(), frequency)
        turn = torch.complex(*((factor * f(angle)).to(x.dtype) for f in (torch.cos, torch.sin)))
        part = x[..., :dim]
        even, odd = (
            (part[..., 0::2], part[..., 1::2])
            if spec.rotary_adjacent
            else (part[..., : dim // 2], part[..., dim // 2 :])
        )
        turned = torch.complex(even, odd) * turn.to(x.device)
        pair = (turned.real, turned.imag)
        new = torch.stack(pair, -1).flatten(-2) if spec.rotary_adjacent else torch.cat(pair, -1)
        return torch.cat([new, x[..., dim:]], -1)

    return turned
