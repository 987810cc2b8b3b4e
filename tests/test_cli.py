"""The command line as a whole: one grammar, documented JSON, exit codes, Ctrl-C, terminals."""

import io
import json
import os
import pty
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import jaxtyping
import pytest
import typer

from mechinterp_attn import cli
from mechinterp_attn.cli import common
from mechinterp_attn.core import progress

ROOT = Path(__file__).resolve().parents[1]
TEXT = "It was the best of times, it was the worst of times. Call me Ishmael. "
COMMANDS = {command.name: command for command in typer.main.get_command(cli.app).commands.values()}


@pytest.fixture(autouse=True)
def as_a_shell_has_it(tmp_path, monkeypatch):
    """A folder with a text, and no checks of shapes, which would be slow."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT * 3, encoding="utf-8")
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mechinterp-attn", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


def documented() -> list[tuple[str, dict[str, str]]]:
    """Every section of the JSON reference: its command, and type by key."""
    found = []
    for part in (ROOT / "docs" / "json.md").read_text(encoding="utf-8").split("\n## ")[1:]:
        command = re.search(r"^`mechinterp-attn (.*) --json`$", part, re.M)
        if command is None:  # the file beside a report: tests/view/test_report.py
            continue
        found.append((command[1], dict(re.findall(r"^\| `(\w+)` \| ([a-z]+\??) \|", part, re.M))))
    return found


TYPES = {"text": str, "integer": int, "number": (int, float), "boolean": bool, "list": list, "object": dict}


@pytest.mark.parametrize(("command", "types"), documented(), ids=[name for name, _ in documented()])
def test_json_is_what_the_reference_says(run, command, types):
    code, out, err = run(*shlex.split(command), "--json")
    assert code == 0, err
    assert out.isascii()
    answer = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    rows = answer if isinstance(answer, list) else [answer]
    assert rows
    for row in rows:
        assert set(row) == set(types)
        for key, value in row.items():
            kind = types[key]
            if value is None:
                assert kind.endswith("?"), key
            else:
                assert isinstance(value, TYPES[kind.rstrip("?")]), key
                assert not (isinstance(value, bool) and kind != "boolean"), key


def test_every_analysis_is_in_the_reference():
    text = (ROOT / "docs" / "json.md").read_text(encoding="utf-8")
    for name in ("paths", "circuits"):
        argument = next(p for p in COMMANDS[name].params if p.name == "analysis")
        values = [getattr(choice, "value", choice) for choice in argument.type_descriptor.choices]
        assert values
        missing = [v for v in values if not re.search(rf"^## {name} \.\.\. .*\b{v}\b", text, re.M)]
        assert missing == []


def test_an_option_is_the_same_everywhere():
    """One name, one short form, one meaning; what prints a table has all that tables have."""
    seen: dict[str, tuple] = {}
    for name, command in COMMANDS.items():
        for parameter in command.params:
            if parameter.param_type_name != "option":
                continue
            about = (tuple(parameter.opts), parameter.help)
            assert seen.setdefault(parameter.opts[0], about) == about, (name, parameter.opts[0])
        options = {opt for parameter in command.params for opt in parameter.opts}
        assert {"--quiet", "-q"} <= options, name
        if name not in ("convert", "report", "explore"):
            assert {"--json", "--csv"} <= options, name
        if name in ("detect", "paths", "circuits", "causal", "diff"):
            assert {"--figure", "--top", "-k"} <= options, name
    assert set(COMMANDS) == {
        "models",
        "convert",
        "verify",
        "attach",
        "explore",
        "report",
        "detect",
        "paths",
        "circuits",
        "causal",
        "diff",
    }


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["models", "--jsn"], "--jsn"),
        (["detect"], "MODEL"),
        (["detect", "no-such-model"], "no-such-model"),
        (["detect", "attn-1l", "--top", "0"], "--top"),
        (["circuits", "attn-1l", "ov"], "takes one head"),
        (["circuits", "attn-1l", "ov", "L9H9"], "no head L9H9"),
        (["paths", "attn-1l", "orders"], "--prompt"),
        (["models", "--csv", "no/such/folder/x.csv"], "no/such/folder"),
        (["verify", "attn-1l", "--text", "missing.txt"], "missing.txt"),
        (["causal", "attn-1l", "effects", "flying"], "nor the name of a behaviour"),
        (["causal", "attn-1l", "guess", "induction"], "no analysis 'guess'"),
        (["causal", "attn-2l", "path", "induction"], "path takes paths"),
        (["causal", "attn-1l", "discover", "induction", "L0H1"], "leave out L0H1"),
        (["fly"], "fly"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_input_is_one_line_and_code_2(run, words, message):
    code, out, err = run(*words)
    assert (code, out) == (common.WRONG_INPUT, "")
    last = err.splitlines()[-1]
    assert last.startswith("error: ")
    assert message.lower() in last.lower()
    assert "Traceback" not in err


def test_alone_it_says_what_there_is(run):
    code, out, _ = run()
    assert code == 0
    assert "Usage" in out
    assert all(name in out for name in COMMANDS)


@pytest.mark.parametrize(
    ("words", "calls"),
    [
        (["paths", "attn-2l", "top", "--prompt", "Mr. Dorling was"], 2),
        (["detect", "attn-1l"], 1),
        (["detect", "attn-1l", "--by", "loss_change"], 1),
        (["detect", "attn-1l", "--by", "copying_z"], 1),
        (["detect", "attn-2l", "--by", "circuit"], 1),
        (["detect", "attn-1l", "--corpus", "text.txt"], 1),
        (["causal", "attn-2l", "effects", "induction"], 1),
        (["causal", "attn-2l", "discover", "induction"], 1),
        (["causal", "attn-2l", "faithfulness", "induction"], 2),
        (["causal", "attn-2l", "path", "induction", "L0H2 -> L1H3 -> logits"], 1),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_plan_says_what_each_call_would_cost(run, words, calls):
    """One line a call, and the limit that the plan of the last one is held against is the user's."""
    code, out, _ = run(*words, "--plan", "--quiet")
    assert code == 0
    assert [("GFLOP in" in line) for line in out.splitlines()] == [True] * calls
    code, out, err = run(*words, "--max-bytes", "1", "--quiet")
    assert (code, out) == (common.WRONG_INPUT, "")
    assert "max_bytes" in err


