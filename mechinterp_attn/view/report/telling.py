"""A story in words: sentences that stand on numbers of the page, each with its test.

A sentence is there only where what it says holds; what was tested and did not hold is in the table of
claims, which counts both.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from mechinterp_attn.core.text import signed
from mechinterp_attn.view.report.blocks import Spans, head, token
from mechinterp_attn.view.report.causes import Look
from mechinterp_attn.view.report.story import Helper, Story

READ = "read off the run"  # no claim about a cause
FELT = 0.01  # nats: least change that a cut must make for a direction to be told


@dataclass(frozen=True)
class Sentence:
    """Words, how they were tested, and where on the page their numbers stand.

    Attributes:
        spans: the words.
        test: what was done to test them, or ``READ``.
        see: id of the block or section with the numbers.
    """

    spans: Spans
    test: str
    see: str


@dataclass(frozen=True)
class Claim:
    """Something that was tested by cutting.

    Attributes:
        words: what is claimed.
        test: what was cut.
        after: the answer's probability then.
        holds: whether the claim did.
    """

    words: str
    test: str
    after: float
    holds: bool


def percent(p: float) -> str:
    """A probability as people read it: ``91.5 %``, ``0.013 %``."""
    x = 100 * p
    if x >= 10:
        text = f"{x:.1f}"
    elif x >= 1e-4:
        text = f"{x:.{max(0, 1 - math.floor(math.log10(x)))}f}"
    else:
        return "under 0.0001 %" if x > 0 else "0 %"
    return text + " %"


def tell(
    story: Story, tokens: Sequence[str], position: int, answer: str, rank: int, n_out: int, n_attention: int
) -> list[Sentence]:
    """The story in four to six sentences.

    Args:
        tokens: of the prompt;  position: where the answer is predicted.
        answer, rank, n_out: the token explained, its place among how many.
        n_attention: how many attention heads there are.
    """
    choice = "first choice" if rank == 1 else f"choice number {rank:,}"
    spans: Spans = ["After ", token(tokens[position]), ", the model gives ", token(answer)]
    spans += [f" a probability p of {percent(story.p)}, its {choice} of {n_out:,}."]
    sentences = [Sentence(spans, READ, "predictions")]
    if story.looks:
        sentences += _circuit(story, tokens, position, answer, n_attention)
    else:
        sentences += _no_circuit(story, n_attention)
    if story.neuron is not None:
        sentences.append(_neurons(story))
    return sentences


def _circuit(
    story: Story, tokens: Sequence[str], position: int, answer: str, n_attention: int
) -> list[Sentence]:
    several, p = len(story.looks) > 1, percent(story.p)
    at_key = next((helper for helper in story.helpers if helper.at == story.key), None)
    at_query = next((helper for helper in story.helpers if helper.at == position), None)
    why = at_key or at_query
    spans: Spans = ["At ", token(tokens[position]), ", ", *_heads([look.head for look in story.looks])]
    spans += [" look" if several else " looks", " back to ", token(tokens[story.key])]
    spans += [f" ({_and([_whole(w) for w in story.weights])} of {'their' if several else 'its'} attention)"]
    test = READ
    if why is not None:
        spans += [", because ", head(why.head), *_doing(why, tokens, story.key)]
        test = f"cut {why.head} at position {why.at}: the attention falls to " + _and(
            [_whole(w) for w in why.weights]
        )
    found = [Sentence([*spans, "."], test, "patterns")]
    who = "Both copy" if len(story.looks) == 2 else "They copy" if several else "It copies"
    does = [f"{who} it"] if story.copies else ["What is read there raises ", token(answer)]
    looks = "these looks" if several else "this look"
    spans = [*does, f": with {looks} taken away, p falls from {p} to {percent(story.p_blind)}."]
    found.append(Sentence(spans, f"set the weight of {looks} to 0", "claims"))
    if why is not None:
        found.append(_helper(story, why))
    rest = n_attention - len(story.named)
    if story.p_alone is not None and rest:
        others = f"with the other {rest:,} attention heads cut" if rest > 1 else "with the other one cut"
        only = "It is" if len(story.named) == 1 else "They are"
        if story.p_alone >= story.p / 2:
            words = f"{only} enough among attention heads: {others}, p is still {percent(story.p_alone)}."
        else:
            words = f"{only} not all: {others}, p falls to {percent(story.p_alone)}."
        found.append(Sentence([words], f"cut {rest:,} attention heads everywhere", "claims"))
    return found


def _doing(helper: Helper, tokens: Sequence[str], key: int) -> Spans:
    """What an earlier head did that others look there."""
    if helper.at == key and helper.reads == key - 1:
        return [" marked it as following ", token(tokens[helper.reads])]
    where: Spans = [" there"] if helper.at == key else [" here"]
    return [*where, " reads ", token(tokens[helper.reads]), f" ({_whole(helper.weight)})"]


def _helper(story: Story, helper: Helper) -> Sentence:
    spans: Spans = ["Without ", head(helper.head), f" there, p falls from {percent(story.p)} to "]
    spans += [f"{percent(helper.p)}; with all attention patterns held as they were, the same cut leaves "]
    spans += [f"{percent(helper.p_held)}: "]
    if through_patterns(story.p, helper.p, helper.p_held):
        spans += ["it acts through patterns, where its direct effect on the logit "]
        spans += [f"({signed(helper.direct)}) does not show."]
    else:
        spans += ["patterns are not all that it acts through."]
    return Sentence(spans, f"cut {helper.head} at position {helper.at}, patterns free and held", "heads")


def through_patterns(p: float, p_cut: float, p_held: float) -> bool:
    """Whether at least half of what a cut does to the log-probability is gone when patterns are held."""
    held, cut, whole = (math.log(max(x, 1e-300)) for x in (p_held, p_cut, p))  # exp may have underflowed
    return abs(held - whole) <= abs(cut - whole) / 2


def _no_circuit(story: Story, n_attention: int) -> list[Sentence]:
    if story.most is None or story.p_none is None:
        words = "It has no attention heads: no token can be looked at but the present one."
        if story.neuron is None:
            words = "It has no heads: the token alone decides."
        return [Sentence([words], READ, "provenance")]
    label, p = story.most
    found = [
        Sentence(
            ["No circuit was found: there is no one token that heads look at for it and that it needs."],
            "take away the looks of every head that writes for it",
            "heads",
        )
    ]
    spans: Spans = ["The attention head that matters most is ", head(label), ": without it, p is "]
    if p >= story.p:
        spans = ["No attention head raises p: without ", head(label), ", it is "]
    found.append(Sentence([*spans, f"{percent(p)}."], f"cut {label} everywhere", "heads"))
    less = "p is still" if story.p_none >= story.p / 2 else "p is"
    which = "the attention head" if n_attention == 1 else f"all {n_attention:,} attention heads"
    words = f"Without {which}, {less} {percent(story.p_none)}."
    found.append(Sentence([words], f"cut {which} everywhere", "claims"))
    return found


def _neurons(story: Story) -> Sentence:
    assert story.neuron is not None
    label, p, n = story.neuron
    spans: Spans
    if story.most is not None and p > story.most[1]:
        spans = [f"Of the {n} neurons that were cut one by one, none matters as much as "]
        spans += [head(story.most[0]), ": without ", head(label), ", the most needed, p is "]
    else:
        spans = [f"The neuron that matters most, of {n} cut one by one, is ", head(label)]
        spans += [": without it, p is "]
    return Sentence([*spans, f"{percent(p)}."], f"cut {label} everywhere", "neurons")


def claims(story: Story, direct: dict[str, float], cut: dict[str, tuple[float, float]]) -> list[Claim]:
    """All that was tested by cutting, whether it held or not.

    Args:
        direct: what the heads that are looked at write straight to the answer's logit.
        cut: of each, what the answer's log-probability loses when it is cut, and the probability then.
    """
    found = []
    for look, weight in zip(story.looks, story.weights, strict=True):
        words = f"{look.head} looks from position {look.query} at {look.key} ({_whole(weight)})"
        found.append(Claim(words + ", and the answer needs it", _taken(story.looks), story.p_blind, True))
    for helper in story.helpers:
        place = f"at position {helper.at}"
        who = _and([look.head for look in story.looks])
        words = f"{helper.head} {place} makes {who} look at position {story.key}"
        found.append(Claim(words, f"cut {helper.head} {place}", helper.p, True))
        holds = through_patterns(story.p, helper.p, helper.p_held)
        words = f"{helper.head} {place} acts through attention patterns"
        found.append(Claim(words, f"cut {helper.head} {place}, patterns held", helper.p_held, holds))
    if story.p_alone is not None:
        words = f"{_and(story.named)} are enough among attention heads"
        enough = story.p_alone >= story.p / 2
        found.append(Claim(words, "cut all other attention heads", story.p_alone, enough))
    for label, value in direct.items():
        worth, p = cut[label]
        verb = "raises" if value > 0 else "lowers"
        words = f"{label}, which writes {signed(value)} straight to the logit, {verb} the answer"
        holds = math.copysign(worth, value) == worth and abs(worth) >= FELT
        found.append(Claim(words, f"cut {label} everywhere", p, holds))
    return found


def _taken(looks: Sequence[Look]) -> str:
    return f"take away {'this look' if len(looks) == 1 else f'these {len(looks)} looks'}"


def _heads(labels: Sequence[str]) -> Spans:
    spans: Spans = []
    for i, label in enumerate(labels):
        spans += ["" if i == 0 else " and " if i == len(labels) - 1 else ", ", head(label)]
    return spans


def _and(words: Sequence[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _whole(share: float) -> str:
    return f"{100 * share:.0f} %"
