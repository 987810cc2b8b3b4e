"""What differs between two models of one shape: told, with heads of one put into the other."""

from __future__ import annotations

import math

import pandas as pd

from mechinterp_attn import causal
from mechinterp_attn.causal.task import Task
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.text import shown
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.view.report.blocks import Block, Spans, column, head, missing, section, table
from mechinterp_attn.view.report.task_study import ENOUGH, UNITS
from mechinterp_attn.view.report.telling import READ, Sentence
from mechinterp_attn.view.report.telling_task import share

EXACT = 8  # heads put into the other model one by one
LISTED = 300  # heads of the table


def difference(base: AttentionOnlyModel, other: AttentionOnlyModel, task: Task, seed: int) -> Block:
    """What changed from the first model to the second, head by head.

    Args:
        base: the model of the report.
        other: the second one.
        task: what both are asked.
        seed: of the noise that changes are compared with.
    """
    title = "What differs"
    try:
        found = causal.diff(base, other, task, exact=EXACT, edges=0, seed=seed)
    except MechInterpError as error:  # another shape: heads have no partners
        lead: list[Spans] = [["Their heads are not compared one by one: ", shown(str(error)), "."]]
        return section("difference", title, lead, [], {})
    told = [{"spans": s.spans, "test": s.test, "see": s.see} for s in tell_difference(found, task)]
    blocks = [
        {"type": "story", "id": "difference-told", "sentences": told},
        _claims(found),
        _heads(found),
    ]
    return section("difference", title, [], blocks, {"what changed": found.receipt})


def tell_difference(found: causal.Diff, task: Task) -> list[Sentence]:
    """What changed, in a few sentences.

    Args:
        found: both models compared.
        task: on what.
    """
    was, now = (float(part.double().mean()) for part in (found.before, found.after))
    unit = UNITS.get(task.metric, task.about) if isinstance(task.metric, str) else task.about
    changed, n = found.receipt.notes["changed"], len(found.frame)
    words = f"The {unit} is {was:.3g} in the first model and {now:.3g} in the second"
    many = "" if len(task) == 1 else f", mean over {len(task)} prompts"
    sentences = [Sentence([f"{words}{many}."], READ, "difference-heads")]
    if not changed:
        return [*sentences, Sentence([f"None of {n:,} heads changed."], READ, "difference-heads")]
    most = found.frame.nlargest(1, "z").iloc[0]
    spans: Spans = [f"{changed:,} of {n:,} heads changed at all, the most "]
    spans += [head(str(most["head"])), f": {_times(most['z'])} more than rounding would change it."]
    sentences.append(Sentence(spans, "compared with copies that were only rounded", "difference-heads"))
    if found.together.empty or math.isclose(was, now, abs_tol=1e-6):
        return sentences
    top = found.frame.iloc[0]
    gained, lost = (top[name] / (now - was) for name in ("gained", "lost"))
    spans = [
        head(str(top["head"])),
        f" of the second model, put into the first, brings {share(gained)} of ",
    ]
    spans += [f"that change; the first model's, put into the second, undoes {share(lost)} of it."]
    sentences.append(Sentence(spans, "put this head of one model into the other", "difference-claims"))
    sentences.append(_together(found))
    return sentences


def _times(z: float) -> str:
    return "infinitely" if math.isinf(z) else f"{z:,.0f} standard deviations"


def _together(found: causal.Diff) -> Sentence:
    enough = found.together[found.together["gained_share"] >= ENOUGH]
    row = (found.together if enough.empty else enough).iloc[-1 if enough.empty else 0]
    n = int(row["heads"])
    who = "that head" if n == 1 else f"{n:,} heads"
    verdict = "enough for it" if len(enough) else "not all of it: the rest is in what belongs to no head"
    words = (
        f"Together, {who} of the second model bring {share(row['gained_share'])} of the change into the "
    )
    words += f"first: {verdict}."
    return Sentence([words], f"put {who} of one model into the other", "difference-claims")


def _claims(found: causal.Diff) -> Block:
    """That single heads, and sets of them, bring the change, tested both ways."""
    change = float(found.after.double().mean() - found.before.double().mean())
    rows = []
    for one in found.frame.dropna(subset=["gained"]).to_dict("records"):
        there, back = (one[name] / change if change else math.nan for name in ("gained", "lost"))
        helps = one["gained_estimate"] * change > 0
        words = f"{one['head']} {'brings some of the change' if helps else 'works against the change'}"
        held = there > 0 and back > 0 if helps else there < 0 and back < 0
        rows.append((words, "put it into the other model", there, back, held))
    for two in found.together.to_dict("records"):
        words = f"the first {two['heads']:,} heads bring at least {share(ENOUGH)} of the change"
        there, back = two["gained_share"], two["lost_share"]
        rows.append((words, "put them into the other model", there, back, there >= ENOUGH))
    frame = pd.DataFrame(rows, columns=["claim", "test", "there", "back", "holds"])
    frame["verdict"] = ["✓ held" if holds else "✗ did not hold" for holds in frame["holds"]]
    for name in ("there", "back"):
        frame[name] = missing(frame[name])
    columns = [
        column("claim", "Claim", "text"),
        column("test", "Test", "text"),
        column("there", "Brings (share)", "number", "put into the first model"),
        column("back", "Undone (share)", "number", "the first model's put into the second"),
        column("verdict", "Verdict", "text"),
    ]
    caption = "Claims tested by putting heads of one model into the other; shares of the change"
    return table("difference-claims", caption, frame, columns, rows=12)


def _heads(found: causal.Diff) -> Block:
    frame = found.frame.head(LISTED)
    frame = frame.assign(**{name: missing(frame[name]) for name in ("gained", "lost", "OV", "QK")})
    columns = [
        column("head", "Head", "head"),
        column("kind", "Kind", "kind"),
        column("gained", "Brings", "signed", "change of the first model's metric with this head put in"),
        column("lost", "Undone", "signed", "what the second one's loses with the first one's head"),
        column("gained_estimate", "Estimate", "signed", "of what it brings"),
        column("output", "Output", "number", "relative change of what it writes"),
        column("OV", "OV", "number", "relative change of weights"),
        column("QK", "QK", "number", "relative change of weights"),
        column("z", "z", "number", "against copies that were only rounded"),
    ]
    caption = "Heads that changed, those with the largest estimates first"
    return table("difference-heads", caption, frame, columns, filters=("head", "kind"), rows=10)
