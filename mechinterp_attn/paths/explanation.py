"""What every result that explains a sum of logits at one position has in common."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mechinterp_attn.core.results import Result
from mechinterp_attn.frozen.goals import Goal


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Explanation(Result):
    """A logit, a logit difference or any direction of logits at one position, taken apart.

    Attributes:
        total: its value, as the model computed it.
        target: the token with the largest weight.
        against: the token with the most negative weight, or none.
        position: where the logits are read, counted from the start.
        about: what is explained, in words.
    """

    total: float
    target: int
    against: int | None
    position: int
    about: str

    @staticmethod
    def of(goal: Goal) -> dict[str, Any]:
        """The fields that a goal gives."""
        return {name: getattr(goal, name) for name in ("total", "target", "against", "position", "about")}


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Parts(Explanation):
    """Some of the parts that a target is the sum of, the largest ones.

    Attributes:
        explained: what the listed parts add up to.
    """

    explained: float

    @property
    def explained_share(self) -> float:
        """The listed parts' share of the total; NaN of a total of 0."""
        return self.explained / self.total if self.total else float("nan")

    def _heading(self) -> str:
        of = f"{self.explained:.3g} of {self.total:.3g}, {self.about}"
        return f"{self.title}: {self.explained_share:.0%} explained ({of})" if self.total else self.title
