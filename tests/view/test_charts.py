"""One picture, two drawings: what a notebook shows and what the report shows have the same numbers."""

import math
import re

import numpy as np
import pytest

import mechinterp_attn as mia
from mechinterp_attn.view.charts import (
    Chart,
    Series,
    composition_matrix,
    largest_paths,
    largest_terms,
    loss_by_order,
    worth_of_orders,
)
from mechinterp_attn.view.figures.chart import plotly_chart, plotly_matrix
from mechinterp_attn.view.report.blocks import chart_block, matrix
from mechinterp_attn.view.report.svg import svg
from tests.conftest import random_tokens, tiny_bridge
from tests.view.test_safety import HOSTILE


@pytest.fixture(scope="module")
def charts() -> dict[str, Chart]:
    model = mia.convert(tiny_bridge())
    frozen = mia.paths.freeze(model, random_tokens(model, 1, 8)[0])
    orders, terms = mia.paths.orders(frozen), mia.paths.logit_attribution(frozen)
    shorter = mia.paths.orders(frozen, max_order=1)
    strongest = mia.paths.top_paths(frozen, top_k=3, max_expansions=10, progress=False)
    return {
        "line": loss_by_order([orders]),
        "two lines": loss_by_order([orders, shorter], ["one", "two"]),
        "worth": worth_of_orders(mia.paths.term_importance(model, frozen.tokens, heads=0)),
        "terms": largest_terms(terms, 6),
        "neurons": largest_terms(terms, 4, "mlp"),
        "paths": largest_paths(strongest, 3),
    }


@pytest.mark.parametrize("name", ["line", "two lines", "worth", "terms", "neurons", "paths"])
def test_both_drawings_have_the_numbers(charts, name):
    """Every value once in each: read off the figure's traces, and off the titles in the SVG."""
    chart = charts[name]
    values = [v for series in chart.series for v in series.values if v == v]
    assert values
    figure = plotly_chart(chart)
    drawn = [v for trace in figure.data for v in (trace.y if chart.shape == "line" else trace.x)]
    assert [v for v in drawn if v == v] == values
    picture = str(svg(chart_block("id", chart)))
    titles = re.findall(r"<title>[^<]*: ([+-]?[0-9.]+)</title>", picture)
    # 6 significant digits in the page's data, 4 decimals in a title
    assert sorted(map(float, titles)) == pytest.approx(sorted(values), rel=1e-5, abs=6e-5)


def test_the_worth_of_orders_is_what_the_loss_falls(charts):
    """Order by order, parts added up, against the loss with the paths up to each order."""
    columns = zip(*(series.values for series in charts["worth"].series), strict=True)
    gains = [sum(v for v in parts if v == v) for parts in columns]
    losses, blind = charts["line"].series[0].values, charts["line"].reference[1]
    before = [blind, *losses]
    for gain, one, two in zip(gains[:2], before, losses, strict=False):
        assert gain == pytest.approx(one - two, abs=1e-5)  # losses in float32


def test_text_stays_text():
    text = " ".join(HOSTILE)
    chart = Chart("bars", text, (text,), (Series(text, (1.0,)), Series("b", (-2.0,))), text)
    picture = str(svg(chart_block("id", chart)))
    assert "<script" not in picture
    assert "<img" not in picture
    assert "<iframe" not in picture


def test_composition_is_drawn_above_its_baseline_in_both():
    """Neurons and attention heads have baselines of their own, which plain scores would show."""
    result = mia.circuits.composition(mia.convert(tiny_bridge()), "V")
    drawn = composition_matrix(result)
    heatmap = plotly_matrix(drawn).data[0]
    frame = result.frame.set_index(["src", "dst"])
    for i, src in enumerate(drawn.rows):
        for j, dst in enumerate(drawn.columns):
            if (src, dst) in frame.index:
                pair = frame.loc[(src, dst)]
                assert heatmap.z[i][j] == pytest.approx(pair["score"] - pair["baseline"], abs=1e-12)
            else:
                assert math.isnan(heatmap.z[i][j])
    block = matrix("composition-V", drawn)
    assert (block["rows"], block["columns"]) == (list(drawn.rows), list(drawn.columns))
    assert block["top"] == pytest.approx(float(np.nanmax(drawn.values)), rel=1e-5)  # six digits
