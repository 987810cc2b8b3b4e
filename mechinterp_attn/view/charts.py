"""What a picture shows, said once: a notebook draws it with plotly, the report in its own way.

A result becomes a ``Chart`` or a ``Matrix`` here. ``figures/chart.py`` draws them with plotly, the report
as SVG and as a heatmap of its page; none of them knows a result.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import pandas as pd

from mechinterp_attn.causal.evaluation import Faithfulness
from mechinterp_attn.circuits.composition_scores import CompositionScores
from mechinterp_attn.paths.by_order import Orders
from mechinterp_attn.paths.importance import TermImportance
from mechinterp_attn.paths.logits import LogitAttribution
from mechinterp_attn.paths.search import TopPaths

NAN = float("nan")


@dataclass(frozen=True)
class Series:
    """One line, or one part of every bar.

    Attributes:
        name: as a legend has it.
        values: one for each label; NaN where there is none.
        kind: whose colour it has: "attention", "mlp", "embed", "bias", ...
    """

    name: str
    values: tuple[float, ...]
    kind: str = "attention"


@dataclass(frozen=True)
class Chart:
    """Lines over labelled points, or signed bars whose parts are stacked.

    Attributes:
        shape: "line" or "bars".
        caption: what it shows.
        labels: of the points or bars, in order.
        series: at least one.
        value: the axis of the values, with its unit.
        over: the axis of the labels.
        reference: a level to compare with, and its name.
    """

    shape: Literal["line", "bars"]
    caption: str
    labels: tuple[str, ...]
    series: tuple[Series, ...]
    value: str
    over: str = ""
    reference: tuple[str, float] | None = None


@dataclass(frozen=True, eq=False)
class Matrix:
    """A number for each pair of a row and a column.

    Attributes:
        caption: what it shows.
        rows, columns: their names; each has at least one pair.
        values: ``[row, column]``; NaN marks pairs that do not exist.
        axes: what rows and columns are.
        value: what the numbers are.
    """

    caption: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: np.ndarray
    axes: tuple[str, str]
    value: str


def composition_matrix(result: CompositionScores) -> Matrix:
    """How far the composition of each pair of heads is above that of random heads of the same shape, as
    Elhage et al. 2021 draw it: the baseline depends on the heads' ranks, so plain scores of neurons and
    attention heads cannot be compared. Heads without a partner are left out.
    """
    frame = result.frame
    writing, reading = set(frame["src"]), set(frame["dst"])
    sources = [label for label in result.sources if label in writing]
    readers = [label for label in result.readers if label in reading]
    values = np.full((len(sources), len(readers)), NAN)
    i = frame["src"].map({label: i for i, label in enumerate(sources)})
    j = frame["dst"].map({label: j for j, label in enumerate(readers)})
    values[i, j] = frame["score"] - frame["baseline"]
    reads = {"K": "keys", "Q": "queries", "V": "values"}[result.kind]
    return Matrix(
        f"{result.kind}-composition above random heads: the later head's {reads} read the earlier head",
        tuple(sources),
        tuple(readers),
        values,
        ("earlier head", "later head"),
        "score − baseline",
    )


def loss_by_order(results: Sequence[Orders], names: Sequence[str] = ("",)) -> Chart:
    """The loss (or a task's metric) with the paths up to each order, of one model or of several.

    The line of a model with fewer orders ends where its orders do.
    """
    first = results[0]
    metric = first.receipt.notes.get("metric")
    column, unit = ("loss", "loss (nats)") if metric is None else ("metric", str(metric))
    lines = [result.frame.set_index("order")[column] for result in results]
    longest = sorted(lines, key=len, reverse=True)
    labels = pd.unique(pd.concat([line.index.to_series() for line in longest]))
    blind = ("blind guess", math.log(first.logits.shape[-1])) if metric is None else None
    of = "Loss on this prompt" if metric is None else unit
    return Chart(
        "line",
        f"{of} with the paths up to each order",
        tuple(map(str, labels)),
        tuple(
            Series(name, tuple(line.reindex(labels)), kind)
            for name, line, kind in zip(names, lines, ("attention", "mlp"), strict=False)
        ),
        unit,
        "paths through at most this many heads",
        blind,
    )


def worth_of_orders(result: TermImportance) -> Chart:
    """What each order adds: of a loss how far it falls, of a task's metric how far it rises.

    The part of paths through attention heads alone, and of those with MLP-derived heads, stand apart.
    """
    metric = result.receipt.notes.get("metric")
    frame, sign = result.frame, -1 if metric is None else 1
    direct = tuple(sign * value if i == 0 else NAN for i, value in enumerate(frame["change"]))
    parts = [
        tuple(sign * value if i else NAN for i, value in enumerate(frame[name]))
        for name in ("attention_only", "with_mlp")
    ]
    return Chart(
        "bars",
        "What each order gains",
        tuple(f"order {order}" for order in frame["order"]),
        (
            Series("direct path", direct, "embed"),
            Series("attention heads only", parts[0], "attention"),
            Series("with MLP-derived heads", parts[1], "mlp"),
        ),
        "how much the loss falls (nats)" if metric is None else f"change of {metric}",
    )


def largest_terms(result: LogitAttribution, k: int, kind: str | None = None) -> Chart:
    """The largest terms of a logit: of one kind, or of all with what is left in one bar."""
    frame = result.frame if kind is None else result.frame[result.frame["kind"] == kind]
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index[:k]
    top = frame.loc[order]
    rows = list(zip(top["head"], top["value"], top["kind"], strict=True))
    left = len(frame) - len(top)
    if kind is None and left:
        rows.append((f"{left:,} others", result.total - sum(value for _, value, _ in rows), "others"))
    caption = f"{result.about} = {result.total:.3f}"
    return _by_kind(caption if kind is None else f"The {len(top)} largest direct effects", rows)


def largest_paths(result: TopPaths, k: int) -> Chart:
    """The largest paths to a logit, and all others in one bar."""
    top = result.frame.head(k)
    kinds = [f"{order} head" + "s" * (order != 1) for order in top["order"]]
    rows = list(zip(top["path"], top["contribution"], kinds, strict=True))
    rows.append(("all others", result.total - sum(value for _, value, _ in rows), "others"))
    return _by_kind(f"{result.about} = {result.total:.3f}", rows)


def _by_kind(caption: str, rows: Sequence[tuple[str, float, str]]) -> Chart:
    """Signed bars in logits, each in the series of its kind."""
    labels, _, kinds = zip(*rows, strict=True) if rows else ((), (), ())
    series = [
        Series(kind, tuple(value if own == kind else NAN for _, value, own in rows), kind)
        for kind in dict.fromkeys(kinds)
    ]
    return Chart("bars", caption, labels, tuple(series), "contribution (logits)")


def faithfulness_by_size(result: Faithfulness) -> Chart:
    """What circuits of growing size carry alone, and as many heads or edges drawn at random."""
    frame = result.frame
    lines = [Series("the ranking's first", tuple(frame["faithfulness"]), "attention")]
    if frame["random"].notna().all():
        lines.append(Series("as many at random", tuple(frame["random"]), "mlp"))
    return Chart(
        "line",
        f"What circuits of growing size carry alone ({result.units})",
        tuple(f"{size:,}" for size in frame["size"]),
        tuple(lines),
        "share of the behaviour",
        f"{result.units} in the circuit, of {result.total:,}",
        ("the whole behaviour", 1.0),
    )