def test_a_difference_is_code_1(run):
    code, out, _ = run("verify", "gelu-2l", "--text", "text.txt", "--mlp", "silu")
    assert code == common.DIFFERS
    assert "NOT EQUAL" in out


def test_a_bug_is_code_70(run, monkeypatch):
    import mechinterp_attn as mia

    monkeypatch.setattr(mia, "models", lambda: 1 / 0, raising=False)
    code, out, err = run("models")
    assert (code, out) == (common.BUG, "")
    assert "ZeroDivisionError" in err
    assert "please report" in err.splitlines()[-1]


def test_quiet_leaves_the_result_alone(run):
    loud = run("detect", "attn-1l", "--top", 2)
    quiet = run("detect", "attn-1l", "--top", 2, "--quiet")
    assert loud[:2] == quiet[:2]
    assert "loading attn-1l" in loud[2]
    assert "ok: " in loud[2]
    assert quiet[2] == ""


def test_a_figure_opens_offline(run):
    code, _, err = run("circuits", "attn-2l", "copying", "--figure", "figure.html")
    assert code == 0
    assert "wrote figure.html" in err
    page = Path("figure.html").read_text(encoding="utf-8")
    assert "Plotly.newPlot" in page
    assert not re.search(r"<(script|link)[^>]*(src|href)=", page)


def program(*words, **options):
    command = [sys.executable, "-c", "from mechinterp_attn.cli import main; main()", *words]
    return subprocess.Popen(command, text=True, **options)


def on_a_terminal(*words, **variables) -> str:
    """What a program writes to a terminal of its own."""
    ours, theirs = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"} | variables
    process = program(*words, stdout=theirs, stderr=theirs, env=environment)
    os.close(theirs)
    seen = b""
    while True:
        try:
            part = os.read(ours, 4096)
        except OSError:  # Linux says that the other end is closed by an error
            break
        if not part:
            break
        seen += part
    process.wait()
    os.close(ours)
    return seen.decode()


def test_tables_fit_the_terminal_they_are_printed_on():
    """A pseudo-terminal says that it has no columns; COLUMNS stands for a window's width."""
    narrow = on_a_terminal("models", COLUMNS="60", NO_COLOR="1").splitlines()
    table = [line for line in narrow if not line.startswith("left out")]
    assert max(map(len, table)) <= 60
    assert table[1].startswith("attn-1l")
    left_out = next(line for line in narrow if line.startswith("left out"))
    assert "--wide shows them" in left_out
    wide = on_a_terminal("models", "--wide", COLUMNS="60", NO_COLOR="1")
    piped, _ = program("models", stdout=subprocess.PIPE, stderr=subprocess.PIPE).communicate()
    assert wide.split() == piped.split()
    assert "English novels, byte-level BPE" in wide


