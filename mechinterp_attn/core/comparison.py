"""Two results of one kind side by side: of two models, two prompts, two settings."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import pandas as pd

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Receipt, Result


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Comparison(Result):
    """One column of two results, row by row.

    Attributes:
        frame: one row per name that both have: what names it (``head``, ``path``, ...), its value in
            either (columns called by ``names``) and ``change``, the second minus the first; the largest
            change first. The receipt has the checks of both.
        column: the column that is compared.
        names: what the two results are called.
        rank_correlation: Spearman's, over all rows of ``frame``; NaN where one of them is constant.
        only: how many rows each has that the other one lacks.
    """

    column: str
    names: tuple[str, str]
    rank_correlation: float
    only: tuple[int, int]
    title: ClassVar[str] = "Comparison"
    sort_by: ClassVar[str | None] = "change"


def compare(
    first: Result,
    second: Result,
    *,
    by: str | None = None,
    on: list[str] | None = None,
    names: tuple[str, str] = ("first", "second"),
) -> Comparison:
    """What changed between two results, such as the head scores of two models.

    Args:
        first: a result.
        second: another one with the same columns.
        by: the column to compare; by default the one that the results are ranked by.
        on: the columns that name a row in both; by default their texts (``head``, ``kind``, ``path``),
            and their whole numbers too where the texts do not tell rows apart.
        names: what to call the two in the table.

    Raises:
        MechInterpError: one of them lacks a column, rows that cannot be told apart, or no row in common.
    """
    one, two = first.frame, second.frame
    column = by or first.sort_by or _first_number(one)
    lacking = [
        f"the {which} result has no column {name!r}"
        for which, frame in (("first", one), ("second", two))
        for name in [column, *(on or [])]
        if name not in frame
    ]
    if lacking:
        raise MechInterpError(f"cannot compare: {'; '.join(lacking)}; by= and on= name columns of both")
    keys = on or _naming(one, two, column)
    if names[0] == names[1] or {*names} & {*keys, "change"}:
        raise MechInterpError(
            f"names={names!r}: expected two different names, none of them 'change' or one of {keys}"
        )
    for which, frame in (("first", one), ("second", two)):
        if frame.duplicated(keys).any():
            raise MechInterpError(
                f"rows of the {which} result cannot be told apart by {keys}; name them with on=[...], of "
                f"{list(frame.columns)}"
            )
    both = one[[*keys, column]].merge(two[[*keys, column]], on=keys, suffixes=("_1", "_2"))
    if both.empty:
        raise MechInterpError(f"the two results have no row in common by {keys}")
    both = both.rename(columns={f"{column}_1": names[0], f"{column}_2": names[1]})
    both["change"] = both[names[1]].astype(float) - both[names[0]].astype(float)
    order = both["change"].abs().sort_values(ascending=False, kind="stable").index
    # Ranks that are all the same have no correlation, and numpy would warn of it.
    varied = all(both[name].nunique() > 1 for name in names)
    correlation = float(both[names[0]].rank().corr(both[names[1]].rank())) if varied else float("nan")
    only = (len(one) - len(both), len(two) - len(both))
    notes = {
        "compared": f"{column} of {len(both):,} rows by {', '.join(keys)}",
        "rank correlation": f"{correlation:.3f}",
        f"only in {names[0]}": only[0],
        f"only in {names[1]}": only[1],
    }
    checks = tuple(
        replace(check, name=f"{name}: {check.name}")
        for name, result in zip(names, (first, second), strict=True)
        for check in result.receipt.checks
    )
    return Comparison(
        frame=both.loc[order].reset_index(drop=True),
        receipt=Receipt(checks, notes),
        column=column,
        names=names,
        rank_correlation=correlation,
        only=only,
    )


def _first_number(frame: pd.DataFrame) -> str:
    found = list(frame.select_dtypes("float").columns)
    if not found:
        raise MechInterpError(f"no column of numbers to compare; there are {list(frame.columns)}")
    return str(found[0])


def _naming(one: pd.DataFrame, two: pd.DataFrame, column: str) -> list[str]:
    shared = [str(c) for c in one if c in two and c != column]
    texts = [c for c in shared if one[c].dtype.kind not in "iufb"]
    wholes = [c for c in shared if one[c].dtype.kind == "i"]
    if texts and not (one.duplicated(texts).any() or two.duplicated(texts).any()):
        return texts
    return [*texts, *wholes]
