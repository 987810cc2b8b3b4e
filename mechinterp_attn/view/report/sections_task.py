"""The sections of a behaviour: what carries it, heads, the circuit, how far it goes alone, its prompts."""

from __future__ import annotations

import pandas as pd

from mechinterp_attn.causal.evaluation import Faithfulness
from mechinterp_attn.view.charts import faithfulness_by_size
from mechinterp_attn.view.report.blocks import (
    Block,
    Spans,
    chart_block,
    column,
    head,
    missing,
    section,
    table,
)
from mechinterp_attn.view.report.sections_circuit import picture
from mechinterp_attn.view.report.task_study import EDGES, TaskStudy
from mechinterp_attn.view.report.telling_task import paths_between, share, task_claims, tell_task


def task_story(study: TaskStudy) -> Block:
    """What carries the behaviour, in a few sentences, its circuit drawn, and the claims tested."""
    told = [{"spans": s.spans, "test": s.test, "see": s.see} for s in tell_task(study)]
    blocks: list[Block] = [{"type": "story", "id": "story-told", "sentences": told}]
    if not isinstance(study.paths, str):
        blocks.append(_drawn(study))
    blocks.append(_claims(study))
    receipts = {"ranking": study.ranking.receipt, "effects of patching": study.effects.receipt}
    return section("story", "What carries it", [], blocks, receipts)


def _drawn(study: TaskStudy) -> Block:
    found = study.edges.circuit(min(EDGES, len(study.edges.frame)))
    caption = f"The {len(found)} edges that it runs along, by estimate; all neurons of an MLP are one end"
    return picture("task-edges", caption, list(found.edges), list(found.scores))


def _claims(study: TaskStudy) -> Block:
    rows = [
        (c.words, c.test, c.share, c.low, c.high, "✓ held" if c.holds else "✗ did not hold")
        for c in task_claims(study)
    ]
    frame = pd.DataFrame(rows, columns=["claim", "test", "share", "low", "high", "verdict"])
    for name in ("low", "high"):
        frame[name] = missing(frame[name])
    of = "of the difference between prompts and counterfactuals" if study.patch == "corrupt" else (
        f"of the {study.unit}"
    )  # fmt: skip
    columns = [
        column("claim", "Claim", "text"),
        column("test", "Test", "text"),
        column("share", "Found", "number", f"a share {of}"),
        column("low", "From", "number", "95 % interval over prompts"),
        column("high", "To", "number", "95 % interval over prompts"),
        column("verdict", "Verdict", "text"),
    ]
    caption = f"Claims tested by patching: a head that is patched holds {study.given()}. Shares {of}"
    return table("claims", caption, frame, columns, rows=20)


def task_heads(study: TaskStudy) -> Block:
    """All heads: estimates, and what patching them alone takes away."""
    ranked = study.ranking.frame[["head", "layer", "kind", "score"]]
    measured = study.needed.set_index("head")
    inside = set(study.circuit_heads) if study.at_size is not None else set()
    frame = ranked.assign(
        score=ranked["score"] * study.sign,
        part=["in the circuit" if label in inside else "" for label in ranked["head"]],
        **{
            name: missing(ranked["head"].map(measured[name])) for name in ("effect", "low", "high", "share")
        },
    )
    lead = [
        [
            f"What the {study.unit} loses when a head is given {study.given()}, mean over prompts: "
            f"estimated for all heads on the prompts for finding, and measured one by one for "
            f"{len(measured):,} of them on those for testing. A head that others can stand in for shows "
            "little here and may still be part of the circuit."
        ]
    ]
    columns = [
        column("head", "Head", "head"),
        column("kind", "Kind", "kind"),
        column("layer", "Layer", "layer"),
        column("effect", "Measured", "signed", "what is lost when it is patched alone"),
        column("low", "From", "number", "95 % interval over prompts"),
        column("high", "To", "number", "95 % interval over prompts"),
        *([column("share", "Share")] if study.patch == "corrupt" else []),
        column("score", "Estimate", "signed", "from one backward pass, on other prompts"),
        column("part", "Part", "badge"),
    ]
    caption = "All heads by what they are needed for"
    block = table("task-heads", caption, frame, columns, sort="effect", filters=("head", "kind"), rows=15)
    sure = study.needed[study.needed["low"] > 0]
    finding: Spans = ["No single head is surely needed"]
    if len(sure):
        top = sure.iloc[0]
        finding = [head(str(top["head"])), f" is needed most: {share(top['share'])} of it goes with it"]
    receipts = {"effects of patching": study.effects.receipt, "ranking": study.ranking.receipt}
    return section("heads", "Heads", lead, [block], receipts, finding=finding)


