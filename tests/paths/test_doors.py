"""Figures and the command line of paths."""

import json
import sys

import pytest

import mechinterp_attn as mia
from mechinterp_attn.cli import main
from tests.conftest import random_tokens, tiny_bridge

PROMPT = "Mr. Dorling was a tall man. I had never seen Mr. Dor"


@pytest.fixture(scope="module")
def frozen():
    model = mia.convert(tiny_bridge())
    return mia.paths.freeze(model, random_tokens(model, 1, 8)[0])


def test_the_bars_of_a_logit_add_up_to_it(frozen):
    attribution = mia.paths.logit_attribution(frozen)
    paths = mia.paths.top_paths(frozen, top_k=5, max_expansions=20, progress=False)
    for figure, total in ((attribution.plot(6), attribution.total), (paths.plot(), paths.total)):
        shown = [x for trace in figure.data for x in trace.x]
        assert sum(shown) == pytest.approx(total)
        assert len(shown) in (6, 7)


def test_figures_show_what_the_results_hold(frozen):
    orders = mia.paths.orders(frozen)
    assert list(orders.plot().data[0].y) == orders.frame["loss"].tolist()
    importance = mia.paths.term_importance(frozen.model, frozen.tokens, heads=0)
    bars = {trace.name: sum(trace.x) for trace in importance.plot().data}
    assert sum(bars.values()) == pytest.approx(-importance.frame["change"].sum())  # how far the loss falls
    score = mia.paths.expand_score(frozen, "L1H1", 5, 2, keep=1)
    assert score.plot(100).data[0].z.sum() == pytest.approx(score.total)
    term = mia.paths.virtual_head(frozen, "L0H0", "L1H1")
    assert term.plot().data[0].z.shape == (8, 8)


@pytest.fixture
def run(monkeypatch, capsys):
    def call(*arguments):
        argv = ["mechinterp-attn", "paths", "gelu-2l", "--prompt", PROMPT, *map(str, arguments)]
        monkeypatch.setattr(sys, "argv", argv)
        with pytest.raises(SystemExit) as exit:
            main()
        out, err = capsys.readouterr()
        return exit.value.code or 0, out, err

    return call


@pytest.mark.parametrize("analysis", ["orders", "importance"])
def test_tables_as_json(run, analysis):
    code, out, err = run(analysis, "--json")
    assert code == 0
    assert json.loads(out)[0]["order"] == "0"
    assert "ok: " in err


def test_a_score(run):
    code, out, err = run("score", "L1H3", "--key", 5, "--json", "-k", 3)
    assert code == 0
    assert len(json.loads(out)) == 3
    assert "score of L1H3 from 'or' (20) to 'ling' (5) over its other keys" in err


def test_a_graph_as_viewers_json_and_as_a_page(run, tmp_path):
    page = tmp_path / "graph.html"
    code, out, err = run("graph", "--target", "ling", "--json", "--figure", page)
    assert code == 0
    assert set(json.loads(out)) == {"metadata", "qParams", "nodes", "links"}
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert "wrote" in err


def test_errors_are_one_line(run):
    code, out, err = run("top", "--quiet", "--target", " Constantinople")
    assert (code, out) == (2, "")
    assert err.startswith("error: ' Constantinople' is 6 tokens, not one: [")
    assert run("score", "--quiet")[2].startswith("error: paths ... score takes one head")
