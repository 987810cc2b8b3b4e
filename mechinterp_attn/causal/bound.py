"""A behaviour in one model's tokens, with everything checked that can be checked without a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp_attn.causal.batches import Batch, pad
from mechinterp_attn.causal.metrics import (
    NO_GRADIENT,
    Metric,
    divergence,
    measure,
    own,
    right,
    sequence_loss,
)
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.frozen.behaviour import OnPrompt
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.given import single_id

SHOWN = 3  # how many of the prompts with the same mistake a message names


@dataclass(frozen=True, eq=False)
class Bound:
    """A task as a model reads it.

    Attributes:
        clean, corrupt: the prompts and their counterfactuals, padded alike; None without.
        position: where the output is read, counted from the start, ``[n]``.
        answer, against: output ids, -1 where a prompt has fewer than the widest one.
        metric: a name or a function of the logits.
        about: the metric in words.
        reference: for "kl": what the whole model says at the position, ``[n, d_vocab_out]``.
    """

    clean: Batch
    corrupt: Batch | None
    position: Int[Tensor, " n"]
    answer: Int[Tensor, "n k"] | None
    against: Int[Tensor, "n j"] | None
    metric: str | Metric
    about: str
    reference: Float[Tensor, "n d_vocab_out"] | None = field(default=None)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def at_position(self) -> bool:
        """Whether the logits at the position are all that the metric reads."""
        return isinstance(self.metric, str) and not (self.metric == "loss" and self.answer is None)

    @property
    def aligned(self) -> bool:
        """Whether all prompts have the same length, so that their positions can be compared."""
        return bool(self.clean.real.all())

    def measure(self, logits: Float[Tensor, "n pos d_vocab_out"]) -> Float[Tensor, " n"]:
        """The metric from the logits: of all positions, or of the one that ``at_position`` asks for."""
        if not isinstance(self.metric, str):
            return own(self.metric, logits)
        if not self.at_position:
            return sequence_loss(logits, self.clean.tokens, self.clean.real)
        if self.metric == "kl":
            assert self.reference is not None
            return divergence(logits[:, 0], self.reference)
        assert self.answer is not None
        return measure(self.metric, logits[:, 0], self.answer, self.against)

    def on_prompts(self) -> list[OnPrompt]:
        """The metric on every prompt alone, as analyses of single prompts take it."""

        def one(part: Bound) -> OnPrompt:
            place = int(part.position) if part.at_position else None

            def measure(logits: Tensor) -> Tensor:
                flat = logits.reshape(-1, *logits.shape[-2:])
                read = flat if place is None else flat[:, place, None]
                return part.repeat(len(flat)).measure(read).reshape(logits.shape[:-2])

            return OnPrompt(part.clean.tokens[0], place, measure, part.about)

        return [one(part) for _, part in self.split(1)]

    def right(self, logits: Float[Tensor, "n one d_vocab_out"]) -> Bool[Tensor, " n"] | None:
        """Whether the answer wins, from the logits at the position; None without answers."""
        return None if self.answer is None else right(logits[:, 0], self.answer, self.against)

    def chance(self, d_vocab_out: int) -> float:
        """How often the answer would win among outputs that say nothing."""
        assert self.answer is not None
        k = (self.answer >= 0).sum(-1).double()
        if self.against is None:
            return float((k / d_vocab_out).mean())
        return float((k / (k + (self.against >= 0).sum(-1))).mean())

    def split(self, rows: int) -> Iterator[tuple[slice, Bound]]:
        """The task in parts of at most ``rows`` prompts, each cut to its longest one."""
        for start in range(0, len(self), rows):
            yield slice(start, start + rows), self.take(slice(start, start + rows))

    def take(self, rows: slice | Tensor) -> Bound:
        """The task of some prompts."""
        width = int(self.clean.real[rows].sum(1).max())

        def batch(of: Batch) -> Batch:
            return Batch(of.tokens[rows, :width], of.real[rows, :width])

        def ids(of: Tensor | None) -> Tensor | None:
            return None if of is None else of[rows]

        return Bound(
            batch(self.clean),
            None if self.corrupt is None else batch(self.corrupt),
            self.position[rows],
            ids(self.answer),
            ids(self.against),
            self.metric,
            self.about,
            ids(self.reference),
        )

    def repeat(self, n: int) -> Bound:
        """The whole task ``n`` times, one after the other."""
        return self.take(torch.arange(len(self)).repeat(n))

    def counterfactual(self, why: str, instead: str = "") -> Batch:
        """The counterfactual prompts.

        Args:
            why: what needs them.
            instead: what to do without, where anything can be done.

        Raises:
            MechInterpError: there are none.
        """
        if self.corrupt is None:
            raise MechInterpError(
                f"{why} needs counterfactual prompts and this task has none: give Task(..., corrupt=[...]),"
                f" one for each prompt with as many tokens{instead}"
            )
        return self.corrupt

    def differentiable(self, why: str) -> None:
        """Raises:
        MechInterpError: the metric has no gradient.
        """
        if self.metric in NO_GRADIENT:
            raise MechInterpError(
                f"{why} needs a gradient and {self.metric!r} is a step; use 'logit_diff' or 'loss', "
                "or method='exact'"
            )


def bind(
    model: AttentionOnlyModel,
    *,
    clean: Sequence[Any],
    corrupt: Sequence[Any] | None,
    answer: Sequence[Any] | None,
    against: Sequence[Any] | None,
    position: int | Sequence[int],
    metric: str | Metric,
    labels: Sequence[Any] | None,
    about: str,
) -> Bound:
    """Prompts and answers in a model's tokens.

    Raises:
        MechInterpError: everything in which they do not fit the model, or each other.
    """
    wrong: list[str] = []
    rows = _rows(model, clean, "prompt", wrong)
    others = None if corrupt is None else _rows(model, corrupt, "counterfactual", wrong)
    if others is not None and not wrong:
        wrong += _misaligned(model, rows, others)
    n = len(clean)
    places = [position] * n if isinstance(position, int) else list(position)
    ids = {
        name: None if given is None else _answers(model, given, clean, labels, name, wrong)
        for name, given in (("answer", answer), ("against", against))
    }
    outside = []
    for i, (row, place) in enumerate(zip(rows, places, strict=True)):
        if len(row) and not -len(row) <= place < len(row):
            outside.append(f"position {place} of prompt {i}, which has {len(row)} tokens")
    wrong += _some(outside, "positions outside their prompt")
    if ids["answer"] is not None and ids["against"] is not None and not wrong:
        pairs = zip(ids["answer"], ids["against"], strict=True)
        same = [f"prompt {i}" for i, (a, b) in enumerate(pairs) if set(a) & set(b)]
        wrong += _some(same, "answers that stand against themselves, so that the metric says nothing")
    if wrong:
        raise MechInterpError(listing("the task does not fit this model", wrong))
    batch = pad(model, rows)
    device = batch.tokens.device
    last = torch.tensor([place % len(row) for row, place in zip(rows, places, strict=True)], device=device)
    return Bound(
        batch,
        None if others is None else pad(model, others),
        last,
        _padded(ids["answer"], device),
        _padded(ids["against"], device),
        metric,
        about,
    )


def _rows(model: AttentionOnlyModel, prompts: Sequence[Any], what: str, wrong: list[str]) -> list[Tensor]:
    rows, bad = [], []
    for i, prompt in enumerate(prompts):
        try:
            rows.append(model.as_tokens(prompt)[0])
        except MechInterpError as error:
            bad.append(f"{what} {i}: {error}")
            rows.append(torch.zeros(0, dtype=torch.long))
    wrong += _some(bad, f"{what}s that cannot be read")
    return rows


def _misaligned(model: AttentionOnlyModel, rows: list[Tensor], others: list[Tensor]) -> list[str]:
    """Pairs of different lengths, with the first token at which they part."""
    found = []
    for i, (row, other) in enumerate(zip(rows, others, strict=True)):
        if len(row) != len(other):
            one, two = model.to_str_tokens(row), model.to_str_tokens(other)
            at = next((k for k, (a, b) in enumerate(zip(row, other, strict=False)) if a != b), None)
            at = min(len(row), len(other)) if at is None else at
            found.append(
                f"prompt {i} has {len(row)} tokens and its counterfactual {len(other)}; they part at "
                f"position {at}: {one[at : at + 4]} and {two[at : at + 4]}"
            )
    return _some(found, "prompts misaligned with their counterfactuals")


def _answers(
    model: AttentionOnlyModel,
    given: Sequence[Any],
    clean: Sequence[Any],
    labels: Sequence[Any] | None,
    what: str,
    wrong: list[str],
) -> list[list[int]]:
    """Output ids of every prompt's answers."""
    out, bad = [], []
    known: dict[tuple[str, str | None], int] = {}
    for i, (one, prompt) in enumerate(zip(given, clean, strict=True)):
        ids = []
        for token in one if isinstance(one, list) else [one]:
            try:
                if isinstance(token, str):
                    key = token, prompt.rsplit(" ", 1)[-1] if isinstance(prompt, str) else None
                    if key not in known:  # what a token is depends on the word before it
                        known[key] = output_of(model, token, prompt, labels)
                    found = known[key]
                else:
                    found = single_id(token)
                if not 0 <= found < model.spec.d_vocab_out:
                    raise MechInterpError(
                        f"{token!r} is outside the outputs 0..{model.spec.d_vocab_out - 1} of this model"
                    )
                ids.append(found)
            except MechInterpError as error:
                bad.append(f"prompt {i}: {error}")
        if not ids and not bad:
            bad.append(f"prompt {i} has an empty list of answers")
        out.append(ids)
    wrong += _some(list(dict.fromkeys(bad)), f"{what}: not one output each")
    return out


