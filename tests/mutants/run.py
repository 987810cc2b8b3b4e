"""Mutation testing: does a small slip in the package break a test?

Makes each slip in a copy of the project, never in the project itself, and runs the tests that should notice
it. ``make mutants`` runs those written down in ``by_hand.py`` and writes the table in ``docs/mutants.md``.

    python -m tests.mutants.run                  those by hand
    python -m tests.mutants.run --only gain      those by hand whose name holds a word
    python -m tests.mutants.run --random 20      20 slips drawn at random in the rooms of ``ROOMS``
"""

from __future__ import annotations

import argparse
import ast
import copy
import importlib
import multiprocessing
import os
import random
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.mutants.by_hand import MUTANTS, Mutant

ROOT = Path(__file__).resolve().parents[2]
BROKEN = 70  # exit code of a child in which pytest did not even start
LIMIT = 300  # seconds for the tests of one mutant; a slip that never ends is noticed, too
# Files in which slips are drawn, and the tests that should notice them.
ROOMS = {
    "circuits/null.py": "tests/circuits/test_composition.py tests/test_guards.py",
    "circuits/chance.py": "tests/circuits/test_composition.py",
    "circuits/ends.py": "tests/circuits tests/test_invariance.py",
    "circuits/copying.py": "tests/circuits tests/test_guards.py",
    "circuits/rank_one.py": "tests/circuits",
    "detect/measures.py": "tests/detect/test_scores.py tests/detect/test_receipts.py",
    "detect/null.py": "tests/detect/test_induction.py tests/test_guards.py tests/test_invariance.py",
    "detect/weights.py": "tests/detect/test_weights.py tests/test_guards.py",
    "core/results.py": "tests/core tests/view/test_results.py",
    "model/norm.py": "tests/conversion/test_families.py tests/test_model.py",
    "model/gates.py": "tests/conversion/test_modes.py",
    "paths/best_first.py": "tests/paths tests/test_guards.py",
}
SWAPS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Lt: ast.LtE,
    ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.And: ast.Or, ast.Or: ast.And,
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="a word in the names, or the file, of mutants")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="draw N slips instead")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--table", type=Path, help="where to write the table")
    given = parser.parse_args()
    chosen = (
        drawn(given.random, given.seed) if given.random else [m for m in MUTANTS if given.only in m.name]
    )
    if wrong := [f"{m.name}: {n} times in {m.file}: {m.old!r}" for m in chosen if (n := found(m)) != 1]:
        print("The text that a mutant changes must stand in its file once:", *wrong, sep="\n  ")
        return 2
    _warm_up()
    rows, passing = [], dict[str, bool]()
    with tempfile.TemporaryDirectory() as folder:
        for name in ("mechinterp_attn", "tests", "docs", "pyproject.toml", "README.md"):
            from_, to = ROOT / name, Path(folder) / name
            if from_.is_dir():
                shutil.copytree(from_, to, ignore=shutil.ignore_patterns("__pycache__", "_build"))
            else:
                shutil.copy(from_, to)
        for mutant in chosen:
            start = time.monotonic()
            noticed = tried(mutant, Path(folder), passing)
            seconds = time.monotonic() - start
            print(f"{noticed:9} {mutant.name} ({mutant.file}, {seconds:.0f} s)", flush=True)
            rows.append((mutant, noticed))
    killed = sum(noticed in ("noticed", "timed out") for _, noticed in rows)
    print(f"{killed} of {len(rows)} noticed")
    if given.table:
        given.table.write_text(table(rows), encoding="utf-8")
    return 0 if killed == len(rows) else 1


def found(mutant: Mutant) -> int:
    return (ROOT / "mechinterp_attn" / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def tried(mutant: Mutant, folder: Path, passing: dict[str, bool]) -> str:
    """Make the slip in the copy, run its tests there, and take it back.

    Args:
        mutant: the slip.
        folder: the copy.
        passing: which tests were seen to pass without any slip; those that are not in it are run.
    """
    if mutant.tests not in passing:
        passing[mutant.tests] = _exit_code(mutant.tests, folder) == 0
    if not passing[mutant.tests]:
        return "NO TEST"  # tests that fail anyhow, or are not there, notice nothing
    path = folder / "mechinterp_attn" / mutant.file
    right = path.read_text(encoding="utf-8")
    path.write_text(right.replace(mutant.old, mutant.new), encoding="utf-8")
    code = _exit_code(mutant.tests, folder)
    path.write_text(right, encoding="utf-8")
    return {0: "SURVIVED", 1: "noticed", None: "timed out"}.get(code, f"BROKEN ({code})")


def _exit_code(tests: str, folder: Path) -> int | None:
    """Of pytest, in a child of this process; None where it took longer than ``LIMIT``."""
    child = multiprocessing.get_context("fork").Process(target=_tests, args=(tests, str(folder)))
    child.start()
    child.join(LIMIT)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    return child.exitcode


def _warm_up() -> None:
    """What every child needs and no mutant changes is imported once."""
    for name in ("torch", "transformers", "transformer_lens.model_bridge"):
        importlib.import_module(name)
    assert "mechinterp_attn" not in sys.modules


def _tests(tests: str, folder: str) -> None:
    import pytest

    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ.setdefault("MECHINTERP_ATTN_DATA", str(ROOT.parent / "shared" / "data"))
    os.chdir(folder)
    sys.path[:] = [folder, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    files, chosen, expression = tests.partition(" -k ")
    options = [
        "-x",
        "-q",
        "-o",
        "addopts=",
        "-p",
        "no:cacheprovider",
        "-W",
        "ignore::pytest.PytestAssertRewriteWarning",
    ]
    options += ["-k", expression] if chosen else []
    code = BROKEN
    try:
        code = int(pytest.main([*options, *files.split()]))
    finally:
        os._exit(code)


def drawn(n: int, seed: int) -> list[Mutant]:
    """Slips at random: an operator, a comparison or a number changed."""
    every = [mutant for file, tests in ROOMS.items() for mutant in slips(file, tests)]
    return random.Random(seed).sample(every, min(n, len(every)))


def slips(file: str, tests: str) -> Iterator[Mutant]:
    """All slips of one file whose text stands there once."""
    source = (ROOT / "mechinterp_attn" / file).read_text(encoding="utf-8")
    for node in ast.walk(ast.parse(source)):
        other = copy.deepcopy(node)
        if isinstance(other, ast.BinOp | ast.BoolOp) and type(other.op) in SWAPS:
            other.op = SWAPS[type(other.op)]()  # type: ignore[assignment]
        elif isinstance(other, ast.Compare) and type(other.ops[0]) in SWAPS:
            other.ops[0] = SWAPS[type(other.ops[0])]()  # type: ignore[call-overload]
        elif isinstance(other, ast.Constant) and type(other.value) in (int, float):
            other.value = other.value + 1
        else:
            continue
        old = ast.get_source_segment(source, node) or ""
        line = source.splitlines()[node.lineno - 1]  # type: ignore[attr-defined]
        if "|" in old or "\n" in old or source.count(line) != 1 or line.count(old) != 1:
            continue
        new = line.replace(old, f"({ast.unparse(other)})")
        yield Mutant(f"line {node.lineno}: {new.strip()}", file, line, new, tests)  # type: ignore[attr-defined]


def table(rows: list[tuple[Mutant, str]]) -> str:
    lines = ["| slip | file | tests | |", "|---|---|---|---|"]
    lines += [
        f"| {mutant.name} | `{mutant.file}` | `{mutant.tests}` | {noticed} |" for mutant, noticed in rows
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    raise SystemExit(main())
