"""A model in TransformerLens's convention: a config and a state dict with its names and shapes.

Every door leads through here: a bridge is read into a ``Checkpoint``, and ``convert`` takes one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mechinterp_attn.core.errors import CheckpointError
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.sources.config import spec_from_config

_GROUPED = re.compile(r"attn\._([Wb])_([KV])$")

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
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

    def __post_init__(self) -> None:
        # HookedTransformer marks keys and values that heads share with an underscore.
        named = {_GROUPED.sub(r"attn.\1_\2", name): t for name, t in self.state_dict.items()}
        object.__setattr__(self, "state_dict", named)

    @property
    def prepends_bos(self) -> bool:
        """Whether texts begin with a BOS: the config's ``default_prepend_bos``, as in TransformerLens
        True where it says nothing.
        """
        return self.cfg.get("default_prepend_bos") is not False

    def forget(self) -> None:
        """Let go of the tensors, for one who made this checkpoint and has taken what it needs."""
        object.__setattr__(self, "state_dict", {})

    def spec(self) -> Spec:
        """The model's shapes and rules, after checking that it can be converted at all.

        Raises:
            UnsupportedModelError: with every unsupported part.
            CheckpointError: with every missing, misshapen, unknown or non-finite tensor.
        """
        spec = spec_from_config(self.cfg, self.name)
        self._check_tensors(spec)
        return spec

    def _check_tensors(self, spec: Spec) -> None:
        tensors = {name: t for name, t in self.state_dict.items() if not name.endswith(_BUFFERS)}
        problems = wrong_tensors(tensors, spec, expected_shapes)
        for name, tensor in tensors.items():
            where = first_non_finite(tensor) if tensor.dtype in _DTYPES else None
            if where is not None:
                problems.append(f"{name} is {float(tensor[where])} at index {list(where)}")
        if problems:
            raise CheckpointError(self.name, problems)


Shapes = dict[str, tuple[int, ...]]


def expected_shapes(spec: Spec) -> tuple[Shapes, Shapes]:
    """Names and shapes of the tensors a checkpoint must have, and of those it may have."""
    H, K, d, k, m = spec.n_heads, spec.n_kv_heads, spec.d_model, spec.d_head, spec.d_mlp
    required: Shapes = {"embed.W_E": (spec.d_vocab, d), "unembed.W_U": (d, spec.d_vocab_out)}
    optional: Shapes = {"unembed.b_U": (spec.d_vocab_out,)}
    if spec.positions in ("standard", "shortformer"):
        required["pos_embed.W_pos"] = (spec.n_ctx, d)
    if spec.prediction_head:
        required["prediction.W"] = (d, d)
        optional["prediction.b"] = (d,)
    around = (spec.norm or spec.stream_norm) is not None
    norms = (["ln_final"] if spec.final_norm else []) + (["embed_norm"] if spec.embed_norm else [])
    for layer in range(spec.n_layers):
        at = f"blocks.{layer}"
        required |= {f"{at}.attn.W_Q": (H, d, k), f"{at}.attn.W_O": (H, k, d)}
        required |= {f"{at}.attn.W_K": (K, d, k), f"{at}.attn.W_V": (K, d, k)}
        optional |= {f"{at}.attn.b_Q": (H, k), f"{at}.attn.b_O": (d,)}
        optional |= {f"{at}.attn.b_K": (K, k), f"{at}.attn.b_V": (K, k)}
        if spec.qk_norm:
            for side, n in (("q", H), ("k", K)):
                optional |= {f"{at}.attn.{side}_norm.{part}": qk_gain(spec, n) for part in "wb"}
        if spec.sinks:
            required[f"{at}.attn.sinks"] = (H,)
        norms += [f"{at}.ln1"] if around else []
        norms += [f"{at}.ln1_post", f"{at}.ln2_post"] if spec.post_norm else []
        if spec.attn_only:
            continue
        required |= {f"{at}.mlp.W_in": (d, m), f"{at}.mlp.W_out": (m, d)}
        optional |= {f"{at}.mlp.b_in": (m,), f"{at}.mlp.b_out": (d,)}
        if spec.gated:
            required[f"{at}.mlp.W_gate"] = (d, m)
            optional[f"{at}.mlp.b_gate"] = (m,)
        if spec.experts:
            required[f"{at}.mlp.W_router"] = (d, spec.experts)
            optional[f"{at}.mlp.b_router"] = (spec.experts,)
        if spec.shared_gate:
            required[f"{at}.mlp.W_shared"], optional[f"{at}.mlp.b_shared"] = (d, 1), (1,)
        if spec.act_fn == "solu_ln":
            optional |= {f"{at}.mlp.ln.{part}": (m,) for part in ("w", "b")}
        norms += [f"{at}.ln2"] if around else []
    optional |= {
        f"{name}.{part}": (d,)
        for name in norms
        for part in ("w", "b")
        if part == "w" or not name.endswith("_post")
    }
    return required, optional


def qk_gain(spec: Spec, n_heads: int) -> tuple[int, ...]:
    """The shape of the gain of a norm on queries or keys of so many heads."""
    k = spec.d_head
    return {"head": (k,), "each": (n_heads, k), "all": (n_heads * k,)}[spec.qk_norm_over]


def wrong_tensors(
    tensors: Mapping[str, Tensor], spec: Spec, shapes: Callable[[Spec], tuple[Shapes, Shapes]]
) -> list[str]:
    """Every tensor that is missing, unknown, misshapen or not of 16, 32 or 64 bit numbers.

    Args:
        shapes: of the tensors that there must be and of those that there may be.
    """
    if spec.n_layers > len(tensors):  # every layer has several: not worth listing, or even possible
        return [f"config has n_layers={spec.n_layers}, but there are only {len(tensors)} tensors"]
    required, optional = shapes(spec)
    problems = [f"missing tensor {name}" for name in required if name not in tensors]
    for name, tensor in tensors.items():
        shape = required.get(name) or optional.get(name)
        if shape is None:
            problems.append(f"unknown tensor {name} {tuple(tensor.shape)}")
        elif tuple(tensor.shape) != shape:
            problems.append(f"{name} has shape {tuple(tensor.shape)}, expected {shape}")
        elif tensor.dtype not in _DTYPES:
            problems.append(f"{name} has dtype {tensor.dtype}, expected floating point")
    return problems


def first_non_finite(tensor: Tensor) -> tuple[int, ...] | None:
    """Index of the first NaN or infinity, or None."""
    if bool(torch.isfinite(tensor.sum())):  # a sum needs no second tensor; where it overflows, look
        return None
    bad = (~torch.isfinite(tensor)).nonzero()
    return tuple(int(i) for i in bad[0]) if len(bad) else None
