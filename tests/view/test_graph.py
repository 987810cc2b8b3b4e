"""The attribution graph's picture in headless Chromium, with tokens that try to be markup."""

import pytest

import mechinterp_attn as mia
from tests.view.conftest import PROMPT


@pytest.fixture(scope="module")
def graph(model):
    return mia.paths.attribution_graph(mia.paths.freeze(model, PROMPT), scores=True)


@pytest.fixture(scope="module")
def saved(graph, tmp_path_factory):
    return graph.view().save(tmp_path_factory.mktemp("graph") / "graph.html")


def test_it_opens_offline_on_the_target(saved, graph, watched):
    page = watched.open(saved)
    assert graph.about in page.locator(".graph-panel h3").inner_text()
    drawn = page.locator(".graph-node.attention, .graph-node.mlp").count()
    assert drawn == min(60, int(graph.nodes["kind"].isin(["attention", "mlp"]).sum()))
    assert page.locator(".graph-node.token").count() == len(graph.tokens)
    watched.assert_quiet()


def test_a_click_shows_where_a_node_comes_from(saved, graph, watched):
    page = watched.open(saved)
    into = graph.edges.query("target == 'logit' and kind == 'value' and source != 'bias'")
    first = page.locator(".graph-panel button").first
    label = first.inner_text()
    assert any(label.startswith(source.split("@")[0]) for source in into["source"].head(3))
    first.click()
    assert page.locator(".graph-panel h3").inner_text() == label
    assert page.locator(".graph-node.chosen").count() == 1
    node = page.locator(".graph-node.logit")
    node.focus()
    node.press("Enter")
    assert graph.about in page.locator(".graph-panel h3").inner_text()
    watched.assert_quiet()


def test_the_slider_hides_small_edges(saved, watched):
    page = watched.open(saved)
    everything = page.locator(".graph-edge:not(.hidden)").count()
    page.locator("input[type=range]").fill("60")
    assert page.locator(".graph-edge:not(.hidden)").count() < everything
    watched.assert_quiet()


def test_strong_nodes_are_named_and_a_name_is_found(saved, graph, watched):
    page = watched.open(saved)
    inner = graph.nodes[graph.nodes["kind"].isin(["attention", "mlp"])]
    strongest = inner.loc[inner["influence"].nlargest(60).index]
    label = str(strongest.loc[strongest["value"].abs().idxmax(), "label"])
    assert label in page.locator(".graph-name").all_text_contents()
    page.get_by_label("find a node").fill(label.lower())
    assert page.locator(".graph-panel h3").inner_text().startswith(label)
    assert page.locator(".graph-node.found").count() >= 1
    page.get_by_label("find a node").fill("")
    assert page.locator(".graph-node.found").count() == 0
    watched.assert_quiet()
