"""Receipts: nothing checked is not the same as all well, and a failed check is said aloud."""

import warnings

import pandas as pd
import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.results import Check, Receipt, Result


class Numbers(Result):
    title = "Numbers"


def made(*errors):
    checks = tuple(Check(f"check {i}", error, 0.1) for i, error in enumerate(errors))
    return Numbers(frame=pd.DataFrame({"x": [1]}), receipt=Receipt(checks, {"seed": 0}))


def test_a_receipt_without_a_check_is_neither_ok_nor_not():
    assert made().receipt.ok is None
    assert str(made().receipt) == "not checked; seed: 0"
    assert "not checked" in made()._repr_html_()
    assert made(0.1, 0.0).receipt.ok is True


@pytest.mark.parametrize("error", [0.2, float("nan"), float("inf")])
def test_a_failed_check_warns_where_the_result_is_made(error):
    with pytest.warns(mia.FailedCheckWarning, match="Numbers: FAILED: check 1: error") as said:
        result = made(0.0, error)
    assert result.receipt.ok is False
    assert "check 0" not in str(said[0].message)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        made(0.0)
