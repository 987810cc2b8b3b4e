"""Fold norm gains and biases into the weights that read the normalised stream.

``V1 <- (I - 11^T / D) diag(gain) V1`` and ``b1 <- beta V1 + b1`` (the centring for LayerNorm only).
What is left of the norm is its per-position scale.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import product
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.model.spec import NormKind, Spec
from mechinterp_attn.sources.checkpoint import qk_gain

_AT_ONCE = 2**18  # numbers held in float64 at a time while folding: 2 MiB


def attention_only_weights(
    spec: Spec, source: Mapping[str, Tensor], *, spend: Callable[[str], object] | None = None
) -> dict[str, Tensor]:
    """The weights of the attention-only model from a TL-convention state dict.

    Tensors that no norm touches are taken as they are, not copied.

    Args:
        spec: what the model is.
        source: tensors by name.
        spend: called with the name of each matrix once its folded form is there, so that one who does not
            need it any more can let it go: the weights are then never all there twice.

    Returns:
        Tensors under the names of ``AttentionOnlyModel.state_dict()``.
    """
    out = {"embed.W_E": source["embed.W_E"]}
    if spec.positions in ("standard", "shortformer"):
        out["pos_embed.W_pos"] = source["pos_embed.W_pos"]
    dtype, device = out["embed.W_E"].dtype, out["embed.W_E"].device

    def zeros(*shape: int) -> Tensor:
        return torch.zeros(shape, dtype=dtype, device=device)

    def ones(*shape: int) -> Tensor:
        return torch.ones(shape, dtype=dtype, device=device)

    def folded(name: str, bias: Tensor, norm: str, kind: NormKind) -> tuple[Tensor, Tensor]:
        W = source[name]
        W_new, b_new = fold(W, bias, *_gain_and_bias(source, norm), kind=kind)
        if spend is not None and W_new is not W:
            spend(name)
        return W_new, b_new

    if spec.embed_norm:
        out["embed_norm.w"] = source.get("embed_norm.w", ones(spec.d_model))
        out |= _present(source, "embed_norm.b")
    for layer in range(spec.n_layers):
        at, ln1, ln2 = (f"blocks.{layer}.{part}" for part in ("attn", "ln1", "ln2"))
        for name, heads in (("Q", spec.n_heads), ("K", spec.n_kv_heads), ("V", spec.n_kv_heads)):
            bias = source.get(f"{at}.b_{name}")
            bias = zeros(heads, spec.d_head) if bias is None else bias
            W, b = folded(f"{at}.W_{name}", bias, ln1, spec.norm)
            out[f"{at}.W_{name}"], out[f"{at}.b_{name}"] = _head_by_head(W), b
        out[f"{at}.W_O"] = source[f"{at}.W_O"]
        out[f"{at}.b_O"] = source.get(f"{at}.b_O", zeros(spec.d_model))
        if spec.qk_norm:
            for side, n in (("q_norm", spec.n_heads), ("k_norm", spec.n_kv_heads)):
                shape = qk_gain(spec, n)
                out[f"{at}.{side}.w"] = source.get(f"{at}.{side}.w", ones(*shape))
                out |= _present(source, f"{at}.{side}.b")
        out |= _present(source, f"{at}.sinks")
        for name in ("ln1_post", "ln2_post") if spec.post_norm else ():
            out |= _present(source, f"blocks.{layer}.{name}.w")
        for name in (ln1, ln2) if spec.stream_norm else ():
            out |= _present(source, f"{name}.w", f"{name}.b")
        if spec.attn_only:
            continue
        mlp, bank = f"blocks.{layer}.mlp", f"blocks.{layer}.neurons"
        shared = spec.parallel and not any(f"{ln2}.{part}" in source for part in ("w", "b"))
        present = {"gate": spec.gated, "router": bool(spec.experts), "shared": spec.shared_gate}
        for name in ("in", *(name for name, is_there in present.items() if is_there)):
            bias = source.get(f"{mlp}.b_{name}", zeros(source[f"{mlp}.W_{name}"].shape[1]))
            out[f"{bank}.W_{name}"], out[f"{bank}.b_{name}"] = folded(
                f"{mlp}.W_{name}", bias, ln1 if shared else ln2, spec.norm
            )
        # solu_ln has a norm behind the activation, over neurons
        out[f"{bank}.W_out"], out[f"{bank}.b_out"] = folded(
            f"{mlp}.W_out",
            source.get(f"{mlp}.b_out", zeros(spec.d_model)),
            f"{mlp}.ln",
            "LN" if spec.act_fn == "solu_ln" else None,
        )
    if spec.prediction_head:
        out["prediction.W"] = source["prediction.W"]
        out["prediction.b"] = source.get("prediction.b", zeros(spec.d_model))
    out["unembed.W_U"], out["unembed.b_U"] = folded(
        "unembed.W_U",
        source.get("unembed.b_U", zeros(spec.d_vocab_out)),
        "ln_final",
        spec.final_norm,
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
    """``(norm(x) * gain + beta) @ W + b`` as ``norm(x) @ W' + b'``; float64 inside, some columns at a
    time, so that no large tensor is ever held in float64.
    """
    if kind is None:
        return W, b
    W_new, b_new = torch.empty_like(W), torch.empty_like(b)
    # Steps of whole vector registers: the sums below then round as they would for all columns at once.
    step = max(1, _AT_ONCE // W.shape[-2] // 64) * 64
    for head in product(*map(range, W.shape[:-2])):
        for start in range(0, W.shape[-1], step):
            columns: Any = (*head, ..., slice(start, start + step))
            wide = W[columns].to(torch.float64, copy=True)  # changed in place: never the source's own
            bias = b[columns].double()
            if beta is not None:
                bias = bias + torch.einsum("d,do->o", beta.double(), wide)
            if gain is not None:
                wide *= gain.double()[:, None]
            if kind == "LN":
                wide -= wide.mean(0)
            W_new[columns], b_new[columns] = wide, bias
    return W_new, b_new


def _gain_and_bias(source: Mapping[str, Tensor], norm: str) -> tuple[Tensor | None, Tensor | None]:
    return source.get(f"{norm}.w"), source.get(f"{norm}.b")


def _present(source: Mapping[str, Tensor], *names: str) -> dict[str, Tensor]:
    return {name: source[name] for name in names if name in source}


def _head_by_head(W: Float[Tensor, "head d_model d_head"]) -> Float[Tensor, "head d_model d_head"]:
    """The same tensor laid out as [head, d_head, d_model], so that all heads are one matmul."""
    return W.transpose(1, 2).contiguous().transpose(1, 2)
