"""The viewer of attribution graphs in headless Chromium, with tokens and names that try to be markup."""

import json
from pathlib import Path

import pytest

import mechinterp_attn as mia
from mechinterp_attn import MechInterpError
from tests.view.conftest import PROMPT

EVIL = "<img src=x onerror=\"document.title='owned'\">"


@pytest.fixture(scope="module")
def graph(model):
    return mia.paths.attribution_graph(mia.paths.freeze(model, PROMPT), scores=True)


@pytest.fixture(scope="module")
def saved(graph, tmp_path_factory):
    return graph.view().save(tmp_path_factory.mktemp("graph") / "graph.html")


def viewer(page, call):
    return page.evaluate(f"document.querySelector('.attribution-graph').viewer.{call}")


def chosen(page):
    return page.locator(".graph-panel h3").inner_text()


def press(page, node):
    """A press on a node's mark."""
    x, y = viewer(page, f"place({json.dumps(node)})")
    page.locator(".graph-stage").click(position={"x": x, "y": y})


def into(graph, node="logit"):
    return graph.edges[(graph.edges["target"] == node) & (graph.edges["kind"] == "value")]


def test_it_opens_offline_on_the_target_and_fits_its_window(saved, graph, watched):
    page = watched.open(saved)
    assert graph.about in chosen(page)
    stage = page.locator(".graph-stage").bounding_box()
    places = page.evaluate("(v => v.nodes.map(n => v.place(n.id)))(graph.viewer)")
    assert len(places) == int((graph.nodes["kind"] != "score").sum())
    assert all(0 < x < stage["width"] and 0 < y < stage["height"] for x, y in places)
    first = page.locator(".graph-panel li button").first.inner_text()
    strongest = into(graph).iloc[0]["source"]
    assert first.startswith(graph.nodes.set_index("node").loc[strongest, "label"])
    watched.wait_until(lambda: page.evaluate(INK) > 1000)
    watched.assert_quiet()


# How many pixels are painted in the picture that is shown.
INK = """[...document.querySelectorAll(".graph-sheet:not([hidden]) canvas")].reduce((sum, canvas) => {
    const image = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return sum + new Uint32Array(image.data.buffer).filter((pixel) => pixel !== 0).length;
}, 0)"""


def test_presses_and_keys_choose_nodes(saved, graph, watched):
    page = watched.open(saved)
    inner = graph.nodes[graph.nodes["members"] == 1]
    node = inner.loc[inner["influence"].idxmax()]
    page.locator(".graph-stage").focus()
    for _ in range(12):  # large enough to hit one mark
        page.keyboard.press("+")
    assert viewer(page, "window().zoom") > 1
    page.locator("input[type=search]").fill(node["label"])
    assert chosen(page).startswith(node["label"])
    page.keyboard.press("Tab")
    press(page, viewer(page, "state().chosen"))
    assert chosen(page).startswith(node["label"])
    listed = page.locator(".graph-panel div:has(> h4:text-is('comes in from')) li button").first
    source = listed.inner_text()
    listed.click()
    assert chosen(page) == source
    page.locator(".graph-stage").focus()
    page.keyboard.press("Escape")
    assert graph.about in chosen(page)
    page.keyboard.press("ArrowDown")
    assert graph.about not in chosen(page)
    page.keyboard.press("0")
    assert viewer(page, "window().zoom") == 1
    watched.assert_quiet()


def test_wheel_and_drag_move_the_window(saved, watched):
    page = watched.open(saved)
    box = page.locator(".graph-stage").bounding_box()
    page.mouse.move(box["x"] + 300, box["y"] + 200)
    page.mouse.wheel(0, -300)
    assert viewer(page, "window().zoom") == 1  # the wheel is the page's until the graph has the focus
    page.locator(".graph-stage").focus()
    page.mouse.wheel(0, -900)
    watched.wait_until(lambda: viewer(page, "window().zoom") > 1.3)
    before = viewer(page, "window()")
    page.mouse.down()
    page.mouse.move(box["x"] + 240, box["y"] + 160, steps=4)
    page.mouse.up()
    after = viewer(page, "window()")
    assert (after["x"], after["y"]) != (before["x"], before["y"])
    page.get_by_role("button", name="show the whole graph").click()
    assert viewer(page, "window().zoom") == 1
    watched.assert_quiet()


def test_edges_and_kinds_are_hidden(saved, graph, watched):
    page = watched.open(saved)
    count, slider = page.locator(".graph-count"), page.get_by_label("smallest edge shown")
    slider.fill("0")
    assert count.inner_text().startswith(f"{len(graph.edges[graph.edges['kind'] == 'value']):,} of")
    slider.fill("100")
    assert count.inner_text().startswith("1 of")
    listed = page.locator(".graph-panel li").count()
    page.get_by_label("MLP-derived heads").uncheck()
    assert page.locator(".graph-panel li").count() < listed
    assert not any(
        "L0N" in text or "L1N" in text for text in page.locator(".graph-panel li").all_inner_texts()
    )
    watched.assert_quiet()


