"""The modes that make every neuron true softmax heads: which mixture stands in for an activation.

A head with score ``a z + b`` on its own token and 0 on the bias token puts ``sigmoid(a z + b)`` on
itself (Huben & Morris 2023). ``silu`` uses one such head per neuron, their generalised SiLU
``a1 SiLU(a2 z)``; ``mixture`` uses K of them with fitted values. The fits stand in ``mixtures.json``,
written by ``benchmarks/fit_mixtures.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import cache
from importlib.resources import files
from typing import Any, Literal, get_args

import pandas as pd
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError, UnsupportedModelError
from mechinterp_attn.model.gates import GATES
from mechinterp_attn.model.spec import Mixture, Spec

Mode = Literal["exact", "silu", "mixture"]

# ReLU is the limit of sharp scores: max error 0.27846 / slope, next to 0.
RELU_SLOPE = 1000.0
# What one softmax head per neuron computes, as its slope a2 (a1 a2 = 1 in all of them).
_SLOPES = {"silu": 1.0, "quick_gelu": 1.702, "gelu": 1.702, "gelu_new": 1.702, "relu": RELU_SLOPE}
_ONE = ((1.0,), (0.0,), (1.0,))  # a gated MLP whose gate is a sigmoid: one head, exactly


def check_mode(mlp: str, components: int) -> None:
    """Whether these options name a mode.

    Raises:
        MechInterpError: they do not; says what there is.
    """
    if mlp not in get_args(Mode):
        raise MechInterpError(
            f"mlp={mlp!r} is not a conversion mode; use {', '.join(map(repr, get_args(Mode)))}"
        )
    if isinstance(components, bool) or not isinstance(components, int) or components < 1:
        raise MechInterpError(f"components={components!r}; expected a positive integer")


def mixtures() -> pd.DataFrame:
    """The fitted mixtures: ``kind`` (plain or gated), ``act_fn, components, range, max_error,
    max_error_float32`` and the heads' ``slopes, offsets, values``.

    Errors are those of the activation itself, measured on a fine grid (of ``[-20, 20]`` where there
    is no range; the tails beyond are smaller). ``range`` R: the fit of a gated MLP's activation
    holds on ``[-R, R]`` only.
    """
    rows = [{"kind": kind} | row for kind, table in _table().items() for row in table]
    columns = ["kind", "act_fn", "components", "range", "max_error", "max_error_float32"]
    return pd.DataFrame(rows)[[*columns, "slopes", "offsets", "values"]]


def mixtures_for(
    spec: Spec, weights: Mapping[str, Tensor], *, mlp: str, components: int, name: str
) -> tuple[Mixture, ...]:
    """The mixture of every layer; empty for ``exact`` and for models without MLPs.

    Raises:
        UnsupportedModelError: no softmax heads can stand in for this model's neurons; says why.
        MechInterpError: there is no fit with so many components.
    """
    if mlp == "exact" or spec.act_fn is None:
        return ()
    if spec.experts:
        reason = "a mixture of experts: the router's weight on a neuron is no softmax over {self, bias}"
        raise UnsupportedModelError(f"{name} in mode {mlp!r}", [f"{reason}; use 'exact'"])
    act = GATES[spec.act_fn].name
    if spec.gated:
        if act == "sigmoid":
            return (_ONE,) * spec.n_layers
        if mlp == "silu":
            reason = (
                f"a gated MLP with {act}: a softmax head's output grows at most linearly in the stream, "
                f"{act}(g) * u faster, so no single head per neuron stands in for it"
            )
            raise UnsupportedModelError(f"{name} in mode 'silu'", [f"{reason}; use 'exact' or 'mixture'"])
        return tuple(
            _gated_fit(act, components, gate_bound(spec, weights, layer), name)
            for layer in range(spec.n_layers)
        )
    if act not in _SLOPES:
        reason = f"activation {spec.act_fn!r}: its weight on the own token is not bounded, or not its own"
        raise UnsupportedModelError(f"{name} in mode {mlp!r}", [f"{reason}; use 'exact'"])
    if mlp == "silu" or act in ("silu", "quick_gelu", "relu"):
        return (((_SLOPES[act],), (0.0,), (1.0,)),) * spec.n_layers
    return (_plain_fit(act, components),) * spec.n_layers


def gate_bound(spec: Spec, weights: Mapping[str, Tensor], layer: int) -> float:
    """How large any gate's reading ``|g|`` of a layer can be: the norm in front keeps its output no
    longer than sqrt(d_model); infinite without a norm.
    """
    if spec.norm is None:
        return math.inf
    W, b = (weights[f"blocks.{layer}.neurons.{part}"].double() for part in ("W_gate", "b_gate"))
    return float((W.norm(dim=0) * math.sqrt(spec.d_model) + b.abs()).max())


def _plain_fit(act: str, components: int) -> Mixture:
    known = {row["components"]: row for row in _table()["plain"] if row["act_fn"] == act}
    return _mixture(_chosen(known, components, act))


def _gated_fit(act: str, components: int, bound: float, name: str) -> Mixture:
    """The fit on the smallest range that holds the bound, or the widest one where none does."""
    rows = [row for row in _table()["gated"] if row["act_fn"] == act]
    if not rows:
        raise UnsupportedModelError(
            f"{name} in mode 'mixture'", [f"a gated MLP with {act} has no fitted mixture; use 'exact'"]
        )
    known = {row["components"]: row for row in rows}
    _chosen(known, components, f"gated {act}")
    ranges = sorted(row["range"] for row in rows if row["components"] == components)
    holding = [r for r in ranges if r >= bound]
    r = holding[0] if holding else ranges[-1]
    return _mixture(next(row for row in rows if (row["components"], row["range"]) == (components, r)))


def _chosen(known: Mapping[int, dict[str, Any]], components: int, act: str) -> dict[str, Any]:
    if components not in known:
        raise MechInterpError(
            f"components={components}: there is no fit of {act} with that many heads; there are fits with "
            f"{', '.join(map(str, sorted(known)))}"
        )
    return known[components]


def _mixture(row: Mapping[str, Any]) -> Mixture:
    return tuple(row["slopes"]), tuple(row["offsets"]), tuple(row["values"])


@cache
def _table() -> dict[str, list[dict[str, Any]]]:
    text = (files("mechinterp_attn") / "conversion" / "mixtures.json").read_text(encoding="utf-8")
    return dict(json.loads(text))
