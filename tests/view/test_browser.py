"""The report in headless Chromium, the network cut off."""

import csv
import io
import json

import pytest


@pytest.fixture(scope="module")
def saved(report, tmp_path_factory):
    return report.save(tmp_path_factory.mktemp("report") / "report.html")


def column(page, table, k):
    return page.locator(f"#table-{table} tbody tr td:nth-child({k})").all_inner_texts()


def values(page, table, k):
    return [float(x.replace("−", "-").split()[-1]) for x in column(page, table, k)]


def test_it_opens_offline_and_quietly(saved, watched):
    page = watched.open(saved)
    assert page.title() == "Circuit report: tiny <b>&amp; random"
    assert page.locator("h1").inner_text() == "tiny <b>&amp; random"
    assert page.locator("svg.chart polyline").count() == 1
    watched.assert_quiet()


def test_the_head_table_sorts(saved, watched):
    page = watched.open(saved)
    header = page.locator("#table-heads th").filter(has_text="Current token")
    k = page.locator("#table-heads th").all_inner_texts().index(header.inner_text()) + 1
    header.get_by_role("button").click()
    down = values(page, "heads", k)
    assert header.get_attribute("aria-sort") == "descending"
    assert down == sorted(down, reverse=True)
    header.get_by_role("button").press("Enter")
    up = values(page, "heads", k)
    assert header.get_attribute("aria-sort") == "ascending"
    assert up == sorted(up)
    assert up[0] < down[0]
    watched.assert_quiet()


def test_the_head_table_filters(saved, watched, model):
    page = watched.open(saved)
    box = page.locator(".table", has=page.locator("#table-heads"))
    box.get_by_label("Kind", exact=True).select_option("attention")
    assert len(column(page, "heads", 1)) == 8
    assert set(column(page, "heads", 2)) == {"attention"}
    box.get_by_label("Head", exact=True).fill("l1")
    assert len(column(page, "heads", 1)) == 4
    assert all(x.startswith("L1H") for x in column(page, "heads", 1))
    box.get_by_label("Kind", exact=True).select_option("")
    assert set(column(page, "heads", 3)) == {"1"}
    box.get_by_label("Column of the threshold").select_option("current_token")
    box.get_by_label("Least size of the value").fill("2")
    assert "no rows" in box.inner_text()
    watched.assert_quiet()


def test_a_pattern_is_visible_and_is_the_models(saved, watched, model):
    page = watched.open(saved)
    assert page.locator(".panel").count() == 2
    box = page.locator(".patterns .heatmap").first
    assert box.is_visible()
    colours = box.evaluate(
        """async (svg) => {
        const picture = new Image();
        picture.src = svg.querySelector("image").getAttribute("href");
        await picture.decode();
        const canvas = new OffscreenCanvas(picture.width, picture.height);
        canvas.getContext("2d").drawImage(picture, 0, 0);
        const { data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
        const seen = new Set();
        for (let i = 0; i < data.length; i += 4) seen.add(data.slice(i, i + 3).join());
        return seen.size;
        }"""
    )
    assert colours > 20
    watched.assert_quiet()


def test_pointing_at_a_cell_reads_its_weight(saved, watched, model, report):
    from tests.view.conftest import PROMPT

    page = watched.open(saved)
    _, cache = model.run_with_cache(PROMPT)
    for kind, panel in enumerate(page.locator(".panel").all()):
        label = panel.locator("input:checked").get_attribute("value")
        exact = model[label].pattern(cache)
        n = len(exact)
        query, key = (n - 2, 3) if kind == 0 else (n - 2, n - 2)
        cells = panel.locator(".heatmap .edge").first
        cells.scroll_into_view_if_needed()
        size = cells.bounding_box()
        panel.locator(".heatmap image").hover(
            position={"x": (key + 0.5) * size["width"] / (n + 1), "y": (query + 0.5) * size["height"] / n}
        )
        watched.wait_until(lambda: f"({query})" in panel.locator(".readout").inner_text())  # noqa: B023
        read = panel.locator(".readout strong").inner_text()
        assert float(read) == pytest.approx(
            float(exact[query, key]), abs=0.008
        )  # two decimals of 252 steps
    watched.assert_quiet()


def test_patterns_work_by_keyboard(saved, watched):
    page = watched.open(saved)
    panel = page.locator(".panel").first
    strip = panel.locator(".strip")
    strip.focus()
    strip.press("Home")
    watched.wait_until(lambda: strip.get_attribute("aria-activedescendant") == "patterns-0-token-0")
    strip.press("ArrowRight")
    chosen = panel.locator("[aria-selected=true]")
    watched.wait_until(lambda: chosen.get_attribute("id") == "patterns-0-token-1")
    panel.locator("input:checked").press("ArrowRight")
    second = panel.locator("input").nth(1)
    watched.wait_until(lambda: second.get_attribute("value") in panel.locator(".readout").inner_text())
    assert second.is_checked()
    watched.assert_quiet()


