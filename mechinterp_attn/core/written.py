"""The table of a result with its receipt and single values, written as JSON or parquet."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
from typing_extensions import TypedDict

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.files import write_file, write_text

FORMAT = 1
Single = str | int | float | bool | None


class _NotFinite(TypedDict):
    number: Literal["nan", "inf", "-inf"]


class CheckSaved(TypedDict):
    """One check of a receipt."""

    name: str
    error: float | _NotFinite
    tolerance: float | _NotFinite


class AboutSaved(TypedDict):
    """All of a result but its table."""

    format: int
    result: str
    title: str
    sort_by: str | None
    checks: list[CheckSaved]
    notes: dict[str, Any]
    facts: dict[str, Any]


class ColumnSaved(TypedDict):
    """A column of the table."""

    name: str
    dtype: str
    values: list[Any]


class WholeSaved(AboutSaved):
    """A result as its JSON file has it."""

    columns: list[ColumnSaved]


def write_result(result: Any, path: str | os.PathLike[str]) -> Path:
    """Write a result's table, receipt and single values.

    Args:
        result: any ``Result``.
        path: of the file, ``.json`` or ``.parquet``.

    Returns:
        the path.

    Raises:
        MechInterpError: another ending, or a file that cannot be written.
    """
    path = Path(path)
    frame, about = result.frame, _about(result)
    if not isinstance(frame.index, pd.RangeIndex):
        frame = frame.reset_index(names=[name or "index" for name in frame.index.names])
    if path.suffix == ".json":
        columns = [
            {"name": str(name), "dtype": str(frame[name].dtype), "values": plain(frame[name].tolist())}
            for name in frame
        ]
        return write_text(path, json.dumps({**about, "columns": columns}, indent=1, allow_nan=False))
    if path.suffix == ".parquet":
        table = frame.copy()
        table.attrs = dict(about.items())
        return write_file(path, lambda target: table.to_parquet(target, index=False))
    raise MechInterpError(f"cannot save a result as {path.name!r}; end the name in .json or .parquet")


def _about(result: Any) -> AboutSaved:
    single = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    facts = single.pop("facts", {}) | {k: v for k, v in single.items() if _is_single(v)}
    kind = facts.pop("kind_of_result", type(result).__name__)
    checks = [cast("CheckSaved", plain(dataclasses.asdict(check))) for check in result.receipt.checks]
    return {
        "format": FORMAT,
        "result": kind,
        "title": result.title,
        "sort_by": result.sort_by,
        "checks": checks,
        "notes": plain(dict(result.receipt.notes)),
        "facts": plain(facts),
    }


def _is_single(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(v, Single) for v in value)
    return isinstance(value, Single)


def plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite are marked, what it has no word for is text."""
    if isinstance(value, Mapping):
        return {str(key): plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [plain(v) for v in value]
    if hasattr(value, "tolist") and not isinstance(value, str):  # of numpy or torch
        return plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is pd.NA:
        return None
    return value if isinstance(value, Single) else str(value)
