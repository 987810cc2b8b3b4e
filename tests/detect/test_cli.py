"""``mechinterp-attn detect`` as a shell sees it."""

import json

import pytest
from typer.testing import CliRunner

from mechinterp_attn.cli import app
from mechinterp_attn.errors import MechInterpError


def rows(*arguments: str) -> list[dict]:
    result = CliRunner().invoke(app, ["detect", "gelu-2l", "--json", *arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0
    return json.loads(result.stdout)


def test_every_view_sorts_by_its_scores():
    attention = rows("--top", "2")
    assert {row["kind"] for row in attention} == {"attention"}
    assert attention[0]["induction"] > 0.8
    weights = rows("--by", "induction_z", "--top", "1")[0]
    assert weights["head"] in {row["head"] for row in attention}
    cut = rows("--by", "loss_change", "--top", "3")
    assert cut[0]["loss_change"] > 2
    circuit = rows("--by", "circuit", "--top", "3")
    assert {row["role"] for row in circuit} == {"induction", "previous_token"}


def test_a_corpus(tmp_path):
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"body": "It was the best of times. " * n}) + "\n" for n in (3, 5)))
    arguments = ("--corpus", str(path), "--field", "body", "--by", "written", "--top", "4")
    found = rows(*arguments, "--save", str(tmp_path / "pass"))
    assert len(found) == 4
    assert found == rows(*arguments, "--save", str(tmp_path / "pass"))
    with pytest.raises(MechInterpError, match="no text file"):
        rows("--corpus", str(tmp_path / "nothing.txt"))
