"""What a report is made of, as plain JSON-ready data: sections of blocks.

A block is a dict with a ``type``: "facts", "prompt", "table", "chart", "patterns", "matrix", "graph",
"words". The page draws them, the JSON file is them; no block holds markup.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.core.text import number, shown
from mechinterp_attn.view.charts import Chart, Matrix

Block = dict[str, Any]
Spans = list[Any]  # strings, and what ``token`` and ``head`` give

# Patterns are kept as bytes: 0..252 for weights 0..1, then what a colour scale cannot show.
SCALE, BELOW, ABOVE, NOT_A_NUMBER = 252, 253, 254, 255


def token(text: str) -> dict[str, str]:
    """A table cell that shows a token."""
    return {"token": shown(text)}


def head(label: str) -> dict[str, str]:
    """A table cell that links to a head."""
    return {"head": label}


def section(
    id: str,
    title: str,
    lead: Sequence[Spans],
    blocks: Sequence[Block],
    receipts: Mapping[str, Receipt],
    *,
    finding: Spans | None = None,
) -> Block:
    """One section: ``lead`` paragraphs, blocks, and the receipts of what it shows, by name.

    Args:
        finding: what was found, in a line: the section is folded behind it. None: it stands open.
    """
    return {
        "id": id,
        "title": title,
        "finding": None if finding is None else list(finding),
        "lead": list(lead),
        "blocks": list(blocks),
        "receipts": [receipt_block(name, receipt) for name, receipt in receipts.items()],
    }


def _check(check: Check) -> Block:
    return {
        "name": check.name,
        "ok": bool(check.ok),  # a float64 of numpy compares to its own kind of bool
        "error": number(check.error, 3),
        "tolerance": number(check.tolerance, 3),
    }


def receipt_block(name: str, receipt: Receipt) -> Block:
    """A receipt as it stands under a section."""
    checks = [_check(check) for check in receipt.checks]
    notes = {key: shown(str(value)) for key, value in receipt.notes.items()}
    return {"of": name, "ok": receipt.ok, "checks": checks, "notes": notes}


def fact(
    name: str, value: Any, note: str = "", *, receipt: Receipt | None = None, text: bool = False
) -> Block:
    """A headline number or a property.

    Args:
        note: what it means.
        receipt: of the result it stands in; its first check is shown beside it.
        text: the value is a sentence rather than a number.
    """
    item: Block = {"name": name, "value": shown(str(value)), "note": shown(note), "text": text}
    item["check"] = _check(receipt.checks[0]) if receipt is not None and receipt.checks else None
    return item


def facts(*items: Block) -> Block:
    """Headline numbers or properties side by side."""
    return {"type": "facts", "items": list(items)}


def column(key: str, label: str, kind: str = "number", help: str = "") -> Block:
    """A column of a table.

    Args:
        kind: "text", "badge", "head", "kind", "layer", "token", "tokens" (lists of them), "id", "number",
            "signed" (a bar either way of zero) or "score" (a bar from 0 to 1).
    """
    return {"key": key, "label": label, "kind": kind, "help": help}


def table(
    id: str,
    caption: str,
    frame: pd.DataFrame,
    columns: Sequence[Block],
    *,
    sort: str | None = None,
    filters: Sequence[str] = (),
    rows: int = 25,
) -> Block:
    """A sortable table; ``filters`` name columns that the reader can filter by."""
    data = {c["key"]: _values(frame[c["key"]], c["kind"]) for c in columns}
    return {
        "type": "table",
        "id": id,
        "caption": caption,
        "columns": list(columns),
        "data": data,
        "sort": sort,
        "filters": list(filters),
        "rows": rows,
    }


def missing(values: pd.Series) -> pd.Series:
    """The column with None for NaN: a number that does not exist, not one that went wrong."""
    return values.astype(object).where(values.notna(), None)


def _values(values: Iterable[Any], kind: str) -> list[Any]:
    if kind in ("number", "signed", "score"):
        return [number(v) for v in values]
    if kind == "tokens":
        return [[shown(token) for token in tokens] for tokens in values]
    if kind in ("layer", "id"):
        return [None if pd.isna(v) else int(v) for v in values]
    return [shown("" if pd.isna(v) else str(v)) for v in values]


def chart_block(id: str, chart: Chart) -> Block:
    """A chart drawn as SVG, its table twin beside it."""
    return {
        "type": "chart",
        "id": id,
        "caption": shown(chart.caption),
        "kind": chart.shape,
        "labels": [shown(label) for label in chart.labels],
        "series": [
            {"name": shown(one.name), "kind": one.kind, "values": [number(v) for v in one.values]}
            for one in chart.series
        ],
        "value": shown(chart.value),
        "over": chart.over,
        "reference": chart.reference and [chart.reference[0], number(chart.reference[1])],
    }


def pattern(weights: np.ndarray) -> str:
    """Attention weights of any shape as deflated bytes in base64 (about three significant digits)."""
    with np.errstate(invalid="ignore"):
        scaled = np.rint(np.clip(weights, 0, 1) * SCALE)
    coded = np.where(np.isnan(weights), NOT_A_NUMBER, scaled)
    # Rounding may leave a softmax weight a hair outside [0, 1]: that is not worth a mark.
    coded = np.where(weights > 1 + 1e-3, ABOVE, coded)
    coded = np.where(weights < -1e-3, BELOW, coded)
    return base64.b64encode(zlib.compress(coded.astype(np.uint8).tobytes(), 9)).decode("ascii")


def patterns(
    id: str,
    tokens: Sequence[str],
    groups: Sequence[tuple[str, str, Mapping[str, tuple[str, np.ndarray]]]],
    *,
    caption: str = "",
    circuitsvis: bool = False,
) -> Block:
    """Attention patterns side by side.

    Args:
        groups: kind, title, and by head: why it is shown and its weights ``[query, key + bias]``.
        circuitsvis: offer the first heads in CircuitsVis as well.
    """
    return {
        "type": "patterns",
        "id": id,
        "caption": shown(caption),
        "circuitsvis": circuitsvis,
        "tokens": [shown(t) for t in tokens],
        "groups": [
            {
                "kind": kind,
                "title": shown(title),
                "heads": [
                    {"head": shown(head), "why": shown(why), "weights": pattern(weights)}
                    for head, (why, weights) in heads.items()
                ],
            }
            for kind, title, heads in groups
            if heads
        ],
    }


def matrix(id: str, drawn: Matrix) -> Block:
    """A heatmap of values from 0 up, what is below drawn as 0; NaN marks pairs that do not exist."""
    finite = drawn.values[np.isfinite(drawn.values)]
    top = float(finite.max()) if finite.size and finite.max() > 0 else 1.0
    return {
        "type": "matrix",
        "id": id,
        "caption": shown(drawn.caption),
        "axes": [shown(axis) for axis in drawn.axes],
        "rows": [shown(r) for r in drawn.rows],
        "columns": [shown(c) for c in drawn.columns],
        "wide": len(drawn.columns) > 24,
        "top": number(top),
        "values": pattern(np.maximum(drawn.values, 0) / top),
    }
