"""Slips drawn at random that change nothing anybody could see, each looked at by hand."""

from __future__ import annotations

from tests.mutants.draw import Slip

# File, the line, what stands there, what it becomes, and why that changes nothing.
EQUIVALENT: list[tuple[str, str, str, str, str]] = [
    (
        "conversion/check.py",
        "_MOST_WORK = 10**12  # multiplications, about as many as a minute on one core gives",
        "10", "11", "a budget of work: longer sequences fit, none of them is needed",
    ),
    (
        "frozen/attention.py", "at = y.new_zeros(len(group), self.pattern.shape[-1])",
        "1", "2", "the pattern of a prompt is square",
    ),
    (
        "frozen/attention.py",
        "return torch.cat([scores, sink.expand(len(scores), 1)], -1).softmax(-1)[:, :-1]",
        "-1", "1", "scores are [row, key]: their last axis is axis 1",
    ),
    (
        "circuits/streaming.py", "return best.entries._replace(value=best.entries.value * sign)",
        "best.entries.value * sign", "best.entries.value / sign", "the sign is 1 or -1",
    ),
    ("circuits/copying.py", "seed: int = 0,", "0", "1", "the default seed: another draw of the same null"),
    ("detect/weights.py", "NULL_DRAWS = 100", "100", "101", "one draw more of the same null"),
    (
        "circuits/chance.py", "found = torch.where(z >= FURTHEST - 2 * STEP, 0.0, found)",
        "2", "3", "the end of a table, where the tail is below any float",
    ),
]  # fmt: skip


def is_equivalent(slip: Slip) -> bool:
    return (slip.file, slip.text, slip.old, slip.new) in {known[:4] for known in EQUIVALENT}
