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
        (["gelu-2l", "a", "--preset", "hedas"], "'hedas' is not one of 'overview'"),
        (["gelu-2l", "a", "--prompt", "b"], "the text once"),
        (["gelu-2l", "a", "--out", "-", "--data"], "give --out a file"),
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


def test_a_text_behind_the_model_and_a_file_named_after_it(run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, _ = run("report", "attn-1l", "It was the", "--section", "story")
    assert (code, out) == (0, "attn-1l.html\n")
    assert [p.name for p in tmp_path.iterdir()] == ["attn-1l.html"]


def test_wrong_names_are_said_before_a_model_is_loaded(run, monkeypatch):
    def never(*arguments, **options):
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("mechinterp_attn.load", never)
    for wrong in (["--preset", "nope"], ["--section", "nope"], ["--compare-mlp", "nope"]):
        code, out, err = run("report", "gelu-2l", "a", *wrong)
        assert (code, out) == (2, "")
        assert "nope" in err
        assert "Value error" not in err


def test_the_names_are_the_reports_own():
    from typing import get_args

    from mechinterp_attn.cli import report
    from mechinterp_attn.view.report.presets import PRESETS, SECTIONS, TASK_SECTIONS

    assert get_args(report.Preset) == tuple(PRESETS)
    assert tuple(SECTIONS | TASK_SECTIONS) == report.SECTIONS


def test_the_version(run):
    from mechinterp_attn.version import __version__

    assert run("--version")[:2] == (0, f"mechinterp-attn {__version__}\n")


def test_standard_input_is_a_text(run, tmp_path, monkeypatch):
    import io

    monkeypatch.setattr(sys, "stdin", io.StringIO("It was the\n"))
    code, _, _ = run("report", "attn-1l", "-", "--section", "provenance", "--out", tmp_path / "x.html")
    assert code == 0
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    code, _, err = run("report", "attn-1l", "-", "--out", tmp_path / "y.html")
    assert code == 2
    assert "empty" in err


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
