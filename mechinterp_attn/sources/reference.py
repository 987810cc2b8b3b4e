"""A plain dense transformer with MLPs: what a TL-convention checkpoint computes, written directly.

Used to check conversions of checkpoints. It shares no code with the banks on purpose: norms keep
their gains, the MLP is an MLP, attention is written out.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.spec import NormKind, Spec

_ACT = {
    "relu": torch.relu,
    "silu": F.silu,
    "swish": F.silu,
    "gelu": lambda x: 0.5 * x * (1 + torch.erf(x / math.sqrt(2))),
    "gelu_new": lambda x: F.gelu(x, approximate="tanh"),
}


@torch.no_grad()
def run_checkpoint(
    checkpoint: Checkpoint, tokens: Int[Tensor, "batch pos"]
) -> tuple[Float[Tensor, "batch pos d_vocab"], dict[str, Float[Tensor, "batch pos d_model"]]]:
    """Logits, and the residual stream after every sublayer by its hook name."""
    spec = checkpoint.spec()
    sd = checkpoint.state_dict
    x = sd["embed.W_E"][tokens]
    if spec.positions == "standard":
        x = x + sd["pos_embed.W_pos"][: tokens.shape[1]]
    streams = {}
    for layer in range(spec.n_layers):
        at = f"blocks.{layer}"
        x = x + _attention(
            checkpoint, spec, at, _norm(checkpoint, f"{at}.ln1", x, spec.norm, spec.eps)
        )
        if not spec.attn_only:
            streams[f"{at}.hook_resid_mid"] = x
            y = _norm(checkpoint, f"{at}.ln2", x, spec.norm, spec.eps)
            y = _ACT[str(spec.act_fn)](y @ sd[f"{at}.mlp.W_in"] + sd.get(f"{at}.mlp.b_in", 0.0))
            x = x + y @ sd[f"{at}.mlp.W_out"] + sd.get(f"{at}.mlp.b_out", 0.0)
        streams[f"{at}.hook_resid_post"] = x
    x = _norm(checkpoint, "ln_final", x, spec.final_norm, spec.eps)
    return x @ sd["unembed.W_U"] + sd.get("unembed.b_U", 0.0), streams


def _norm(checkpoint: Checkpoint, name: str, x: Tensor, kind: NormKind, eps: float) -> Tensor:
    if kind is None:
        return x
    if kind == "LN":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt((x * x).mean(-1, keepdim=True) + eps)
    return x * checkpoint.state_dict.get(f"{name}.w", 1.0) + checkpoint.state_dict.get(
        f"{name}.b", 0.0
    )


def _attention(checkpoint: Checkpoint, spec: Spec, at: str, x: Tensor) -> Tensor:
    sd = checkpoint.state_dict

    def read(name: str) -> Tensor:
        y = torch.einsum("bpd,hdk->bhpk", x, sd[f"{at}.attn.W_{name}"])
        bias = sd.get(f"{at}.attn.b_{name}")
        y = y if bias is None else y + bias[:, None]
        return y.repeat_interleave(spec.n_heads // y.shape[1], 1)

    q, k, v = read("Q"), read("K"), read("V")
    if spec.positions == "rotary":
        q, k = _rotate(spec, q), _rotate(spec, k)
    scores = q @ k.mT / spec.attn_scale
    if spec.causal:
        future = torch.triu(torch.ones_like(scores[0, 0], dtype=torch.bool), 1)
        scores = scores.masked_fill(future, -math.inf)
    out = torch.einsum("bhqk,bhkd,hdm->bqm", scores.softmax(-1), v, sd[f"{at}.attn.W_O"])
    return out + sd.get(f"{at}.attn.b_O", 0.0)


def _rotate(spec: Spec, x: Float[Tensor, "batch head pos d_head"]) -> Tensor:
    """Rotary positions by complex multiplication."""
    dim = spec.rotary_dim
    frequency = 1.0 / (spec.rotary_base ** (torch.arange(0, dim, 2).float() / dim))
    angle = torch.outer(torch.arange(x.shape[2]).float(), frequency)
    turn = torch.complex(angle.cos().to(x.dtype), angle.sin().to(x.dtype)).to(x.device)
    part = x[..., :dim]
    even, odd = (
        (part[..., 0::2], part[..., 1::2])
        if spec.rotary_adjacent
        else (part[..., : dim // 2], part[..., dim // 2 :])
    )
    turned = torch.complex(even, odd) * turn
    pair = (turned.real, turned.imag)
    new = torch.stack(pair, -1).flatten(-2) if spec.rotary_adjacent else torch.cat(pair, -1)
    return torch.cat([new, x[..., dim:]], -1)
