"""Reading text and JSON that come from outside: what is wrong with them is said, whatever it is."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any, NoReturn

from mechinterp_attn.core.errors import MechInterpError


def read_text(path: str | os.PathLike[str]) -> str:
    """The text of a file in UTF-8; a byte order mark in front is no part of it.

    Raises:
        MechInterpError: there is no such file, it cannot be read, or it is not UTF-8.
    """
    path = Path(path)
    try:
        if path.exists() and not path.is_file():
            raise MechInterpError(f"cannot read {path}: it is not a regular file")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise MechInterpError(f"cannot read {path}: it is not UTF-8 text ({error})") from error
    except (OSError, ValueError) as error:  # a ValueError for a name with a null character
        raise MechInterpError(f"cannot read {path}: {getattr(error, 'strerror', None) or error}") from error


def read_json(path: str | os.PathLike[str]) -> Any:
    """What a JSON file holds, as ``parse_json`` reads it.

    Raises:
        MechInterpError: the file cannot be read, or is not JSON.
    """
    text = read_text(path)
    try:
        return parse_json(text)
    except ValueError as error:
        raise MechInterpError(f"{path} is not JSON: {error}") from error


def parse_json(text: str) -> Any:
    """What a JSON text holds; stricter than ``json.loads``.

    Raises:
        ValueError: it is not JSON, a key stands twice in one object, a number is not finite or absurdly
            long, or it is nested too deeply.
    """
    try:
        return json.loads(
            text,
            object_pairs_hook=_once,
            parse_constant=_no_number,
            parse_int=_integer,
            parse_float=_number,
        )
    except RecursionError:
        raise ValueError("it is nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        keys = [key for key, _ in pairs]
        twice = sorted({key for key in keys if keys.count(key) > 1})
        raise ValueError(f"the key {', '.join(map(repr, twice))} stands twice")
    return found


def _no_number(text: str) -> NoReturn:
    raise ValueError(f"{text} is no JSON number")


def _integer(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    return value if math.isfinite(value) else _no_number(text)


def parse_yaml(text: str) -> Any:
    """What a YAML text holds: plain data, no tags that make objects.

    Raises:
        ValueError: it is not YAML, a key stands twice in one mapping, an alias is used (a few of them can
            stand for more than memory holds), or it is nested too deeply.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        def compose_node(self, parent: Any, index: Any) -> Any:
            if self.check_event(yaml.AliasEvent):
                raise yaml.MarkedYAMLError(None, None, "aliases are not read", self.peek_event().start_mark)
            return super().compose_node(parent, index)

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            seen = set()
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode) and key.value in seen:
                    raise yaml.MarkedYAMLError(
                        None, None, f"the key {key.value!r} stands twice", key.start_mark
                    )
                seen.add(key.value if isinstance(key, yaml.ScalarNode) else None)
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(text, Loader)  # a SafeLoader, and stricter
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
