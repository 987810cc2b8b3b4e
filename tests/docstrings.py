"""Part of `make lint`: what a user can call says what it takes, in which shape, and what it raises.

Public is what the package and its rooms name in their ``__init__``, with the public methods of those
classes. Each must have a docstring in Google's style in which every argument stands under ``Args:`` (or
``Attributes:``, for the fields of a dataclass) and every error raised by its own body under ``Raises:``.
Ruff's own rule sees neither a missing section nor several arguments described together.
"""

from __future__ import annotations

import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "mechinterp_attn"
SECTION = re.compile(r"^(Args|Attributes|Returns|Yields|Raises|Note|Example):\s*$")
ENTRY = re.compile(r"^\s+([*`]*\w+[`*]*(?:(?:, | and |, and )[*`]*\w+[`*]*)*):")
Function = ast.FunctionDef | ast.AsyncFunctionDef


def sections(docstring: str) -> dict[str, set[str]]:
    """The names described under each heading."""
    found: dict[str, set[str]] = {}
    heading = ""
    for line in docstring.splitlines():
        if match := SECTION.match(line):
            heading = match[1]
            found.setdefault(heading, set())
        elif heading and (match := ENTRY.match(line)):
            found[heading] |= set(re.findall(r"\w+", match[1]))
    return found


def arguments(function: Function) -> list[str]:
    """The names of a function's arguments, without self and those that nobody passes."""
    a = function.args
    every = [*a.posonlyargs, *a.args, *a.kwonlyargs, *filter(None, (a.vararg, a.kwarg))]
    return [arg.arg for arg in every if arg.arg not in ("self", "cls") and not arg.arg.startswith("_")]


def raised(function: Function) -> set[str]:
    """The errors that a function's own body raises by name."""
    found = set()
    for node in ast.walk(function):
        if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
            name = node.exc.func
            if isinstance(name, ast.Name) and name.id.endswith("Error"):
                found.add(name.id)
    return found


def is_property(function: Function) -> bool:
    names = {ast.unparse(decorator).split(".")[-1] for decorator in function.decorator_list}
    return bool(names & {"property", "cached_property", "setter", "overload"})


def faults_of_function(function: Function, inherited: dict[str, set[str]] | None = None) -> Iterator[str]:
    """What a function's docstring leaves out; ``inherited`` are the sections of its class."""
    text = ast.get_docstring(function)
    if any(ast.unparse(decorator).endswith("overload") for decorator in function.decorator_list):
        return  # the function itself says it all
    if text is None and inherited is None:
        yield "has no docstring"
        return
    said = sections(text or "")
    known = said.get("Args", set())
    for name, names in (inherited or {}).items():
        known = known | names if name in ("Args", "Attributes") else known
    if not is_property(function):
        missing = [name for name in arguments(function) if name not in known]
        if missing:
            yield "Args: leaves out " + ", ".join(missing)
    unsaid = raised(function) - said.get("Raises", set()) - (inherited or {}).get("Raises", set())
    if unsaid:
        yield "Raises: leaves out " + ", ".join(sorted(unsaid))


def faults_of_class(node: ast.ClassDef) -> Iterator[str]:
    text = ast.get_docstring(node)
    if text is None:
        yield "has no docstring"
        return
    said = sections(text)
    fields = [
        item.target.id
        for item in node.body
        if isinstance(item, ast.AnnAssign) and isinstance(item.target, ast.Name)
        if not item.target.id.startswith("_") and "ClassVar" not in ast.unparse(item.annotation)
    ]
    if any("dataclass" in ast.unparse(decorator) for decorator in node.decorator_list):
        known = said.get("Args", set()) | said.get("Attributes", set())
        missing = [name for name in fields if name not in known]
        if missing:
            yield "Attributes: leaves out " + ", ".join(missing)
    for item in node.body:
        if not isinstance(item, Function):
            continue
        if item.name == "__init__":
            yield from (f"__init__ {fault}" for fault in faults_of_function(item, said))
        elif not item.name.startswith("_"):
            yield from (f".{item.name} {fault}" for fault in faults_of_function(item))


def public(init: Path) -> Iterator[tuple[str, str]]:
    """Module and name of everything that an ``__init__`` names."""
    for node in ast.parse(init.read_text()).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            module = node.module if node.level == 0 else f"mechinterp_attn.{node.module}"
            yield from ((module, alias.name) for alias in node.names)


def main() -> int:
    """Print every fault; 1 if there are any."""
    found = []
    inits = [PACKAGE / "__init__.pyi", *sorted(PACKAGE.glob("*/__init__.py"))]
    for module, name in sorted({pair for init in inits for pair in public(init)}):
        path = PACKAGE.parent.joinpath(*module.split(".")).with_suffix(".py")
        if not path.is_file():
            continue  # a package: its names come with its own __init__
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ClassDef | Function) or node.name != name:
                continue
            faults = faults_of_class(node) if isinstance(node, ast.ClassDef) else faults_of_function(node)
            where = f"{path.relative_to(PACKAGE.parent)}:{node.lineno}: {name}"
            found += [f"{where} {fault}" for fault in faults]
    print("\n".join(found) or "docstrings: complete")
    return bool(found)


if __name__ == "__main__":
    sys.exit(main())
