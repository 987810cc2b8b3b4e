"""Behaviours to start with, written for a model's own tokens.

Every generator draws prompts from templates of our own, and keeps those that fit the model's tokenizer:
the answer and what it is compared with are one token each behind the prompt, and the counterfactual has
as many tokens as the prompt. Where nothing fits, the error says why.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

import torch

from mechinterp_attn.causal import words
from mechinterp_attn.causal.bound import output_of
from mechinterp_attn.causal.task import Task
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.model.attention_only import AttentionOnlyModel

WORDINGS = {
    "ioi": len(words.IOI), "sva": len(words.SVA), "greater_than": len(words.YEARS),
    "pronouns": len(words.PRONOUNS), "brackets": len(words.BRACKETS),
}  # fmt: skip
TRIES = 40  # drawn for each prompt that is wanted, before a generator gives up


@dataclass(frozen=True)
class Example:
    """One prompt, its counterfactual, and the answers of both."""

    clean: str
    corrupt: str
    answer: str | list[str]
    against: str | list[str]


def induction(model: AttentionOnlyModel, n: int = 32, seed: int = 0) -> Task:
    """Random tokens, the last few repeating earlier ones: the next token is the one that followed before.

    The counterfactual swaps the token before the answer with one elsewhere, in the first pass only: the
    tokens to copy stay where they are, and only what stands before them tells which is right. So what
    differs is the matching, through the keys of induction heads (Olsson et al. 2022).

    Args:
        n: how many prompts.

    Raises:
        MechInterpError: the context or the vocabulary is too small.
    """
    bos = model.bos_token_id
    start = 0 if bos is None else 1
    tokens = [i for i in range(min(model.spec.d_vocab, model.spec.d_vocab_out)) if i != bos]
    room = model.spec.n_ctx - start
    period = min(20, len(tokens), room - 1 if room < 12 else room - 5)
    said = 5 if period >= 12 else 1
    if period < 4:
        raise MechInterpError(
            f"induction needs 4 different tokens and one said again: a context of at least {5 + start} and "
            f"{4 + start} tokens; this model has {model.spec.n_ctx} and {model.spec.d_vocab}"
        )
    draw = Random(seed)
    clean, corrupt, answer, against = [], [], [], []
    for _ in range(n):
        row = draw.sample(tokens, period)
        last = draw.randrange(said - 1, period - 1)  # said again, up to this one
        far = [i for i in range(period - 1) if abs(i - last) > 1 and not last - said < i <= last]
        if not far:
            far = [i for i in range(period - 1) if abs(i - last) > 1] or [(last + 2) % (period - 1)]
        other = draw.choice(far)
        swapped = list(row)
        swapped[last], swapped[other] = row[other], row[last]
        again = row[last - said + 1 : last + 1]
        front = [] if bos is None else [bos]
        clean.append([*front, *row, *again])
        corrupt.append([*front, *swapped, *again])
        answer.append(row[last + 1])
        against.append(row[other + 1])
    return Task(clean, corrupt=corrupt, answer=answer, against=against, name="induction")


def ioi(model: AttentionOnlyModel, n: int = 64, seed: int = 0, *, wording: int | None = None) -> Task:
    """Indirect objects (Wang et al. 2022): "When Mary and John went to the shop, John gave a book to" Mary.

    The counterfactual names the other person the second time, so that the answers change places.

    Args:
        n: how many prompts.
        wording: a single one of its templates, by number; all of them by default.

    Raises:
        MechInterpError: too few prompts fit the tokenizer; says why. No such wording.
    """
    templates = _worded(words.IOI, wording)

    def draw(random: Random) -> Example:
        one, two = random.sample(words.WOMEN + words.MEN, 2)
        place, thing, verb = (
            random.choice(words.PLACES),
            random.choice(words.THINGS),
            random.choice(words.GIVES),
        )
        template = random.choice(templates)
        first, second = random.sample([one, two], 2)
        parts = {"A": first, "B": second, "place": place, "thing": thing, "verb": verb}
        return Example(
            template.format(S=two, **parts), template.format(S=one, **parts), f" {one}", f" {two}"
        )

    return _drawn(model, draw, n, seed, name=_named("ioi", wording))


def sva(model: AttentionOnlyModel, n: int = 64, seed: int = 0, *, wording: int | None = None) -> Task:
    """Subject-verb agreement across another noun: "The keys to the cabinet" are. The counterfactual has the
    subject in the other number.

    Args:
        n: how many prompts.
        wording: a single one of its templates, by number; all of them by default.

    Raises:
        MechInterpError: too few prompts fit the tokenizer; says why. No such wording.
    """
    templates = _worded(words.SVA, wording)

    def draw(random: Random) -> Example:
        subject, noun = random.choice(words.NOUNS), random.choice(words.NOUNS)
        template = random.choice(templates)
        singular, plural = random.choice(words.VERBS)
        between = random.choice(noun)
        number = random.randrange(2)
        texts = [template.format(subject=form, noun=between) for form in subject]
        verbs = [f" {singular}", f" {plural}"]
        return Example(texts[number], texts[1 - number], verbs[number], verbs[1 - number])

    return _drawn(model, draw, n, seed, name=_named("sva", wording))


def greater_than(
    model: AttentionOnlyModel, n: int = 64, seed: int = 0, *, wording: int | None = None
) -> Task:
    """Years (Hanna et al. 2023): "The war lasted from the year 1732 to the year 17" ends in more than 32.

    The metric is the probability of all larger endings less that of the others. The counterfactual starts
    in year 01. Where a tokenizer splits numbers into digits, the last digit is asked for instead ("1734
    to the year 173", counterfactual 1730).

    Args:
        n: how many prompts.
        wording: a single one of its templates, by number; all of them by default.

    Raises:
        MechInterpError: too few prompts fit the tokenizer; says why. No such wording.
    """
    templates = _worded(words.YEARS, wording)

    def two_digits(random: Random) -> Example:
        century, year = random.randrange(11, 18), random.randrange(2, 98)
        text = random.choice(templates)
        more, less = ([f"{y:02d}" for y in span] for span in (range(year + 1, 100), range(year + 1)))
        clean, corrupt = (text.format(start=f"{century}{y:02d}", end=century) for y in (year, 1))
        return Example(clean, corrupt, more, less)

    def one_digit(random: Random) -> Example:
        decade, year = random.randrange(110, 180), random.randrange(2, 9)
        text = random.choice(templates)
        more, less = ([str(y) for y in span] for span in (range(year + 1, 10), range(year + 1)))
        clean, corrupt = (text.format(start=f"{decade}{y}", end=decade) for y in (year, 0))
        return Example(clean, corrupt, more, less)

    try:
        return _drawn(model, two_digits, n, seed, name=_named("greater_than", wording), metric="prob_diff")
    except MechInterpError as error:
        try:
            return _drawn(
                model, one_digit, n, seed, name=_named("greater_than", wording), metric="prob_diff"
            )
        except MechInterpError as other:
            raise MechInterpError(f"two digits: {error}; one digit: {other}") from None


def pronouns(model: AttentionOnlyModel, n: int = 64, seed: int = 0, *, wording: int | None = None) -> Task:
    """Gendered pronouns: "Mary left the house because" she. The counterfactual has a man's name, and the
    other way round.

    Args:
        n: how many prompts.
        wording: a single one of its templates, by number; all of them by default.

    Raises:
        MechInterpError: too few prompts fit the tokenizer; says why. No such wording.
    """
    templates = _worded(words.PRONOUNS, wording)

    def draw(random: Random) -> Example:
        names = [random.choice(words.WOMEN), random.choice(words.MEN)]
        template = random.choice(templates)
        which = random.randrange(2)
        texts = [template.format(name=name) for name in names]
        said = [" she", " he"]
        return Example(texts[which], texts[1 - which], said[which], said[1 - which])

    return _drawn(model, draw, n, seed, name=_named("pronouns", wording))


def docstring(model: AttentionOnlyModel, n: int = 64, seed: int = 0) -> Task:
    """The next argument in a Python docstring (Heimersheim & Janiak 2023). The counterfactual has other
    arguments in the signature.

    Args:
        n: how many prompts.

    Raises:
        MechInterpError: too few prompts fit the tokenizer; says why.
    """

    def draw(random: Random) -> Example:
        a, b, c, d, e, f = random.sample(words.ARGUMENTS, 6)
        first, second = (" ".join(random.sample(words.THINGS, 2)) for _ in range(2))
        function = random.choice(words.FUNCTIONS)

        def text(last: str) -> str:
            return (
                f"def {function}(self, {a}, {b}, {last}, {d}):\n"
                f'    """{first} {e}\n\n    :param {a}: {first}\n    :param {b}: {second}\n    :param'
            )

        return Example(text(c), text(f), f" {c}", f" {f}")

    return _drawn(model, draw, n, seed, name="docstring")


