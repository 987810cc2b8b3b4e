"""The one way by which a benchmark's numbers reach the documentation.

A script calls ``publish("forward", rows)``. The rows are printed as a Markdown table. Under ``make
bench`` (which sets ``BENCH_TABLES=docs/benchmarks``) they are also written to
``docs/benchmarks/forward.csv``, and how they were made to ``docs/benchmarks/runs.csv``.
``docs/benchmarks.md`` shows both; a test holds pages and files together.
"""

from __future__ import annotations

import csv
import datetime
import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch


def publish(
    name: str, rows: Sequence[Mapping[str, object]], *, clock: str = "wall clock", key: str | None = None
) -> None:
    """Print a table, and write it where the documentation reads it if ``BENCH_TABLES`` is set.

    Args:
        name: of the table, the same in every run; a script may publish several.
        rows: all with the same keys, the columns. Numbers as text, rounded as readers should see them.
        clock: what was measured, such as "wall clock", "processor time" or "none".
        key: the column that names a row, in a table whose rows are measured in runs of their own: rows of
            earlier runs stay where this one has none of that name.
    """
    columns = list(rows[0])
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(row[column]) for column in columns) + " |", flush=True)
    folder = os.environ.get("BENCH_TABLES")
    if folder is None:
        return
    path, runs = Path(folder) / f"{name}.csv", Path(folder) / "runs.csv"
    others = _read(runs)
    command = " ".join(["python", *(_relative(word) for word in sys.argv)])
    table = [dict(row) for row in rows]
    if key is not None and path.exists():
        earlier = {row[key]: row for row in _read(path)} | {row[key]: row for row in table}
        table = list(earlier.values())
        commands = [row["command"] for row in others if row["table"] == name]
        command = "; ".join(dict.fromkeys([*(c for one in commands for c in one.split("; ")), command]))
    _write(path, table)
    run = {
        "table": name,
        "command": command,
        "clock": clock,
        "threads": torch.get_num_threads(),
        "cores": os.cpu_count(),
        "processor": _processor(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU",
        "torch": torch.__version__,
        "day": datetime.date.today().isoformat(),
    }
    others = [row for row in others if row["table"] != name]
    _write(runs, sorted([*others, run], key=lambda row: str(row["table"])))


def _read(path: Path) -> list[dict[str, str]]:
    if not path.exists():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def _write(path: Path, rows: Sequence[Mapping[str, object]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


def _relative(word: str) -> str:
    """A path inside the repository without what is in front of it: no machine's folders in the docs."""
    root = str(Path(__file__).resolve().parents[1])
    return word.replace(root + os.sep, "")


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
