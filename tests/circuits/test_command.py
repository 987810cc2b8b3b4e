"""``mechinterp-attn circuits``, as a shell sees it: the same tables as the functions give."""

import io
import json
import re
import sys

import pandas as pd
import pytest

import mechinterp_attn as mia
from mechinterp_attn.cli import main
from tests.circuits.test_composition import random_model

C = mia.circuits


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model") / "tiny"
    random_model(n_heads=4).save(folder)
    return folder


@pytest.fixture(scope="module")
def model(folder):
    return mia.load(folder)


@pytest.fixture
def run(monkeypatch, capsys):
    """Run the command line in this process: (exit code, stdout, stderr)."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["mechinterp-attn", "circuits", *map(str, words)])
        with pytest.raises(SystemExit) as left:
            main()
        out, err = capsys.readouterr()
        return left.value.code or 0, out, err

    return call


CALLS = {
    ("ov", "L1H2", "--top", 4): lambda m: C.ov_top(m, "L1H2", top_k=4).frame,
    ("qk", "L0H1 > L1H2", "--top", 4): lambda m: C.qk_top(m, "L0H1 > L1H2", top_k=4).frame,
    ("ov", "L1N3", "--top", 1, "--over", "rows"): lambda m: C.ov_top(m, "L1N3", top_k=1, over="rows").frame,
    ("ov", "L1H2", "--smallest", "--source", 3): (
        lambda m: C.ov_top(m, "L1H2", sources=[3], largest=False).frame
    ),
    ("bigrams", "--top", 2): lambda m: C.bigrams(m, top_k=2).frame,
    ("skip-trigrams", "L0H1", "--top", 3): lambda m: C.skip_trigrams(m, "L0H1", top_k=3).frame,
    ("skip-trigrams", "--top", 3): lambda m: C.skip_trigrams(m, top_k=3).frame,
    ("factoring-bugs", "L0H1", "--top", 3): lambda m: C.factoring_bugs(m, "L0H1", top_k=3).frame,
    ("copying", "--top", 5): lambda m: C.copying_scores(m).top(5),
    ("composition", "--kind", "Q", "--top", 6): lambda m: C.composition(m, "Q", top_k=6).frame,
    ("composition", "--src", "L0H1", "--dst", "L1H0,L1N2", "--rank-by", "z", "--top", 1): (
        lambda m: C.composition(m, "K", ["L0H1"], ["L1H0", "L1N2"], top_k=1, rank_by="z").frame
    ),
    ("virtual", "--top", 3): lambda m: C.virtual_heads(m, top_k=3).frame,
    ("virtual", "--dst", "L0N1,L1H0", "--length", 3, "--top", 3): (
        lambda m: C.virtual_heads(m, dst=["L0N1", "L1H0"], length=3, top_k=3).frame
    ),
    ("positions", "L1H1", "--top", 3): lambda m: C.position_circuit(m, "L1H1").top(3),
    ("directions", "L1H1", "--top", 3): (
        lambda m: C.singular_directions(m, "L1H1", top_k=3, components=1).frame
    ),
}


@pytest.mark.parametrize("words", CALLS, ids=lambda words: " ".join(map(str, words)))
def test_a_table_its_json_and_its_csv_are_the_functions_own(run, folder, model, tmp_path, words):
    expected = CALLS[words](model)
    code, out, _ = run(folder, *words, "--json")
    assert code == 0
    rows = pd.DataFrame(json.loads(out))
    assert rows.columns.tolist() == expected.columns.tolist()
    for name in expected.select_dtypes("number"):
        ours = rows[name].astype(float).to_numpy()
        assert ours == pytest.approx(expected[name].to_numpy(dtype=float), rel=1e-9, abs=1e-12, nan_ok=True)
    for name in expected.select_dtypes(exclude="number"):
        assert rows[name].tolist() == expected[name].tolist()
    file = tmp_path / "table.csv"
    code, out, _ = run(folder, *words, "--csv", file)
    assert (code, out.strip()) == (0, str(file))
    assert pd.read_csv(file).shape == expected.shape
    code, out, _ = run(folder, *words)
    assert code == 0
    assert out.split("\n")[0].split()[0] == expected.columns[0]
    assert len(pd.read_fwf(io.StringIO(out))) == len(expected)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["ov", "L1H9"], "no head L1H9.*near it: L1"),
        (["ov"], "one head"),
        (["ov", "L1H2", "--top", "401"], "top_k=401 is out of range; expected 1 to 400"),
        (["qk", "L1H0 > L0H1"], "L0H1 does not read what L1H0 writes.*in the order in which they act"),
        (["ov", "L1H2", "--source", "99"], r"\[99\]: expected at least one, out of 0..19"),
        (["composition", "--max-bytes", "1000"], r"max_bytes=1,000 is too small; [\d,]+ is the smallest"),
        (["composition", "--src", "L1H0", "--dst", "L0H0"], "src must come earlier"),
        (["skip-trigrams", "--top", "21"], "top_k=21 is out of range; expected 1 to 20"),
        (["factoring-bugs", "L0N1"], "sees only its own token"),
        (["copying", "--special-tokens"], "circuits ... copying lists no tokens"),
    ],
)
def test_errors_are_one_line_and_exit_code_2(run, folder, words, message):
    code, out, err = run(folder, *words, "--quiet")
    assert (code, out) == (2, "")
    assert err.count("\n") == 1
    assert re.search(message, err), err


def test_special_tokens_are_listed_when_asked_for(run):
    def sources(*more):
        code, out, _ = run("attn-1l", "bigrams", "--top", 1, "--json", *more)
        assert code == 0
        return {row["source"] for row in json.loads(out)}

    assert sources("--special-tokens") - sources() == {"<|endoftext|>"}


def test_weights_that_are_not_finite_are_named(run, folder, model, tmp_path):
    """A saved model is refused when it is read; one changed afterwards when it is analysed."""
    broken = mia.load(folder)
    broken.banks[0].W_O.data[1, 2, 3] = float("nan")
    for call in (
        lambda: C.ov_top(broken, "L0H1"),
        lambda: C.skip_trigrams(broken, "L0H1"),
        lambda: C.composition(broken, "V"),
        lambda: C.copying_scores(broken),
        lambda: C.virtual_heads(broken),
        lambda: C.singular_directions(broken, "L0H1"),
    ):
        with pytest.raises(mia.MechInterpError, match=r"not finite: blocks.0.attn.W_O at \[1, 2, 3\]"):
            call()
    broken.save(tmp_path / "broken")
    code, _, err = run(tmp_path / "broken", "ov", "L0H1", "--quiet")
    assert code == 2
    assert "finite" in err


@pytest.mark.parametrize(
    "words", [["ov", "L1H2"], ["qk", "L1H2"], ["composition"], ["skip-trigrams"], ["bigrams"], ["copying"]]
)
def test_plan_says_the_cost_only(run, folder, words):
    code, out, _ = run(folder, *words, "--plan")
    assert code == 0
    assert "GFLOP in" in out
    assert out.count("\n") == 1
