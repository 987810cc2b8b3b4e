"""Mutation testing: does a small slip in the package break a test?

Makes each slip in a copy of the project, never in the project itself, and runs the tests that should notice
it: for those in ``by_hand.py`` the tests named there, for those drawn at random all tests of the room that
call the function with the slip, quickest first. ``docs/mutants.md`` has what came of it.

    python -m tests.mutants.run                            those by hand
    python -m tests.mutants.run --only gain                those by hand whose name holds a word
    python -m tests.mutants.run --random 10 --seed 1       10 drawn at random in every room of ``draw.py``
    python -m tests.mutants.run --random 10 --room paths   in one room
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import multiprocessing
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from tests.mutants.by_hand import MUTANTS, Mutant
from tests.mutants.draw import ROOMS, ROOT, Slip, drawn, files_of, tests_of
from tests.mutants.equivalent import is_equivalent, stale

BROKEN = 70  # exit code of a child in which pytest did not even start
LIMIT = 300  # seconds for the tests of one mutant; a slip that never ends is noticed, too
NOTICED = ("noticed", "timed out")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", default="", help="a word in the names of mutants by hand")
    parser.add_argument("--random", type=int, default=0, metavar="N", help="draw N slips a room instead")
    parser.add_argument("--room", choices=ROOMS, help="draw in this room alone")
    parser.add_argument("--seed", type=int, default=0, help="of the draw")
    parser.add_argument("--table", type=Path, help="where to write the table")
    given = parser.parse_args()
    chosen = [m for m in MUTANTS if given.only in m.name]
    if wrong := [f"{m.name}: {n} times in {m.file}: {m.old!r}" for m in chosen if (n := found(m)) != 1]:
        print("The text that a mutant changes must stand in its file once:", *wrong, sep="\n  ")
        return 2
    if given.random and (gone := stale()):
        print("Slips listed as equivalent that no file has any more:", *gone, sep="\n  ")
        return 2
    _warm_up()
    rows = list[tuple[str, str, str]]()
    with tempfile.TemporaryDirectory() as folder:
        copy_of_project(Path(folder))
        if given.random:
            tries = at_random(drawn(given.random, given.seed, given.room), Path(folder))
        else:
            tries = by_hand(chosen, Path(folder))
        start = time.monotonic()
        for name, file, became in tries:
            print(f"{became:10} {file} {name} ({time.monotonic() - start:.0f} s)", flush=True)
            rows.append((name, file, became))
            start = time.monotonic()
    killed = sum(became in NOTICED for *_, became in rows)
    equal = sum(became == "equivalent" for *_, became in rows)
    print(f"{killed} of {len(rows) - equal} noticed, {equal} equivalent")
    if given.table:
        lines = [f"| {name} | `{file}` | {became} |" for name, file, became in rows]
        given.table.write_text(
            "\n".join(["| slip | file | |", "|---|---|---|", *lines, ""]), encoding="utf-8"
        )
    return 0 if killed + equal == len(rows) else 1


def copy_of_project(folder: Path) -> None:
    for name in ("mechinterp_attn", "tests", "benchmarks", "docs", "pyproject.toml", "README.md"):
        from_, to = ROOT / name, folder / name
        if from_.is_dir():
            ignored = shutil.ignore_patterns("__pycache__", "_build", "node_modules")
            shutil.copytree(from_, to, ignore=ignored)
        else:
            shutil.copy(from_, to)


def found(mutant: Mutant) -> int:
    return (ROOT / "mechinterp_attn" / mutant.file).read_text(encoding="utf-8").count(mutant.old)


def by_hand(mutants: Sequence[Mutant], folder: Path) -> Iterator[tuple[str, str, str]]:
    """Name, file and what became of each; each is made only where its tests pass without it."""
    passing = dict[str, bool]()
    for mutant in mutants:
        if mutant.tests not in passing:
            passing[mutant.tests] = pytest_on(_arguments(mutant.tests), folder) == 0
        if not passing[mutant.tests]:
            yield mutant.name, mutant.file, "NO TEST"  # what fails anyhow, or is not there, notices nothing
            continue
        right = (folder / "mechinterp_attn" / mutant.file).read_text(encoding="utf-8")
        slipped = right.replace(mutant.old, mutant.new)
        yield mutant.name, mutant.file, tried(mutant.file, slipped, _arguments(mutant.tests), folder)


def at_random(mutants: Sequence[Slip], folder: Path) -> Iterator[tuple[str, str, str]]:
    """Name, file and what became of each; the tests of its room must pass without it."""
    reached = dict[str, dict[str, Any]]()
    for slip in mutants:
        if is_equivalent(slip):
            yield slip.name, slip.file, "equivalent"
            continue
        if slip.room not in reached:
            out = folder / f"reached-{slip.room}.json"
            if pytest_on(tests_of(slip.room), folder, watch=(files_of(slip.room), out)) != 0:
                raise SystemExit(f"the tests of {slip.room} fail without any slip")
            reached[slip.room] = json.loads(out.read_text())
        tests = those_that_call(slip, reached[slip.room])
        became = tried(slip.file, slip.whole, tests, folder) if tests else "NO TEST"
        yield slip.name, slip.file, became


def those_that_call(slip: Slip, reached: dict[str, Any]) -> list[str]:
    """The tests that call the function of a slip, all where it is outside of functions: the quickest file
    first, and in it the quickest test. Files stay together, since their tests share models.
    """
    key, seconds = [slip.file, slip.function], reached["seconds"]
    tests = [test for test, calls in reached["calls"].items() if not slip.function or key in calls]
    of_file = dict[str, float]()
    for test in tests:
        file = test.split("::")[0]
        of_file[file] = of_file.get(file, 0) + seconds[test]
    return sorted(tests, key=lambda test: (of_file[test.split("::")[0]], seconds[test]))


def tried(file: str, slipped: str, tests: list[str], folder: Path) -> str:
    """Make the slip in the copy, run tests there, and take it back."""
    path = folder / "mechinterp_attn" / file
    right = path.read_text(encoding="utf-8")
    path.write_text(slipped, encoding="utf-8")
    code = pytest_on(tests, folder)
    path.write_text(right, encoding="utf-8")
    became = {0: "SURVIVED", 1: "noticed", 2: "noticed", None: "timed out"}  # 2: it cannot be imported
    return became.get(code, f"BROKEN ({code})")


Watch = tuple[list[str], Path]


def pytest_on(arguments: list[str], folder: Path, watch: Watch | None = None) -> int | None:
    """Exit code of pytest, in a child of this process; None where it took longer than ``LIMIT``.

    Args:
        arguments: files or tests.
        folder: of the copy.
        watch: the files whose functions are watched, and where to write which test calls which.
    """
    child = multiprocessing.get_context("fork").Process(target=_tests, args=(arguments, str(folder), watch))
    child.start()
    child.join(None if watch else LIMIT)
    if child.exitcode is None:
        child.kill()
        child.join()
        return None
    return child.exitcode


def _warm_up() -> None:
    """What every child needs and no mutant changes is imported once."""
    for name in (
        "torch",
        "transformers",
        "transformer_lens.model_bridge",
        "pandas",
        "hypothesis",
        "pytest",
    ):
        importlib.import_module(name)
    assert "mechinterp_attn" not in sys.modules
    gc.freeze()  # no child looks through all of this for garbage


def _arguments(tests: str) -> list[str]:
    files, chosen, expression = tests.partition(" -k ")
    return [*files.split(), "-k", expression] if chosen else files.split()


def _tests(arguments: list[str], folder: str, watch: Watch | None) -> None:
    import pytest

    for name in [name for name in sys.modules if name.split(".")[0] == "tests"]:
        del sys.modules[name]
    os.environ.setdefault("MECHINTERP_ATTN_DATA", str(ROOT.parent / "shared" / "data"))
    os.chdir(folder)
    sys.path[:] = [folder, *(p for p in sys.path if Path(p or ".").resolve() != ROOT)]
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, 1)
    os.dup2(nothing, 2)
    options = ["-x", "-q", "-o", "addopts="]
    for plugin in ("cacheprovider", "xdist", "anyio", "typeguard"):  # not used here, slow to import
        options += ["-p", f"no:{plugin}"]
    options += ["-W", "ignore::pytest.PytestAssertRewriteWarning"]
    plugins = []
    if watch is not None:
        from tests.mutants.reach import Reach

        plugins = [Reach(Path(folder) / "mechinterp_attn", *watch)]
    code = BROKEN
    try:
        code = int(pytest.main([*options, *arguments], plugins))
    finally:
        os._exit(code)


if __name__ == "__main__":
    raise SystemExit(main())
