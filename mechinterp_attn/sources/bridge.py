"""The door for TransformerLens's TransformerBridge, and the way back to one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.errors import UnsupportedModelError
from mechinterp_attn.sources.checkpoint import Checkpoint

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_MLP = ("W_in", "b_in", "W_out", "b_out")
_NATIVE = "TransformerLensNative"


def read_bridge(bridge: TransformerBridge) -> Checkpoint:
    """A native bridge's weights (views, nothing copied) and config as a Checkpoint.

    Raises:
        UnsupportedModelError: the bridge is not a native one.
    """
    architecture = getattr(bridge.cfg, "architecture", None)
    if architecture != _NATIVE:
        raise UnsupportedModelError(
            f"the bridge of {architecture}",
            ["only native bridges (TransformerBridge.boot_native) are supported so far"],
        )
    cfg = {name: value for name, value in vars(bridge.cfg).items() if not name.startswith("_")}
    # The native model scales its scores and turns adjacent pairs whatever the config says, and takes
    # RMS norms in float32.
    cfg["use_attn_scale"] = True
    cfg["rotary_adjacent_pairs"] = True
    cfg["float32_inside"] = "RMS" in str(cfg["normalization_type"]) or bool(cfg["final_rms"])
    tensors = {"embed.W_E": bridge.W_E, "unembed.W_U": bridge.W_U, "unembed.b_U": bridge.b_U}
    if cfg["positional_embedding_type"] == "standard":
        tensors["pos_embed.W_pos"] = bridge.W_pos
    tensors |= _named(bridge.ln_final, "ln_final", ("w", "b"))
    for layer, block in enumerate(bridge.blocks):
        at = f"blocks.{layer}"
        tensors |= _named(block.attn, f"{at}.attn", _ATTENTION)
        tensors |= _named(getattr(block, "ln1", None), f"{at}.ln1", ("w", "b"))
        if not cfg["attn_only"]:
            tensors |= _named(block.mlp, f"{at}.mlp", _MLP)
            tensors |= _named(getattr(block, "ln2", None), f"{at}.ln2", ("w", "b"))
    return Checkpoint(
        cfg=cfg,
        state_dict={name: tensor.detach() for name, tensor in tensors.items()},
        tokenizer=getattr(bridge, "tokenizer", None),
        name=str(getattr(bridge.cfg, "model_name", "bridge")),
    )


def _named(module: Any, at: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights that a bridge component has; accessors raise where it has none."""
    found = {}
    for name in names:
        with contextlib.suppress(AttributeError):
            found[f"{at}.{name}"] = getattr(module, name)
    return found


@torch.no_grad()
def run_bridge(
    bridge: TransformerBridge, tokens: Int[Tensor, "batch pos"]
) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits, and the residual stream after every sublayer by its hook name.

    The bridge is run in eval mode and left as it was, hooks included.
    """
    streams = {}
    wanted = [
        name
        for layer in range(bridge.cfg.n_layers)
        for name in (f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_resid_post")
        if name in bridge.hook_dict
    ]
    handles = []
    try:
        for name in wanted:  # plain torch hooks: TransformerLens's bookkeeping stays untouched

            def keep(_module: Any, _input: Any, output: Tensor, name: str = name) -> None:
                streams[name] = output.detach()

            handles.append(bridge.hook_dict[name].register_forward_hook(keep))
        with _evaluating(bridge):
            logits = bridge(tokens, return_type="logits")
    finally:
        for handle in handles:
            handle.remove()
    return logits, {name: streams[name] for name in wanted}


@contextlib.contextmanager
def _evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Eval mode for a while, then every submodule's own mode again."""
    modes = {m: m.training for m in module.modules()}
    module.eval()
    try:
        yield
    finally:
        for m, mode in modes.items():
            m.training = mode


def to_bridge(checkpoint: Checkpoint) -> TransformerBridge:
    """The checkpoint as a native TransformerBridge: the source model, with its MLPs.

    Raises:
        UnsupportedModelError: native bridges cannot express it; every reason is listed.
    """
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    spec = checkpoint.spec()
    standard_scale = math.isclose(spec.attn_scale, math.sqrt(spec.d_head))
    reasons = []
    if not standard_scale and math.isclose(spec.attn_scale, 1.0):
        reasons.append("native bridges always scale attention scores")
    if spec.positions is None:
        reasons.append("it has no positions and native bridges always have some")
    if spec.positions == "rotary" and not spec.rotary_adjacent:
        reasons.append("native bridges turn adjacent rotary pairs only")
    if spec.final_norm is None and spec.norm is not None:
        reasons.append("it has no final norm and native bridges have one")
    if reasons:
        raise UnsupportedModelError(f"{checkpoint.name}, made a native bridge,", reasons)
    cfg = TransformerBridgeConfig(
        d_model=spec.d_model,
        d_head=spec.d_head,
        n_heads=spec.n_heads,
        n_layers=spec.n_layers,
        n_ctx=spec.n_ctx,
        d_vocab=spec.d_vocab,
        d_vocab_out=spec.d_vocab_out,
        d_mlp=spec.d_mlp or None,
        n_key_value_heads=spec.n_kv_heads,
        act_fn=spec.act_fn or "relu",
        attn_only=spec.attn_only,
        normalization_type=spec.norm,
        final_rms=spec.final_norm == "RMS",
        eps=spec.eps,
        positional_embedding_type=str(spec.positions),
        rotary_dim=spec.rotary_dim or None,
        rotary_base=spec.rotary_base,
        attention_dir="causal" if spec.causal else "bidirectional",
        attn_scale=-1.0 if standard_scale else spec.attn_scale,
        init_weights=True,
        seed=0,
        model_name=checkpoint.name,
        dtype=checkpoint.state_dict["embed.W_E"].dtype,
    )
    bridge = TransformerBridge.boot_native(cfg, tokenizer=checkpoint.tokenizer)
    bridge = bridge.to(checkpoint.state_dict["embed.W_E"].dtype).eval()
    own = read_bridge(bridge).state_dict  # views: writing to them writes the model
    with torch.no_grad():
        for name, tensor in own.items():
            given = checkpoint.state_dict.get(name)
            if given is not None:
                tensor.copy_(given)
            elif not name.endswith(".w"):  # a bias that the checkpoint leaves out is zero
                tensor.zero_()
    return bridge
