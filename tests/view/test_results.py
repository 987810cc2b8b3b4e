"""Every kind of result shows itself: the same look, colours and signs, and text that is only text."""

import copy
import importlib
import pkgutil
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import plotly.graph_objects as go
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.palette import DIVERGING, SEQUENTIAL
from mechinterp_attn.core.results import ROWS_SHOWN, Check, Receipt, Result
from mechinterp_attn.core.table import fitted_table, html_table, text_table, width_of
from tests.conftest import random_tokens, tiny_bridge
from tests.conversion.test_dictionary import transcoder
from tests.view.conftest import PROMPT
from tests.view.test_safety import HOSTILE


def kinds(base: type = Result) -> set[type]:
    """All kinds that are made, found by importing the whole package; not what they are derived from."""
    for module in pkgutil.walk_packages(mia.__path__, "mechinterp_attn."):
        importlib.import_module(module.name)
    own = {kind for kind in base.__subclasses__() if kind.__module__.startswith("mechinterp_attn")}
    return {kind for one in own for kind in (kinds(one) or {one})}


@pytest.fixture(scope="module")
def results(model, tmp_path_factory) -> dict[str, Result]:
    """One of every kind, from small models of random weights."""
    tiny = mia.convert(tiny_bridge(torch.float64, act_fn="silu"))
    tokens = random_tokens(tiny, 2, 12)
    frozen = mia.paths.freeze(model, PROMPT)
    own, detect, paths, theorems = mia.circuits, mia.detect, mia.paths, mia.theorems
    literal = theorems.attention_only(tiny)
    described = mia.attach(tiny, transcoder(16), layer=0)
    behaviour = mia.tasks.induction(model, n=4)
    single = mia.causal.prompt_circuits(model, [behaviour, mia.tasks.sva(model, n=4)])
    changed = copy.deepcopy(model)
    changed.blocks[0].attn.W_O.data[1] *= 2
    scores = detect.score_heads(model)
    file = scores.save(tmp_path_factory.mktemp("results") / "scores.json")
    made = [
        mia.compare(scores, detect.score_heads(changed)),
        mia.load_result(file),
        own.bigrams(model, top_k=2),
        own.composition(model),
        own.copying_scores(model, ["L0H1", "L1H2", "L0N3"]),
        own.factoring_bugs(model, "L1H2", top_k=3),
        own.ov_circuit(model, "L0H1").block([0, 1, 2], [3, 4]),
        own.ov_circuit(model, "L0H1").statistics(tokens=8),
        own.ov_top(model, "L0H1", top_k=20),
        own.position_circuit(model, "L0H1"),
        own.reads_and_writes(model, ["L0N1", "L1N2"], top_k=3),
        own.singular_directions(model, "L0H1", top_k=3),
        own.skip_trigrams(model, "L1H2", top_k=5),
        own.token_composition(model),
        own.token_positions(model, "L0H1", top_k=3),
        own.virtual_heads(model, src="attention", dst="attention", top_k=5),
        mia.causal.diff(model, changed, behaviour, exact=2, draws=2),
        mia.causal.discover(model, behaviour),
        mia.causal.effects(model, behaviour, exact=2),
        mia.causal.faithfulness(model, behaviour, ["L0H1", "L1H2"], sizes=[1, 2], draws=1),
        mia.causal.head_loadings(model, behaviour, "L1H2"),
        mia.causal.intervene(model, PROMPT, mia.causal.Edit("L0H1")),
        mia.causal.minimality(model, behaviour, ["L0H1", "L1H2"]),
        mia.causal.path_patch(model, behaviour, "L0H* -> L1H2 -> logits"),
        single,
        single.clusters(2),
        single.stability(3, draws=5),
        mia.causal.overlap(model, behaviour, 3, resamples=1),
        detect.ablate(model, PROMPT),
        detect.check_circuit(model, {"heads": {"L0H0": {"previous_token": 0.0}}}),
        detect.in_context_learning(model, PROMPT, early=1, late=8),
        detect.induction(model),
        detect.match(model, PROMPT, "previous_token"),
        detect.offsets(model, up_to=3, draws=2),
        detect.over_corpus(model, [PROMPT, PROMPT + " end"]),
        detect.reconstruction(described, random_tokens(tiny)),
        scores,
        detect.score_weights(model),
        paths.attribution_graph(frozen),
        paths.expand_score(frozen, "L1H1", 5, 2),
        paths.logit_attribution(frozen),
        paths.orders(frozen),
        paths.replacement_scores(described, tokens[0]),
        paths.term_importance(model, frozen.tokens, heads=2),
        paths.top_circuits(frozen, top_k=4, max_expansions=5, progress=False),
        paths.top_paths(frozen, top_k=4, max_expansions=30, progress=False),
        paths.virtual_head(frozen, "L0H0", "L1H1"),
        theorems.calibrate_omega(tiny, tokens, 1e-6),
        theorems.costs(tiny),
        theorems.mask_sweep(tiny, tokens, [10, 20]),
        literal.steps,
        mia.verify(tiny, tiny_bridge(torch.float64, act_fn="silu"), tokens),
    ]
    return {type(result).__name__: result for result in made}


