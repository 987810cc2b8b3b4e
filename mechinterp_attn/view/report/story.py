"""The story of a prediction, found by cutting: who looks where, why, and what is left without them.

Nothing here is words: the finder gives numbers of runs, ``telling.py`` says them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace

import pandas as pd

from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.view.report.causes import Causes, Look

HALF = math.log(2)  # nats: the answer becomes half as likely
SOME = 0.1  # nats that a head must be worth, and its share of what heads write for the answer, to be named
LOOKS = 0.1  # least attention that is called looking at a token
CANDIDATES = 24  # heads tried at a position
# Of the model, to find a story: with all attention cut; of heads where the answer is predicted, those that
# write at least SOME of it among them; with the looks of each taken away; of heads before them, at two
# places, one of each held; with the rest cut.
MOST_RUNS = 1 + 2 * (CANDIDATES + int(1 / SOME)) + 2 * (CANDIDATES + 1) + 1


@dataclass(frozen=True)
class Helper:
    """An earlier head without which nobody looks there.

    Attributes:
        head, at: the head, and the only position where it was cut.
        reads, weight: the position that it looks at most from there, and how much.
        weights: what is left of each look without it.
        p: the answer's probability without it there;  p_held: with attention patterns held besides.
        direct: what it writes straight to the answer's logit.
    """

    head: str
    at: int
    reads: int
    weight: float
    weights: tuple[float, ...]
    p: float
    p_held: float
    direct: float


@dataclass(frozen=True)
class Story:
    """What was found.

    Attributes:
        p: the answer's probability.
        looks: heads that look from the position at one and the same token, and are needed there; empty
            where no such head was found.
        weights: of the looks.
        p_blind: with these looks taken away.
        copies: the token looked at is the answer itself.
        helpers: earlier heads that the looks hang on: at the token looked at, at the one that looks.
        p_alone: with all attention heads cut but those named.
        p_none: with all attention heads cut; None in a model without.
        most: the attention head that matters most when cut everywhere, and the probability then.
        neuron: likewise of the neurons that were tested, and how many were.
    """

    p: float
    looks: tuple[Look, ...] = ()
    weights: tuple[float, ...] = ()
    p_blind: float = 1.0
    copies: bool = False
    helpers: tuple[Helper, ...] = ()
    p_alone: float | None = None
    p_none: float | None = None
    most: tuple[str, float] | None = None
    neuron: tuple[str, float, int] | None = None

    @property
    def key(self) -> int:
        """The token that is looked at."""
        return self.looks[0].key

    @property
    def named(self) -> list[str]:
        """The heads of the circuit."""
        return list(dict.fromkeys([*(look.head for look in self.looks), *(h.head for h in self.helpers)]))


def find_story(causes: Causes, direct: dict[str, float]) -> Story:
    """Look for heads that bring the answer, and for the head that shows them where it is.

    Args:
        direct: what every head writes straight to the answer's logit.
    """
    frame = causes.frame.dropna(subset=["cut"])
    attention, neurons = (frame[frame["kind"] == kind] for kind in ("attention", "mlp"))
    told = Story(
        causes.probability,
        most=None if attention.empty else _most(attention["p"]),
        neuron=None if neurons.empty else (*_most(neurons["p"]), len(neurons)),
    )
    every = [label for bank in causes.frozen.model.banks if bank.mixes_positions for label in bank.labels()]
    if not every:
        return told
    (none,) = causes.without([every])
    told = replace(told, p_none=none.p)
    for looks in _groups(causes, direct, every):
        blind = causes.blinded(looks)
        if blind > told.p / 2:
            continue
        weights = tuple(map(causes.weight, looks))
        copies = int(causes.frozen.tokens[looks[0].key]) == causes.target
        told = replace(
            told,
            looks=looks,
            weights=weights,
            p_blind=blind,
            copies=copies,
            helpers=tuple(_helpers(causes, direct, looks, weights)),
        )
        rest = [label for label in every if label not in told.named]
        return replace(told, p_alone=causes.without([rest])[0].p if rest else told.p)
    return told


def _most(p: pd.Series) -> tuple[str, float]:
    return str(p.idxmin()), float(p.min())


def _groups(causes: Causes, direct: dict[str, float], every: list[str]) -> Iterable[tuple[Look, ...]]:
    """Heads that raise the answer where it is predicted, by the token that they look at: the most
    needed tokens first.
    """
    q = causes.position
    if q == 0:
        return []
    least = SOME * sum(direct[label] for label in every if direct[label] > 0)
    likely = causes.likeliest(every, q, CANDIDATES)
    likely += [label for label in every if direct[label] > least and label not in likely]
    found: dict[int, list[tuple[float, Look]]] = {}
    for label, outcome in zip(likely, causes.without([[one] for one in likely], q), strict=True):
        worth = math.log(causes.probability / max(outcome.p, 1e-30))
        look = _gaze(causes, label, q)
        if worth < SOME or direct[label] <= least or look is None:
            continue
        found.setdefault(look.key, []).append((worth, look))
    groups = sorted(found.values(), key=lambda group: -sum(worth for worth, _ in group))
    return [tuple(look for _, look in sorted(group, key=lambda pair: -pair[0])) for group in groups]


def _gaze(causes: Causes, label: str, query: int) -> Look | None:
    """Where a head looks most from a position, itself and a special first token aside; None where it
    hardly looks anywhere.
    """
    model, n = causes.frozen.model, len(causes.frozen.tokens)
    first = 1 if model.tokenizer is not None and int(causes.frozen.tokens[0]) in _special(model) else 0
    keys = [k for k in range(first, n) if k != query]
    looks = [Look(label, query, k) for k in keys]
    best = max(looks, key=causes.weight, default=None)
    return best if best is not None and causes.weight(best) >= LOOKS else None


def _special(model: AttentionOnlyModel) -> set[int]:
    return set(getattr(model.tokenizer, "all_special_ids", ()))


def _helpers(
    causes: Causes, direct: dict[str, float], looks: tuple[Look, ...], weights: tuple[float, ...]
) -> Iterator[Helper]:
    """At the token looked at, and at the one that looks: the earlier head whose cut there takes most of the
    looks away, where that is half of them, and halves the answer.
    """
    model, whole = causes.frozen.model, sum(weights)
    last = max(model.heads.find(look.head)[0].layer for look in looks)
    banks = [bank for bank in model.banks if bank.mixes_positions and bank.layer < last]
    earlier = [label for bank in banks for label in bank.labels()]
    for place in (looks[0].key, looks[0].query):
        tries = causes.likeliest(earlier, place, CANDIDATES)
        if not tries:
            continue
        outcomes = causes.without([[label] for label in tries], place, watch=looks)
        outcome, label = min(zip(outcomes, tries, strict=True), key=lambda pair: sum(pair[0].weights))
        reads = _gaze(causes, label, place)
        if sum(outcome.weights) > whole / 2 or outcome.p > causes.probability / 2 or reads is None:
            continue
        (held,) = causes.without([[label]], place, hold=True)
        yield Helper(
            head=label,
            at=place,
            reads=reads.key,
            weight=causes.weight(reads),
            weights=outcome.weights,
            p=outcome.p,
            p_held=held.p,
            direct=direct[label],
        )
