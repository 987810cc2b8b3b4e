"""The errors a user can meet. Every message says what was given, what was expected and what to do."""

from collections.abc import Sequence


class MechInterpError(ValueError):
    """Base of all errors raised on purpose by this package."""


class UnsupportedModelError(MechInterpError):
    """The model has parts that cannot be converted; ``reasons`` lists every one of them."""

    def __init__(self, what: str, reasons: Sequence[str]):
        self.reasons = tuple(reasons)
        super().__init__(listing(f"{what} cannot be converted", reasons))


class CheckpointError(MechInterpError):
    """A folder or state dict does not hold what its config promises; ``reasons`` lists it all."""

    def __init__(self, what: str, reasons: Sequence[str]):
        self.reasons = tuple(reasons)
        super().__init__(listing(f"{what} is not a usable checkpoint", reasons))


class ConversionError(MechInterpError):
    """A converted model does not compute what its source computes."""


class FailedCheckWarning(UserWarning):
    """A result does not agree with the same thing computed another way; its receipt says by how much."""


def below_one(**numbers: int) -> list[str]:
    """A reason for every number that must be 1 or more and is not, with its name."""
    return [f"{name}={number}; expected at least 1" for name, number in numbers.items() if number < 1]


def listing(headline: str, reasons: Sequence[str]) -> str:
    """``headline: reason; reason; ...``, on one line, so that a terminal shows it whole."""
    return f"{headline}: " + "; ".join(reasons)
