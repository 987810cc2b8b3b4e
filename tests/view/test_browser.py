"""The report in headless Chromium, the network cut off."""

import csv
import io

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
    box = page.locator("canvas.big").first
    assert box.is_visible()
    colours = box.evaluate(
        """(canvas) => {
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
        canvas = panel.locator("canvas.big")
        canvas.scroll_into_view_if_needed()
        size = canvas.bounding_box()
        canvas.hover(
            position={"x": (key + 0.5) * size["width"] / (n + 1), "y": (query + 0.5) * size["height"] / n}
        )
        page.wait_for_timeout(100)
        read = panel.locator(".readout strong").inner_text()
        assert float(read) == pytest.approx(
            float(exact[query, key]), abs=0.008
        )  # two decimals of 252 steps
        assert f"({query})" in panel.locator(".readout").inner_text()
    watched.assert_quiet()


def test_patterns_work_by_keyboard(saved, watched):
    page = watched.open(saved)
    panel = page.locator(".panel").first
    strip = panel.locator(".strip")
    strip.focus()
    strip.press("Home")
    page.wait_for_timeout(100)
    assert strip.get_attribute("aria-activedescendant") == "attention-token-0"
    strip.press("ArrowRight")
    page.wait_for_timeout(100)
    assert panel.locator("[aria-selected=true]").get_attribute("id") == "attention-token-1"
    panel.locator("input:checked").press("ArrowRight")
    page.wait_for_timeout(100)
    assert panel.locator("input").nth(1).is_checked()
    assert panel.locator("input").nth(1).get_attribute("value") in panel.locator(".readout").inner_text()
    watched.assert_quiet()


def test_tables_download_as_csv(saved, watched, model):
    page = watched.open(saved)
    with page.expect_download() as caught:
        page.get_by_label("Download as CSV: All heads").click()
    rows = list(csv.DictReader(io.StringIO(caught.value.path().read_text(encoding="utf-8"))))
    assert {row["head"] for row in rows} == set(model.heads)
    watched.assert_quiet()


def test_charts_and_patterns_download_as_pictures(saved, watched):
    page = watched.open(saved)
    for name, start in (("SVG", b"<svg"), ("PNG", b"\x89PNG")):
        with page.expect_download() as caught:
            page.get_by_label(f"Download as {name}: Loss with").click()
        assert caught.value.path().read_bytes().startswith(start)
    with page.expect_download() as caught:
        page.get_by_label("Download the pattern as PNG").first.click()
    assert caught.value.path().read_bytes().startswith(b"\x89PNG")
    watched.assert_quiet()


@pytest.mark.parametrize("width", [390, 1280])
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
