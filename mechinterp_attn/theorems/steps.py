"""The induction over the sublayers of a literal model, measured."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from mechinterp_attn.core.results import Result


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Steps(Result):
    """The induction over sublayers, measured.

    Attributes:
        frame: one row per sublayer and one for the logits: ``sublayer`` (the hook of the stream it
            makes, or ``blocks.0.neurons products`` for one that only fills scratch), ``heads``,
            ``max_error`` (against the original stream), ``scale`` (largest entry
            of the original), ``relative``, ``constant`` (largest departure of the constant coordinate
            from its 1 and 0), ``bias_row`` (largest entry of the bias token's row).
    """

    title: ClassVar[str] = "Residual stream after every sublayer, against the original"

    @property
    def max_logit_error(self) -> float:
        """The largest absolute difference of the logits."""
        return float(self.frame["max_error"].iloc[-1])
