"""Results in files come back as they were; two results stand side by side."""

import json
import math

import numpy as np
import pandas as pd
import pytest
from hypothesis import HealthCheck, given, settings, strategies as st

import mechinterp_attn as mia
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.stored import StoredResult


class Numbers(Result):
    title = "Numbers </b>"
    sort_by = "score"


def numbers(frame, *errors, **notes):
    checks = tuple(Check(f"check {i}", error, 1e-5) for i, error in enumerate(errors))
    return Numbers(frame=frame, receipt=Receipt(checks, notes))


floats = st.floats(width=64)
texts = st.text(st.characters(exclude_categories=["Cs"]), max_size=5) | st.sampled_from(
    ["inf", "nan", "</script>"]
)


@pytest.mark.parametrize("ending", [".json", ".parquet"])
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.tuples(texts, floats, st.integers(-(2**62), 2**62), st.booleans()), min_size=1, max_size=6
    )
)
def test_a_table_comes_back_as_it_was(tmp_path, ending, rows):
    frame = pd.DataFrame(rows, columns=["token", "score", "id", "on"]).astype(
        {"score": float, "id": int, "on": bool}
    )
    frame["heads"] = pd.Series([("L0H1", "L1H2")] * len(rows), dtype=object)
    found = mia.load_result(numbers(frame, 1e-6, seed=3, z=math.inf).save(tmp_path / f"result{ending}"))
    assert isinstance(found, StoredResult)
    pd.testing.assert_frame_equal(found.frame, frame)  # exactly, infinities and NaN included
    assert (found.title, found.sort_by, found.kind_of_result) == ("Numbers </b>", "score", "Numbers")
    assert found.receipt.ok
    assert found.receipt.notes == {"seed": 3, "z": math.inf}


@pytest.mark.parametrize("ending", [".json", ".parquet"])
def test_a_real_result_comes_back(tmp_path, ending):
    model = mia.load("attn-1l")
    scores = mia.detect.score_heads(model)
    attribution = mia.paths.logit_attribution(mia.paths.freeze(model, "It was the best of times"))
    for result in (scores, attribution):
        found = mia.load_result(result.save(tmp_path / f"a{ending}"))
        pd.testing.assert_frame_equal(found.frame, result.frame)
        assert [str(check) for check in found.receipt.checks] == [
            str(check) for check in result.receipt.checks
        ]
        assert found.top(3).equals(result.top(3))
        assert found._repr_html_().split("<table")[1] == result._repr_html_().split("<table")[1]
        again = mia.load_result(found.save(tmp_path / f"b{ending}"))
        assert (again.kind_of_result, again.facts) == (type(result).__name__, found.facts)
    assert found.facts["total"] == attribution.total
    assert sum(len(bars.x) for bars in found.plot().data) == min(20, len(attribution.frame))


def test_files_that_hold_no_result_are_refused(tmp_path):
    good = numbers(pd.DataFrame({"score": [1.0, 2.0]})).save(tmp_path / "good.json")
    data = json.loads(good.read_text())
    bad = tmp_path / "bad.json"
    for change, said in [
        ({"format": 2}, "format=2, expected 1"),
        ({"columns": [{"name": "x", "dtype": "float64"}]}, "no columns.0.values"),
        ({"columns": [{"name": "x", "dtype": "int64", "values": ["a"]}]}, "column 'x' is no int64"),
        (
            {
                "columns": [
                    {"name": n, "dtype": "int64", "values": [1] * k} for n, k in (("a", 1), ("b", 2))
                ]
            },
            "lengths",
        ),
        ({"checks": [{"name": "x", "error": {"number": "one"}, "tolerance": 1.0}]}, "checks.0.error"),
    ]:
        bad.write_text(json.dumps({**data, **change}))
        with pytest.raises(mia.MechInterpError, match=said):
            mia.load_result(bad)
    broken = tmp_path / "broken.parquet"
    broken.write_bytes(b"PAR1 no parquet PAR1")
    with pytest.raises(mia.MechInterpError, match="as parquet"):
        mia.load_result(broken)
    pd.DataFrame({"x": [1]}).to_parquet(broken)
    with pytest.raises(mia.MechInterpError, match="holds no saved result: no format"):
        mia.load_result(broken)
    with pytest.raises(mia.MechInterpError, match="no such file"):
        mia.load_result(tmp_path / "none.parquet")
    with pytest.raises(mia.MechInterpError, match=r"end the name in .json or .parquet"):
        numbers(pd.DataFrame({"score": [1.0]})).save(tmp_path / "result.csv")


def test_a_column_by_its_name():
    result = numbers(pd.DataFrame({"head": ["L0H0"], "score": [2.5]}))
    assert result["score"].tolist() == [2.5]
    with pytest.raises(KeyError, match=r"no column 'scores'; there are \['head', 'score'\]"):
        result["scores"]


def test_two_results_side_by_side():
    rng = np.random.default_rng(0)
    one = pd.DataFrame({"head": list("abcdef"), "layer": range(6), "score": rng.normal(size=6)})
    two = one.assign(score=rng.normal(size=6)).iloc[::-1].iloc[:5]
    found = mia.compare(numbers(one), numbers(two), names=("base", "tuned"))
    by_hand = {
        head: two.set_index("head")["score"][head] - one.set_index("head")["score"][head]
        for head in two["head"]
    }
    assert dict(zip(found["head"], found["change"], strict=True)) == pytest.approx(by_hand)
    assert found["change"].abs().is_monotonic_decreasing
    assert found.only == (1, 0)
    ranks = [one.set_index("head")["score"][list(by_hand)].rank(), two.set_index("head")["score"].rank()]
    assert found.rank_correlation == pytest.approx(np.corrcoef(ranks[0], ranks[1][list(by_hand)])[0, 1])
    assert list(found.frame.columns) == ["head", "base", "tuned", "change"]
    assert len(found.plot().data) > 0
    same = mia.compare(numbers(one, 1e-7), numbers(one, 2e-7))
    assert [check.name for check in same.receipt.checks] == ["first: check 0", "second: check 0"]
    assert same["change"].eq(0).all()
    assert same.rank_correlation == pytest.approx(1)


def test_results_that_cannot_be_compared():
    one = numbers(pd.DataFrame({"head": ["a", "a"], "query": [0, 1], "score": [1.0, 2.0]}))
    assert len(mia.compare(one, one).frame) == 2  # the texts alone do not tell rows apart
    with pytest.raises(
        mia.MechInterpError, match=r"rows of the first result cannot be told apart by \['head'\]"
    ):
        mia.compare(one, one, on=["head"])
    other = numbers(pd.DataFrame({"head": ["b"], "query": [0], "score": [1.0]}))
    with pytest.raises(mia.MechInterpError, match="no row in common"):
        mia.compare(one, other)
    with pytest.raises(
        mia.MechInterpError,
        match=r"the first result has no .*; the second result has no column 'z'",
    ):
        mia.compare(one, other, by="z")
    with pytest.raises(mia.MechInterpError, match="two different names"):
        mia.compare(one, one, names=("a", "a"))
