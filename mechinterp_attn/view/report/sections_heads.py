"""The sections about heads: their table, their patterns, neurons by effect, chosen heads' circuits."""

from __future__ import annotations

from collections.abc import Sequence

import pandas as pd

from mechinterp_attn import circuits
from mechinterp_attn.circuits.listed import fewest
from mechinterp_attn.core.plan import Call, plan
from mechinterp_attn.core.text import signed
from mechinterp_attn.view.charts import largest_terms
from mechinterp_attn.view.report.blocks import (
    Block,
    Spans,
    chart_block,
    column,
    head,
    missing,
    patterns,
    section,
    table,
    token,
)
from mechinterp_attn.view.report.study import KIND_NAMES, SCORES, Study

FLOPS = 1e11  # of one head's table over all pairs of tokens: a second
NEURONS = 200  # listed by effect
TOKENS = 6  # of each side of a neuron


def heads(study: Study) -> Block | None:
    """The table of all heads: what they write to the logit, what cutting them does, their scores."""
    if not study.model.n_heads:
        return None
    found = study.causes.frame
    frame = study.scores.frame
    frame = frame.assign(
        effect=frame["head"].map(study.direct),
        cut=missing(frame["head"].map(found["cut"])),
        p=missing(frame["head"].map(found["p"])),
        way=frame["head"].map(study.ways),
    )
    lead = [
        [
            "Direct effect is what a head writes straight to the logit of ",
            token(study.token(study.attribution.target)),
            " on this prompt. When cut is what the log-probability of that token loses without the head, "
            "from a run of its own. Where the two disagree, the table says what the head acts through: "
            "attention patterns, if the loss is gone once they are held as they were; else later heads. "
            f"Scores are mean attention on repeated random tokens, from 0 to 1. {_measured(study)}",
        ]
    ]
    helps = {
        "induction": "attention to the token after an earlier occurrence of this one",
        "previous_token": "attention to the token just before",
        "duplicate_token": "attention to earlier occurrences of this token",
        "current_token": "attention to the token itself; of an MLP-derived head, its mean gate",
        "first_token": "attention to the first token",
    }
    columns = [
        column("head", "Head", "head"),
        column("kind", "Kind", "kind"),
        column("layer", "Layer", "layer"),
        column("effect", "Direct effect (logits)", "signed", "written straight to the logit"),
        column("cut", "When cut (nats)", "signed", "what the log-probability loses without it"),
        column("p", "p without it", "score", "the token's probability without the head"),
        column("way", "Acts through", "badge"),
        *(column(s, words.capitalize(), "score", helps[s]) for s, words in SCORES.items()),
    ]
    filters = ("head", "kind", "layer", "score")
    block = table("heads", "All heads", frame, columns, sort="cut", filters=filters, rows=15)
    receipts = {"scores": study.scores.receipt, "effects of cutting": study.causes.effects.receipt}
    return section("heads", "Heads", lead, [block], receipts, finding=_most_needed(study))


def _most_needed(study: Study) -> Spans:
    """The head whose cut takes most, and how many act in ways that direct effects do not show."""
    cut = study.causes.frame["cut"].dropna()
    if cut.empty or cut.max() <= 0:
        return ["No head that was cut is needed"]
    spans: Spans = [head(str(cut.idxmax())), " is needed most: the log-probability loses "]
    spans += [f"{cut.max():.1f} nats without it"]
    hidden = sum(way == "patterns" for way in study.ways.values())
    return [*spans, f"; {hidden} heads act through patterns" if hidden > 1 else ""]


def _measured(study: Study) -> str:
    """Which heads were cut, in words."""
    found = study.causes.frame
    counts = found[found["cut"].notna()]["kind"].value_counts()
    parts = [
        f"{counts.get(kind, 0):,} of {(found['kind'] == kind).sum():,} {name}"
        for kind, name in KIND_NAMES.items()
        if (found["kind"] == kind).any()
    ]
    return f"Cut one by one were {', '.join(parts)}, those with the largest estimated effect."


KINDS = (("attention", "Attention heads"), ("mlp", "MLP-derived heads"))


def attention_patterns(study: Study) -> Block | None:
    """Attention heads and MLP-derived heads side by side."""
    groups = [(kind, title, study.pictures(kind)) for kind, title in KINDS]
    if not any(pictures for _, _, pictures in groups):
        return None
    lead = [
        [
            "Each row of a pattern is a token that looks, each column a token that is looked at. "
            "MLP-derived heads look at their own token (the diagonal) or at the bias token, the "
            "last column: a neuron that is off puts all its weight there. Point at a token, or walk "
            f"with the arrow keys. {study.shown_patterns}"
        ]
    ]
    block = patterns("patterns", study.names, groups, circuitsvis=True)
    receipts = {"scores": study.scores.receipt}
    finding: Spans = [f"{sum(len(pictures) for _, _, pictures in groups)} heads drawn on this prompt"]
    return section("patterns", "Attention patterns", lead, [block], receipts, finding=finding)