def output_of(
    model: AttentionOnlyModel, text: str, prompt: Any, labels: Sequence[Any] | None = None
) -> int:
    """The output that a text stands for: a class by its name, or the token that it is behind the prompt or,
    where it cannot follow it as one, alone.

    Raises:
        MechInterpError: it is no class, or not one token; says which pieces it has.
    """
    if labels is not None:
        if text in labels:
            return list(labels).index(text)
        raise MechInterpError(f"{text!r} is not among the labels {list(labels)}")
    if model.spec.d_vocab_out != model.spec.d_vocab:
        raise MechInterpError(
            f"{text!r} is a text, but this model's {model.spec.d_vocab_out} outputs are not tokens; give "
            "the class as a number, or labels= with the names of the classes in order"
        )
    found = continued(model, prompt, text) if isinstance(prompt, str) else None
    return int(model.to_single_token(text)) if found is None else found


def continued(model: AttentionOnlyModel, prompt: str, text: str) -> int | None:
    """The one token that a text is behind a prompt; None where it is several, or changes the prompt."""
    before, whole = model.as_tokens(prompt)[0].tolist(), model.as_tokens(prompt + text)[0].tolist()
    return whole[-1] if len(whole) == len(before) + 1 and whole[:-1] == before else None


def _padded(ids: list[list[int]] | None, device: torch.device) -> Int[Tensor, "n k"] | None:
    if ids is None:
        return None
    width = max(map(len, ids))
    return torch.tensor([row + [-1] * (width - len(row)) for row in ids], device=device)


def _some(found: list[str], what: str) -> list[str]:
    """One reason for all prompts with the same mistake, the first of them named."""
    if not found:
        return []
    more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
    return [f"{what}: {', '.join(found[:SHOWN])}{more}"]
