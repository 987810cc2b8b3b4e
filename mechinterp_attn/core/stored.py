"""Results in files: the table with its receipt and single values, as JSON or parquet."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import pandas as pd
from typing_extensions import TypedDict

from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.fields import wrong_fields
from mechinterp_attn.core.files import write_file, write_text
from mechinterp_attn.core.reading import read_json
from mechinterp_attn.core.results import Check, Receipt, Result

FORMAT = 1
Single = str | int | float | bool | None


class _NotFinite(TypedDict):
    number: Literal["nan", "inf", "-inf"]


class _Check(TypedDict):
    name: str
    error: float | _NotFinite
    tolerance: float | _NotFinite


class _About(TypedDict):
    format: int
    result: str
    title: str
    sort_by: str | None
    checks: list[_Check]
    notes: dict[str, Any]
    facts: dict[str, Any]


class _Column(TypedDict):
    name: str
    dtype: str
    values: list[Any]


class _Whole(_About):
    columns: list[_Column]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class StoredResult(Result):
    """A result read from a file: its table, receipt and single values.

    Tensors and models that the first one carried are not in the file; run the analysis again for those.

    Attributes:
        kind_of_result: the class of the result that was saved, such as ``"HeadScores"``.
        facts: its single values by name, such as ``total``.
    """

    kind_of_result: str
    facts: Mapping[str, Any] = field(default_factory=dict)


def save_result(result: Result, path: str | os.PathLike[str]) -> Path:
    """Write a result's table, receipt and single values.

    Args:
        result: any result.
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
            {"name": str(name), "dtype": str(frame[name].dtype), "values": _plain(frame[name].tolist())}
            for name in frame
        ]
        return write_text(path, json.dumps({**about, "columns": columns}, indent=1, allow_nan=False))
    if path.suffix == ".parquet":
        table = frame.copy()
        table.attrs = dict(about.items())
        return write_file(path, lambda target: table.to_parquet(target, index=False))
    raise MechInterpError(f"cannot save a result as {path.name!r}; end the name in .json or .parquet")


def load_result(path: str | os.PathLike[str]) -> StoredResult:
    """Read what ``result.save`` wrote.

    Args:
        path: of the file, ``.json`` or ``.parquet``.

    Raises:
        MechInterpError: there is no such file, or it holds no result.
    """
    path = Path(path)
    if path.suffix == ".parquet":
        frame = _read_parquet(path)
        about = dict(frame.attrs)
        frame.attrs = {}
        _check(path, about, _About)
    else:
        about = read_json(path)
        _check(path, about, _Whole)
        frame = _frame(path, about["columns"])
    wanted = {"title": about["title"], "sort_by": about["sort_by"]}
    kind = cast("type[StoredResult]", type("StoredResult", (StoredResult,), wanted))
    checks = tuple(
        Check(check["name"], _restored(check["error"]), _restored(check["tolerance"]))
        for check in about["checks"]
    )
    return kind(
        frame=frame,
        receipt=Receipt(checks, {name: _restored(note) for name, note in about["notes"].items()}),
        kind_of_result=about["result"],
        facts={name: _restored(value) for name, value in about["facts"].items()},
    )


def _about(result: Result) -> _About:
    single = {f.name: getattr(result, f.name) for f in dataclasses.fields(result)}
    facts = single.pop("facts", {}) | {k: v for k, v in single.items() if _is_single(v)}
    kind = facts.pop("kind_of_result", type(result).__name__)
    checks = [cast("_Check", _plain(dataclasses.asdict(check))) for check in result.receipt.checks]
    return {
        "format": FORMAT,
        "result": kind,
        "title": result.title,
        "sort_by": result.sort_by,
        "checks": checks,
        "notes": _plain(dict(result.receipt.notes)),
        "facts": _plain(facts),
    }


def _is_single(value: Any) -> bool:
    if isinstance(value, tuple):
        return all(isinstance(v, Single) for v in value)
    return isinstance(value, Single)


def _plain(value: Any) -> Any:
    """What JSON can hold: numbers that are not finite are marked, what it has no word for is text."""
    if isinstance(value, Mapping):
        return {str(key): _plain(v) for key, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    if hasattr(value, "tolist") and not isinstance(value, str):  # of numpy or torch
        return _plain(value.tolist())
    if isinstance(value, float) and not math.isfinite(value):
        return {"number": str(value)}
    if value is pd.NA:
        return None
    return value if isinstance(value, Single) else str(value)


def _restored(value: Any) -> Any:
    if isinstance(value, list):
        return tuple(_restored(v) for v in value)
    if isinstance(value, dict):
        return (
            float(value["number"])
            if set(value) == {"number"}
            else {k: _restored(v) for k, v in value.items()}
        )
    return value


def _check(path: Path, about: Any, kind: type) -> None:
    wrong = wrong_fields(kind, about)
    if not wrong and about["format"] != FORMAT:
        wrong = [f"format={about['format']}, expected {FORMAT}"]
    if wrong:
        raise MechInterpError(listing(f"{path} holds no saved result", wrong))


def _frame(path: Path, columns: list[_Column]) -> pd.DataFrame:
    lengths = {len(column["values"]) for column in columns}
    if len(lengths) > 1:
        raise MechInterpError(f"{path} holds no saved result: its columns have lengths {sorted(lengths)}")
    series = {}
    for column in columns:
        name, dtype = column["name"], column["dtype"]
        try:
            series[name] = pd.Series([_restored(v) for v in column["values"]], dtype=dtype)
        except (TypeError, ValueError) as error:
            raise MechInterpError(f"{path}: column {name!r} is no {dtype} ({error})") from error
    return pd.DataFrame(series)


def _read_parquet(path: Path) -> pd.DataFrame:
    try:
        frame = pd.read_parquet(path)
    except FileNotFoundError as error:
        raise MechInterpError(f"cannot read {path}: there is no such file") from error
    except (OSError, ValueError) as error:  # what pyarrow raises for a damaged file are both
        raise MechInterpError(f"cannot read {path} as parquet: {error}") from error
    for name in frame:  # lists come back as arrays
        if frame[name].dtype == object:
            frame[name] = [_restored(v.tolist()) if hasattr(v, "tolist") else v for v in frame[name]]
    return frame
