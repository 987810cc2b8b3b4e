"""A model in TransformerLens's convention: a config and a state dict with its names and shapes.

Every door leads through here: a bridge is read into a ``Checkpoint``, and ``convert`` takes one.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.errors import CheckpointError, UnsupportedModelError
from mechinterp_attn.spec import NormKind, Positions, Spec

_NORMS: dict[str | None, NormKind] = {
    "LN": "LN", "LNPre": "LN", "RMS": "RMS", "RMSPre": "RMS", None: None,
}  # fmt: skip
_ACTIVATIONS = ("silu", "swish", "gelu", "gelu_new", "relu")

# Parts that TransformerLens can describe and this package does not convert: cfg field, the values
# that mean "absent", and what to call it.
_UNSUPPORTED = (
    ("gated_mlp", (False, None), "a gated MLP"),
    ("parallel_attn_mlp", (False, None), "attention and MLP in parallel"),
    ("num_experts", (None, 0), "a mixture of experts"),
    ("use_local_attn", (False, None), "local attention"),
    ("window_size", (None,), "a sliding attention window"),
    ("scale_attn_by_inverse_layer_idx", (False, None), "attention scaled by layer"),
    ("use_qk_norm", (False, None), "norms on queries and keys"),
    ("post_embedding_ln", (False, None), "a norm after the embedding"),
    ("use_normalization_before_and_after", (False, None), "norms after the sublayers"),
    ("attn_scores_soft_cap", (-1.0, 0, None), "soft-capped attention scores"),
    ("output_logits_soft_cap", (-1.0, 0, None), "soft-capped logits"),
    ("rope_scaling", (None,), "scaled rotary positions"),
    ("use_NTK_by_parts_rope", (False, None), "scaled rotary positions"),
)
# Buffers that TransformerLens has kept in state dicts and that are no weights.
_BUFFERS = ("attn.mask", "attn.IGNORE", "attn.rotary_sin", "attn.rotary_cos")


@dataclass(frozen=True, eq=False)
class Checkpoint:
    """A model as TransformerLens's config and state dict, not yet converted.

    Attributes:
        cfg: HookedTransformer's config names (``n_layers``, ``d_model``, ``act_fn``, ...).
        state_dict: its tensor names and shapes: ``embed.W_E`` [d_vocab, d_model],
            ``blocks.0.attn.W_Q`` [head, d_model, d_head], ``blocks.0.mlp.W_in`` [d_model, d_mlp], ...
            Biases that are not there are zero; norm gains that are not there are one.
        tokenizer: a Hugging Face tokenizer, or None.
        name: what to call the model.
    """

    cfg: Mapping[str, Any]
    state_dict: Mapping[str, Tensor] = field(repr=False)
    tokenizer: Any = field(default=None, repr=False)
    name: str = "checkpoint"

    def spec(self) -> Spec:
        """The model's shapes and rules, after checking that it can be converted at all.

        Raises:
            UnsupportedModelError: with every unsupported part.
            CheckpointError: with every missing, misshapen, unknown or non-finite tensor.
        """
        cfg = self.cfg
        self._need_fields()
        self._refuse_unsupported()
        norm = _NORMS[cfg.get("normalization_type")]
        positions = _positions(cfg)
        n_heads = cfg["n_heads"]
        has_final_norm = norm is not None and cfg.get("final_norm", True)
        spec = Spec(
            n_layers=cfg["n_layers"],
            n_heads=n_heads,
            n_kv_heads=cfg.get("n_key_value_heads") or n_heads,
            d_model=cfg["d_model"],
            d_head=cfg["d_head"],
            d_mlp=0 if cfg.get("attn_only") else cfg["d_mlp"],
            n_ctx=cfg["n_ctx"],
            d_vocab=cfg["d_vocab"],
            d_vocab_out=cfg["d_vocab_out"]
            if (cfg.get("d_vocab_out") or -1) > 0
            else cfg["d_vocab"],
            act_fn=None if cfg.get("attn_only") else cfg["act_fn"],
            norm=norm,
            final_norm=("RMS" if cfg.get("final_rms") else norm) if has_final_norm else None,
            eps=float(cfg.get("eps", 1e-5)),
            positions=positions,
            causal=cfg.get("attention_dir", "causal") == "causal",
            attn_scale=_attn_scale(cfg),
            rotary_dim=(cfg.get("rotary_dim") or cfg["d_head"]) if positions == "rotary" else 0,
            rotary_base=float(cfg.get("rotary_base") or 10000),
            rotary_adjacent=bool(cfg.get("rotary_adjacent_pairs", False)),
            norm_in_float32=bool(cfg.get("norm_in_float32", False)),
        )
        self._check_tensors(spec)
        return spec

    def _need_fields(self) -> None:
        need = ["n_layers", "n_heads", "d_model", "d_head", "n_ctx", "d_vocab"]
        if not self.cfg.get("attn_only"):
            need += ["d_mlp", "act_fn"]
        missing = [f"config has no {name!r}" for name in need if self.cfg.get(name) is None]
        numbers = [n for n in need if n != "act_fn" and self.cfg.get(n) is not None]
        bad = [
            f"config has {n}={self.cfg[n]!r}, expected a positive integer"
            for n in numbers
            if isinstance(self.cfg[n], bool) or not isinstance(self.cfg[n], int) or self.cfg[n] < 1
        ]
        if missing or bad:
            raise CheckpointError(self.name, missing + bad)

    def _refuse_unsupported(self) -> None:
        cfg, reasons = self.cfg, []
        if not cfg.get("attn_only") and cfg["act_fn"] not in _ACTIVATIONS:
            reasons.append(f"activation {cfg['act_fn']!r} (supported: {', '.join(_ACTIVATIONS)})")
        if cfg.get("normalization_type") not in _NORMS:
            reasons.append(
                f"normalization {cfg['normalization_type']!r} (supported: LN, RMS, none)"
            )
        if _positions(cfg) not in ("standard", "rotary", None):
            reasons.append(
                f"positions {cfg['positional_embedding_type']!r} (supported: standard, rotary, none)"
            )
        if cfg.get("attention_dir", "causal") not in ("causal", "bidirectional"):
            reasons.append(f"attention_dir {cfg['attention_dir']!r}")
        n_kv = cfg.get("n_key_value_heads") or cfg["n_heads"]
        if cfg["n_heads"] % n_kv:
            reasons.append(f"{cfg['n_heads']} heads cannot share {n_kv} key-value heads evenly")
        for name, absent, what in _UNSUPPORTED:
            if cfg.get(name) not in absent:
                reasons.append(f"{what} ({name}={cfg[name]!r})")
        if reasons:
            raise UnsupportedModelError(self.name, reasons)

    def _check_tensors(self, spec: Spec) -> None:
        required, optional = expected_shapes(spec)
        problems = [f"missing tensor {name}" for name in required if name not in self.state_dict]
        for name, tensor in self.state_dict.items():
            shape = required.get(name) or optional.get(name)
            if shape is None:
                if not name.endswith(_BUFFERS):
                    problems.append(f"unknown tensor {name} {tuple(tensor.shape)}")
            elif tuple(tensor.shape) != shape:
                problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
            elif not tensor.dtype.is_floating_point:
                problems.append(f"{name} has dtype {tensor.dtype}, expected floating point")
            elif (where := first_non_finite(tensor)) is not None:
                problems.append(f"{name} is {float(tensor[where])} at index {list(where)}")
        if problems:
            raise CheckpointError(self.name, problems)


Shapes = dict[str, tuple[int, ...]]


def expected_shapes(spec: Spec) -> tuple[Shapes, Shapes]:
    """Names and shapes of the tensors a checkpoint must have, and of those it may have."""
    H, K, d, k, m = spec.n_heads, spec.n_kv_heads, spec.d_model, spec.d_head, spec.d_mlp
    required: Shapes = {"embed.W_E": (spec.d_vocab, d), "unembed.W_U": (d, spec.d_vocab_out)}
    optional: Shapes = {"unembed.b_U": (spec.d_vocab_out,)}
    if spec.positions == "standard":
        required["pos_embed.W_pos"] = (spec.n_ctx, d)
    norms = ["ln_final"] if spec.final_norm else []
    for layer in range(spec.n_layers):
        at = f"blocks.{layer}"
        required |= {f"{at}.attn.W_Q": (H, d, k), f"{at}.attn.W_O": (H, k, d)}
        required |= {f"{at}.attn.W_K": (K, d, k), f"{at}.attn.W_V": (K, d, k)}
        optional |= {f"{at}.attn.b_Q": (H, k), f"{at}.attn.b_O": (d,)}
        optional |= {f"{at}.attn.b_K": (K, k), f"{at}.attn.b_V": (K, k)}
        norms += [f"{at}.ln1"] if spec.norm else []
        if not spec.attn_only:
            required |= {f"{at}.mlp.W_in": (d, m), f"{at}.mlp.W_out": (m, d)}
            optional |= {f"{at}.mlp.b_in": (m,), f"{at}.mlp.b_out": (d,)}
            norms += [f"{at}.ln2"] if spec.norm else []
    optional |= {f"{name}.{part}": (d,) for name in norms for part in ("w", "b")}
    return required, optional


def first_non_finite(tensor: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, or None."""
    finite = torch.isfinite(tensor)
    if bool(finite.all()):
        return None
    return tuple(int(i) for i in (~finite).nonzero()[0])


def _positions(cfg: Mapping[str, Any]) -> Positions:
    kind = cfg.get("positional_embedding_type", "standard")
    return None if kind in (None, "none") else kind


def _attn_scale(cfg: Mapping[str, Any]) -> float:
    """What scores are divided by: sqrt(d_head) unless the config says otherwise."""
    if not cfg.get("use_attn_scale", True):
        return 1.0
    scale = cfg.get("attn_scale") or -1.0
    return float(scale) if scale > 0 else math.sqrt(cfg["d_head"])
