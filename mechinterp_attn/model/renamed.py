"""Hooks of neurons under the names of version 0.1, for one version more.

They ended like those of attention, so that filters meant for attention (``name.endswith("pattern")``)
took neurons too, and TransformerLens's ``pos_slice`` cut their batch axis.
"""

from __future__ import annotations

import re
import warnings
from typing import Any

from transformer_lens import ActivationCache

NEW = {"hook_q": "hook_score", "hook_v": "hook_read", "hook_pattern": "hook_weight", "hook_z": "hook_act"}
_OLD = re.compile(r"(blocks\.\d+\.neurons\.)(hook_(?:q|v|pattern|z))")


def present(name: Any) -> Any:
    """A hook's present name; old ones warn, all else is given back as it is."""
    old = _OLD.fullmatch(name) if isinstance(name, str) else None
    if old is None:
        return name
    new = old[1] + NEW[old[2]]
    warnings.warn(
        f"{name} is called {new} now; the old name goes with the next version", FutureWarning, stacklevel=3
    )
    return new


def present_filter(names: Any) -> Any:
    """``names_filter`` with present names: a name, several, or a function, which is left alone."""
    return [present(name) for name in names] if isinstance(names, list) else present(names)


class Renamed(dict[str, Any]):
    """A dict by hook name that also knows the old names."""

    def __missing__(self, name: str) -> Any:
        new = present(name)
        if new == name:
            raise KeyError(name)
        return self[new]


class Cache(ActivationCache):
    """TransformerLens's cache, which also knows the old names."""

    def __getitem__(self, key: Any) -> Any:
        return super().__getitem__(present(key))