def brackets(model: AttentionOnlyModel, n: int = 64, seed: int = 0, *, wording: int | None = None) -> Task:
    """Closing the bracket that is open: "names = [red, blue" is closed by "]". The counterfactual opens the
    other kind.

    Args:
        n: how many prompts.
        wording: a single one of its templates, by number; all of them by default.

    Raises:
        MechInterpError: too few prompts fit the tokenizer; says why. No such wording.
    """
    templates = _worded(words.BRACKETS, wording)
    kinds = {"(": ")", "[": "]", "{": "}"}

    def draw(random: Random) -> Example:
        one, two = random.sample(list(kinds), 2)
        inside = ", ".join(random.sample(words.ARGUMENTS, random.choice((2, 3))))
        text = random.choice(templates)
        clean, corrupt = (text.format(open=kind, inside=inside) for kind in (one, two))
        return Example(clean, corrupt, kinds[one], kinds[two])

    return _drawn(model, draw, n, seed, name=_named("brackets", wording))


def _worded(templates: list[str], wording: int | None) -> list[str]:
    """All templates, or one of them.

    Raises:
        MechInterpError: there is no such one.
    """
    if wording is None:
        return templates
    if not 0 <= wording < len(templates):
        raise MechInterpError(f"wording={wording}; this behaviour has 0 to {len(templates) - 1}")
    return [templates[wording]]


