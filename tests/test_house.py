"""What the package promises about itself: what an import costs, what the wheel holds."""

import importlib
import json
import pkgutil
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
HEAVY = ("torch", "transformer_lens", "transformers", "plotly", "pandas")
REPORT = f"; import json; print(json.dumps([name for name in {HEAVY!r} if name in sys.modules]))"


@pytest.mark.parametrize(
    "code",
    [
        "import sys, mechinterp_attn",
        "import sys, mechinterp_attn; assert 'load' in dir(mechinterp_attn)",
        "import sys; from mechinterp_attn.cli import app; "
        "from typer.testing import CliRunner; "
        "result = CliRunner().invoke(app, ['--help']); "
        "assert result.exit_code == 0 and 'report' in result.output, result.output",
        "import sys; from mechinterp_attn.cli import app; "
        "from typer.testing import CliRunner; "
        "assert CliRunner().invoke(app, ['report', '--help']).exit_code == 0",
    ],
    ids=["import", "dir", "--help", "report --help"],
)
def test_loads_nothing_heavy(code: str) -> None:
    """In a fresh interpreter, since this one has loaded everything."""
    done = subprocess.run([sys.executable, "-c", code + REPORT], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1]) == []


def test_no_module_hides_behind_a_function() -> None:
    """``paths.orders`` is a function, so no file ``paths/orders.py`` may exist: nobody could import it
    with ``from mechinterp_attn.paths import orders``, nor patch a name in it."""
    import mechinterp_attn

    hidden = []
    for found in pkgutil.walk_packages(mechinterp_attn.__path__, "mechinterp_attn."):
        if found.name.endswith("__main__"):
            continue
        room, _, name = found.name.rpartition(".")
        module = importlib.import_module(found.name)
        if getattr(importlib.import_module(room), name) is not module:
            hidden.append(found.name)
    assert hidden == []


def test_files_are_short() -> None:
    """A file that one can read in one sitting: where it grows longer, it has a seam."""
    files = [*(ROOT / "mechinterp_attn").rglob("*.py"), *(ROOT / "tests").rglob("*.py")]
    lines = {p.relative_to(ROOT).as_posix(): len(p.read_text().splitlines()) for p in files}
    assert {name: n for name, n in lines.items() if n > 400} == {}


def test_public_names_all_load() -> None:
    """The stub names what is exported; each name must be there."""
    import mechinterp_attn as mia

    missing = [name for name in mia.__all__ if not hasattr(mia, name)]
    assert missing == []


@pytest.mark.parametrize("room", ["circuits", "paths", "detect", "causal", "theorems"])
def test_a_room_offers_what_one_calls(room: str) -> None:
    """Completion shows calls and what one builds for them, each named in a guide; the types that calls
    return can be imported, but nobody looks for them in the list."""
    import mechinterp_attn as mia
    from mechinterp_attn.core.results import Result

    module = getattr(mia, room)
    assert dir(module) == sorted(module.__all__)
    offered = {name: getattr(module, name) for name in module.__all__}
    assert [name for name, x in offered.items() if isinstance(x, type) and issubclass(x, Result)] == []
    pages = [*(ROOT / "docs").glob("*.md"), *(ROOT / "notebooks").glob("*.ipynb")]
    guides = " ".join(page.read_text(encoding="utf-8") for page in pages)
    assert [name for name in offered if not re.search(rf"\b{name}\b", guides)] == []


def test_names_that_left_a_room_work_with_a_warning() -> None:
    import mechinterp_attn as mia
    from mechinterp_attn.theorems.omega import check_omega

    with pytest.warns(FutureWarning, match=r"theorems\.check_omega is .*\.omega\.check_omega now"):
        assert mia.theorems.check_omega is check_omega
    with pytest.raises(AttributeError, match="has no attribute 'nonsense'"):
        mia.theorems.nonsense  # noqa: B018


@pytest.fixture(scope="module")
def packaged(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Names of the files in a wheel built from this tree."""
    pytest.importorskip("hatchling", reason="needs hatchling to build the wheel offline")
    out = tmp_path_factory.mktemp("wheel")
    build = "from hatchling.build import build_wheel; import sys; print(build_wheel(sys.argv[1]))"
    done = subprocess.run([sys.executable, "-c", build, str(out)], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    with zipfile.ZipFile(out / done.stdout.splitlines()[-1]) as wheel:
        return set(wheel.namelist())


def test_wheel_holds_all_of_the_package(packaged: set[str]) -> None:
    """Weights, cards, templates and assets ship; nothing of the package's folder stays behind."""
    tree = (ROOT / "mechinterp_attn").rglob("*")
    files = {p.relative_to(ROOT).as_posix() for p in tree if p.is_file() and "__pycache__" not in p.parts}
    assert files - packaged == set()
    endings = {Path(name).suffix for name in packaged}
    assert {".safetensors", ".json", ".pyi"} <= endings


def test_wheel_holds_nothing_else(packaged: set[str]) -> None:
    tops = {name.split("/")[0] for name in packaged}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"mechinterp_attn"}
