"""``mechinterp-attn detect`` as a shell sees it."""

import json

import pandas as pd
import pytest
from typer.testing import CliRunner

from mechinterp_attn.cli import app
from mechinterp_attn.core.errors import MechInterpError


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["detect", "gelu-2l", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return result.stdout


def rows(*arguments: str) -> list[dict]:
    return json.loads(run("--json", *arguments))


def test_every_view_sorts_by_its_scores():
    attention = rows("--top", "2")
    assert {row["kind"] for row in attention} == {"attention"}
    assert attention[0]["induction"] > 0.8
    weights = rows("--by", "induction_z", "--top", "1")[0]
    assert weights["head"] in {row["head"] for row in attention}
    circuit = rows("--by", "circuit", "--top", "3")
    assert {row["role"] for row in circuit} == {"induction", "previous_token"}
    by_task = rows("--by", "circuit", "--task", "induction", "--top", "3")
    assert {row["head"] for row in by_task} == {row["head"] for row in circuit}
    assert by_task[0]["effect"] > 0
    with pytest.raises(MechInterpError, match="--task is what the heads of a circuit are cut for"):
        rows("--by", "loss_change", "--task", "induction")
    with pytest.raises(MechInterpError, match=r"no score 'magic' here; there are .*copying_z.*loss_change"):
        rows("--by", "magic")
    with pytest.raises(MechInterpError, match="--resume is about a corpus; give one with --corpus"):
        rows("--resume", "somewhere")


def test_chosen_heads_of_every_kind_as_a_csv_file(tmp_path):
    heads = ["L1H1", "L0N68", "L0H2 > L1H1"]
    for by in ("previous_token", "copying_z", "loss_change"):
        path = tmp_path / f"{by}.csv"
        assert run(*heads, "--by", by, "--csv", str(path)).strip() == str(path)
        frame = pd.read_csv(path)
        assert sorted(frame["head"]) == sorted(heads)
        assert set(frame["kind"]) == {"attention", "mlp", "virtual"}
        assert frame[by].notna().all()


def test_a_corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": "It was the best of times. " * n}) + "\n" for n in (3, 5)))
    arguments = ("--corpus", str(path), "--field", "body", "--by", "written", "--top", "4")
    found = rows(*arguments, "--resume", str(tmp_path / "pass"))
    assert len(found) == 4
    assert found == rows(*arguments, "--resume", str(tmp_path / "pass"))
    cut = rows("L1H1", *arguments[:4], "--by", "loss_change", "--top", "1")
    assert cut[0]["head"] == "L1H1"
    assert rows(*arguments[:4], "--by", "estimate", "--top", "1")[0]["estimate"] is not None
    passages = rows(*arguments[:4], "--passages", "L0N68", "--top", "3")
    assert [row["rank"] for row in passages] == [1, 2, 3]
    assert {"before", "token", "after", "document"} <= set(passages[0])
    with pytest.raises(MechInterpError, match="no text file"):
        rows("--corpus", str(tmp_path / "nothing.txt"))
