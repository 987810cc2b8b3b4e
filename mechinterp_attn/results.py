"""What every analysis returns: a table, and the checks that this very result passed."""

from __future__ import annotations

import html
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pandas as pd


@dataclass(frozen=True)
class Check:
    """One check of a result against something computed another way.

    Attributes:
        name: what was compared with what.
        error: the largest difference, in the unit of the quantity.
        tolerance: the largest error that passes.
    """

    name: str
    error: float
    tolerance: float

    @property
    def ok(self) -> bool:
        return bool(self.error <= self.tolerance)  # False for NaN; numpy has a bool of its own

    def __str__(self) -> str:
        sign = "ok" if self.ok else "FAILED"
        return f"{sign}: {self.name}: error {self.error:.1e} (tolerance {self.tolerance:.1e})"


@dataclass(frozen=True)
class Receipt:
    """The checks a result passed and the choices it was made with (dtype, seed, baseline, ...)."""

    checks: tuple[Check, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        return all(check.ok for check in self.checks)

    def __str__(self) -> str:
        notes = [f"{name}: {value}" for name, value in self.notes.items()]
        return "; ".join([str(check) for check in self.checks] + notes)


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Result:
    """Base of all results.

    Attributes:
        frame: a tidy table; the subclass says which rows and columns.
        receipt: the checks this result passed.
    """

    frame: pd.DataFrame = field(repr=False)
    receipt: Receipt = field(repr=False)

    title: ClassVar[str]
    sort_by: ClassVar[str | None] = None  # the column ``top`` ranks by, largest first

    def top(self, k: int = 10, by: str | None = None) -> pd.DataFrame:
        """The ``k`` rows with the largest values of a column (by absolute value where signed).

        Raises:
            KeyError: no such column; the message lists them.
        """
        by = by or self.sort_by
        if by is None:
            return self.frame.head(k)
        if by not in self.frame:
            raise KeyError(f"no column {by!r}; there are {list(self.frame.columns)}")
        order = self.frame[by].abs().sort_values(ascending=False, kind="stable").index
        return self.frame.loc[order[:k]].reset_index(drop=True)

    def _repr_html_(self) -> str:
        head = self.top(12) if self.sort_by else self.frame.head(12)
        more = len(self.frame) - len(head)
        note = f"<p>and {more:,} more rows in <code>.frame</code></p>" if more > 0 else ""
        receipt = html.escape(str(self.receipt))
        return f"<b>{html.escape(self.title)}</b>{head.to_html(index=False)}{note}<small>{receipt}</small>"

    def __repr__(self) -> str:
        head = self.top(12) if self.sort_by else self.frame.head(12)
        return f"{self.title} ({len(self.frame)} rows)\n{head.to_string(index=False)}\n{self.receipt}"
