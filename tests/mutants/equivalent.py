"""Slips drawn at random that change nothing anybody could see, each looked at by hand."""

from __future__ import annotations

from tests.mutants.draw import ROOMS, Slip, files_of, slips

# File, the line, what stands there, what it becomes, and why that changes nothing.
EQUIVALENT: list[tuple[str, str, str, str, str]] = [
    (
        "conversion/check.py",
        "_MOST_WORK = 10**12  # multiplications, about as many as a minute on one core gives",
        "10", "11", "a budget of work: longer sequences fit, none of them is needed",
    ),
    (
        "conversion/check.py",
        "_MOST_WORK = 10**12  # multiplications, about as many as a minute on one core gives",
        "12", "13", "the same budget",
    ),
    (
        "paths/best_first.py", "QUEUE = 100_000  # partial paths that wait to be opened",
        "100_000", "100001", "how long a queue may grow before it is cut, and what is cut is counted",
    ),
    (
        "paths/best_first.py",
        "best = torch.where(live, carried.abs(), -1.0).topk(min(WIDTH, carried.shape[1]), dim=1)",
        "1.0", "2.0", "any number below every magnitude",
    ),
    (
        "circuits/pair_search.py", "free = max_bytes - 3 * block[0] * block[1] * size",
        "3", "4", "memory set aside for a block: the rest is cut into smaller pieces, of the same result",
    ),
    (
        "paths/flow.py", "span = int(nodes.position.max()) + 1 if len(nodes) else 1",
        "1", "2", "any number above the last position gives the same order",
    ),
    ("causal/edges.py", "flops, widest = 0, 0", "0", "1", "one operation more in an estimate"),
    (
        "frozen/attention.py", "at = y.new_zeros(len(group), self.pattern.shape[-1])",
        "1", "2", "the pattern of a prompt is square",
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


def stale() -> list[str]:
    """Those of the list that are in no file any more."""
    every = {
        (s.file, s.text, s.old, s.new) for room in ROOMS for f in files_of(room) for s in slips(f, room)
    }
    return [f"{known[0]}: `{known[2]}` in {known[1]!r}" for known in EQUIVALENT if known[:4] not in every]
