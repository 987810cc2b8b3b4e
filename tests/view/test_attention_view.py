"""``head.show``: the CircuitsVis view, offline, from the notebook's output alone; and what it says."""

import html
import re

import numpy as np
import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.text import shown
from mechinterp_attn.view.circuitsvis import BIAS, AttentionView
from tests.view.conftest import PROMPT
from tests.view.test_safety import HOSTILE

FLOAT32 = dict(rtol=1e-4, atol=1e-6)  # two runs that keep different activations


def test_shows_the_patterns_of_a_run(model):
    """Against the cache of a run, for heads of every kind."""
    _, cache = model.run_with_cache(PROMPT)
    n = cache["hook_embed"].shape[1]
    attention = model["L1H2"].show(PROMPT)
    np.testing.assert_allclose(attention.patterns[0], cache["blocks.1.attn.hook_pattern"][0, 2], **FLOAT32)
    assert attention.heads == ("L1H2",)
    assert len(attention.tokens) == n
    gates = cache["blocks.0.neurons.hook_weight"][0, :, 5]
    (neuron,) = model["L0N5"].show(PROMPT).patterns
    np.testing.assert_allclose(neuron[:n, :n], gates.diag(), **FLOAT32)
    np.testing.assert_allclose(neuron[:n, n], 1 - gates, **FLOAT32)
    chain = mia.circuits.virtual_head(model, "L0H1", "L1H2")
    np.testing.assert_allclose(chain.show(PROMPT).patterns[0], chain.pattern(cache)[:, :-1], **FLOAT32)
    both = mia.show(model, ["L1H2", "L0N5"], PROMPT)
    assert [p.shape for p in both.patterns] == [(n + 1, n + 1)] * 2  # side by side on the same axes
    assert both.tokens[-1] == BIAS
    assert both.frame.groupby("head").size().to_dict() == {"L0N5": n, "L1H2": n}


def test_the_table_says_where_each_token_looks_most(model):
    view = model["L1H2"].show(PROMPT, positions=slice(-4, None))
    row = view.frame.iloc[1]
    weights = view.patterns[0][1]
    assert row["weight"] == pytest.approx(float(weights.max()))
    assert row["to"] == view.tokens[int(weights.argmax())]
    assert row["to_position"] - row["position"] == int(weights.argmax()) - 1
    assert repr(view).splitlines()[1].split() == list(view.frame.columns)


def test_only_what_is_asked_for_is_in_it(model):
    """The script takes half a megabyte; each head adds its own square of numbers, and rows of the table."""
    one, two = model["L0H0"].show(PROMPT), mia.show(model, ["L0H0", "L0H1"], PROMPT)
    assert len(one._repr_html_()) < 600_000
    assert len(two.page()) - len(one.page()) < 10 * len(one.tokens) ** 2
    assert len(two.frame) == 2 * len(one.frame)


def test_says_what_cannot_be_shown(model):
    with pytest.raises(MechInterpError, match=r"taken from a bank.*model\['L0H1'\]\.show"):
        model.banks[0].head(1).show(PROMPT)
    with pytest.raises(MechInterpError, match=r"0 of .* tokens to show; expected 1 to 64 in a row"):
        model["L0H1"].show(PROMPT, positions=slice(3, 3))
    with pytest.raises(MechInterpError, match="no head L7H1"):
        mia.show(model, "L7H1", PROMPT)
    with pytest.raises(MechInterpError, match="no heads selected"):
        mia.show(model, [], PROMPT)


def test_draws_offline_in_a_saved_notebook(model, watched, tmp_path):
    """The output's HTML alone, as a saved notebook has it: drawn, nothing asked for, nothing logged."""
    path = tmp_path / "cell.html"
    output = mia.show(model, ["L1H2", "L0N5"], PROMPT)._repr_html_()
    path.write_text(f"<!doctype html><meta charset=utf-8>{output}", encoding="utf-8")
    watched.page.goto(path.as_uri())
    frame = watched.page.frame_locator("iframe")
    frame.locator("canvas").first.wait_for(timeout=120_000)
    assert "L0N5" in frame.locator("#view").inner_text()
    assert watched.page.locator("details table tr").count() > 10
    assert watched.requests == []
    assert watched.dialogs == []
    assert [e for e in watched.errors if "WebGL" not in e] == []


def test_tokens_are_only_text(model, watched, tmp_path):
    given = model["L0H0"].show(PROMPT)
    some = HOSTILE[: len(given.tokens)]
    names = tuple(shown(t) for t in some)
    frame = given.frame.assign(token=names, to=names)
    view = AttentionView(("<b>L0H0",), names, given.patterns, frame)
    path = tmp_path / "hostile.html"
    path.write_text(f"<!doctype html><meta charset=utf-8>{view._repr_html_()}", encoding="utf-8")
    watched.page.goto(path.as_uri())
    inside = watched.page.frame_locator("iframe")
    inside.locator("canvas").first.wait_for(timeout=120_000)
    for place in (watched.page.locator("details"), inside.locator("#view")):
        assert place.locator("img, iframe, script, style, b:has-text('L0H0')").count() == 0
    cells = watched.page.locator("details td:nth-child(3)").all_text_contents()
    assert cells == list(names)
    assert watched.requests == []
    assert watched.dialogs == []
    bare = re.sub(r'srcdoc="[^"]*"', "", view._repr_html_())
    assert html.escape(names[0]) in bare
    assert "<script" not in bare
