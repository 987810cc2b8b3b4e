"""Mixtures of experts: all of a layer's neurons side by side, and the router."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.sources.families.table import Family

_COUNTS = ("num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts")


def unfit_experts(blocks: list[Any], hf: Any, family: Family) -> str | None:
    """Why a model's experts cannot be converted; None where they can, or where there are none."""
    mixed = any("MoE" in type(getattr(b, "mlp", None)).__name__ for b in blocks)
    if not mixed and not any(getattr(hf, name, None) for name in _COUNTS):
        return None
    if not family.experts:
        return "a mixture of experts whose router or experts are of a kind of their own"
    if not all(isinstance(getattr(_mixture(b), "experts", None), torch.nn.Module) for b in blocks):
        return "a mixture of experts in some layers only"
    return None


def experts_config(block: Any, hf: Any, family: Family) -> dict[str, Any]:
    """The config fields of a mixture of experts.

    Args:
        block: the bridge's first block.
        hf: Hugging Face's config.
        family: what its modules do not say.
    """
    down, shared = _weights(block)["down_proj"], _shared(block)
    n_experts, width = down.shape[0], down.shape[-1]
    return {
        "num_experts": None,  # TransformerLens's name for experts that are not read here
        "experts": n_experts,
        "experts_used": hf.num_experts_per_tok,
        "d_expert": width,
        "d_mlp": n_experts * width + (0 if shared is None else shared["down_proj"].shape[-1]),
        "gated_mlp": True,
        "router_renormed": family.router_renormed or bool(getattr(hf, "norm_topk_prob", False)),
        "shared_gate": getattr(_mixture(block), "shared_expert_gate", None) is not None,
    }


def experts_tensors(block: Any) -> dict[str, Tensor]:
    """``W_in W_gate W_out`` of all neurons, and what the router and the shared expert's gate read."""
    mixture, weights, shared = _mixture(block), _weights(block), _shared(block)
    gate, up = weights["gate_up_proj"].chunk(2, dim=1)  # [expert, neuron, d_model]
    parts = {
        "W_gate": [gate.flatten(0, 1)],
        "W_in": [up.flatten(0, 1)],
        "W_out": [weights["down_proj"].transpose(1, 2).flatten(0, 1)],
    }
    if shared is not None:
        parts["W_gate"].append(shared["gate_proj"])
        parts["W_in"].append(shared["up_proj"])
        parts["W_out"].append(shared["down_proj"].T)
    out = {name: torch.cat(own) for name, own in parts.items()}
    out = {name: t if name == "W_out" else t.T for name, t in out.items()}
    router = getattr(mixture, "gate", None)
    out["W_router"] = _plain(mixture.router if router is None else router).weight.T
    if getattr(mixture, "shared_expert_gate", None) is not None:
        out["W_shared"] = _plain(mixture.shared_expert_gate).weight.T
    return out


def _plain(module: Any) -> Any:
    """Hugging Face's module inside a bridge's component."""
    return getattr(module, "original_component", module)


def _mixture(block: Any) -> Any:
    return _plain(block.mlp)


def _weights(block: Any) -> dict[str, Tensor]:
    experts = _plain(_mixture(block).experts)
    return {name: getattr(experts, name) for name in ("gate_up_proj", "down_proj")}


def _shared(block: Any) -> dict[str, Tensor] | None:
    expert = _plain(getattr(_mixture(block), "shared_expert", None))
    if expert is None:
        return None
    names = ("gate_proj", "up_proj", "down_proj")
    return {name: _plain(getattr(expert, name)).weight for name in names}