def test_a_card_says_what_moves_a_score(saved, graph, watched):
    score = graph.nodes[graph.nodes["kind"] == "score"].iloc[0]
    head, _ = score["node"].split("<-")
    watched.page.goto(f"{saved.as_uri()}#graph?node={head}")
    watched.page.wait_for_selector("html[data-ready]", state="attached")
    page = watched.page
    assert viewer(page, "state().chosen") == head
    text = page.locator(".graph-panel").inner_text()
    assert score["label"] in text
    for kind, words in (("query", "Q: the query is moved by"), ("key", "K: the key is moved by")):
        own = graph.edges.query(f"target == '{score['node']}' and kind == '{kind}'")
        assert (words in text) == (len(own) > 0)
    watched.assert_quiet()


def test_pins_groups_names_and_the_address(saved, graph, watched, tmp_path):
    page = watched.open(saved)
    assert "Nothing is pinned" in page.locator(".graph-pins").inner_text()
    page.get_by_role("button", name="Pin these").click()
    rows = page.locator(".graph-pinned > li")
    n = rows.count()
    names = rows.locator("input[type=checkbox]").evaluate_all("all => all.map(x => x.ariaLabel)")
    for row in (1, 2):
        rows.nth(row).locator("input[type=checkbox]").check()
    page.get_by_role("button", name="Group the ticked").click()
    field = page.get_by_label("name of the group")
    assert field.evaluate("x => x === document.activeElement")
    field.fill(EVIL)
    field.press("Enter")
    assert rows.count() == n - 1
    figure = page.locator(".graph-figure svg")
    assert any(EVIL[:20] in text for text in figure.locator("text").all_text_contents())
    assert page.locator(":is(img, iframe)").count() == 0
    with page.expect_download() as caught:
        page.get_by_role("button", name="Pins as file").click()
    pins = json.loads(caught.value.path().read_text(encoding="utf-8"))
    (group,) = pins["supernodes"].values()
    assert graph.view(**pins).data["supernodes"] == pins["supernodes"]
    assert list(pins["supernodes"]) == [EVIL]
    assert len(pins["pinned"]) == len(names) == n
    written = graph.save_json(tmp_path / "viewers.json", **pins)
    assert len(json.loads(written.read_text())["qParams"]["pinnedIds"]) == n
    for name, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as caught:
            page.get_by_label(f"Download as {name}:").click()
        data = caught.value.path().read_bytes()
        assert data.startswith(start)
        if name == "SVG":
            text = data.decode()
            assert "Helvetica" in text
            assert not any(wrong in text for wrong in ("<img", "var("))
            assert text.count("<rect") == 1 + n - 1  # the ground, and a box for each item
    watched.wait_until(lambda: "group=" in page.url)
    again = page.url
    page.goto("about:blank")
    page.goto(again)
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.get_by_label("name of the group").input_value() == EVIL
    assert viewer(page, "state().groups")[0][1] == group
    watched.assert_quiet()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(graph, chromium, tmp_path, scheme):
    """The viewer alone, with pins and a group, a score's card and contrast AA included."""
    score = graph.nodes[graph.nodes["kind"] == "score"].iloc[0]["node"]
    head = score.split("<-")[0]
    file = graph.view(pinned=["logit"], supernodes={"two": [head, "token@1"]}).save(tmp_path / "graph.html")
    context = chromium.new_context(color_scheme=scheme, bypass_csp=True)
    page = context.new_page()
    page.goto(f"{file.as_uri()}#graph?node={head}")
    page.wait_for_selector("html[data-ready]", state="attached")
    page.add_script_tag(path=Path(__file__).parent / "vendor" / "axe.min.js")
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    context.close()
    worst = [v for v in found if v["impact"] in ("serious", "critical")]
    assert [f"{v['id']}: {[n['target'] for n in v['nodes']][:4]}" for v in worst] == []


def graph_of(report):
    return next(b["graph"] for s in report.data["sections"] for b in s["blocks"] if b["type"] == "graph")


def test_pins_are_kept_in_the_page_and_its_data(report, tmp_path):
    nodes = [n["id"] for n in graph_of(report)["nodes"]]
    pins = {"pinned": nodes[:2], "supernodes": {"</script><b>": nodes[3:5]}}
    pinned = report.pin(**pins)
    pinned.save(tmp_path / "report.html", data=True)
    again = mia.Report.load(tmp_path / "report.json")
    graph = graph_of(again)
    assert {key: graph[key] for key in pins} == pins
    assert "</script><b>" not in pinned.html()
    assert report.html() != pinned.html()  # the first is as it was
    with pytest.raises(MechInterpError, match=r"no node 'L9H9@9'"):
        report.pin(pinned=["L9H9@9"])
    with pytest.raises(MechInterpError, match="no attribution graph"):
        mia.Report(report.data | {"sections": []}).pin(pinned=["logit"])
