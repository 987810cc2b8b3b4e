"""``circuits MODEL ov|qk|skip-trigrams|copying|composition|virtual``."""

from __future__ import annotations

import inspect
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from mechinterp_attn.cli.answer import Answer, answering
from mechinterp_attn.cli.common import (
    Heads,
    Model,
    Top,
    load,
    one_head,
    token_of,
)

if TYPE_CHECKING:
    from mechinterp_attn.core.plan import Call
    from mechinterp_attn.model.attention_only import AttentionOnlyModel


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
    app.command()(answering(circuits))


def circuits(
    model: Model,
    analysis: Annotated[
        Analysis,
        typer.Argument(
            help="ov: what attending to a token does to the logits; qk: which token attends to which; "
            "bigrams: the direct path; skip-trigrams: the strongest of a head, or of all; factoring-bugs: "
            "crossings they imply; copying: eigenvalue scores; composition: of heads with later ones; "
            "virtual: heads in a row; positions: attention by position; directions: SVD of a head.",
            metavar="ANALYSIS",
            show_default=False,
        ),
    ],
    heads: Heads = None,
    top: Top = None,
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
    length: Annotated[int, typer.Option(help="virtual: heads in a chain, 2 or 3.")] = 2,
    rank_by: Annotated[RankBy, typer.Option(help="composition: what the best are best by.")] = RankBy.score,
    special_tokens: Annotated[
        bool, typer.Option("--special-tokens", help="Tables of tokens: list special tokens, padding too.")
    ] = False,
    resume: Annotated[
        Path | None, typer.Option(help="Keep what was found here; the same command goes on from it.")
    ] = None,
    *,
    answer: Answer,
) -> None:
    """Read circuits from the weights: tables over tokens, copying, composition, virtual heads."""
    import mechinterp_attn as mia

    loaded = load(model)
    own = mia.circuits
    tokens = [token_of(loaded, text) or text for text in source] if source else None
    if analysis in (Analysis.ov, Analysis.qk):
        ranked = own.ov_top if analysis is Analysis.ov else own.qk_top
        options: dict[str, Any] = {"top_k": top, "over": over.value, "sources": tokens}
        options["largest"] = not smallest
        call: Call = ranked, (loaded, one_head(heads, f"circuits ... {analysis}")), options
    elif analysis is Analysis.composition:
        earlier = _select(src or (",".join(heads) if heads else None))
        options = {"rank_by": rank_by.value, "resume": resume, "top_k": top or 10}
        call = own.composition, (loaded, kind.value, earlier, _select(dst)), options
    else:
        call = _others(loaded, analysis, heads, tokens, top, src, dst, length)
    result = answer.run(_listing_special(call, analysis) if special_tokens else call)
    ranked_here = analysis in (Analysis.copying, Analysis.positions)  # the others come as long as asked
    rows = result.top(top or 10) if ranked_here else result.frame
    answer.give(result, rows)


def _listing_special(call: Call, analysis: Analysis) -> Call:
    from mechinterp_attn.core.errors import MechInterpError

    function, args, options = call
    if "special_tokens" not in inspect.signature(function).parameters:
        raise MechInterpError(f"circuits ... {analysis} lists no tokens; leave --special-tokens out")
    return function, args, {**options, "special_tokens": True}


def _others(
    model: AttentionOnlyModel,
    analysis: Analysis,
    heads: list[str] | None,
    tokens: list[str | int] | None,
    top: int | None,
    src: str | None,
    dst: str | None,
    length: int,
) -> Call:
    from mechinterp_attn import circuits as own

    name = f"circuits ... {analysis}"
    options: dict[str, Any]
    if analysis is Analysis.bigrams:
        return own.bigrams, (model,), {"top_k": top, "sources": tokens}
    if analysis is Analysis.skip_trigrams:
        return own.skip_trigrams, (model, heads or None), {"sources": tokens, "top_k": top}
    if analysis is Analysis.factoring_bugs:
        options = {"sources": tokens, "top_k": top or 10}
        return own.factoring_bugs, (model, one_head(heads, name)), options
    if analysis is Analysis.copying:
        return own.copying_scores, (model, heads or None), {}
    if analysis is Analysis.virtual:
        src, dst = src or "attention", dst or "attention"
        options = {"src": _select(src), "dst": _select(dst), "length": length, "top_k": top or 10}
        return own.virtual_heads, (model,), options
    if analysis is Analysis.positions:
        return own.position_circuit, (model, one_head(heads, name)), {}
    return own.singular_directions, (model, one_head(heads, name)), {"top_k": top, "components": 1}


def _select(text: str | None) -> str | list[str] | None:
    """'attention', 'mlp' or a list of labels between commas."""
    if text is None or text in ("attention", "mlp"):
        return text
    return [label.strip() for label in text.split(",")]
