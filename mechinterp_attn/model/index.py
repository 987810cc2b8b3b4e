"""The heads of a model by name: labels, patterns of labels, kinds, virtual heads.

Every ``head=`` and ``heads=`` argument of the package is resolved here.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.given import named
from mechinterp_attn.model.heads import Head, HeadBank
from mechinterp_attn.model.virtual import JOIN, VirtualHead, compose

One = str | Head | tuple[str | Head, ...]  # a tuple is a virtual head
Heads = str | Head | Iterable[One]

KINDS = ("all", "attention", "mlp", "feature", "skip", "error")
_LABEL = re.compile(r"L(\d+)([A-Z])(\d+)(?:\.(\d+))?")
_SOME = r"(\*|\d+(?:-\d+)?)"
_PATTERN = re.compile(rf"L{_SOME}(?:\*|([A-Z]){_SOME}(?:\.(\*|\d+))?)")
_SHOWN = 3  # labels that an error names as near


@dataclass(frozen=True, eq=False)
class HeadIndex(Sequence[str]):
    """The heads of a model in order: labels, a table, and lookup.

    Attributes:
        banks: the banks whose heads these are.
        model: the model that heads belong to.
    """

    banks: tuple[HeadBank, ...]
    model: Any = None

    def __len__(self) -> int:
        return sum(bank.n_heads for bank in self.banks)

    def __iter__(self) -> Iterator[str]:
        return (label for bank in self.banks for label in bank.labels())

    def __getitem__(self, index: Any) -> Any:
        if not isinstance(index, int):
            return list(iter(self))[index]
        left = index + len(self) if index < 0 else index
        for bank in self.banks if left >= 0 else ():
            if left < bank.n_heads:
                return bank.label(left)
            left -= bank.n_heads
        raise IndexError(f"head {index} of {len(self)}")

    def of(self, kind: str) -> HeadIndex:
        """The heads of one kind: "attention" or "mlp"."""
        return HeadIndex(tuple(bank for bank in self.banks if bank.of(kind)), self.model)

    @property
    def between_positions(self) -> HeadIndex:
        """The heads that can attend to tokens other than their own."""
        return HeadIndex(tuple(bank for bank in self.banks if bank.mixes_positions), self.model)

    def required(self) -> None:
        """For analyses of heads, which have nothing to say about a model without any.

        Raises:
            MechInterpError: there is no head.
        """
        if not self.banks:
            raise MechInterpError(
                "this model has no layers, so it has no heads to analyse; circuits.bigrams reads its "
                "bigram table"
            )

    @property
    def frame(self) -> pd.DataFrame:
        """One row per head: ``head, layer, kind, index``."""
        parts = [
            pd.DataFrame(
                {
                    "head": bank.labels(),
                    "layer": bank.layer,
                    "kind": bank.kind,
                    "index": range(bank.n_heads),
                }
            )
            for bank in self.banks
        ]
        none = pd.DataFrame({"head": [], "layer": [], "kind": [], "index": []})  # a model of no layers
        return pd.concat(parts, ignore_index=True) if parts else none

    def find(self, label: str) -> tuple[HeadBank, int]:
        """The bank and index behind the label of a single head: ``L0H3``, ``L1N152`` or, where a neuron is
        several heads, ``L1N152.0``. Lower case will do.

        Raises:
            MechInterpError: the label is malformed or names no head; the message says which exist and
                which are near.
        """
        text = label.strip().upper() if isinstance(label, str) else ""
        match = _LABEL.fullmatch(text)
        if match is None:
            what = repr(label) if isinstance(label, str) else named(label)
            raise MechInterpError(
                f"{what} is not a head label; write L<layer>H<head> for an attention head or L<layer>"
                f"N<neuron> for an MLP-derived head; this model has {self._ranges()}{self._near(text)}"
            )
        layer, letter, number = int(match[1]), match[2], int(match[3])
        part = None if match[4] is None else int(match[4])
        for bank in self.banks:
            if bank.layer == layer and bank.letter == letter:
                index = number * bank.parts + (part or 0)
                if (part is not None) == (bank.parts > 1) and (part or 0) < bank.parts:
                    if index < bank.n_heads:
                        return bank, index
                elif part is None and index < bank.n_heads:
                    first, last = bank.label(index), bank.label(index + bank.parts - 1)
                    raise MechInterpError(f"neuron {label} is {bank.parts} heads: {first}..{last}")
        raise MechInterpError(f"no head {label}; this model has {self._ranges()}{self._near(text)}")

    def at(self, layer: int, index: int) -> Head:
        """A head of a layer's first bank (its attention heads), by number; negative counts from the end.

        Raises:
            MechInterpError: no such layer or head.
        """
        firsts = {bank.layer: bank for bank in reversed(self.banks)}
        wanted = layer + len(firsts) if layer < 0 else layer
        bank = firsts.get(wanted)
        if bank is None or not -bank.n_heads <= index < bank.n_heads:
            raise MechInterpError(f"no head {index} in layer {layer}; this model has {self._ranges()}")
        return self.one(bank.label(index % bank.n_heads))

    def one(self, head: One) -> Head:
        """A head from what a user may give: a ``Head``, a label, or a virtual head: a label such as
        ``L0H1 > L1H4`` or a tuple of labels.

        Raises:
            MechInterpError: no such head; the message names near ones.
        """
        if isinstance(head, Head):
            return head
        parts = head.split(JOIN.strip()) if isinstance(head, str) and JOIN.strip() in head else head
        if not isinstance(parts, str) and isinstance(parts, Sequence):
            return self.chain(*parts)
        bank, index = self.find(parts)
        return replace(bank.head(index), model=self.model)

    def chain(self, *heads: One) -> VirtualHead:
        """Several heads in a row as one head; see ``compose``."""
        return replace(compose([self.one(head) for head in heads]), model=self.model)

    def select(self, heads: Heads) -> list[Head]:
        """Many heads, each once, in the order given.

        Args:
            heads: one or several of: a label, a ``Head``, a virtual head (its label or a tuple), "all", a
                kind ("attention", "mlp"), or a pattern of labels: ``L1H*``, ``L0N10-20``, ``L*H0``,
                ``L0-3H*``, ``L2*``.

        Raises:
            MechInterpError: nothing is selected, or names that do not exist, all of them at once.
        """
        return [self.one(label) if head is None else head for label, head in self._expand(heads).items()]

    def is_many(self, text: str) -> bool:
        """Whether a text stands for a list of heads, a kind or a pattern, rather than for one."""
        return text.strip().lower() in KINDS or bool(set("*-") & set(text))

    def labels(self, heads: Heads) -> list[str]:
        """The labels of ``select``, without looking at any weights."""
        return list(self._expand(heads))

    def _expand(self, heads: Heads) -> dict[str, Head | None]:
        """Labels, with the heads themselves where they were given as such."""
        found: dict[str, Head | None] = {}
        wrong = []
        if not isinstance(heads, str | Head | Iterable):
            raise MechInterpError(
                f"heads={named(heads)}; expected a label, a list of labels, 'attention', 'mlp' or 'all'"
            )
        for item in [heads] if isinstance(heads, str | Head) else heads:
            try:
                if isinstance(item, str):
                    found |= dict.fromkeys(self._named(item))
                else:
                    head = self.one(item)
                    found[head.label] = head
            except MechInterpError as error:
                wrong.append(str(error))
        if wrong:
            raise MechInterpError("; ".join(dict.fromkeys(wrong)))
        if not found:
            raise MechInterpError("no heads selected; give labels, a pattern such as 'L0H*', or a kind")
        return found

    def _named(self, text: str) -> list[str]:
        if (kind := text.strip().lower()) in KINDS:
            if not (chosen := list(self.of(kind))):
                raise MechInterpError(f"this model has no heads of kind {kind!r}; it has {self._ranges()}")
            return chosen
        if JOIN.strip() in text:
            return [self.one(text).label]
        pattern = _PATTERN.fullmatch(text.strip().upper())
        if pattern is None or not self.is_many(text):
            bank, index = self.find(text)
            return [bank.label(index)]
        layers, letter, numbers, part = pattern.groups()
        chosen = [
            bank.label(index)
            for bank in self.banks
            if _within(layers, bank.layer) and letter in (None, bank.letter)
            for index in range(bank.n_heads)
            if _within(numbers, index // bank.parts) and _within(part, index % bank.parts)
        ]
        if not chosen:
            raise MechInterpError(f"no head matches {text!r}; this model has {self._ranges()}")
        return chosen

    def _ranges(self) -> str:
        return ", ".join(f"{b.label(0)}..{b.label(b.n_heads - 1)}" for b in self.banks) or "none"

    def _near(self, text: str) -> str:
        near = difflib.get_close_matches(text, list(self), n=_SHOWN, cutoff=0.6) if text else []
        return f"; near it: {', '.join(near)}" if near else ""

    def _repr_html_(self) -> str:
        return self.frame.to_html(max_rows=12, index=False)

    def __repr__(self) -> str:
        return f"{len(self)} heads: {self._ranges()}"


def _within(some: str | None, number: int) -> bool:
    """Whether a number is one of ``3``, ``2-5``, ``*`` or, for None, any."""
    if some is None or some == "*":
        return True
    first, _, last = some.partition("-")
    return int(first) <= number <= int(last or first)
