"""``mechinterp-attn paths ... --task`` as a shell sees it: what the functions give."""

import json

import pytest
from typer.testing import CliRunner

import mechinterp_attn as mia
from mechinterp_attn.cli import app
from mechinterp_attn.core.errors import MechInterpError

TEXTS = ["Once upon a time", "There was once a"]


@pytest.fixture(scope="module")
def model():
    return mia.load("silu-2l")


@pytest.fixture(scope="module")
def task():
    return mia.Task(TEXTS, answer=[" there", " man"], against=[" he", " woman"])


def run(*arguments: str) -> list[dict]:
    result = CliRunner().invoke(app, ["paths", "silu-2l", *arguments, "--json", "--quiet"])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return json.loads(result.stdout)


def test_a_file_names_the_behaviour(model, task, tmp_path):
    file = str(task.save(tmp_path / "task.jsonl"))
    frozen = mia.paths.freeze(model, TEXTS[1])
    expected = mia.paths.logit_attribution(frozen, task=task)
    found = run("attribution", "--task", file, "--prompt", TEXTS[1], "--top", "3")
    assert [row["value"] for row in found] == pytest.approx(expected.top(3)["value"].tolist())
    orders = run("orders", "--task", file)
    own = mia.paths.orders(mia.paths.freeze(model, TEXTS[0]), task=task).frame
    assert [row["metric"] for row in orders] == pytest.approx(own["metric"].tolist(), abs=1e-6)
    importance = run("importance", "--task", file)
    every = mia.paths.term_importance(model, task=task, progress=False).frame
    assert len(importance) == len(every)


def test_a_name_does_too(model):
    found = run("top", "--task", "sva", "--top", "2")
    task = mia.tasks.sva(model, n=32)
    own = mia.paths.top_paths(mia.paths.freeze(model, task.clean[0]), task=task, top_k=2).frame
    assert [row["path"] for row in found] == own["path"].tolist()


def test_what_does_not_go_together(task, tmp_path):
    file = str(task.save(tmp_path / "task.jsonl"))
    for words, said in (
        (
            ["attribution", "--task", file, "--target", " he"],
            "a task has an answer and a position of its own",
        ),
        (["attribution", "--task", file, "--prompt", "Another one"], "not among the 2 prompts of Task"),
        (["score", "L1H0", "--task", file], "a score is what a head looks by"),
        (["orders", "--task", "nothing"], "'nothing' is neither a file nor the name of a behaviour"),
    ):
        with pytest.raises(MechInterpError, match=said):
            run(*words)
