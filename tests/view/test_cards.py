"""Head cards: their numbers against the run's own cache, and the dialog in the browser."""

import numpy as np
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.text import shown
from mechinterp_attn.view.report.cards import named
from tests.view.conftest import PROMPT


@pytest.fixture(scope="module")
def saved(report, tmp_path_factory):
    return report.save(tmp_path_factory.mktemp("cards") / "report.html")


def written(model, label):
    """What a head writes at the last token, from the cache: ``[d_model]``, and the scale behind it."""
    _, cache = model.run_with_cache(PROMPT)
    bank, index = model.heads.find(label)
    out = cache[bank.hook("z")][0, -1, index].reshape(-1) @ model[label].W_O
    return cache, out.detach(), cache["ln_final.hook_scale"][0, -1]


def test_what_a_card_says_is_written_is_in_the_cache(report, model):
    """Every list and rank, through the final norm's own scale (float32; four digits are kept)."""
    for label in ("L0H1", "L1H2", "L1N3"):
        card = report.data["cards"][label]
        _, out, scale = written(model, label)
        logits = ((out - out.mean()) / scale) @ model.W_U.detach()
        centred = (logits - logits.mean()).double()
        texts = [shown(t) for t in model.to_str_tokens(centred.topk(6).indices)]
        assert [token for token, _ in card["raises"]] == texts
        np.testing.assert_allclose([v for _, v in card["raises"]], centred.topk(6).values, rtol=2e-3)
        np.testing.assert_allclose([-v for _, v in card["lowers"]], (-centred).topk(6).values, rtol=2e-3)
        target = int(model(PROMPT)[0, -1].argmax())
        assert card["rank"] == int((logits > logits[target]).sum()) + 1
        assert card["effect"] == pytest.approx(float(logits[target]), rel=1e-3, abs=1e-5)


def test_what_tokens_bring_is_attention_times_value(report, model):
    label = "L1H2"
    cache, _, scale = written(model, label)
    head, target = model[label], int(model(PROMPT)[0, -1].argmax())
    scaled = cache["blocks.1.ln1.hook_normalized"][0]
    weights = cache["blocks.1.attn.hook_pattern"][0, 2, -1]
    for key, weight, brought in report.data["cards"][label]["looks"]:
        assert weight == pytest.approx(float(weights[key]), abs=1e-4)
        out = weights[key] * (scaled[key] @ head.W_V.detach()) @ head.W_O.detach()
        expected = float(((out - out.mean()) / scale) @ model.W_U.detach()[:, target])
        assert brought == pytest.approx(expected, rel=2e-3, abs=1e-5)  # four digits of float32


def test_every_head_that_the_page_names_has_a_card(report, model):
    names = named(report.data["sections"], model.heads)
    assert set(names) <= set(report.data["cards"])
    assert "head cards" in [r["of"] for r in report.data["sections"][0]["receipts"]]


def test_the_receipt_turns_red(report, model, monkeypatch):
    from mechinterp_attn.view.report import cards

    honest = cards._brought
    monkeypatch.setattr(cards, "_brought", lambda *a: honest(*a) * 1.5)
    page = mia.report(model, PROMPT, sections=["story", "heads"], progress=False)
    assert page.data["checks"]["failed"] == 1


def test_passages_stand_in_cards_where_a_corpus_was_read(model, tmp_path, watched):
    texts = ["It was the best of times", "</script><b>of times</b> it was the worst"]
    corpus = mia.detect.over_corpus(model, texts, top_k=2)
    page = mia.report(model, PROMPT, sections=["heads"], corpus=corpus, progress=False)
    found = page.data["cards"]["L0H0"]["passages"]
    frame = corpus.passages("L0H0")
    assert [p["token"] for p in found] == [shown(t) for t in frame["token"]]
    shows = watched.open(page.save(tmp_path / "passages.html"))
    shows.locator("#table-heads [data-head=L0H0]").click()
    assert shows.locator("dialog .passages li").count() == len(frame)
    watched.assert_quiet()


def test_a_name_opens_its_card_and_escape_closes_it(saved, watched):
    page = watched.open(saved, folded=True)
    name = page.locator(".story [data-head]").first
    label = name.inner_text()
    name.focus()
    page.keyboard.press("Enter")
    dialog = page.locator("dialog#card")
    assert dialog.is_visible()
    assert dialog.locator("h2 .head").inner_text() == label
    watched.wait_until(lambda: dialog.locator(":is(.heatmap, .strip)").count() == 1)
    page.keyboard.press("Escape")
    assert not dialog.is_visible()
    assert page.evaluate("document.activeElement.dataset.head") == label  # back where it was opened
    watched.assert_quiet()


def test_cards_lead_to_one_another(saved, watched, report):
    page = watched.open(saved)
    page.locator("#table-heads [data-head=L1H2]").click()
    dialog = page.locator("dialog#card")
    other = dialog.locator(".partners [data-head]").first
    label = other.inner_text()
    assert label in {p[2] for p in report.data["cards"]["L1H2"]["partners"]}
    other.click()
    assert dialog.locator("h2 .head").inner_text() == label
    dialog.get_by_label("Close").click()
    assert not dialog.is_visible()
    watched.assert_quiet()


def test_a_head_without_a_card_shows_its_row(report, watched, tmp_path):
    few = {k: v for k, v in report.data["cards"].items() if k != "L1H0"}
    page = watched.open(mia.Report(report.data | {"cards": few}).save(tmp_path / "few.html"))
    page.evaluate("openCard('L1H0')")
    assert "Far down the table" in page.locator("dialog#card").inner_text()
    assert "Direct effect" in page.locator("dialog#card").inner_text()
    watched.assert_quiet()


def test_read_out_at_is_read_out(model):
    frozen = mia.paths.freeze(model, PROMPT)
    x = torch.randn(3, model.spec.d_model, generator=torch.Generator().manual_seed(0))
    field = torch.zeros(3, *frozen.end.shape)
    field[:, 5] = x
    expected = frozen.read_out(field)[:, 5]
    torch.testing.assert_close(frozen.read_out_at(x, 5), expected, rtol=1e-5, atol=1e-5)
