"""The door for TransformerLens's TransformerBridge, and the way back to one."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import UnsupportedModelError
from mechinterp_attn.model.config import common_fields
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.sources.families.read import config_of, norms_stream, tensors_of
from mechinterp_attn.sources.tokenizer import as_before_booting

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_ATTENTION = ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V", "b_O")
_MLP = ("W_in", "W_gate", "b_in", "b_gate", "W_out", "b_out")
_NATIVE = "TransformerLensNative"


def read_bridge(bridge: TransformerBridge) -> Checkpoint:
    """A bridge's weights (views wherever possible) and rules as a Checkpoint; nothing is changed.

    Raises:
        UnsupportedModelError: with every part that cannot be converted.
    """
    name = Path(str(getattr(bridge.cfg, "model_name", "bridge"))).name
    if getattr(bridge.cfg, "architecture", None) == _NATIVE:
        cfg, tensors = _read_native(bridge)
    else:
        cfg = config_of(bridge)
        if cfg.get("unsupported"):
            raise UnsupportedModelError(name, cfg["unsupported"])
        tensors = tensors_of(bridge, cfg)
    return Checkpoint(
        cfg=cfg,
        state_dict={key: tensor.detach() for key, tensor in tensors.items()},
        tokenizer=as_before_booting(getattr(bridge, "tokenizer", None)),
        name=name,
    )


def _read_native(bridge: TransformerBridge) -> tuple[dict[str, Any], dict[str, Tensor]]:
    cfg = {name: value for name, value in vars(bridge.cfg).items() if not name.startswith("_")}
    # The native model scales its scores and turns adjacent pairs whatever the config says, and takes
    # RMS norms in float32.
    cfg["use_attn_scale"] = True
    cfg["rotary_adjacent_pairs"] = True
    cfg["parallel_attn_mlp"] = False  # accepted and ignored by native models
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
    return cfg, tensors


def _named(module: Any, at: str, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The weights that a bridge component has; accessors raise where it has none."""
    found = {}
    for name in names:
        with contextlib.suppress(AttributeError):
            if getattr(module, name) is not None:
                found[f"{at}.{name}"] = getattr(module, name)
    return found


def read_object(source: Any) -> Checkpoint:
    """Any object with HookedTransformer's ``cfg`` and ``state_dict()``: TransformerLens 2 and 3
    models, course models with the same names.

    A config that leaves the norm, the positions, the activation or eps out means LayerNorm where
    there are gains, learned positions where there is a W_pos, gelu_new and 1e-5, as in GPT-2; the
    comparison with the object itself decides whether that was right.
    """
    given = source.cfg if isinstance(source.cfg, dict) else vars(source.cfg)
    cfg = {name: value for name, value in given.items() if not name.startswith("_")}
    state = {name: t.detach() for name, t in source.state_dict().items()}
    has_mlp = any(".mlp.W_in" in name for name in state)
    has_gain = any(name.endswith("ln1.w") for name in state)
    assumed = {
        "act_fn": "gelu_new",
        "normalization_type": "LN" if has_gain else None,
        "positional_embedding_type": "standard" if "pos_embed.W_pos" in state else None,
        "attn_only": not has_mlp,
        "eps": cfg.get("layer_norm_eps", 1e-5),
    }
    if "W_gate" in "".join(state):
        assumed["gated_mlp"] = True
    return Checkpoint(
        cfg=assumed | cfg,
        state_dict=state,
        tokenizer=getattr(source, "tokenizer", None),
        name=str(cfg.get("model_name") or type(source).__name__),
    )


@torch.no_grad()
def run_bridge(module: Any, tokens: Int[Tensor, "batch pos"]) -> tuple[Tensor, dict[str, Tensor]]:
    """Logits of a source model, and the residual stream after every sublayer by its hook name.

    Args:
        module: a bridge, or an object with HookedTransformer's cfg; one without hooks gives no streams.
            It is run in eval mode and left as it was, hooks included.
    """
    streams = {}
    points = dict(getattr(module, "hook_dict", {}))
    if norms_stream(module):  # BERT, OpenAI's GPT: the bridge's hooks stand elsewhere
        for layer in range(module.cfg.n_layers):
            for hook, norm in (("hook_resid_mid", "ln1"), ("hook_resid_post", "ln2")):
                points[f"blocks.{layer}.{hook}"] = points[f"blocks.{layer}.{norm}.hook_out"]
    wanted = [
        name
        for layer in range(module.cfg.n_layers)
        for name in (f"blocks.{layer}.hook_resid_mid", f"blocks.{layer}.hook_resid_post")
        if name in points
    ]
    handles = []
    try:
        for name in wanted:  # plain torch hooks: TransformerLens's bookkeeping stays untouched

            def keep(_module: Any, _input: Any, output: Tensor, name: str = name) -> None:
                streams[name] = output.detach().unflatten(0, tokens.shape) if output.ndim == 2 else output

            handles.append(points[name].register_forward_hook(keep))
        with _evaluating(module):
            logits = module(tokens)
    finally:
        for handle in handles:
            handle.remove()
    return logits.detach(), {name: streams[name].detach() for name in wanted if name in streams}


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
    if spec.positions is None and spec.n_layers:
        reasons.append("it has no positions and native bridges always have some")
    if spec.positions == "rotary" and not spec.rotary_adjacent:
        reasons.append("native bridges turn adjacent rotary pairs only")
    if spec.final_norm is None and spec.norm is not None:
        reasons.append("it has no final norm and native bridges have one")
    if reasons:
        raise UnsupportedModelError(f"{checkpoint.name}, made a native bridge,", reasons)
    cfg = TransformerBridgeConfig(
        **common_fields(spec),
        n_key_value_heads=spec.n_kv_heads,
        normalization_type=spec.norm,
        positional_embedding_type=spec.positions or "rotary",  # without layers there is nothing to turn
        rotary_dim=spec.rotary_dim or None,
        rotary_base=spec.rotary_base,
        attn_scale=-1.0 if standard_scale else spec.attn_scale,
        init_weights=spec.n_layers > 0,  # it divides by the number of layers
        seed=0,
        model_name=checkpoint.name,
        dtype=checkpoint.state_dict["embed.W_E"].dtype,
    )
    with torch.random.fork_rng(devices=[]):  # the caller's random numbers stay as they are
        bridge = TransformerBridge.boot_native(cfg, tokenizer=checkpoint.tokenizer)
    bridge = bridge.to(checkpoint.state_dict["embed.W_E"].dtype, print_details=False).eval()
    own = read_bridge(bridge).state_dict  # views: writing to them writes the model
    with torch.no_grad():
        for name, tensor in own.items():
            given = checkpoint.state_dict.get(name)
            if given is not None:
                tensor.copy_(given)
            elif not name.endswith(".w"):  # a bias that the checkpoint leaves out is zero
                tensor.zero_()
    return bridge
