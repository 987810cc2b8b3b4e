"""Two models, or two modes of one, side by side in a report."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import tiny_bridge
from tests.view.conftest import PROMPT
from tests.view.test_report import as_frame, blocks


def test_a_model_beside_itself_does_not_differ(model):
    page = mia.report(model, PROMPT, sections=["summary"], compare=model, progress=False)
    tables = blocks(page, "table")
    sides = as_frame(tables["comparison"])
    assert list(sides.columns) == ["what", "first", "second"]
    assert len(tables["comparison"]["columns"]) == 3
    assert list(sides["first"]) == list(sides["second"])
    assert set(tables["comparison-heads"]["data"]["change"]) == {0.0}
    assert len(as_frame(tables["comparison-heads"])) == model.n_heads


def test_two_models_on_one_prompt(model, tokenizer):
    other = mia.convert(
        tiny_bridge(torch.float32, d_vocab=len(tokenizer), n_ctx=64, attn_only=True, seed=3)
    )
    page = mia.report(model, PROMPT, sections=["summary"], compare=other, progress=False)
    sides = as_frame(blocks(page, "table")["comparison"]).set_index("what")
    loss = other(model.as_tokens(PROMPT), return_type="loss").item()
    assert float(sides.loc["loss", "second"].split()[0]) == pytest.approx(loss, abs=1e-3)
    assert sides.loc["heads", "second"] == "8"


def test_models_of_other_vocabularies_cannot_be_compared(model):
    with pytest.raises(MechInterpError, match=r"d_vocab is 13, the first one's 1,024"):
        mia.report(model, PROMPT, compare=mia.convert(tiny_bridge(torch.float32)), progress=False)


def test_two_modes_on_one_prompt(tokenizer):
    exact, silu = mia.load("gelu-2l"), mia.load("gelu-2l", mlp="silu")
    page = mia.report(exact, PROMPT, sections=["summary"], compare=silu, progress=False)
    sides = as_frame(blocks(page, "table")["comparison"]).set_index("what")
    losses = [m(PROMPT, return_type="loss").item() for m in (exact, silu)]
    for side, loss in zip(("first", "second"), losses, strict=True):
        assert float(sides.loc["loss", side].split()[0]) == pytest.approx(loss, abs=1e-3)
    chart = blocks(page, "chart")["comparison-losses"]
    for series, loss in zip(chart["series"], losses, strict=True):
        assert series["values"][-1] == pytest.approx(loss, abs=1e-3)
    pictures = blocks(page, "patterns")["comparison-mlp"]["groups"]
    assert [g["title"].split(":")[0] for g in pictures] == ["First", "Second"]
