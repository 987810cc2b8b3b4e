"""``mechinterp-attn convert`` and ``verify``, as a shell sees them."""

import json
import sys

import pytest

import mechinterp_attn as mia
from mechinterp_attn import cli


@pytest.fixture
def shell(monkeypatch, capsys):
    def run(*words: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["mechinterp-attn", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            cli.main()
        out = capsys.readouterr()
        return int(left.value.code or 0), out.out, out.err

    return run


@pytest.fixture
def sorting(data, tmp_path):
    """A model without a tokenizer, and token ids to compare on."""
    text = tmp_path / "ids.txt"
    text.write_text("0 1 2 0 1 2 0 0 1 1 2\n2 1 0 2 1 0 0 0 1 1 2\n")
    return data / "models" / "nano_sort_3l", text


def test_verify_says_equal(shell, sorting):
    model, text = sorting
    code, out, _ = shell("verify", model, "--text", text)
    assert code == 0
    assert "equal: max logit error" in out
    assert "blocks.2.neurons" in out


def test_verify_says_different_and_exits_with_1(shell, sorting):
    model, text = sorting
    code, out, _ = shell("verify", model, "--text", text, "--mlp", "silu", "--json")
    card = json.loads(out)
    assert code == 1
    assert card["ok"] is False
    assert 1e-3 < card["max_logit_error"] / card["logit_scale"] < 1
    assert [row["sublayer"] for row in card["per_layer"]][:2] == ["blocks.0.attn", "blocks.0.neurons"]


def test_convert_writes_a_model_that_load_reads_and_verify_refuses(shell, sorting, tmp_path):
    model, text = sorting
    code, out, err = shell(
        "convert", model, "--out", tmp_path / "out", "--mlp", "mixture", "--components", 4
    )
    assert code == 0, err
    assert out.strip() == str(tmp_path / "out")
    saved = mia.load(tmp_path / "out")
    assert saved.mode == "mixture"
    assert saved.n_heads == 3 * 3 + 3 * 192 * 4
    code, _, err = shell("verify", tmp_path / "out", "--text", text)
    assert code == 2
    assert "without its source" in err


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "is empty"), ("hello there", "must be token ids"), ("0 1\n0 1 2", "equally long")],
)
def test_unusable_texts_are_refused(shell, sorting, content, message):
    model, text = sorting
    text.write_text(content)
    code, _, err = shell("verify", model, "--text", text)
    assert code == 2
    assert message in err


def test_attach_measures_and_writes_a_model_that_load_reads(shell, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("It was the best of times, it was the worst of times. Call me Ishmael.\n")
    words = ("attach", "gelu-2l", "gelu-2l", "--layer", 1, "--text", text)
    code, out, err = shell(*words, "--out", tmp_path / "out", "--json")
    assert code == 0, err
    (row,) = json.loads(out)
    assert row["dictionary"] == "L1"
    assert 0.5 < row["fve"] < 1
    saved = mia.load(tmp_path / "out")
    assert len(saved["L1F*"]) == row["features"]
    assert saved["L1E0"].kind == "error"
    code, out, err = shell("attach", tmp_path / "out", "gelu-2l", "--layer", 1, "--text", text)
    assert (code, out) == (2, "")
    assert "layer 1 has a dictionary already" in err
    code, _, err = shell("attach", "silu-2l", "gelu-2l", "--layer", 1, "--text", text)
    assert code == 2
    assert "card says model 'gelu-2l', not 'silu-2l'" in err
