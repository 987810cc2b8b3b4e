"""Slips at random: which there are in a file, and a draw of them."""

from __future__ import annotations

import ast
import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

# The core rooms: files in the package, and the tests that should notice a slip there.
ROOMS = {
    "circuits": (
        "circuits/*.py",
        "circuits/test_*.py test_guards.py test_invariance.py",
    ),
    "nulls": (
        "circuits/null.py circuits/chance.py detect/null.py detect/measures.py detect/weights.py "
        "detect/tally.py detect/estimates.py detect/losses.py detect/induction_circuit.py detect/scores.py",
        "detect/test_receipts.py detect/test_weights.py detect/test_scores.py detect/test_induction*.py "
        "detect/test_corpus.py detect/test_ablation.py circuits/test_composition.py test_guards.py "
        "test_invariance.py",
    ),
    "paths": (
        "paths/*.py",
        "paths/test_*.py test_guards.py",
    ),
    "frozen": (
        "frozen/*.py",
        "paths/test_*.py conversion/test_parts.py conversion/test_dictionary.py",
    ),
    "model": (
        "model/attention.py model/neurons.py model/block.py model/norm.py model/rotary.py model/heads.py "
        "model/virtual.py model/batch.py model/experts.py model/low_rank.py model/own_token.py "
        "model/weights.py",
        "test_model.py test_heads.py circuits/test_seen.py circuits/test_heads.py "
        "circuits/test_families.py conversion/test_parts.py conversion/test_modes.py "
        "conversion/test_citizen.py conversion/test_surface.py",
    ),
    "conversion": (
        "conversion/*.py",
        "conversion/test_fold.py conversion/test_modes.py conversion/test_parts.py test_checkpoint.py "
        "conversion/test_families.py conversion/test_foreign.py conversion/test_citizen.py "
        "conversion/test_dictionary.py conversion/test_files.py test_guards.py",
    ),
    "causal": (
        "causal/*.py",
        "causal/test_*.py detect/test_ablation*.py test_guards.py",
    ),
}
OPERATORS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.And: ast.Or, ast.Or: ast.And, ast.BitAnd: ast.BitOr,
}  # fmt: skip
COMPARISONS: dict[type[ast.AST], type[ast.AST]] = {
    ast.Lt: ast.GtE, ast.LtE: ast.Gt, ast.Gt: ast.LtE, ast.GtE: ast.Lt, ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is, ast.In: ast.NotIn, ast.NotIn: ast.In,
}  # fmt: skip
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "amin": "amax", "amax": "amin",
         "argmax": "argmin", "argmin": "argmax", "sum": "mean", "mean": "sum", "std": "var",
         "tril": "triu", "triu": "tril", "floor": "ceil", "ceil": "floor"}  # fmt: skip


@dataclass(frozen=True)
class Slip:
    """A slip that was drawn.

    Attributes:
        file: inside ``mechinterp_attn/``.
        line, text: where it is, and the whole line.
        old, new: the text that changes, and what it becomes.
        function: the innermost function around it; "" outside of all.
        room: whose tests should notice it.
        whole: the file with the slip.
    """

    file: str
    line: int
    text: str
    old: str
    new: str
    function: str
    room: str
    whole: str

    @property
    def name(self) -> str:
        return f"line {self.line}: `{self.old}` → `{self.new}`"


def drawn(n: int, seed: int, room: str | None = None) -> list[Slip]:
    """``n`` slips in every room, or in one: every slip there is equally likely."""
    out = []
    for name in ROOMS if room is None else [room]:
        every = [slip for file in files_of(name) for slip in slips(file, name)]
        out += random.Random(f"{seed} {name}").sample(every, min(n, len(every)))
    return out


def files_of(room: str) -> list[str]:
    """The files of a room, relative to the package; without lists of names."""
    package = ROOT / "mechinterp_attn"
    found = [path for pattern in ROOMS[room][0].split() for path in package.glob(pattern)]
    assert len(found) >= len(ROOMS[room][0].split()), f"a file of {room} has another name now"
    return sorted({str(path.relative_to(package)) for path in found if path.name != "__init__.py"})


def tests_of(room: str) -> list[str]:
    """The files of tests that should notice a slip in a room."""
    found = [list((ROOT / "tests").glob(pattern)) for pattern in ROOMS[room][1].split()]
    assert all(found), f"a file of tests for {room} has another name now"
    return sorted({str(path.relative_to(ROOT)) for paths in found for path in paths})


def slips(file: str, room: str) -> Iterator[Slip]:
    """All slips of one file, in its order."""
    whole = (ROOT / "mechinterp_attn" / file).read_text(encoding="utf-8")
    starts = [0]
    for line in whole.encode().splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, function in _expressions(ast.parse(whole), ""):
        for other in _changed(node):
            begin = starts[node.lineno - 1] + node.col_offset
            end = starts[(node.end_lineno or 0) - 1] + (node.end_col_offset or 0)
            text = whole.encode()
            old, new = text[begin:end].decode(), ast.unparse(other)
            slipped = text[:begin] + f"({new})".encode() + text[end:]
            written = whole.splitlines()[node.lineno - 1].strip()
            yield Slip(
                file, node.lineno, written, " ".join(old.split()), new, function, room, slipped.decode()
            )


def _expressions(node: ast.AST, function: str) -> Iterator[tuple[ast.expr, str]]:
    """What computes something: no annotations, no texts of messages, and no estimates of memory, which are
    held to what is allocated by tests of their own.
    """
    for name, value in ast.iter_fields(node):
        if name in ("annotation", "returns", "decorator_list"):
            continue
        for child in value if isinstance(value, list) else [value]:
            if not isinstance(child, ast.AST) or isinstance(child, ast.JoinedStr | ast.Raise):
                continue
            inside = function
            if isinstance(child, ast.FunctionDef):
                if "plan" in child.name:
                    continue
                inside = child.name
            if isinstance(child, ast.expr):
                yield child, inside
            yield from _expressions(child, inside)


def _changed(node: ast.expr) -> Iterator[ast.expr]:
    """What a slip may make of an expression; mostly nothing."""
    other = copy.deepcopy(node)
    if isinstance(other, ast.BinOp | ast.BoolOp) and type(other.op) in OPERATORS:
        other.op = OPERATORS[type(other.op)]()  # type: ignore[assignment]
    elif isinstance(other, ast.Compare) and type(other.ops[0]) in COMPARISONS:
        other.ops[0] = COMPARISONS[type(other.ops[0])]()  # type: ignore[call-overload]
    elif isinstance(other, ast.Constant) and type(other.value) in (int, float):
        other.value += 1  # type: ignore[operator]
    elif isinstance(other, ast.UnaryOp) and isinstance(other.op, ast.Not | ast.USub):
        if isinstance(other.operand, ast.Constant):  # -1 becomes -2; 1 is the same axis of a matrix
            return
        other = other.operand
    elif isinstance(other, ast.IfExp):
        other.body, other.orelse = other.orelse, other.body
    elif isinstance(other, ast.Attribute) and other.attr in NAMES:
        other.attr = NAMES[other.attr]
    else:
        return
    yield other
