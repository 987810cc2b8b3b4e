"""How queries and keys are turned, layer by layer, from the wrapped model's own tables of frequencies."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from mechinterp_attn.model.spec import RotaryTable
from mechinterp_attn.sources.families.table import Family

# What a table depends on besides the position: nothing, or the length of the sequence.
PLAIN = ("default", "linear", "llama3", "yarn", None)
BY_LENGTH = ("longrope", "dynamic")


def rotation_of(model: Any, hf: Any, attention: list[Any], family: Family) -> dict[str, Any]:
    """The config fields for rotary positions.

    Args:
        model: the Hugging Face model;  hf: its config;  attention: its attention modules, by layer.
    """
    rules: dict[str, Any] = {"rotary_adjacent_pairs": family.adjacent}
    module, names = _rotary_module(model)
    if module is None:  # GPT-J and CodeGen keep a table of sines, from the usual base
        return rules | {"rotary_dim": getattr(hf, "rotary_dim", None)}
    tables = {name: _table(module, name, hf, family) for name in names}
    distinct = list(dict.fromkeys(tables.values()))
    used = [distinct.index(tables[name]) for name in _by_layer(hf, names, len(attention))]
    turned = [_turns(m, hf, family) for m in attention]
    rules |= {
        "rotary_dim": 2 * len(distinct[0].frequencies),
        "rotaries": [asdict(table) for table in distinct],
        "rotary_of": tuple(t if turns else None for t, turns in zip(used, turned, strict=True)),
    }
    if any(table.stretch for table in distinct):  # it is made for sequences longer than the config's
        rules["n_ctx"] = max(int(t.until * t.stretch[1]) for t in distinct if t.until and t.stretch)
    return rules


def _rotary_module(model: Any) -> tuple[Any, list[str]]:
    """The module with the frequencies, and their names: "" or one per kind of layer."""
    for module in model.modules():
        own = [name for name, _ in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        own = [name.removesuffix("inv_freq") for name in own if "original" not in name]
        if own:
            return module, own
    return None, []


def _by_layer(hf: Any, names: list[str], n_layers: int) -> list[str]:
    """Which of the tables each layer uses."""
    if names == [""]:
        return names * n_layers
    return [f"{kind}_" for kind in hf.layer_types]


def _table(module: Any, name: str, hf: Any, family: Family) -> RotaryTable:
    frequencies: Tensor = getattr(module, f"{name}original_inv_freq", getattr(module, f"{name}inv_freq"))
    kind = name.removesuffix("_")
    rope = getattr(hf, "rope_parameters", None) or {}
    rope = rope.get(kind, rope) if kind else rope
    table = RotaryTable(
        tuple((-frequencies if family.turns_back else frequencies).float().tolist()),
        float(getattr(module, f"{name}attention_scaling", 1.0)),
    )
    rope_type = rope.get("rope_type")
    if rope_type not in BY_LENGTH:
        return table
    until = rope.get("original_max_position_embeddings") or hf.max_position_embeddings
    if rope_type == "dynamic":
        stretch = (float(rope["rope_theta"]), float(rope["factor"]))
        return RotaryTable(table.frequencies, table.factor, hf.max_position_embeddings, stretch=stretch)
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    beyond, _ = ROPE_INIT_FUNCTIONS[rope_type](hf, "cpu", seq_len=until + 1, layer_type=kind or None)
    return RotaryTable(table.frequencies, table.factor, until, tuple(beyond.float().tolist()))


def _turns(module: Any, hf: Any, family: Family) -> bool:
    """Whether a layer turns its queries and keys at all."""
    use = getattr(module, "use_rope", None)  # SmolLM3
    if use is not None:
        return bool(use)
    if family.turns_windows_only and getattr(hf, "sliding_window", None) is not None:
        return bool(getattr(module, "is_sliding", getattr(module, "sliding_window", None)))
    return True
