"""Arguments under their old names."""

import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.theorems import least_omega


def test_the_old_name_works_and_warns() -> None:
    with pytest.warns(FutureWarning, match=r"least_omega\(tol=\) is called tolerance= now"):
        assert least_omega(3.0, tol=0.01) == least_omega(3.0, tolerance=0.01)  # type: ignore[call-arg]


def test_both_names_at_once_are_refused() -> None:
    with pytest.raises(MechInterpError, match="tol= and tolerance= are the same argument"):
        least_omega(3.0, tolerance=0.1, tol=0.1)  # type: ignore[call-arg]


def test_a_pass_over_a_corpus_knows_its_old_names(tmp_path) -> None:
    model = mia.load("attn-1l")
    texts = ["Mr. Dorling was a tall man."]
    new = mia.detect.over_corpus(model, texts, top_k=2, resume=tmp_path / "new")
    with pytest.warns(FutureWarning):
        old = mia.detect.over_corpus(model, texts, top=2, save=tmp_path / "old")  # type: ignore[call-arg]
    assert old.frame.equals(new.frame)


def test_an_old_value_becomes_a_new_one() -> None:
    model, given = mia.load("attn-1l"), dict(kind="V", src="L0H0", dst="L0H1", top_k=1)
    with (
        pytest.warns(FutureWarning, match=r"composition\(engine=\) is called workers= now"),
        pytest.raises(MechInterpError, match="none of the dst heads reads"),
    ):
        mia.circuits.composition(model, engine="local", **given)
