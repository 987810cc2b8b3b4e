"""What a model is, as plain data: everything the forward pass needs besides the weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from typing import Any, Literal

from mechinterp_attn.errors import MechInterpError

NormKind = Literal["LN", "RMS"] | None
Positions = Literal["standard", "rotary"] | None


@dataclass(frozen=True)
class Spec:
    """Shapes and rules of a transformer; ``n`` counts, ``d`` dimensions.

    Attributes:
        d_mlp: 0 for an attention-only model.
        d_vocab_out: width of the logits; differs from d_vocab in classifiers.
        act_fn: TransformerLens's name of the activation; None for an attention-only model.
        norm: the norm in front of every sublayer.
        final_norm: the norm before the unembedding.
        positions: learned and added ("standard"), rotary, or none.
        attn_scale: what attention scores are divided by.
        rotary_adjacent: rotary pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2+1), ...
        norm_in_float32: the source takes norms in float32 even when it runs in float64.
    """

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    d_vocab_out: int
    act_fn: str | None
    norm: NormKind
    final_norm: NormKind
    eps: float
    positions: Positions
    causal: bool
    attn_scale: float
    rotary_dim: int = 0
    rotary_base: float = 10000.0
    rotary_adjacent: bool = False
    norm_in_float32: bool = False

    @property
    def attn_only(self) -> bool:
        return self.d_mlp == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spec:
        """The inverse of ``to_json``.

        Raises:
            MechInterpError: names every missing and unknown field.
        """
        known = {f.name for f in fields(cls)}
        needed = {f.name for f in fields(cls) if f.default is MISSING}
        wrong = [f"missing field {name!r}" for name in sorted(needed - set(data))]
        wrong += [f"unknown field {name!r}" for name in sorted(set(data) - known)]
        if wrong:
            raise MechInterpError("the model's spec cannot be read: " + "; ".join(wrong))
        return cls(**data)
