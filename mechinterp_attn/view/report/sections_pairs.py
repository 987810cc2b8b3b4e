"""The sections that hold two things side by side: heads that compose, models on one prompt."""

from __future__ import annotations

from itertools import compress
from typing import Any, Literal, cast

import numpy as np
import pandas as pd

from mechinterp_attn import circuits
from mechinterp_attn.view.report.blocks import Block, column, matrix, section, table
from mechinterp_attn.view.report.study import SCORES, Study
from mechinterp_attn.view.text import shown

PAIRS = 200  # strongest pairs listed of each kind
READS: dict[Literal["K", "Q", "V"], str] = {"K": "keys", "Q": "queries", "V": "values"}


def composition(study: Study) -> Block | None:
    """Which attention heads write what later attention heads read, by weights."""
    if study.model.spec.n_layers < 2:
        return None
    lead = [
        [
            "How much of what one head writes a later head reads, from the weights alone, 0 to 1. The "
            "baseline is the mean for random heads of the same shapes; z counts standard deviations from "
            "it. A pair of a real circuit may well lie below it."
        ]
    ]
    blocks, receipts = [], {}
    for kind, reads in READS.items():
        found = circuits.composition(study.model, kind, src="attention", dst="attention")
        result = cast(circuits.CompositionScores, found)
        scores = np.asarray(result.scores, dtype=float)
        writes, reads_any = np.isfinite(scores).any(1), np.isfinite(scores).any(0)
        blocks.append(
            matrix(
                f"composition-{kind}",
                f"{kind}-composition: the later head's {reads} read the earlier head",
                scores[writes][:, reads_any],
                list(compress(result.sources, writes)),
                list(compress(result.readers, reads_any)),
                ("earlier head", "later head"),
            )
        )
        blocks.append(
            table(
                f"pairs-{kind}",
                f"The strongest {kind}-composing pairs",
                result.top(PAIRS),
                [
                    column("src", "Earlier", "head"),
                    column("dst", "Later", "head"),
                    column("score", "Score", "score"),
                    column("baseline", "Baseline"),
                    column("z", "z", "signed"),
                ],
                sort="score",
                rows=10,
            )
        )
        receipts[f"{kind}-composition"] = result.receipt
    return section("composition", "Composition", lead, blocks, receipts)


def comparison(study: Study, other: Study) -> Block:
    """Two models, or one model in two modes, on the same prompt."""
    names = [f"{s.model.provenance.get('name', 'unnamed')}, mode {s.model.mode}" for s in (study, other)]
    if names[0] == names[1]:
        names = [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]
    rows = [(what, *values) for what, values in _facts(study, other)]
    frame = pd.DataFrame(rows, columns=["what", "first", "second"])
    columns = [
        column("what", "On this prompt", "text"),
        column("first", names[0], "text"),
        column("second", names[1], "text"),
    ]
    blocks = [table("comparison", "Side by side", frame, columns, rows=len(frame))]
    heads = _by_head(study, other)
    if len(heads):
        blocks.append(
            table(
                "comparison-heads",
                "Heads with the same label: what each writes straight to the explained logit",
                heads,
                [
                    column("head", "Head", "head"),
                    column("kind", "Kind", "kind"),
                    column("first", "First (logits)"),
                    column("second", "Second (logits)"),
                    column("change", "Change", "signed"),
                ],
                sort="change",
                filters=("head", "kind"),
            )
        )
    lead = [[f"First: {shown(names[0])}. Second: {shown(names[1])}. The same prompt, token by token."]]
    receipts = {
        f"{which}, {what}": receipt
        for which, s in (("first", study), ("second", other))
        for what, receipt in (("orders", s.orders.receipt), ("logit", s.attribution.receipt))
    }
    return section("comparison", "Comparison", lead, blocks, receipts)


def _facts(*studies: Study) -> list[tuple[str, list[str]]]:
    def of(what: Any) -> list[str]:
        return [str(what(s)) for s in studies]

    def best(s: Study, score: str) -> str:
        row = s.ranked(score).iloc[0]
        return f"{row['head']} ({row[score]:.2f})"

    def conversion_error(s: Study) -> str:
        card = s.model.provenance.get("fidelity")
        return f"{card['max_logit_error']:.1e} logits" if card else "not measured"

    explained = studies[0].token(studies[0].attribution.target)
    facts = [
        ("most likely next token", of(lambda s: shown(s.predictions["token"].iloc[0]))),
        ("its probability", of(lambda s: f"{s.predictions['probability'].iloc[0]:.1%}")),
        (f"logit of {shown(explained)}", of(lambda s: f"{s.attribution.total:.3f}")),
        ("conversion error", of(conversion_error)),
        ("heads", of(lambda s: f"{s.model.n_heads:,}")),
    ]
    facts += [(f"best {words} head", of(lambda s, k=key: best(s, k))) for key, words in SCORES.items()]
    if len(studies[0].frozen.tokens) > 1:
        facts.append(("loss", of(lambda s: f"{s.orders.frame['loss'].iloc[-1]:.4f} nats")))
        facts.append(("loss, no head at all", of(lambda s: f"{s.orders.frame['loss'].iloc[0]:.4f} nats")))
    return facts


def _by_head(study: Study, other: Study) -> pd.DataFrame:
    frames = [s.attribution.frame for s in (study, other)]
    frames = [f[f["kind"].isin(("attention", "mlp"))][["head", "kind", "value"]] for f in frames]
    both = frames[0].merge(frames[1][["head", "value"]], on="head", suffixes=("_first", "_second"))
    both = both.rename(columns={"value_first": "first", "value_second": "second"})
    return both.assign(change=both["second"] - both["first"])
