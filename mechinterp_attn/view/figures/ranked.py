"""The figure of any result that is a ranking: its first rows as signed bars."""

from __future__ import annotations

import pandas as pd
import plotly.graph_objects as go

from mechinterp_attn.core.pictures import draws
from mechinterp_attn.core.results import Result
from mechinterp_attn.view.figures.style import KIND_COLOURS, NEGATIVE, POSITIVE, figure, safe_text

_NO_NAMES = ("kind", "ok")  # shown by colour, or no name of a row


@draws(Result)
def ranked_bars(result: Result, k: int = 20) -> go.Figure:
    """The first ``k`` rows of a result by the column it is ranked by; heads in the colours of their
    kind, other rows red below zero and blue above.
    """
    rows = result.top(k)
    column = value_column(result)
    names = row_names(rows)
    values = rows[column].astype(float)
    fig = figure(
        title=safe_text(result.title),
        x=column.replace("_", " "),
        y="",
        height=max(280, 22 * len(rows) + 130),
    )
    kinds = rows["kind"].tolist() if "kind" in rows else [""] * len(rows)
    for kind in dict.fromkeys(kinds):
        own = [i for i, other in enumerate(kinds) if other == kind]
        signs = [POSITIVE if values.iloc[i] >= 0 else NEGATIVE for i in own]
        fig.add_trace(
            go.Bar(
                x=[values.iloc[i] for i in own],
                y=own,
                customdata=[[names[i]] for i in own],
                orientation="h",
                name=str(kind),
                marker_color=KIND_COLOURS.get(kind, signs),
                hovertemplate="%{customdata[0]}: %{x:.4g}<extra></extra>",
            )
        )
    fig.update_layout(showlegend=any(kinds), bargap=0.25)
    return fig.update_yaxes(
        tickvals=list(range(len(rows))), ticktext=names, autorange="reversed", automargin=True
    )


def value_column(result: Result) -> str:
    """What a result is ranked by; where it is not ranked, its ``value`` or first other number."""
    frame = result.frame
    if result.sort_by is not None:
        return result.sort_by
    numbers = [str(name) for name in frame.columns if frame[name].dtype.kind == "f"]
    return "value" if "value" in numbers else numbers[0]


def row_names(rows: pd.DataFrame) -> list[str]:
    """What a row is about, from its texts: ``L1H2: ' the' → ' cat'``."""
    columns = [
        str(name)
        for name in rows.columns
        if name not in _NO_NAMES and rows[name].map(lambda v: isinstance(v, str)).any()
    ]
    names = []
    for record in rows[columns].itertuples(index=False):
        texts = []
        for column, text in zip(columns, record, strict=True):
            quoted = any(isinstance(v, str) and v != v.strip() for v in rows[column])
            texts.append(safe_text(f"'{text}'" if quoted else str(text)))
        head = f"{texts.pop(0)}: " if columns[0] == "head" and len(texts) > 1 else ""
        names.append(head + " → ".join(texts))
    return names
