"""A behaviour in words: what carries it, each sentence with its test, and the claims behind them."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from mechinterp_attn.core.text import signed
from mechinterp_attn.view.report.blocks import Spans, head
from mechinterp_attn.view.report.task_study import ENOUGH, TaskStudy
from mechinterp_attn.view.report.telling import READ, Sentence

HEADS_TESTED = 5  # claims about single heads
LEAST = 0.01  # share of the behaviour that an edge must be worth to be named
READS = {"Q": "queries", "K": "keys", "V": "values"}
_EDGE = re.compile(r"(\S+) (?:-([QKV]))?-> (\S+)")


@dataclass(frozen=True)
class Tested:
    """A claim about a behaviour that was tested by an intervention.

    Attributes:
        words: what is claimed.
        test: what was patched.
        share: of the behaviour, what was found.
        low, high: its interval over prompts (95 %).
        holds: whether the claim did.
    """

    words: str
    test: str
    share: float
    low: float
    high: float
    holds: bool


def share(x: float) -> str:
    """A share as people read it: ``85 %``, ``0.4 %``, ``0 %``."""
    text = f"{100 * x:.{0 if abs(x) >= 0.095 else 1}f}"
    return f"{'0' if float(text) == 0 else _minus(text)} %"


def _minus(text: str) -> str:
    """A number in a sentence has a minus, not a hyphen."""
    return text.replace("-", "−")


def tell_task(study: TaskStudy) -> list[Sentence]:
    """What carries the behaviour, in four to six sentences."""
    state, n = study.effects.standing, len(study.halves[1])
    where = f"On {n} prompts that nothing was found on" if study.held_out else f"On {_prompts(n)}"
    spans: Spans = [f"{where}, the {study.unit} is {_minus(f'{float(state.clean.mean()):.3g}')} on average"]
    if state.corrupt is not None:
        spans += [f"; on their counterfactuals {_minus(f'{float(state.corrupt.mean()):.3g}')}"]
    if state.accuracy is not None and state.chance is not None and n > 1:
        spans += [f". The answer wins on {share(state.accuracy)} of them (chance {share(state.chance)})"]
    found = [Sentence([*spans, "."], READ, "prompts")]
    if state.absent is not None:
        words = f"{state.absent[0].upper()}{state.absent[1:]}. So nothing is said of what carries it; the "
        words += "claims below show what was tried."
        return [*found, Sentence([words], READ, "prompts")]
    found += _circuit(study)
    found.append(_single(study))
    found += _path(study)
    return found


def _prompts(n: int) -> str:
    return "this prompt" if n == 1 else f"{n} prompts"


def _tested_on(study: TaskStudy) -> str:
    n = len(study.halves[1])
    return (
        f"on {n} held-out prompts" if study.held_out else f"on the same {'prompt' if n == 1 else 'prompts'}"
    )


def _circuit(study: TaskStudy) -> list[Sentence]:
    if study.patch != "corrupt":
        words = "Without counterfactuals no circuit can be run alone: single heads are patched instead."
        return [Sentence([words], READ, "task-heads")]
    row, total = study.at_size, study.curve.total
    if row is None:
        best = study.curve.frame[study.curve.frame["share"] <= 0.5]
        most = best["faithfulness"].max() if len(best) else float("nan")
        words = f"No small set of heads carries it: up to half of all {total:,}, the ranking's first ones "
        words += f"bring back {share(most)} of it at most."
        return [Sentence([words], f"ran sets of growing size alone, {_tested_on(study)}", "faithfulness")]
    labels, n = study.circuit_heads, int(row["size"])
    spans: Spans = [*_named(labels), f" of {total:,} heads "]
    holds = row["faithfulness"] >= ENOUGH
    only_there = ("was enough where it was found", "were enough where they were found")[n > 1]
    spans += [("carries it", "carry it")[n > 1] if holds else f"{only_there}, not here"]
    spans += [f": alone, with all others patched, {'it brings' if n == 1 else 'they bring'} back "]
    spans += [f"{share(row['faithfulness'])} of it"]
    spans += [f" ({share(row['low'])} to {share(row['high'])})"] if len(study.halves[1]) > 1 else []
    spans += [f"; {'one' if n == 1 else f'{n:,}'} drawn at random {share(row['random'])}."]
    test = f"gave all other heads {study.given(2)}, {_tested_on(study)}"
    found = [Sentence(spans, test, "faithfulness")]
    if not holds:
        return found
    left = row["removed"]
    verdict = "it is needed" if n == 1 else "they are needed"
    if left > 0.5:
        verdict = "other heads can do it as well"
    one = "this head" if n == 1 else f"these {n:,}"
    words = f"With {one} alone patched, {share(left)} of it is left: {verdict}."
    found.append(Sentence([words], f"gave {one} {study.given(n)}", "faithfulness"))
    return found


def _named(labels: Sequence[str]) -> Spans:
    """The first few heads, and how many others."""
    shown = labels if len(labels) <= 4 else labels[:3]
    spans: Spans = []
    for i, label in enumerate(shown):
        last = i == len(shown) - 1 and len(shown) == len(labels) and i > 0
        spans += [" and " if last else ", " if i else "", head(label)]
    more = len(labels) - len(shown)
    return [*spans, f" and {more:,} more"] if more else spans


def _single(study: TaskStudy) -> Sentence:
    sure = study.needed[study.needed["low"] > 0]
    spans: Spans = ["Of no single head that was patched is it sure, over the prompts, that it is needed."]
    if len(sure):
        top, others = sure.iloc[0], sure.iloc[1:2]
        spans = ["Alone, ", head(top["head"]), f" is needed most: patched, it takes {share(top['share'])} "]
        spans += ["of it away" if study.patch == "corrupt" else f"of the {study.unit} away"]
        for second in others.to_dict("records"):
            spans += ["; then ", head(second["head"]), f" ({share(second['share'])})"]
        spans += ["."]
    test = f"gave each of {len(study.needed):,} heads {study.given()}, {_tested_on(study)}"
    return Sentence(spans, test, "task-heads")


def _path(study: TaskStudy) -> list[Sentence]:
    """The strongest edge between two heads, where patching it does something."""
    if isinstance(study.paths, str):
        return []
    for row in paths_between(study):
        src, mode, dst = row.src, row.mode, row.dst
        reads = f"its {READS[mode]}" if mode else "all it reads"
        spans: Spans = [head(src), " acts on ", head(dst), f" through {reads}: what it sends there alone "]
        spans += [f"is worth {share(row.share)} of it."]
        return [Sentence(spans, f"patched {src} as {dst} reads it, and nothing else", "circuit")]
    return []


@dataclass(frozen=True)
class Between:
    """An edge between two heads that was patched alone: its ends, and what that took (a share)."""

    src: str
    mode: str
    dst: str
    share: float


def paths_between(study: TaskStudy) -> list[Between]:
    """Edges between two heads that surely take something away when patched, the largest first."""
    if isinstance(study.paths, str):
        return []
    found = []
    for path, tested in zip(study.paths.frame["path"], _edges_tested(study), strict=True):
        match = _EDGE.fullmatch(path)
        between = match and match[1] != "embed" and match[3] != "logits"
        if match and between and tested.low > 0 and tested.share >= LEAST:
            found.append(Between(match[1], match[2] or "", match[3], tested.share))
    return sorted(found, key=lambda one: -one.share)


def task_claims(study: TaskStudy) -> list[Tested]:
    """All that was tested, whether it held or not."""
    found: list[Tested] = []
    row = study.at_size
    if row is not None:
        n = int(row["size"])
        who = f"the ranking's first {n:,} heads" if n > 1 else f"{study.circuit_heads[0]}"
        value, low, high = (float(row[name]) for name in ("faithfulness", "low", "high"))
        verb = "carries" if n == 1 else "carry"
        words = f"{who} {verb} at least {share(ENOUGH)} of it alone"
        found.append(Tested(words, "patched all others", value, low, high, value >= ENOUGH))
        random = float(row["random"])
        words = f"{who} {verb} more than as many at random ({share(random)})"
        found.append(Tested(words, "patched all others", value, low, high, low > random))
        left, nan = float(row["removed"]), float("nan")
        words = f"without {who} less than half of it is left"
        found.append(Tested(words, f"patched {'it' if n == 1 else 'them'}", left, nan, nan, left < 0.5))
    order = {label: i for i, label in enumerate(study.ranking.frame["head"])}
    single = sorted(study.needed.to_dict("records"), key=lambda one: order[one["head"]])[:HEADS_TESTED]
    scale = abs(study.whole)
    for one in single:
        label, low, high = one["head"], one["low"], one["high"]
        score = float(study.ranking.frame["score"].iloc[order[label]]) * study.sign
        helps = score > 0
        words = f"{label} is {'needed' if helps else 'in the way'} (estimated {signed(score)})"
        holds = bool(low > 0 if helps else high < 0)
        found.append(Tested(words, f"patched {label}", one["share"], low / scale, high / scale, holds))
    return found + _edges_tested(study)


def _edges_tested(study: TaskStudy) -> list[Tested]:
    if isinstance(study.paths, str):
        return []
    found, scale = [], abs(study.whole)
    scores = study.edges.frame.set_index("edge")["score"]
    for i, path in enumerate(study.paths.frame["path"]):
        each = study.paths.effects[i].double() * study.sign / scale
        mean = float(each.mean())
        spread = 1.96 * float(each.std(correction=0)) / max(1, len(each) - 1) ** 0.5
        helps = scores[path] * study.sign > 0
        words = f"what flows along {path} {'helps' if helps else 'is in the way'}"
        holds = mean - spread > 0 if helps else mean + spread < 0
        found.append(Tested(words, "patched this edge alone", mean, mean - spread, mean + spread, holds))
    return found
