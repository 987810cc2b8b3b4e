"""The front of the page: the story, its picture, and the claims behind it."""

from __future__ import annotations

from typing import Any

import pandas as pd

from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.core.text import number, shown
from mechinterp_attn.view.report.blocks import Block, column, section, table
from mechinterp_attn.view.report.study import Study
from mechinterp_attn.view.report.telling import percent, tell


def story(study: Study) -> Block:
    """What happens on this prompt, in a few sentences, drawn on the prompt itself."""
    told, attribution = study.story, study.attribution
    answer = study.token(attribution.target)
    rank = int((study.frozen.logits[attribution.position] > attribution.total).sum()) + 1
    sentences = tell(
        told,
        study.names,
        attribution.position,
        answer,
        rank,
        study.model.spec.d_vocab_out,
        study.n_attention,
    )
    blocks: list[Block] = [
        _arcs(study, answer),
        {
            "type": "story",
            "id": "story-told",
            "sentences": [{"spans": s.spans, "test": s.test, "see": s.see} for s in sentences],
        },
        table(
            "predictions",
            f"The most likely {study.output}s",
            study.predictions.head(5),
            [
                column("token", "Token", "token"),
                column("token_id", "Id", "id"),
                column("probability", "Probability", "score"),
                column("logit", "Logit"),
            ],
        ),
    ]
    receipts = {"frozen model": study.frozen.receipt}
    if study.model.n_heads:
        receipts["probability"] = _same_probability(study)
        receipts["effects of cutting"] = study.causes.effects.receipt
        blocks.append(_claims(study))
    return section("story", "What happens", [], blocks, receipts)


def _same_probability(study: Study) -> Receipt:
    """The runs that cuts are made in give the probability that the page is about."""
    again = study.causes.without([[]])[0].p
    error = abs(again - study.causes.probability)
    return Receipt((Check("a run with nothing cut gives the probability told", error, 1e-4),))


def _arcs(study: Study, answer: str) -> Block:
    """The tokens, and who looks where."""
    told, position = study.story, study.attribution.position
    drawn: list[dict[str, Any]] = []

    def arc(head: str, start: int, stop: int, weight: float, why: str) -> None:
        label = f"{head} {100 * weight:.0f} %"
        same = next((a for a in drawn if (a["from"], a["to"], a["kind"]) == (start, stop, why)), None)
        if same is not None:
            same["label"] += ", " + label
            same["weight"] = max(same["weight"], number(weight, 3))
        else:
            drawn.append(
                {"from": start, "to": stop, "label": label, "weight": number(weight, 3), "kind": why}
            )

    for look, weight in zip(told.looks, told.weights, strict=True):
        arc(look.head, look.query, look.key, weight, "brings")
    for helper in told.helpers:
        if helper.at == told.key:
            arc(helper.head, helper.at, helper.reads, helper.weight, "marks")
    for one in drawn:
        one["title"] = f"{one['label']}: from position {one['from']} to {one['to']}"
    heads = "; ".join(one["label"] for one in drawn)
    caption = (
        f"The prompt, who looks where ({heads}), and the token explained"
        if drawn
        else ("The end of the prompt, and the token explained")
    )
    return {
        "type": "arcs",
        "id": "prompt-arcs",
        "caption": caption,
        "tokens": [shown(t) for t in study.names],
        "position": position,
        "answer": shown(answer),
        "p": percent(told.p),
        "arcs": drawn,
    }


def _claims(study: Study) -> Block:
    """Every claim that was tested by cutting, those that did not hold among them."""
    frame = pd.DataFrame(
        [
            (c.words, c.test, study.story.p, c.after, "✓ held" if c.holds else "✗ did not hold")
            for c in study.claims
        ],
        columns=["claim", "test", "before", "after", "verdict"],
    )
    columns = [
        column("claim", "Claim", "text"),
        column("test", "What was cut", "text"),
        column("before", "p of the whole model", "score"),
        column("after", "p then", "score"),
        column("verdict", "Verdict", "text"),
    ]
    caption = f"Claims tested by cutting: {study.causes.meaning}"
    return table("claims", caption, frame, columns, rows=20)
