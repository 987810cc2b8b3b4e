"""Composition: which heads write what later heads read, by weights."""

from __future__ import annotations

from mechinterp_attn import circuits
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import Call, plan
from mechinterp_attn.view.charts import composition_matrix
from mechinterp_attn.view.report.blocks import Block, column, matrix, section, table
from mechinterp_attn.view.report.study import Study

PAIRS = 200  # strongest pairs listed of each kind
FLOPS = 4e11  # of a search over all pairs of heads: seconds to half a minute
COLUMNS = [
    column("src", "Earlier", "head"),
    column("dst", "Later", "head"),
    column("score", "Score", "score"),
    column("baseline", "Baseline"),
    column("z", "z"),
]


def composition(study: Study) -> Block | None:
    """Heatmaps of attention heads, and the strongest pairs of heads of every kind."""
    lead = [
        [
            "How much of what one head writes a later head reads, from the weights alone, 0 to 1. The "
            "baseline is the mean with the same heads turned at random; z counts standard deviations from "
            "it. The pictures show what is above the baseline; pairs at or below it stay pale, and a pair "
            "of a real circuit may well be one of them."
        ]
    ]
    blocks, receipts = [], {}
    for kind, result in study.compositions.items():
        blocks += _pictures(kind, result)
        receipts[f"{kind}-composition"] = result.receipt
    try:
        of_all = _all_heads(study)
    except MechInterpError:  # no pair composes: a single sublayer
        of_all = None
    if isinstance(of_all, str):
        lead.append([of_all])
    elif of_all is not None:
        blocks.append(_pairs_of_all(of_all))
        receipts["composition of all heads"] = of_all.receipt
    if not blocks:
        return None
    finding = ["Which heads write what later heads read, from the weights alone"]
    return section("composition", "Composition", lead, blocks, receipts, finding=finding)


def _pictures(kind: str, result: circuits.CompositionScores) -> list[Block]:
    return [
        matrix(f"composition-{kind}", composition_matrix(result)),
        table(
            f"pairs-{kind}",
            f"The strongest {kind}-composing pairs",
            result.top(PAIRS),
            COLUMNS,
            sort="score",
            rows=8,
        ),
    ]


def pairs_call(study: Study) -> Call:
    """V-composition among all heads."""
    few = study.model.n_heads <= 2 * PAIRS**0.5  # so few heads have too few pairs: all are listed
    return circuits.composition, (study.model, "V"), {"top_k": None if few else PAIRS, "rank_by": "z"}


def _all_heads(study: Study) -> circuits.CompositionScores | str | None:
    """V-composition among attention heads and MLP-derived heads together, or why it is left out."""
    n = study.model.n_heads
    if study.n_attention == n:
        return None
    function, args, options = pairs_call(study)
    cost = plan(function, *args, **options)
    if cost.flops > FLOPS:
        return (
            f"The pairs of all {n:,} heads, MLP-derived ones among them, are left out here ({cost}); "
            f"mia.circuits.composition(model, 'V', top_k={PAIRS}, rank_by='z') lists them."
        )
    return function(*args, **options)


def _pairs_of_all(result: circuits.CompositionScores) -> Block:
    return table(
        "pairs-all",
        "V-composing pairs of all heads, MLP-derived ones among them, furthest above their baseline",
        result.top(PAIRS, by="z"),
        COLUMNS,
        sort="z",
        filters=("src", "dst"),
        rows=8,
    )
