"""Fold norm gains and biases into the weights that read the normalised stream.

``V1 <- (I - 11^T / D) diag(gain) V1`` and ``b1 <- beta V1 + b1`` (the centring for LayerNorm only).
What is left of the norm is its per-position scale.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.spec import NormKind, Spec


def attention_only_weights(spec: Spec, source: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights of the attention-only model from a TL-convention state dict.

    Tensors that no norm touches are taken as they are, not copied.

    Returns:
        Tensors under the names of ``AttentionOnlyModel.state_dict()``.
    """
    out = {"embed.W_E": source["embed.W_E"]}
    if spec.positions == "standard":
        out["pos_embed.W_pos"] = source["pos_embed.W_pos"]
    dtype, device = out["embed.W_E"].dtype, out["embed.W_E"].device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    for layer in range(spec.n_layers):
        at, ln1, ln2 = (f"blocks.{layer}.{part}" for part in ("attn", "ln1", "ln2"))
        for name, heads in (("Q", spec.n_heads), ("K", spec.n_kv_heads), ("V", spec.n_kv_heads)):
            bias = source.get(f"{at}.b_{name}")
            W, b = fold(
                source[f"{at}.W_{name}"],
                zeros(heads, spec.d_head) if bias is None else bias,
                *_gain_and_bias(source, ln1),
                kind=spec.norm,
            )
            out[f"{at}.W_{name}"], out[f"{at}.b_{name}"] = _head_by_head(W), b
        out[f"{at}.W_O"] = source[f"{at}.W_O"]
        out[f"{at}.b_O"] = source.get(f"{at}.b_O", zeros(spec.d_model))
        if spec.attn_only:
            continue
        mlp, bank = f"blocks.{layer}.mlp", f"blocks.{layer}.neurons"
        out[f"{bank}.W_in"], out[f"{bank}.b_in"] = fold(
            source[f"{mlp}.W_in"],
            source.get(f"{mlp}.b_in", zeros(spec.d_mlp)),
            *_gain_and_bias(source, ln2),
            kind=spec.norm,
        )
        out[f"{bank}.W_out"] = source[f"{mlp}.W_out"]
        out[f"{bank}.b_out"] = source.get(f"{mlp}.b_out", zeros(spec.d_model))
    out["unembed.W_U"], out["unembed.b_U"] = fold(
        source["unembed.W_U"],
        source.get("unembed.b_U", zeros(spec.d_vocab_out)),
        *_gain_and_bias(source, "ln_final"),
        kind=spec.final_norm,
    )
    return out


def fold(
    W: Float[Tensor, "*head d_model out"],
    b: Float[Tensor, "*head out"],
    gain: Float[Tensor, " d_model"] | None,
    beta: Float[Tensor, " d_model"] | None,
    *,
    kind: NormKind,
) -> tuple[Float[Tensor, "*head d_model out"], Float[Tensor, "*head out"]]:
    """``(norm(x) * gain + beta) @ W + b`` as ``norm(x) @ W' + b'``; float64 inside."""
    if kind is None:
        return W, b
    wide = W.double()
    if beta is not None:
        b = (b.double() + torch.einsum("d,...do->...o", beta.double(), wide)).to(W.dtype)
    if gain is not None:
        wide = wide * gain.double()[:, None]
    if kind == "LN":
        wide = wide - wide.mean(-2, keepdim=True)
    return wide.to(W.dtype), b


def _gain_and_bias(source: Mapping[str, Tensor], norm: str) -> tuple[Tensor | None, Tensor | None]:
    return source.get(f"{norm}.w"), source.get(f"{norm}.b")


def _head_by_head(W: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_model d_head"]:
    """The same tensor laid out as [head, d_head, d_model], so that all heads are one matmul."""
    return W.transpose(1, 2).contiguous().transpose(1, 2)