def vocabulary(study: Study) -> Block | None:
    """OV and QK circuits of chosen heads, by default the best induction and previous-token heads."""
    chosen = study.circuit_heads
    if not chosen:
        return None
    wide = [label for label in chosen if study.model[label].kind != "mlp"]
    sources = _sources(study, wide)
    first = "over all pairs of tokens" if sources is None else (
        "for the tokens of this prompt as the first of a pair (mia.circuits.ov_top and qk_top go over all)"
    )  # fmt: skip
    lead = [
        [
            f"Read from the weights alone, {first}. OV: attending to the first "
            "token raises the logit of the second. QK: the first token, as a query, scores the "
            "second as a key. The norms' gains are folded in; positions and the layers between are "
            "left out."
        ]
    ]
    blocks, receipts = [], {}
    ends = {"OV": ("Attended token", "Output token"), "QK": ("Query token", "Key token")}
    for (label, circuit), (ranked, args, options) in pair_calls(study, wide).items():
        result = ranked(*args, **options)
        blocks.append(
            table(
                f"{circuit.lower()}-{label}",
                f"{label} {circuit}: the strongest pairs ({chosen[label]})",
                result.frame,
                [
                    column("rank", "Rank", "id"),
                    column("source", ends[circuit][0], "token"),
                    column("token", ends[circuit][1], "token"),
                    column("value", "Value"),
                ],
                rows=10,
            )
        )
        receipts[f"{label} {circuit}"] = result.receipt
    if own := [label for label in chosen if study.model[label].kind == "mlp"]:
        frame, found = _with_tokens(study, pd.DataFrame({"head": own}))
        columns = [column("head", "Head", "head"), *_token_columns(frame)]
        blocks.append(table("ov-neurons", "What the chosen neurons read and write", frame, columns))
        receipts["chosen neurons"] = found.receipt
    finding: Spans = ["What ", *_names(list(chosen)), " write and look for, from the weights alone"]
    return section("vocabulary", "OV and QK circuits", lead, blocks, receipts, finding=finding)


def _sources(study: Study, labels: Sequence[str]) -> list[int] | None:
    """The first tokens of the pairs: all, or the prompt's own where all pairs would take too long."""
    costs = (plan(circuits.ov_top, study.model, label).flops for label in labels)
    return None if all(flops <= FLOPS for flops in costs) else study.own_tokens


def pair_calls(study: Study, labels: Sequence[str]) -> dict[tuple[str, str], Call]:
    """The tables of attention heads' circuits, by label and circuit."""
    sources, n = _sources(study, labels), fewest(study.model)
    options = {"top_k": min(20, n * (n if sources is None else len(sources))), "sources": sources}
    ranked = {"OV": circuits.ov_top, "QK": circuits.qk_top}
    return {
        (label, circuit): (function, (study.model, label), options)
        for label in labels
        for circuit, function in ranked.items()
    }


def _names(labels: list[str]) -> Spans:
    return [part for i, label in enumerate(labels) for part in ([", "] if i else []) + [head(label)]]


def neurons(study: Study) -> Block | None:
    """The MLP-derived heads with the largest direct effect on the prediction."""
    frame = study.attribution.frame
    frame = frame[frame["kind"] == "mlp"]
    if frame.empty:
        return None
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
    here = study.own_weights.set_index("head")
    top = frame.loc[order[:NEURONS]]
    causal = study.causes.frame[["cut", "estimate"]]
    top, found = _with_tokens(study, top.join(here, on="head").join(causal, on="head"))
    top["cut"] = missing(top["cut"])
    lead = [
        [
            "What every neuron, read as a head, writes straight to the logit of ",
            token(study.token(study.attribution.target)),
            f" after token {study.attribution.position + 1}. All {len(frame):,} MLP-derived heads "
            f"together: {signed(frame['value'].sum())} of {study.attribution.total:.2f}; the {len(top)} "
            f"largest {signed(top['value'].sum())}. Fires on: tokens whose embedding excites it most. "
            "Raises and lowers: the logits it moves when it fires. Both from the weights alone, what "
            "layers before and after do to them left out.",
        ]
    ]
    blocks = [
        chart_block("neuron-effects", largest_terms(study.attribution, 15, "mlp")),
        table(
            "neurons",
            f"The {len(top)} MLP-derived heads with the largest direct effect",
            top,
            [
                column("head", "Head", "head"),
                column("layer", "Layer", "layer"),
                column("value", "Direct effect (logits)", "signed"),
                column("cut", "When cut (nats)", "signed", "what the log-probability loses without it"),
                column("estimate", "Estimate (nats)", "signed", "of that, from one backward pass"),
                column("here", "Weight here", "score", "on itself where the prediction is made"),
                column("mean", "Mean weight", "score", "on itself over this prompt"),
                *_token_columns(top),
            ],
            sort="value",
            filters=("head", "layer"),
            rows=15,
        ),
    ]
    receipts = {"attribution": study.attribution.receipt, "tokens read and written": found.receipt}
    finding: Spans = [f"All {len(frame):,} together write {signed(frame['value'].sum())}, the largest "]
    finding += [head(str(top["head"].iloc[0])), f" ({signed(top['value'].iloc[0])})"]
    return section("neurons", "Neurons by effect", lead, blocks, receipts, finding=finding)


SIDES = {
    "query": ("Fires on", "tokens whose embedding excites it most"),
    "value": ("Carries", "tokens whose embedding gives the largest value behind the gate"),
    "raises": ("Raises", "tokens whose logit it raises most"),
    "lowers": ("Lowers", "tokens whose logit it lowers most"),
}


def _with_tokens(study: Study, frame: pd.DataFrame) -> tuple[pd.DataFrame, circuits.ReadsAndWrites]:
    """The frame with a column of tokens for every side that its heads have."""
    most = min(TOKENS, fewest(study.model))
    found = circuits.reads_and_writes(study.model, frame["head"].tolist(), top_k=most)
    lists = found.frame.groupby(["head", "side"])["token"].agg(list)
    frame = frame.copy()
    for side in (side for side in SIDES if side in set(found.frame["side"])):
        frame[f"tokens_{side}"] = [lists.get((label, side), []) for label in frame["head"]]
    return frame, found


def _token_columns(frame: pd.DataFrame) -> list[Block]:
    return [
        column(f"tokens_{side}", name, "tokens", help)
        for side, (name, help) in SIDES.items()
        if f"tokens_{side}" in frame
    ]
