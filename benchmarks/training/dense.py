"""The arithmetic of a training step: a transformer written on its weights alone.

Without a bridge's hooks and with attention in bfloat16, a step takes about two thirds of the time.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.sources.bridge import read_bridge

Weights = dict[str, Tensor]
"""Weights by TransformerLens's names (`blocks.0.attn.W_Q` is [head, d_model, d_head], ...)."""

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"relu": F.relu, "silu": F.silu, "gelu": F.gelu}


def initial_weights(cfg: dict[str, Any], seed: int) -> Weights:
    """A native bridge's own initialisation: standard deviation 0.8 / sqrt(d_model)."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    # An attention-only config still names an activation and an MLP width: its defaults, unused.
    # No bridge is without layers or positions; what a smaller model has not is left out below.
    named = {key: value for key, value in cfg.items() if value is not None or key == "normalization_type"}
    named["n_layers"] = max(1, cfg["n_layers"])
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**named, seed=seed))
    weights = {}
    for name, value in read_bridge(bridge).state_dict.items():
        absent = (
            name == "unembed.b_U"  # zeros that the bridge fills in
            or (cfg.get("gated_mlp") and ".b_" in name)  # Llama-shaped: no biases
            or (name.startswith("blocks.") and cfg["n_layers"] == 0)
            or (name == "pos_embed.W_pos" and cfg["positional_embedding_type"] != "standard")
        )
        if not absent:
            weights[name] = value.detach().clone().contiguous().requires_grad_()
    return weights


def forward(
    weights: Weights, cfg: dict[str, Any], tokens: Int[Tensor, "document pos"]
) -> tuple[Float[Tensor, "document pos vocab"], list[Float[Tensor, "document head query key"]]]:
    """Logits, and the attention patterns layer by layer."""
    n_pos = tokens.shape[1]
    future = torch.full((n_pos, n_pos), -math.inf).triu(1)
    turns = _turns(cfg, n_pos) if cfg["positional_embedding_type"] == "rotary" else None
    patterns = []
    residual = F.embedding(tokens, weights["embed.W_E"])
    if cfg["positional_embedding_type"] == "standard":
        residual = residual + weights["pos_embed.W_pos"][:n_pos]
    for layer in range(cfg["n_layers"]):
        w = {key.split(".")[-1]: value for key, value in weights.items() if f"s.{layer}." in key}
        x = _norm(weights, cfg, residual, f"blocks.{layer}.ln1")
        q, k, v = (_read(w, letter, x) for letter in "QKV")
        if turns is not None:
            q, k = _turned(q, *turns), _turned(k, *turns)
        if (shared_by := q.shape[1] // k.shape[1]) > 1:
            k, v = k.repeat_interleave(shared_by, 1), v.repeat_interleave(shared_by, 1)
        scores = (q / math.sqrt(cfg["d_head"])) @ k.mT
        with torch.autocast("cpu", enabled=False):  # it would make the softmax float32, and slow
            pattern = (scores + future.to(scores.dtype)).softmax(dim=-1)
        patterns.append(pattern)
        z = (pattern @ v).transpose(1, 2).flatten(2)
        residual = residual + F.linear(z, w["W_O"].flatten(0, 1).T, w.get("b_O"))
        if not cfg["attn_only"]:
            x = _norm(weights, cfg, residual, f"blocks.{layer}.ln2")
            hidden = F.linear(x, w["W_in"].T, w.get("b_in"))
            if cfg.get("gated_mlp"):
                hidden = ACTIVATIONS[cfg["act_fn"]](F.linear(x, w["W_gate"].T)) * hidden
            else:
                hidden = ACTIVATIONS[cfg["act_fn"]](hidden)
            residual = residual + F.linear(hidden, w["W_out"].T, w.get("b_out"))
    return _norm(weights, cfg, residual, "ln_final") @ weights["unembed.W_U"], patterns


def _norm(weights: Weights, cfg: dict[str, Any], x: Tensor, name: str) -> Tensor:
    width = (cfg["d_model"],)
    if cfg["normalization_type"] == "LN":
        return F.layer_norm(x, width, weights[f"{name}.w"], weights[f"{name}.b"], cfg["eps"])
    if cfg["normalization_type"] == "RMS":
        return F.rms_norm(x, width, weights[f"{name}.w"], cfg["eps"])
    return x


def _read(
    w: Weights, letter: str, x: Float[Tensor, "document pos d_model"]
) -> Float[Tensor, "document head pos d_head"]:
    """Queries, keys or values; keys and values of all heads that have some of their own."""
    W, b = w[f"W_{letter}"], w.get(f"b_{letter}")
    y = F.linear(x, W.mT.flatten(0, 1), None if b is None else b.flatten())
    return y.unflatten(-1, (W.shape[0], W.shape[2])).transpose(1, 2)


def _turns(
    cfg: dict[str, Any], n_pos: int
) -> tuple[Float[Tensor, "pos d_head"], Float[Tensor, "pos d_head"]]:
    """Cosine and, with the sign of its own place in the pair, sine of the angle by which each pair of
    neighbours turns at each position."""
    rate = cfg["rotary_base"] ** -(torch.arange(0, cfg["d_head"], 2) / cfg["d_head"])
    angle = torch.outer(torch.arange(n_pos), rate).repeat_interleave(2, dim=1)
    return angle.cos(), angle.sin() * torch.tensor([-1.0, 1.0]).repeat(cfg["d_head"] // 2)


def _turned(
    x: Float[Tensor, "document head pos d_head"],
    cos: Float[Tensor, "pos d_head"],
    sin: Float[Tensor, "pos d_head"],
) -> Float[Tensor, "document head pos d_head"]:
    swapped = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2)
    return torch.addcmul(x * cos.to(x.dtype), swapped, sin.to(x.dtype))


def loss_per_token(
    weights: Weights, cfg: dict[str, Any], documents: Int[Tensor, "document pos"]
) -> Float[Tensor, "document pos_minus_1"]:
    """Cross-entropy in nats of every token after the first, given the ones before it."""
    logits = forward(weights, cfg, documents[:, :-1])[0].float()
    targets = documents[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)
