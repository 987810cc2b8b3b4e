"""Which sections a report has, and its files."""

import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.view.conftest import PROMPT


def test_presets_choose_sections(model):
    page = mia.report(model, PROMPT, preset="induction", progress=False)
    ids = [s["id"] for s in page.data["sections"]]
    assert ids[:5] == ["story", "circuit", "summary", "heads", "patterns"]
    assert "graph" not in ids


def test_a_large_model_gets_the_sections_that_fit_it(model, monkeypatch):
    """By size, and said on the page; a preset or sections that are asked for stay."""
    from mechinterp_attn.view.report import presets

    monkeypatch.setattr(presets, "LARGE", 10)
    page = mia.report(model, PROMPT, progress=False)
    assert [s["id"] for s in page.data["sections"]][:4] == ["heads", "patterns", "neurons", "graph"]
    n = sum(weight.numel() for weight in model.parameters())
    assert f"since the model has {n:,} weights; preset='overview' makes them all" in page.html().replace(
        "\\u0027", "'"
    )
    asked = mia.report(model, PROMPT, sections=["orders", "provenance"], progress=False)
    assert [s["id"] for s in asked.data["sections"]] == ["orders", "provenance"]
    assert "since the model has" not in asked.html()


def test_the_data_beside_the_page_makes_the_same_page(report, tmp_path):
    page = report.save(tmp_path / "report.html", data=True)
    again = mia.Report.load(tmp_path / "report.json")
    assert again.data == report.data
    assert again.html() == page.read_text(encoding="utf-8")


def test_where_it_cannot_be_written(report, tmp_path):
    with pytest.raises(MechInterpError, match="does not exist"):
        report.save(tmp_path / "nowhere" / "page.html")
    with pytest.raises(MechInterpError, match="is a folder"):
        report.save(tmp_path)
