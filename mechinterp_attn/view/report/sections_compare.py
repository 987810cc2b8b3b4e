"""The section that sets two models, or one model in two modes, side by side on one prompt."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechinterp_attn.core.text import shown
from mechinterp_attn.view.charts import loss_by_order
from mechinterp_attn.view.report.blocks import (
    Block,
    Spans,
    chart_block,
    column,
    patterns,
    section,
    table,
    token,
)
from mechinterp_attn.view.report.study import KIND_NAMES, SCORES, Study
from mechinterp_attn.view.report.telling import percent


def comparison(study: Study, other: Study) -> Block:
    """Predictions, loss by order, head by head, and patterns of both."""
    both = (study, other)
    names = _names(study, other)
    frame = pd.DataFrame(_facts(*both), columns=["what", "first", "second"])
    columns = [
        column("what", "On this prompt", "text"),
        column("first", names[0], "text"),
        column("second", names[1], "text"),
    ]
    blocks = [
        table("comparison", "Side by side", frame, columns, rows=len(frame)),
        table("comparison-predictions", f"The most likely {study.output}s", *_predictions(*both, names)),
    ]
    if study.has_loss:
        losses = loss_by_order([one.orders for one in both], names)
        blocks.append(chart_block("comparison-losses", losses))
    blocks += _heads(*both)
    for kind, title in (("attention", "attention heads"), ("mlp", "MLP-derived heads")):
        groups = [(kind, f"{which}: {name}", s.pictures(kind, 6)) for which, name, s in
                  zip(("First", "Second"), names, both, strict=True)]  # fmt: skip
        if any(pictures for _, _, pictures in groups):
            block = patterns(
                f"comparison-{kind}", study.names, groups, caption=f"Patterns of {title} of both"
            )
            blocks.append(block)
    lead = [[f"First: {names[0]}. Second: {names[1]}. The same prompt, token by token. "
             f"{_in_words(study, other)}"]]  # fmt: skip
    receipts = {
        f"{which}, {what}": receipt
        for which, s in (("first", study), ("second", other))
        for what, receipt in (
            ("frozen model", s.frozen.receipt),
            ("orders", s.orders.receipt),
            ("logit", s.attribution.receipt),
        )
    }
    return section("comparison", "Comparison", lead, blocks, receipts, finding=[_in_words(study, other)])


def two_prompts(study: Study, other: Study) -> Block:
    """Two prompts of one model: where they differ, what it says after each, heads and their patterns."""
    names = ["After the first", "After the second"]
    one, two = study.names, other.names
    blocks: list[Block] = []
    lead: list[Spans] = []
    if len(one) != len(two):
        words = (
            f"The prompts have {len(one):,} and {len(two):,} tokens. Heads are patched from one into the "
        )
        lead.append([words + "other only where every position has its partner."])
    else:
        places = [i for i, pair in enumerate(zip(one, two, strict=True)) if pair[0] != pair[1]]
        rows = [(i, one[i], two[i]) for i in places]
        frame = pd.DataFrame(rows, columns=["position", "first", "second"])
        columns = [
            column("position", "Position", "id"),
            column("first", "First", "token"),
            column("second", "Second", "token"),
        ]
        blocks.append(table("prompts-differ", "Where the prompts differ", frame, columns))
    blocks.append(
        table(
            "comparison-predictions",
            f"The most likely {study.output}s",
            *_predictions(study, other, names),
        )
    )
    blocks += _heads(study, other)
    picked = study.picked("attention", 6)
    for which, s in (("First", study), ("Second", other)):
        pictures = {label: (why, s.pattern(label)) for label, why in picked.items()}
        if pictures:
            groups = [("attention", f"{which} prompt", pictures)]
            blocks.append(patterns(f"comparison-{which.lower()}", s.names, groups))
    answer = study.token(study.attribution.target)
    p = [float(s.frozen.logits[s.attribution.position].double().softmax(-1)[s.attribution.target])
         for s in (study, other)]  # fmt: skip
    finding: Spans = [
        token(answer),
        f" has p {percent(p[0])} after the first and {percent(p[1])} after the ",
    ]
    finding += ["second"]
    receipts = {"first, logit": study.attribution.receipt, "second, logit": other.attribution.receipt}
    return section("comparison", "Side by side", lead, blocks, receipts, finding=finding)


def _heads(study: Study, other: Study) -> list[Block]:
    """What heads write straight to the explained logit in both; none without heads in common."""
    heads = _by_head(study, other)
    if not len(heads):
        return []
    columns = [
        column("head", "Head", "head"),
        column("kind", "Kind", "kind"),
        column("first", "First (logits)", "signed"),
        column("second", "Second (logits)", "signed"),
        column("change", "Change", "signed"),
    ]
    caption = "Heads with the same label: what each writes straight to the explained logit"
    filters = ("head", "kind")
    return [table("comparison-heads", caption, heads, columns, sort="change", filters=filters, rows=15)]


def _names(*studies: Study) -> list[str]:
    names = [shown(f"{s.model.provenance.get('name', 'unnamed')}, mode {s.model.mode}") for s in studies]
    if names[0] == names[1]:
        names = [f"{name} ({which})" for name, which in zip(names, ("first", "second"), strict=True)]
    return names


def _in_words(study: Study, other: Study) -> str:
    logits = [s.frozen.logits.float().log_softmax(-1) for s in (study, other)]
    kl = float((logits[0].exp() * (logits[0] - logits[1])).sum(-1).mean())
    same = float((logits[0].argmax(-1) == logits[1].argmax(-1)).float().mean())
    return (
        f"Over its {len(study.frozen.tokens):,} positions the second's predictions are {kl:.3g} nats "
        f"away from the first's (KL divergence); {same:.0%} of the most likely "
        f"{study.output}s are the same."
    )


def _facts(*studies: Study) -> list[tuple[str, str, str]]:
    explained = studies[0].token(studies[0].attribution.target)
    position = studies[0].attribution.position

    def best(s: Study, score: str) -> str:
        row = s.best(score)
        return "none" if row is None else f"{row['head']} ({row[score]:.2f})"

    def conversion_error(s: Study) -> str:
        card = s.model.provenance.get("fidelity")
        return f"{card['max_logit_error']:.1e} logits" if card else "not measured"

    def probability(s: Study) -> str:
        return f"{float(s.frozen.logits[position].double().softmax(-1)[s.attribution.target]):.1%}"

    facts: list[tuple[str, Any]] = [
        (f"most likely {studies[0].output}", lambda s: shown(s.predictions["token"].iloc[0])),
        ("its probability", lambda s: f"{s.predictions['probability'].iloc[0]:.1%}"),
        (f"logit of {shown(explained)}", lambda s: f"{s.attribution.total:.3f}"),
        (f"probability of {shown(explained)}", probability),
        ("conversion error", conversion_error),
        ("heads", lambda s: f"{s.model.n_heads:,}"),
    ]
    facts += [(f"best {words} head", lambda s, k=key: best(s, k)) for key, words in SCORES.items()]
    if studies[0].has_loss:
        facts.append(("loss", lambda s: f"{s.orders.frame['loss'].iloc[-1]:.4f} nats"))
        facts.append(("loss, no head at all", lambda s: f"{s.orders.frame['loss'].iloc[0]:.4f} nats"))
    first, second = studies
    return [(what, str(of(first)), str(of(second))) for what, of in facts]


def _predictions(study: Study, other: Study, names: list[str]) -> tuple[pd.DataFrame, list[Block]]:
    frames = [s.predictions[["token", "probability"]] for s in (study, other)]
    frame = pd.concat([f.add_suffix(f"_{i}") for i, f in enumerate(frames)], axis=1)
    frame.insert(0, "rank", range(1, len(frame) + 1))
    columns = [column("rank", "Rank", "id")]
    for i, name in enumerate(names):
        columns += [column(f"token_{i}", name, "token"), column(f"probability_{i}", "Probability", "score")]
    return frame, columns


def _by_head(study: Study, other: Study) -> pd.DataFrame:
    frames = [s.attribution.frame for s in (study, other)]
    frames = [f[f["kind"].isin(KIND_NAMES)][["head", "kind", "value"]] for f in frames]
    both = frames[0].merge(frames[1][["head", "value"]], on="head", suffixes=("_first", "_second"))
    both = both.rename(columns={"value_first": "first", "value_second": "second"})
    return both.assign(change=both["second"] - both["first"])
