"""``circuits MODEL ov|qk|skip-trigrams|copying|composition|virtual``."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp_attn.cli.common import AsJson, CsvFile, Model, emit

if TYPE_CHECKING:
    import pandas as pd

    from mechinterp_attn.model import AttentionOnlyModel


class Analysis(StrEnum):
    ov = "ov"
    qk = "qk"
    bigrams = "bigrams"
    skip_trigrams = "skip-trigrams"
    factoring_bugs = "factoring-bugs"
    copying = "copying"
    composition = "composition"
    virtual = "virtual"
    positions = "positions"
    directions = "directions"


class Kind(StrEnum):
    Q = "Q"
    K = "K"
    V = "V"


class Over(StrEnum):
    all = "all"
    rows = "rows"
    columns = "columns"


class RankBy(StrEnum):
    score = "score"
    z = "z"


def register(app: typer.Typer) -> None:
    app.command()(circuits)


def circuits(
    model: Model,
    analysis: Annotated[
        Analysis, typer.Argument(help="What to read from the weights.", show_default=False)
    ],
    heads: Annotated[
        list[str] | None,
        typer.Argument(help="Heads such as L1H2, L0N7 or 'L0H1 > L1H4'; all where that makes sense."),
    ] = None,
    top_k: Annotated[int, typer.Option(help="How many rows (per row or column with --over).")] = 10,
    over: Annotated[Over, typer.Option(help="ov, qk: rank all entries, rows or columns.")] = Over.all,
    source: Annotated[
        list[str] | None, typer.Option(help="Only this source token; may be given several times.")
    ] = None,
    smallest: Annotated[bool, typer.Option("--smallest", help="ov, qk: most negative first.")] = False,
    kind: Annotated[Kind, typer.Option(help="composition: what the later head reads with.")] = Kind.K,
    src: Annotated[
        str | None, typer.Option(help="composition, virtual: earlier heads: attention, mlp, or L0H1,L0H2.")
    ] = None,
    dst: Annotated[str | None, typer.Option(help="composition, virtual: later heads, likewise.")] = None,
    rank_by: Annotated[RankBy, typer.Option(help="composition: what the best are best by.")] = RankBy.score,
    max_bytes: Annotated[int, typer.Option(help="composition: memory it may use.")] = 2**30,
    resume: Annotated[
        Path | None, typer.Option(help="composition: file that keeps the state of the search.")
    ] = None,
    plan: Annotated[bool, typer.Option("--plan", help="ov, qk, composition: say the cost only.")] = False,
    as_json: AsJson = False,
    csv: CsvFile = None,
) -> None:
    """Read circuits from the weights: tables over tokens, copying, composition, virtual heads."""
    import mechinterp_attn as mia

    loaded = mia.load(model)
    own = mia.circuits
    tokens = _tokens(loaded, source)
    if analysis in (Analysis.ov, Analysis.qk):
        top = own.ov_top if analysis is Analysis.ov else own.qk_top
        options: dict[str, Any] = {"top_k": top_k, "over": over.value, "sources": tokens}
        options["largest"] = not smallest
        result: Any = top(loaded, _one(heads, analysis), **options, plan=plan)
    elif analysis is Analysis.composition:
        earlier = _select(src or (",".join(heads) if heads else None))
        options = {"rank_by": rank_by.value, "max_bytes": max_bytes, "resume": resume, "top_k": top_k}
        result = own.composition(loaded, kind.value, earlier, _select(dst), **options, plan=plan)
    else:
        emit(_table(loaded, analysis, heads, tokens, top_k, src, dst), as_json=as_json, csv=csv)
        return
    if plan:
        typer.echo(str(result))
    else:
        emit(result.frame, as_json=as_json, csv=csv)


def _table(
    model: AttentionOnlyModel,
    analysis: Analysis,
    heads: list[str] | None,
    tokens: list[str | int] | None,
    top_k: int,
    src: str | None,
    dst: str | None,
) -> pd.DataFrame:
    from mechinterp_attn import circuits as own

    if analysis is Analysis.bigrams:
        return own.bigrams(model, top_k=top_k, sources=tokens).frame
    if analysis is Analysis.skip_trigrams:
        return own.skip_trigrams(model, heads or None, sources=tokens, top_k=top_k).frame
    if analysis is Analysis.factoring_bugs:
        return own.factoring_bugs(model, _one(heads, analysis), sources=tokens, top_k=top_k).frame
    if analysis is Analysis.copying:
        return own.copying_scores(model, heads or None).top(top_k)
    if analysis is Analysis.virtual:
        src, dst = src or "attention", dst or "attention"
        return own.virtual_heads(model, src=_select(src), dst=_select(dst), top_k=top_k).frame
    if analysis is Analysis.positions:
        return own.position_circuit(model, _one(heads, analysis)).top(top_k)
    return own.singular_directions(model, _one(heads, analysis), top_k=top_k, components=1).frame


def _one(heads: list[str] | None, analysis: Analysis) -> str:
    if not heads or len(heads) != 1:
        raise typer.BadParameter(f"{analysis.value} takes one head, got {len(heads or [])}; such as L0H1")
    return heads[0]


def _select(text: str | None) -> str | list[str] | None:
    """'attention', 'mlp' or a list of labels between commas."""
    if text is None or text in ("attention", "mlp"):
        return text
    return [label.strip() for label in text.split(",")]


def _tokens(model: AttentionOnlyModel, source: list[str] | None) -> list[str | int] | None:
    """Texts of tokens; ids where the model has no tokenizer."""
    if not source:
        return None
    if model.tokenizer is None and all(text.isdigit() for text in source):
        return [int(text) for text in source]
    return list(source)