def test_there_is_one_of_every_kind(results):
    """A new kind of result has to be added above, and so be looked at."""
    assert set(results) == {kind.__name__ for kind in kinds()}


class Markup(HTMLParser):
    """Tags and attributes of a piece of HTML, and whether every tag is closed."""

    def __init__(self, text: str):
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.open.append(tag)
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


# A notebook that is not trusted shows these and no others; nothing here runs a script.
TAGS = {
    "div",
    "b",
    "span",
    "code",
    "table",
    "thead",
    "tbody",
    "tr",
    "th",
    "td",
    "details",
    "summary",
    "ul",
    "li",
}
OWN_PICTURE = {"AttributionGraph"}  # shows an interactive frame; its own tests look at it


def test_html_is_small_and_plain(results):
    for name, result in results.items():
        if name in OWN_PICTURE:
            continue
        text = result._repr_html_()
        markup = Markup(text)
        assert markup.open == [], name
        assert markup.tags <= TAGS, (name, markup.tags - TAGS)
        assert markup.attributes <= {"style", "class", "open"}, name
        assert len(text) < 30_000, name
        assert type(result).title in text, name


def test_text_is_one_table(results):
    for name, result in results.items():
        lines = repr(result).splitlines()
        assert len(lines) <= ROWS_SHOWN + 12, name
        assert max(map(len, lines[:-1]), default=0) < 320, name  # a head has some twenty scores
        assert "Result(" not in repr(result), name


def test_plots_are_plotly_in_one_style(results):
    """Signed maps run from red through white at zero to blue; others start at zero."""
    for name, result in results.items():
        figure = result.plot()
        assert isinstance(figure, go.Figure), name
        assert figure.data, name
        assert figure.layout.title.text, name
        assert figure.layout.font.family.startswith("system-ui"), name
        for trace in figure.data:
            if trace.type != "heatmap":
                continue
            values = np.array(trace.z, dtype=float)
            if np.nanmin(values) < 0:
                assert trace.zmin == -trace.zmax, name
                assert trace.colorscale == go.Heatmap(colorscale=DIVERGING).colorscale, name
            else:
                expected = [go.Heatmap(colorscale=scale).colorscale for scale in (SEQUENTIAL, DIVERGING)]
                assert trace.colorscale in expected, name


UNCHECKED = {"Costs"}  # a count from shapes, nothing measured


def test_receipts_unfold(results):
    not_green = {name: str(result.receipt) for name, result in results.items() if not result.receipt.ok}
    assert set(not_green) == UNCHECKED, not_green
    for result in results.values():
        for check in result.receipt.checks:
            assert check.error >= 0
            assert 0 <= check.tolerance < float("inf")
    failed = Receipt((Check("a < b", 2.0, 1.0), Check("fine", 0.0, 1.0)), {"seed": 0})
    text = failed._repr_html_()
    assert "1 of 2 checks FAILED" in text
    assert "<details open" in text
    assert "a &lt; b" in text
    assert "not checked" in Receipt()._repr_html_()


def test_tables_keep_text_as_text():
    frame = pd.DataFrame({"token": HOSTILE, "value": range(len(HOSTILE))}, dtype=object)
    markup = Markup(html_table(frame))
    assert markup.tags <= TAGS
    assert not {name for name in markup.attributes if name.startswith("on")}
    text = text_table(frame)
    assert len(text.splitlines()) == len(HOSTILE) + 1  # nothing in a token breaks a line
    assert "\x1b" not in text  # or moves the cursor


@pytest.mark.parametrize("width", [20, 33, 47, 60, 200])
def test_a_fitted_table_keeps_what_it_must(width):
    frame = pd.DataFrame(
        {"head": ["L0H1"], "passage": ["汉字" * 40], "layer": [0], "kind": ["attention"], "loss": [0.25]}
    )
    text, left_out = fitted_table(frame, width, keep=["loss"])
    heading, row = text.splitlines()
    assert heading.split() == [name for name in frame if name not in left_out]
    assert not {"head", "loss"} & set(left_out)
    assert width_of(row) <= width
    assert ("…" in row) == (width < 190 and "passage" not in left_out)
    assert fitted_table(frame, 1000) == (text_table(frame), [])


def test_numbers_line_up():
    frame = pd.DataFrame(
        {
            "head": ["L0H1", "L10N152"],
            "token": [" the", "x"],
            "value": [0.12345, -1.5],
            "error": [1e-15, 0.3],
            "n": [1234, 5],
            "odd": [float("nan"), float("inf")],
        }
    )
    head, one, two = text_table(frame).splitlines()
    assert one.split() == ["L0H1", "'", "the'", "+0.123", "1e-15", "1,234", "–"]
    assert two.split() == ["L10N152", "'x'", "-1.500", "0.3", "5", "∞"]
    assert {line.index(cell) + len(cell) for line, cell in ((head, "value"), (one, "+0.123"))} == {
        head.index("value") + 5
    }
    shaded = re.findall(r"background:rgba\((\d+),\d+,(\d+),(0\.\d+)\)", html_table(frame, ["value"]))
    (red, blue, weak), (red2, blue2, strong) = shaded
    assert int(blue) > int(red)  # above zero
    assert int(red2) > int(blue2)
    assert float(strong) > float(weak)
