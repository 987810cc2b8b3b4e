"""``mechinterp-attn report`` and ``detect``, as a shell sees them."""

import json
import re
import sys

import pytest

from mechinterp_attn.cli import main


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["mechinterp-attn", *map(str, arguments)])
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call


def test_the_path_alone_is_on_stdout(run, tmp_path):
    page = tmp_path / "report.html"
    code, out, err = run("report", "gelu-2l", "--prompt", "It was the best of times", "--out", page)
    assert (code, out) == (0, f"{page}\n")
    assert "loading gelu-2l" in err
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]  # no temporary file is left


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["no-such-model", "--prompt", "a", "--out", "x.html"], "no-such-model.*bundled"),
        (["gelu-2l", "--prompt", "", "--out", "x.html"], "empty"),
        (["gelu-2l", "--prompt", "word " * 200, "--out", "x.html"], "context of 128"),
        (["gelu-2l", "--prompt", "a", "--out", "nowhere/x.html"], "folder .*nowhere does not exist"),
        (["gelu-2l", "--prompt", "a", "--out", "."], "is a folder"),
        (["gelu-2l", "--out", "x.html"], "--prompt.*--tokens"),
        (["gelu-2l", "--tokens", "1 b", "--out", "x.html"], "expected ids"),
        (["gelu-2l", "--prompt", "a", "--section", "hedas", "--out", "x.html"], "no section"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    code, out, err = run("report", *arguments, "--quiet")
    assert (code, out) == (2, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert re.search(message, err)
    assert list(tmp_path.iterdir()) == []


def test_detect_prints_the_score_table(run, tmp_path):
    code, out, _ = run("detect", "gelu-2l", "--json", "--top", 2)
    rows = json.loads(out)
    assert code == 0
    assert len(rows) == 2
    assert rows[0]["induction"] >= rows[1]["induction"] > 0.5  # a published induction head
    code, out, _ = run("detect", "gelu-2l", "--csv", tmp_path / "heads.csv")
    assert (code, out) == (0, f"{tmp_path / 'heads.csv'}\n")
    assert (tmp_path / "heads.csv").read_text(encoding="utf-8").count("\n") == 1032 + 1


def test_detect_names_the_scores(run):
    code, _, err = run("detect", "gelu-2l", "--by", "sorcery")
    assert code == 2
    assert "no score 'sorcery'" in err
    assert "induction" in err