def test_tables_download_as_csv(saved, watched, model):
    page = watched.open(saved)
    with page.expect_download() as caught:
        page.get_by_label("Download as CSV: All heads").click()
    rows = list(csv.DictReader(io.StringIO(caught.value.path().read_text(encoding="utf-8"))))
    assert {row["head"] for row in rows} == set(model.heads)
    watched.assert_quiet()


def test_every_figure_downloads_as_svg_and_png(saved, watched):
    """Charts, patterns, heatmaps and the graph: as many of each button as there are pictures."""
    page = watched.open(saved)
    pictures = page.locator("main svg:not(.narrow)").count()  # one of those in two widths
    for name, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        buttons = page.get_by_label(f"Download as {name}:").all()
        assert (
            len(buttons) == pictures == 11
        )  # the prompt, a circuit, 3 charts, 2 patterns, 3 heatmaps, 1 graph
        for button in buttons:
            with page.expect_download() as caught:
                button.click()
            assert caught.value.path().read_bytes().startswith(start)
    watched.assert_quiet()


def test_png_buttons_answer_a_quick_hand(saved, watched):
    """Every button at once, then one button several times: a file for each click, its cells in it."""
    page = watched.open(saved)
    files = []
    page.on("download", lambda download: files.append(download))
    buttons = page.get_by_label("Download as PNG:").all()
    for button in [*buttons, *buttons[:1] * 3]:
        button.click()
    watched.wait_until(lambda: len(files) >= len(buttons) + 3)
    page.wait_for_timeout(300)  # one file too many would come now
    assert len(files) == len(buttons) + 3
    assert len({file.suggested_filename for file in files}) == len(buttons)
    colours = page.evaluate(
        """async () => {
        const blob = await toPng(standalone(document.querySelector(".patterns .heatmap")));
        const picture = await createImageBitmap(blob);
        const context = new OffscreenCanvas(picture.width, picture.height).getContext("2d");
        context.drawImage(picture, 0, 0);
        const data = new Uint32Array(context.getImageData(0, 0, picture.width, picture.height).data.buffer);
        return new Set(data).size;
        }"""
    )
    assert colours > 20  # the cells are in the picture, not only its frame
    watched.assert_quiet()


def test_a_picture_that_was_downloaded_stands_by_itself(saved, watched, chromium):
    """The SVG is drawn as an image of its own: nothing of the page's style is needed."""
    page = watched.open(saved)
    with page.expect_download() as caught:
        page.get_by_label("Download as SVG: pattern, Attention heads").click()
    text = caught.value.path().read_text(encoding="utf-8")
    assert "var(--" not in text
    assert "class=" in text or "fill=" in text
    other = chromium.new_page()
    other.set_content(text)
    assert other.locator("svg > image").bounding_box()["width"] > 100
    assert "token looked at" in other.locator("svg").text_content()
    other.close()


def test_heatmaps_work_by_keyboard(saved, watched, model):
    page = watched.open(saved)
    box = page.locator(".matrix").first
    box.locator(".heatmap").focus()
    box.locator(".heatmap").press("ArrowDown")
    box.locator(".heatmap").press("ArrowRight")
    names = [f"L0H{i}" for i in range(4)], [f"L1H{i}" for i in range(4)]
    assert f"{names[0][1]} → {names[1][1]}" in box.locator(".readout").inner_text()
    box.locator(".heatmap").press("End")
    assert f"{names[0][1]} → {names[1][3]}" in box.locator(".readout").inner_text()
    panel = page.locator(".panel").first
    panel.locator(".heatmap").focus()
    panel.locator(".heatmap").press("PageUp")
    watched.wait_until(lambda: "(0)" in panel.locator(".readout").inner_text())
    watched.assert_quiet()


def test_the_graph_is_walked_with_arrow_keys(saved, watched):
    page = watched.open(saved)
    page.locator(".graph-stage").focus()
    before = page.locator(".graph-panel h3").inner_text()
    page.keyboard.press("ArrowDown")
    assert page.locator(".graph-panel h3").inner_text() != before
    page.keyboard.press("Escape")  # back to the target
    assert page.locator(".graph-panel h3").inner_text() == before
    watched.assert_quiet()


