"""What every analysis returns: a table, and the checks that this very result passed."""

from __future__ import annotations

import html
import os
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd

from mechinterp_attn.core.errors import FailedCheckWarning
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.text import shown

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

ROWS_SHOWN = 12  # of a table, before "and so many more"


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
    """How a result was checked, and the choices it was made with.

    Attributes:
        checks: every check, passed or not.
        notes: dtype, seed, baseline and the like, by name.
    """

    checks: tuple[Check, ...] = ()
    notes: Mapping[str, Any] = field(default_factory=dict)

    @property
    def ok(self) -> bool | None:
        """Whether every check passed; None where nothing was checked."""
        return all(check.ok for check in self.checks) if self.checks else None

    def __str__(self) -> str:
        checks = [str(check) for check in self.checks] or ["not checked"]
        return "; ".join(checks + [f"{name}: {value}" for name, value in self.notes.items()])

    def _repr_html_(self) -> str:
        """One line that unfolds to every check and note; a failed check is unfolded."""
        failed = [check for check in self.checks if not check.ok]
        number = f"{len(self.checks)} check{'s' if len(self.checks) != 1 else ''}"
        line = f"✗ {len(failed)} of {number} FAILED" if failed else f"✓ {number} passed"
        if not self.checks:
            line = "not checked"
        facts = [str(check) for check in self.checks] + [f"{name}: {v}" for name, v in self.notes.items()]
        items = "".join(f"<li>{html.escape(shown(fact))}</li>" for fact in facts)
        return (
            f'<details{" open" if failed else ""} style="opacity:.85"><summary>{line}</summary>'
            f'<ul style="margin:.2em 0 0 1.2em;padding:0">{items}</ul></details>'
        )


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

    verdict: ClassVar[bool] = False  # the receipt is the answer that was asked for: no warning

    def __post_init__(self) -> None:
        failed = [str(check) for check in self.receipt.checks if not check.ok]
        if failed and not self.verdict:
            what = f"{self.title}: {'; '.join(failed)}. Do not rely on this result."
            warnings.warn(what, FailedCheckWarning, stacklevel=4)

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

    def __getitem__(self, column: str) -> pd.Series:
        """A column of ``frame``.

        Raises:
            KeyError: no such column; the message lists them.
        """
        if column not in self.frame:
            raise KeyError(f"no column {column!r}; there are {list(self.frame.columns)}")
        return self.frame[column]

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the table with its receipt and single values; ``mia.load_result`` reads it.

        Args:
            path: of the file: ``.json``, or ``.parquet``.

        Returns:
            the path.

        Raises:
            MechInterpError: another ending, or a file that cannot be written.
        """
        from mechinterp_attn.core.written import write_result

        return write_result(self, path)

    def plot(self) -> Figure:
        """A plotly figure: by default the first rows of ``frame``, ranked, as signed bars."""
        return draw(self)

    def _heading(self) -> str:
        """What stands above the table."""
        return self.title

    def _first_rows(self) -> pd.DataFrame:
        return self.top(ROWS_SHOWN) if self.sort_by else self.frame.head(ROWS_SHOWN)

    def _repr_html_(self) -> str:
        from mechinterp_attn.core.table import html_table

        rows = self._first_rows()
        size = (
            f"{len(self.frame):,} rows"
            if len(rows) == len(self.frame)
            else (f"first {len(rows)} of {len(self.frame):,} rows; all in <code>.frame</code>")
        )
        return (
            '<div style="font-family:system-ui,sans-serif;font-size:13px;max-width:100%;overflow-x:auto">'
            f"<div><b>{html.escape(shown(self._heading()))}</b> "
            f'<span style="opacity:.7">{size}</span></div>'
            f"{html_table(rows, shaded=[self.sort_by] if self.sort_by else [])}"
            f"{self.receipt._repr_html_()}</div>"
        )

    def __repr__(self) -> str:
        from mechinterp_attn.core.table import text_table

        rows = self._first_rows()
        more = (
            f"\n... and {len(self.frame) - len(rows):,} more in .frame"
            if len(rows) < len(self.frame)
            else ""
        )
        return f"{self._heading()} ({len(self.frame):,} rows)\n{text_table(rows)}{more}\n{self.receipt}"