def faithfulness(study: TaskStudy) -> Block | None:
    """What circuits of growing size carry alone."""
    if study.patch != "corrupt":
        return None
    found = study.curve
    where = "prompts that the ranking has not seen" if study.held_out else "the very prompts of the ranking"
    lead: list[Spans] = [
        [
            "The ranking's first heads are run alone: all others hold what they hold in the "
            "counterfactual. 1 is the whole behaviour, 0 that of the counterfactuals; circuits may pass 1, "
            f"where heads that work against it are left out. Measured on {where}."
        ]
    ]
    columns = [
        column("size", "Heads", "id"),
        column("share", "Share of all"),
        column("faithfulness", "Carried alone"),
        column("low", "From", "number", "95 % interval over prompts"),
        column("high", "To", "number", "95 % interval over prompts"),
        column("random", "At random"),
        column("removed", "Left without them"),
    ]
    frame = found.frame.assign(removed=missing(found.frame["removed"]))
    blocks = [
        chart_block("faithfulness-curve", faithfulness_by_size(found)),
        table("faithfulness-table", "Circuits of growing size", frame, columns),
    ]
    receipts = {"faithfulness": found.receipt}
    return section(
        "faithfulness", "How far a circuit goes", lead, blocks, receipts, finding=_far(study, found)
    )


def _far(study: TaskStudy, found: Faithfulness) -> Spans:
    row = study.at_size
    areas = f"area to the whole {found.cmd:.2f}, at random {found.cmd_random:.2f}"
    if row is None:
        return [f"No small circuit is enough; {areas}"]
    n = int(row["size"])
    return [
        f"{n:,} head{'s' if n > 1 else ''} of {found.total:,} carry {share(row['faithfulness'])}; {areas}"
    ]


def task_circuit(study: TaskStudy) -> Block:
    """The edges that the behaviour runs along, and those that were patched alone."""
    lead: list[Spans] = []
    blocks: list[Block] = []
    receipts = {}
    if isinstance(study.paths, str):
        lead.append([study.paths])
    else:
        receipts = {"edges": study.edges.receipt, "paths": study.paths.receipt}
        lead.append(
            [
                "Edges are ranked by an estimate on the prompts for finding. The first ones between single "
                "heads were patched alone on the prompts for testing: the reader sees its source as "
                f"{'in the counterfactual' if study.patch == 'corrupt' else 'its average'}, and nothing "
                "else is touched."
            ]
        )
        measured = study.paths.frame.set_index("path")["effect"] * study.sign
        frame = study.edges.frame.head(60)
        frame = frame.assign(score=frame["score"] * study.sign, effect=missing(frame["edge"].map(measured)))
        columns = [
            column("edge", "Edge", "text"),
            column("effect", "Measured", "signed", "what is lost when this edge alone is patched"),
            column("score", "Estimate", "signed"),
        ]
        blocks.append(table("task-edge-list", "The strongest edges", frame, columns, rows=12))
    strongest = paths_between(study)
    finding: Spans = ["No edge between two heads is surely worth 1 % of it alone"]
    if strongest:
        one = strongest[0]
        mode = f" -{one.mode}-> " if one.mode else " -> "
        finding = [head(one.src), mode, head(one.dst), f" is worth {share(one.share)} of it alone"]
    return section("circuit", "Circuit", lead, blocks, receipts, finding=finding)


def prompts(study: TaskStudy) -> Block:
    """Every prompt with what the model says."""
    frame = study.prompts
    has = {name: bool((frame[name] != "").any()) for name in ("answer", "against", "right")}
    alone = study.at_size
    if alone is not None:
        row = study.curve.frame["size"].tolist().index(int(alone["size"]))
        values = study.curve.metric[row].double().tolist()
        frame = frame.assign(
            alone=missing(pd.Series([*values, *[float("nan")] * (len(frame) - len(values))]))
        )
    columns = [
        column("prompt", "Prompt", "text"),
        *([column("answer", "Answer", "token")] if has["answer"] else []),
        *([column("against", "Against", "token")] if has["against"] else []),
        column("said", "The model says", "token"),
        *([column("right", "Wins", "text")] if has["right"] else []),
        column("metric", study.unit[0].upper() + study.unit[1:]),
        *([column("counterfactual", "Counterfactual")] if study.patch == "corrupt" else []),
        *([column("alone", "Circuit alone", "number", "prompts for testing")] if alone is not None else []),
        *([column("half", "For", "text")] if study.held_out else []),
    ]
    halves = ("half",) if study.held_out else ()
    caption = "Every prompt: what is right, what the model says, and the metric"
    block = table("task-prompts", caption, frame, columns, filters=halves, rows=10)
    n_test = len(study.halves[1])
    finding: Spans = [f"{len(study.task):,} prompts"]
    finding += [f", {n_test:,} of them held out for testing"] if study.held_out else []
    state = study.effects.standing
    if state.accuracy is not None and len(frame) > 1:
        finding += [f"; the answer wins on {share(state.accuracy)}"]
    return section("prompts", "Prompts", [], [block], {}, finding=finding)
