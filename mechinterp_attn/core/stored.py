"""Results in files: the table with its receipt and single values, as JSON or parquet."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pandas as pd

from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.fields import wrong_fields
from mechinterp_attn.core.reading import read_json
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.written import FORMAT, AboutSaved, ColumnSaved, WholeSaved


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
        _check(path, about, AboutSaved)
    else:
        about = read_json(path)
        _check(path, about, WholeSaved)
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


def _frame(path: Path, columns: list[ColumnSaved]) -> pd.DataFrame:
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
