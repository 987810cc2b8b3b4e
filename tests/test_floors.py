"""The rooms stand on floors, and imports only go down: docs/architecture.md says so, this holds it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parents[1] / "mechinterp_attn"

# From the ground up. Rooms that share a floor do not import each other.
FLOORS = (
    ("core",),
    ("model",),
    ("frozen", "sources"),
    ("conversion",),
    ("circuits", "theorems"),
    ("paths",),
    ("causal",),
    ("detect",),
    ("view",),
    ("explore",),
    ("cli",),
)
FLOOR = {room: number for number, floor in enumerate(FLOORS) for room in floor}


def room_of(module: str) -> str:
    """``mechinterp_attn.paths.graph`` stands in ``paths``."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def imports(path: Path) -> Iterator[str]:
    """Every module of the package that a file imports: inside functions and for type checkers too."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (name.name for name in node.names if name.name.startswith("mechinterp_attn"))
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "mechinterp_attn":
                yield from (f"mechinterp_attn.{name.name}" for name in node.names)
            elif (node.module or "").startswith("mechinterp_attn."):
                yield node.module


FILES = sorted(path for path in PACKAGE.rglob("*.py") if path.parent != PACKAGE)
ARROWS = [(path.relative_to(PACKAGE), target) for path in FILES for target in imports(path)]


def test_every_room_has_a_floor() -> None:
    rooms = {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert rooms <= set(FLOOR)


def test_no_arrow_runs_up() -> None:
    """Into a room on a higher floor, or on the same one. The top of the package may be imported by nobody
    but for what stands in its own files (the version)."""
    up = []
    for path, target in ARROWS:
        here, there = path.parts[0], room_of(target)
        if here != there and there in FLOOR and FLOOR[there] >= FLOOR[here]:
            up.append(f"{path} imports {target}")
    assert not up, "\n".join(up)


@pytest.mark.parametrize("room", sorted(FLOOR))
def test_no_circle_in_a_room(room: str) -> None:
    """Within a room the files can be read in one order."""
    names = {
        ".".join(("mechinterp_attn", *path.relative_to(PACKAGE).with_suffix("").parts)): path
        for path in FILES
    }
    graph: dict[str, set[str]] = {}
    for name, path in names.items():
        if room_of(name) == room and path.stem != "__init__":
            graph[name] = {target for target in imports(path) if target in names and target != name}
    while free := [name for name, targets in graph.items() if not targets & graph.keys()]:
        for name in free:
            del graph[name]
    assert not graph, "these import each other: " + ", ".join(sorted(graph))


def test_only_doors_import_the_bridge() -> None:
    """TransformerLens is met in few rooms, so that the rest can be read without it."""
    met = set()
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [module or ""]
            if any(name.split(".")[0] == "transformer_lens" for name in names):
                met.add(path.relative_to(PACKAGE).parts[0])
    assert met <= {"model", "sources", "conversion", "theorems"}