def test_colours_are_for_terminals():
    assert "\x1b[1mname" in on_a_terminal("models")
    assert "\x1b[" not in on_a_terminal("models", NO_COLOR="1")
    process = program("models", stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = process.communicate()
    assert "\x1b[" not in out + err


def test_a_log_gets_progress_in_lines(monkeypatch, capsys):
    monkeypatch.setattr(progress, "IN_A_FILE", 0.0)
    monkeypatch.setattr(progress.state, "quiet", False)
    for _ in progress.Progress(range(3), desc="work"):
        for _ in progress.Progress(range(2), desc="its parts"):
            pass
    err = capsys.readouterr().err
    assert "work: " in err
    assert "\r" not in err
    assert "\x1b" not in err
    assert all(line.startswith(("work: ", "its parts: ")) for line in err.splitlines())


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "latin-1"])
@pytest.mark.parametrize("words", ["circuits gelu-2l directions L1H3", "circuits gelu-2l bigrams --top 2"])
def test_a_console_without_some_signs_gets_others(monkeypatch, encoding, words):
    """U+FFFD and this package's own ↵ are in no code page of Windows."""
    out = io.TextIOWrapper(io.BytesIO(), encoding=encoding)
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setattr(sys, "argv", ["mechinterp-attn", *words.split()])
    with pytest.raises(SystemExit) as left:
        cli.main()
    assert not left.value.code
    out.flush()
    assert out.buffer.getvalue().count(b"\n") > 2


def test_a_prompt_is_what_was_typed(run):
    """Under LC_ALL=C Python takes the bytes of an é for two surrogates; half a character is replaced."""
    words = ("paths", "relu-1l", "top", "--top", "3", "--json", "--prompt")
    assert run(*words, "caf\udcc3\udca9 Dor") == run(*words, "café Dor")
    assert run(*words, "caf\udcc3 Dor") == run(*words, "caf\ufffd Dor")


def test_a_file_that_cannot_be_written_is_said_before_the_work(run, monkeypatch):
    monkeypatch.setattr(common, "load", lambda model: pytest.fail("the work"))
    for option in ("--csv", "--figure"):
        code, out, err = run("circuits", "relu-1l", "bigrams", option, "none/of/these.csv")
        assert (code, out) == (2, "")
        assert "does not exist; make it first" in err


def test_the_shell_completes():
    def complete(*words: str) -> str:
        variables = {"_MECHINTERP_ATTN_COMPLETE": "complete_bash", "COMP_CWORD": str(len(words))}
        variables["COMP_WORDS"] = " ".join(["mechinterp-attn", *words])
        environment = os.environ | variables
        code = "import sys; sys.argv[0] = 'mechinterp-attn'; from mechinterp_attn.cli import main; main()"
        return subprocess.run(
            [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
        ).stdout

    assert "circuits" in complete("cir")
    assert "gelu-2l" in complete("detect", "g")
    assert "--figure" in complete("paths", "gelu-2l", "--fi")


def test_ctrl_c_gives_what_there_was_and_the_next_run_goes_on(tmp_path):
    """A real SIGINT in a pass over a corpus, once the first part is kept."""
    (tmp_path / "long.txt").write_text(TEXT * 4500, encoding="utf-8")
    words = (
        "detect",
        "attn-2l",
        "--corpus",
        "long.txt",
        "--resume",
        "pass.safetensors",
        "--json",
        "--top",
        "2",
    )
    kept = tmp_path / "pass.safetensors"
    first = program(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(6000):
        if kept.exists() or first.poll() is not None:
            break
        time.sleep(0.02)
    first.send_signal(signal.SIGINT)
    out, err = first.communicate(timeout=120)
    assert first.returncode == common.INTERRUPTED, err
    assert len(json.loads(out)) == 2
    assert "stopping at the next step" in err
    assert "stopped early: after" in err
    done = int(re.search(r"stopped early: after ([\d,]+)", err)[1].replace(",", ""))
    assert done > 0
    second = program(*words, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    out, err = second.communicate(timeout=300)
    assert second.returncode == 0, err
    assert "stopped early" not in err


def test_ctrl_c_before_there_is_anything_ends_at_once():
    process = program(
        "paths", "gelu-2l", "orders", "--prompt", TEXT, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    process.stderr.readline()  # "loading gelu-2l"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (common.INTERRUPTED, "")
    assert err.splitlines()[-1] == "error: interrupted"
    assert "Traceback" not in err
