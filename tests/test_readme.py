"""The examples that people copy: Python blocks of the README and the pages run, and so do the commands."""

import json
import re
import shlex
from collections.abc import Iterator
from pathlib import Path

import jaxtyping
import pytest
from typer.testing import CliRunner

import mechinterp_attn as mia
from mechinterp_attn.cli import app
from mechinterp_attn.sources.zoo import bundled_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(autouse=True)
def as_a_user_has_it() -> Iterator[None]:
    """Without the shape checks of the other tests, which slow a whole report down many times."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)


def commands(text: str, program: str) -> list[list[str]]:
    """The lines that start a program in a console block, as words."""
    lines = re.findall(r"^\$ (.*)$", text, re.M)
    words = [shlex.split(line, comments=True) for line in lines]
    return [w for w in words if Path(w[0]).name == program]


def shell_examples() -> list[list[str]]:
    """Every different line that starts the command line of the package, on any page."""
    found = [
        words[1:]
        for page in PAGES
        for block in blocks(page, "console")
        for words in commands(block, "mechinterp-attn")
    ]
    return sorted(words for i, words in enumerate(found) if words not in found[:i])


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The blocks of a page run one after the other in one namespace, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    namespace: dict[str, object] = {"__name__": "__main__"}
    for i, block in enumerate(blocks(page, "python")):
        exec(compile(block, f"{page.name}, Python block {i}", "exec"), namespace)
    if page.name == "README.md":
        assert (tmp_path / "report.html").stat().st_size > 0


@pytest.fixture(autouse=True)
def files_the_pages_speak_of(tmp_path: Path) -> None:
    """What a reader of the pages has beside them: texts to run over."""
    texts = ["It was the best of times, it was the worst of times.", "Call me Ishmael. Call me."]
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (tmp_path / "texts.jsonl").write_text("".join(lines), encoding="utf-8")


def test_make_targets_exist() -> None:
    targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.M)
    shown = [
        words[1]
        for page in [*PAGES, ROOT / "CONTRIBUTING.md"]
        for block in blocks(page, "console")
        for words in commands(block, "make")
    ]
    assert "demo" in shown
    assert set(shown) <= set(targets)


@pytest.mark.parametrize("words", shell_examples(), ids=" ".join)
def test_commands_run(words: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands on bundled models run; of the others, the subcommand and its options must exist."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "README.md").write_bytes((ROOT / "README.md").read_bytes())
    if "behaviour.jsonl" in words:
        mia.tasks.induction(mia.load("gelu-2l"), n=8).save(tmp_path / "behaviour.jsonl")
    if "my_finetuned_folder" in words:
        mia.load("attn-2l").save(tmp_path / "my_finetuned_folder")
    if words[0] == "explore":  # it would serve until Ctrl-C; tests/view/test_explorer.py has it running
        monkeypatch.setattr("uvicorn.Server.run", lambda *args, **options: None)
        monkeypatch.setattr("webbrowser.open", lambda address: True)
    runner = CliRunner()
    if set(words) & {"--help", "models", *bundled_names()}:
        result = runner.invoke(app, words)
        assert result.exit_code == 0, result.output
    else:
        help_page = runner.invoke(app, [words[0], "--help"], env={"COLUMNS": "200"}).output
        missing = [word for word in words if word.startswith("--") and word not in help_page]
        assert missing == []


def test_readme_links_to_files_that_exist() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    links = [link for link in re.findall(r"\]\(([^)#]+)", text) if "://" not in link]
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []
