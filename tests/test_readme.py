"""The examples that people copy: Python blocks of the README and the pages run, commands exist."""

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from mechinterp_attn.cli import app

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str, program: str) -> list[list[str]]:
    """The lines that start a program in a console block, as words."""
    lines = re.findall(r"^\$ (.*)$", text, re.M)
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if Path(w[0]).name == program]


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, Python block {i}", "exec"), namespace)
    if page.name == "README.md":
        assert (tmp_path / "report.html").stat().st_size > 0


def test_commands_exist() -> None:
    """Every make target and subcommand that a page shows is there, with the options it shows."""
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    shown = set()
    for page in [*PAGES, ROOT / "CONTRIBUTING.md"]:
        for block in blocks(page, "console"):
            for words in commands(block, "make"):
                assert words[1] in targets, f"{page.name} shows `make {words[1]}`"
            for _, subcommand, *rest in commands(block, "mechinterp-attn"):
                options = {word for word in rest if word.startswith("--")}
                result = CliRunner().invoke(app, [subcommand, "--help"], env={"COLUMNS": "200"})
                assert result.exit_code == 0, f"{page.name} shows `mechinterp-attn {subcommand}`"
                assert all(option in result.output for option in options), f"{page.name}: {options}"
                shown.add(subcommand)
    assert "report" in shown


def test_readme_links_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