def test_names_in_the_graph_open_cards_and_its_state_is_in_the_address(saved, watched, report):
    heads = [n for n in report_graph(report)["nodes"] if n["members"] == 1]
    node = max(heads, key=lambda n: n["influence"])
    page = watched.page
    page.goto(f"{saved.as_uri()}#graph?node={node['id']}")
    page.wait_for_selector("html[data-ready]", state="attached")
    assert page.locator("#graph .fold").get_attribute("open") is not None
    assert page.locator(".graph-panel h3").inner_text().startswith(node["label"])
    page.get_by_role("button", name="Head card").click()
    assert page.locator("dialog#card h2").inner_text().startswith(node["label"])
    watched.assert_quiet()


def report_graph(report):
    return next(b["graph"] for s in report.data["sections"] for b in s["blocks"] if b["type"] == "graph")


def test_neurons_say_what_they_read_and_write(saved, watched, report):
    page = watched.open(saved)
    headers = page.locator("#table-neurons th").all_inner_texts()
    k = next(i for i, text in enumerate(headers) if text.startswith("Raises")) + 1
    label = page.locator("#table-neurons tbody tr").first.locator("td").first.inner_text()
    data = next(b for s in report.data["sections"] for b in s["blocks"] if b.get("id") == "neurons")["data"]
    expected = data["tokens_raises"][data["head"].index(label)]
    cell = page.locator(f"#table-neurons tbody tr:first-child td:nth-child({k})")
    assert cell.locator("code").all_text_contents() == expected
    with page.expect_download() as caught:
        page.get_by_label("Download as CSV: The 48 MLP-derived heads").click()
    rows = list(csv.DictReader(io.StringIO(caught.value.path().read_text(encoding="utf-8"))))
    assert rows[0]["tokens_raises"] == " ".join(json.dumps(token, ensure_ascii=False) for token in expected)
    watched.assert_quiet()


def test_a_page_that_is_printed_shows_its_tables(saved, watched):
    page = watched.open(saved)
    page.emulate_media(media="print", color_scheme="dark")
    assert not page.locator("nav").is_visible()
    assert page.locator("#table-receipts").is_visible()
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert len(page.pdf(print_background=True)) > 50_000


@pytest.mark.parametrize("width", [320, 390, 1280])
def test_nothing_sticks_out(saved, watched, width):
    watched.page.set_viewport_size({"width": width, "height": 800})
    page = watched.open(saved)
    assert page.evaluate("document.documentElement.scrollWidth") <= width


def test_the_same_heads_in_circuitsvis(saved, watched):
    page = watched.open(saved)
    assert page.evaluate("typeof CircuitsVis") == "undefined"  # nothing of it runs before it is asked for
    page.get_by_text("heads in CircuitsVis").click()
    page.wait_for_selector("#circuitsvis-mlp canvas", timeout=60_000)
    assert page.locator(".circuitsvis canvas").count() >= 2
    assert page.locator("#circuitsvis").count() == 1
    assert watched.requests == []
    assert watched.dialogs == []
    assert [e for e in watched.errors if "WebGL" not in e] == []  # it tries for a GPU first


def test_the_story_is_the_first_screen(saved, watched):
    page = watched.open(saved, folded=True)
    assert page.locator(".fold[open]").count() == 0
    assert page.evaluate("document.documentElement.scrollHeight") < 6 * 900
    first = page.locator(".story li").first.bounding_box()
    assert first["y"] + first["height"] < 900
    watched.assert_quiet()


def below(page):
    """How many pixels of the page are left below the screen."""
    return page.evaluate("document.documentElement.scrollHeight - scrollY - innerHeight")


def test_a_link_opens_the_section_it_leads_to(saved, watched):
    page = watched.open(saved, folded=True)
    for place in ("neurons", "orders", "provenance", "claims"):
        page.evaluate("(place) => { location.hash = place; }", place)
        target = page.locator(f"#{place}")
        watched.wait_until(lambda: abs(target.bounding_box()["y"]) < 30 or below(page) < 2)  # noqa: B023
        page.wait_for_timeout(300)  # and it stays there
        assert abs(target.bounding_box()["y"]) < 30 or below(page) < 2, place
        assert target.is_visible()
        current = page.locator("nav a[aria-current]")
        own = target.evaluate("(place) => '#' + place.closest('section').id")
        if abs(target.bounding_box()["y"]) < 30 and own == f"#{place}":
            watched.wait_until(lambda: current.get_attribute("href") == own)  # noqa: B023
    watched.assert_quiet()


def test_the_prompt_with_its_arcs_fits_a_phone(saved, watched):
    watched.page.set_viewport_size({"width": 390, "height": 800})
    page = watched.open(saved, folded=True)
    assert page.locator(".arcs.narrow").is_visible()
    assert not page.locator(".arcs.wide").is_visible()
    assert page.locator(".arcs.narrow").bounding_box()["width"] <= 374