def _named(name: str, wording: int | None) -> str:
    return name if wording is None else f"{name}, wording {wording}"


def _drawn(
    model: AttentionOnlyModel,
    draw: Callable[[Random], Example],
    n: int,
    seed: int,
    *,
    name: str,
    metric: str = "logit_diff",
) -> Task:
    """Prompts that fit the model's tokenizer, all different.

    Raises:
        MechInterpError: fewer than ``n`` after many draws, with what did not fit and how often.
    """
    if n < 1:
        raise MechInterpError(f"n={n}; expected at least 1 prompt")
    random = Random(seed)
    found: dict[str, tuple[Example, list[int], list[int]]] = {}
    reasons: Counter[str] = Counter()
    examples: dict[str, str] = {}
    for _ in range(TRIES * n):
        if len(found) == n:
            break
        example = draw(random)
        if example.clean in found:
            reasons["drawn before"] += 1
            continue
        try:
            found[example.clean] = _fitted(model, example)
        except _Unfit as unfit:
            reasons[unfit.kind] += 1
            examples.setdefault(unfit.kind, str(unfit))
        if not found and sum(reasons.values()) >= 4 * TRIES:
            break  # this tokenizer fits none of them
    if len(found) < n:
        why = [f"{count} x {kind}" + (f" ({examples[kind]})" if kind in examples else "")
               for kind, count in reasons.most_common()]  # fmt: skip
        raise MechInterpError(listing(f"only {len(found)} of {n} {name} prompts fit this tokenizer", why))
    rows = list(found.values())
    return Task(
        [example.clean for example, _, _ in rows],
        corrupt=[example.corrupt for example, _, _ in rows],
        answer=[answer for _, answer, _ in rows],
        against=[against for _, _, against in rows],
        metric=metric,
        name=name,
    )


class _Unfit(Exception):
    def __init__(self, kind: str, text: str):
        self.kind = kind
        super().__init__(text)


def _fitted(model: AttentionOnlyModel, example: Example) -> tuple[Example, list[int], list[int]]:
    clean, corrupt = (model.as_tokens(text)[0] for text in (example.clean, example.corrupt))
    if len(clean) != len(corrupt):
        raise _Unfit(
            "prompt and counterfactual of different lengths",
            f"{len(clean)} and {len(corrupt)} tokens: {example.clean!r}, {example.corrupt!r}",
        )
    if torch.equal(clean, corrupt):
        raise _Unfit("prompt and counterfactual that are the same tokens", repr(example.clean))
    ids = []
    for given in (example.answer, example.against):
        try:
            each = [given] if isinstance(given, str) else given
            ids.append([output_of(model, text, example.clean) for text in each])
        except MechInterpError as error:
            raise _Unfit("answer that is not one token", str(error)) from None
    if set(ids[0]) & set(ids[1]):
        raise _Unfit("answers that begin with the same token", repr(example.clean))
    return example, ids[0], ids[1]
