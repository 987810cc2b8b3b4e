"""The report's data against the results it shows, and its page as text."""

import base64
import json
import re
import zlib
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.text import inert_json, number, shown, signed
from mechinterp_attn.view.report import sections_heads
from mechinterp_attn.view.report.blocks import ABOVE, BELOW, NOT_A_NUMBER, SCALE, pattern
from mechinterp_attn.view.report.presets import SECTIONS
from mechinterp_attn.view.report.sections_glossary import GLOSSARY
from tests.view.conftest import PROMPT


def blocks(report, kind):
    return {b["id"]: b for s in report.data["sections"] for b in s["blocks"] if b["type"] == kind}


def as_frame(block):
    return pd.DataFrame(block["data"])


def test_every_section_is_there_with_its_receipts(report):
    assert [s["id"] for s in report.data["sections"]] == list(SECTIONS)
    receipts = [r for s in report.data["sections"] for r in s["receipts"]]
    assert {"frozen model", "orders", "scores", "attribution", "term importance", "paths", "graph"} <= {
        r["of"] for r in receipts
    }
    assert all(r["ok"] and r["checks"] for r in receipts)
    n_checks = sum(len(r["checks"]) for r in receipts)
    assert report.data["checks"] == {"passed": n_checks, "failed": 0}
    assert f"All {n_checks} arithmetic checks passed" in report.html()


def test_the_head_table_is_score_heads_of_every_kind(report, model):
    shown_heads = as_frame(blocks(report, "table")["heads"])
    scores = mia.detect.score_heads(model, seed=0).frame
    assert list(shown_heads["head"]) == list(scores["head"])
    assert len(shown_heads) == model.n_heads
    for name in ("induction", "previous_token", "current_token"):
        np.testing.assert_allclose(shown_heads[name], scores[name], rtol=1e-5, atol=1e-12)  # 6 digits


def test_loss_by_order_ends_at_the_models_own_loss(report, model):
    losses = as_frame(blocks(report, "table")["orders"])["loss"]
    chart = blocks(report, "chart")["loss-by-order"]
    assert chart["series"][0]["values"] == list(losses)
    assert losses.iloc[-1] == pytest.approx(model(PROMPT, return_type="loss").item(), rel=1e-4)


def test_neuron_effects_are_those_of_the_attribution(report, model):
    frozen = mia.paths.freeze(model, PROMPT)
    exact = mia.paths.logit_attribution(frozen).frame.set_index("head")["value"]
    neurons = as_frame(blocks(report, "table")["neurons"])
    np.testing.assert_allclose(neurons["value"], exact[neurons["head"]], rtol=1e-5, atol=1e-7)
    largest = exact[exact.index.str.contains("N")].abs().max()
    assert neurons["value"].abs().max() == pytest.approx(largest, rel=1e-5)


def test_patterns_are_the_cached_ones(report, model):
    _, cache = model.run_with_cache(PROMPT)
    n = len(model.as_tokens(PROMPT)[0])
    groups = blocks(report, "patterns")["patterns"]["groups"]
    assert [g["kind"] for g in groups] == ["attention", "mlp"]
    for head in (h for g in groups for h in g["heads"]):
        codes = np.frombuffer(zlib.decompress(base64.b64decode(head["weights"])), np.uint8)
        exact = model[head["head"]].pattern(cache).numpy()
        error = np.abs(codes.reshape(n, n + 1) / SCALE - exact)
        assert error.max() <= 0.5 / SCALE + 1e-6  # rounded to the nearest of 252 steps


def test_ov_and_qk_tables_are_those_of_the_best_heads(report, model):
    best = mia.detect.score_heads(model).frame.query("kind == 'attention'").nlargest(1, "induction")
    label = best["head"].iloc[0]
    table = as_frame(blocks(report, "table")[f"ov-{label}"])
    expected = mia.circuits.ov_top(model, label, top_k=20).frame
    assert list(table["token"]) == [shown(t) for t in expected["token"]]
    np.testing.assert_allclose(table["value"], expected["value"], rtol=1e-5)


def test_features_and_errors_are_kinds_of_their_own():
    """Their direct effects are no part of the embedding's, they are cut, and they have cards."""
    plain = mia.load("gelu-2l")
    model = mia.attach(plain, mia.Dictionary.load("gelu-2l", layer=1), layer=1)
    text = "Mr. Dorling was a tall man. I had never seen Mr. Dor"
    page = mia.report(model, text, sections=["summary", "heads", "circuit"], progress=False)
    terms = mia.paths.logit_attribution(model, text).frame
    of_kind = terms.groupby("kind")["value"].sum()
    finding = "".join(s if isinstance(s, str) else "" for s in page.data["sections"][0]["finding"])
    assert f"all features {signed(of_kind['feature'])}, " in finding
    assert f"all errors of dictionaries {signed(of_kind['error'])}, " in finding
    rest = terms["value"].sum() - of_kind[["attention", "mlp", "feature", "error"]].sum()
    assert finding.endswith(f"embedding and biases {signed(rest)}")
    heads = as_frame(blocks(page, "table")["heads"])
    cut = heads[(heads["kind"] == "feature") & heads["cut"].notna()]
    assert len(cut) == 24
    assert "24 of 1,024 features, 1 of 1 errors of dictionaries" in str(page.data["sections"][1]["lead"])
    assert {card["kind"] for card in page.data["cards"].values()} >= {"attention", "mlp"}


def test_the_data_is_what_the_reference_says(report):
    text = Path(__file__).parents[2].joinpath("docs", "json.md").read_text(encoding="utf-8")
    part = text.split("## report --data")[1]
    keys = dict(re.findall(r"^\| `(\w+)` \| (text|integer|object|list) \|", part, re.M))
    types = {"text": str, "integer": int, "object": dict, "list": list}
    assert set(keys) == set(report.data)
    for key, value in report.data.items():
        assert isinstance(value, types[keys[key]]), key
    found = {block["type"] for s in report.data["sections"] for block in s["blocks"]}
    assert {kind for kind in found if f"`{kind}`" not in part} == set()


def test_large_vocabularies_are_read_from_the_prompts_tokens(model, monkeypatch):
    """All pairs of 50,000 tokens take seconds a table; the page says which pairs it went over."""
    monkeypatch.setattr(sections_heads, "FLOPS", 0)
    page = mia.report(model, PROMPT, sections=["vocabulary"], heads=["L1H2"], progress=False)
    own = model.to_tokens(PROMPT)[0].tolist()
    frame = as_frame(blocks(page, "table")["ov-L1H2"])
    special = set(own) - set(model.text_ids.tolist())
    every = mia.circuits.ov_top(model, "L1H2", top_k=20, sources=sorted(set(own) - special)).frame
    assert list(frame["token"]) == [shown(t) for t in every["token"]]
    assert set(frame["source"]) <= {shown(t) for t in model.to_str_tokens(PROMPT)}
    assert "for the tokens of this prompt" in page.data["sections"][0]["lead"][0][0]


def test_a_pattern_keeps_what_a_colour_cannot_show():
    codes = zlib.decompress(base64.b64decode(pattern(np.array([0, 0.5, 1, 1.2, -0.3, np.nan, 1 + 1e-7]))))
    assert list(codes) == [0, SCALE // 2, SCALE, ABOVE, BELOW, NOT_A_NUMBER, SCALE]


def test_target_and_position_are_the_readers_choice(model):
    page = mia.report(model, PROMPT, target=" the", position=3, sections=["story"], progress=False)
    told = next(b for b in page.data["sections"][0]["blocks"] if b["type"] == "story")
    spans = told["sentences"][0]["spans"]
    names = model.to_str_tokens(PROMPT)
    assert spans[:4] == ["After ", {"token": names[3]}, ", the model gives ", {"token": " the"}]


def test_a_model_without_tokenizer_or_mlps(data):
    model = mia.load(data / "models" / "indhead_2l")
    page = mia.report(model, [3, 7, 9, 1, 3], progress=False)
    assert "neurons" not in [s["id"] for s in page.data["sections"]]
    assert page.data["prompt"] == ["<3>", "<7>", "<9>", "<1>", "<3>"]
    text = json.dumps(next(s for s in page.data["sections"] if s["id"] == "summary")["lead"])
    assert "The clearest induction head is" in text
    assert "L1H0" in text  # the published induction head of this model


def test_a_prompt_of_one_token_has_no_loss(model):
    page = mia.report(
        model, torch.tensor([5]), sections=["summary", "orders", "importance"], progress=False
    )
    assert "loss-by-order" not in blocks(page, "chart")
    assert "<html" in page.html()


@pytest.mark.parametrize("prompt", [[1, 2, 3, 4], [1]])
def test_a_model_without_layers(prompt):
    generator = torch.Generator().manual_seed(0)
    cfg = dict(n_layers=0, n_heads=1, d_model=16, d_head=8, n_ctx=12, d_vocab=11, d_vocab_out=11)
    cfg |= dict(normalization_type="LN", attn_only=True, act_fn=None)
    shapes = {"embed.W_E": (11, 16), "pos_embed.W_pos": (12, 16), "unembed.W_U": (16, 11)}
    shapes |= {"ln_final.w": (16,), "ln_final.b": (16,)}
    state = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    page = mia.report(mia.convert(mia.Checkpoint(cfg, state)), prompt, progress=False)
    ids = [s["id"] for s in page.data["sections"]]
    assert {"story", "summary", "orders", "paths", "glossary"} <= set(ids)
    assert not {"heads", "patterns", "composition", "neurons", "graph"} & set(ids)
    assert "It has no heads: the token alone decides" in page.html()
    assert "Not shown" not in page.html()
    assert page.data["checks"]["failed"] == 0


def test_composition_is_that_of_the_weights(report, model):
    exact = mia.circuits.composition(model, "K", src="attention", dst="attention")
    table = as_frame(blocks(report, "table")["pairs-K"])
    np.testing.assert_allclose(table["score"], exact.top(200)["score"], rtol=1e-5)
    picture = blocks(report, "matrix")["composition-K"]
    codes = np.frombuffer(zlib.decompress(base64.b64decode(picture["values"])), np.uint8)
    drawn = np.where(codes == NOT_A_NUMBER, np.nan, codes / SCALE * picture["top"]).reshape(4, 4)
    above = exact.frame.assign(above=exact.frame["score"] - exact.frame["baseline"])
    expected = above.pivot(index="src", columns="dst", values="above").loc[
        picture["rows"], picture["columns"]
    ]
    assert (expected < 0).any(axis=None)  # drawn as 0
    np.testing.assert_allclose(drawn, expected.clip(lower=0), atol=0.5 * picture["top"] / SCALE + 1e-6)


def test_a_failed_check_is_on_the_front(report):
    data = json.loads(json.dumps(report.data))
    data["checks"] = {"passed": 9, "failed": 1}
    assert "1 of 10 arithmetic checks FAILED" in mia.Report(data).html()


def test_every_receipt_is_in_one_table(report):
    rows = as_frame(blocks(report, "table")["receipts"])
    passed = {
        (r["of"], c["name"]) for s in report.data["sections"] for r in s["receipts"] for c in r["checks"]
    }
    assert set(zip(rows["result"], rows["check"], strict=True)) == passed
    assert set(rows["ok"]) == {"✓ passed"}


def test_headline_numbers_carry_their_check(report):
    summary = next(s for s in report.data["sections"] if s["id"] == "summary")
    items = {i["name"]: i for b in summary["blocks"] if b["type"] == "facts" for i in b["items"]}
    checked = ["Next token", "Largest direct effect", "Loss on the prompt", "Best induction head"]
    for name in [*checked, "Conversion error"]:
        assert items[name]["check"]["ok"], name
    assert items["Conversion error"]["check"]["error"] <= items["Conversion error"]["check"]["tolerance"]


def test_heads_that_were_asked_for_come_first(model):
    page = mia.report(
        model, PROMPT, sections=["patterns", "vocabulary"], heads=["L1H2", "L0N7"], progress=False
    )
    groups = blocks(page, "patterns")["patterns"]["groups"]
    assert [g["heads"][0]["head"] for g in groups] == ["L1H2", "L0N7"]
    tables = blocks(page, "table")
    assert {"ov-L1H2", "qk-L1H2", "ov-neurons"} == set(tables)
    exact = mia.circuits.reads_and_writes(model, ["L0N7"], top_k=6)
    assert tables["ov-neurons"]["data"]["tokens_raises"] == [
        [shown(t) for t in exact.tokens("L0N7", "raises")]
    ]
    with pytest.raises(MechInterpError, match="L9H9"):
        mia.report(model, PROMPT, heads=["L9H9"], progress=False)


def test_glossary_links_only_to_published_docs(model, monkeypatch):
    from mechinterp_attn.view.report import sections_glossary

    for site in (None, "https://docs.example.org"):
        monkeypatch.setattr(sections_glossary, "documentation", lambda site=site: site)
        page = mia.report(model, PROMPT, sections=["glossary"], progress=False)
        words = page.data["sections"][0]["blocks"][0]["words"]
        assert words["Order"]["links"][0]["url"] == (site and f"{site}/paths.html")
        assert ("docs.example.org" in page.html()) == bool(site)


def test_every_page_of_the_glossary_exists():
    docs = Path(__file__).parents[2] / "docs"
    assert all((docs / f"{page}.md").is_file() for _, page, _ in GLOSSARY.values())


def test_a_long_graph_draws_the_tokens_that_matter(model):
    from mechinterp_attn.view import graph as picture

    graph = mia.paths.attribution_graph(mia.paths.freeze(model, PROMPT))
    everything = picture.graph_data(graph)
    assert everything["columns"] == list(range(len(graph.tokens)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(picture, "TOKENS", 2)
        few = picture.graph_data(graph)
    assert sum(n["kind"] == "token" for n in few["nodes"]) == 2
    assert set(few["columns"]) == {n["position"] for n in few["nodes"] if n["position"] is not None}
    assert "2 of" in few["note"]
    for data in (everything, few):  # what is not drawn is said, node by node
        into = {n["id"]: n["rest"] for n in data["nodes"]}
        for target, weight in zip(data["edges"]["target"], data["edges"]["weight"], strict=True):
            into[data["nodes"][target]["id"]] += weight
        for n in data["nodes"]:
            if n["kind"] in ("attention", "mlp", "logit"):  # weights have four digits
                assert into[n["id"]] == pytest.approx(n["value"], abs=2e-3)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("[]", "not the data of a report"),
        ('{"format": "mechinterp_attn.report", "version": 99}', "format 99, but this release reads 4"),
    ],
)
def test_other_files_are_no_reports(tmp_path, text, message):
    file = tmp_path / "other.json"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(MechInterpError, match=message):
        mia.Report.load(file)


def test_paths_and_graph_are_those_of_the_analyses(report, model):
    frozen = mia.paths.freeze(model, PROMPT)
    exact = mia.paths.top_paths(frozen, top_k=30, max_expansions=200, progress=False).frame
    table = as_frame(blocks(report, "table")["top-paths"])
    np.testing.assert_allclose(table["contribution"], exact["contribution"], rtol=1e-5)
    nodes = as_frame(blocks(report, "table")["graph-nodes"])
    graph = mia.paths.attribution_graph(frozen)
    assert set(nodes["label"]) == {shown(x) for x in graph.nodes.query("kind != 'score'")["label"]}


def test_a_part_that_cannot_be_had_leaves_the_rest(report, model, monkeypatch):
    def refuse(study):
        raise MechInterpError("no <i>such</i> thing")

    monkeypatch.setitem(SECTIONS, "heads", refuse)
    page = mia.report(model, PROMPT, sections=["heads", "fidelity"], progress=False)
    assert [s["id"] for s in page.data["sections"]] == ["heads", "fidelity"]
    assert "no &lt;i&gt;such&lt;/i&gt; thing" in page.html()


def test_the_page_holds_no_address_and_one_policy(report):
    html = report.html()
    assert "<b>&amp;" not in html  # the model's name, escaped
    assert "tiny &lt;b&gt;&amp;amp; random" in html
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)[1]
    assert "default-src &#39;none&#39;" in policy
    assert "unsafe" not in policy
    html = re.sub(r'<script type="text/plain" id="circuitsvis">.*?</script>', "", html, flags=re.S)
    hosts = set(re.findall(r"https?://[^\s\"'<)]+", html))
    papers = {url for _, _, source in GLOSSARY.values() if source for url in source[1:]}
    assert hosts <= {"http://www.w3.org/2000/svg"} | papers  # a name space, and links to follow by hand


def test_same_input_same_data(report, model):
    names = ["story", "summary", "heads", "patterns", "graph"]
    again = mia.report(model, PROMPT, sections=names, progress=False)
    assert again.data["sections"] == [s for s in report.data["sections"] if s["id"] in names]


def test_in_a_notebook_the_page_stands_in_a_frame_of_its_own(report):
    frame = report._repr_html_()
    assert frame.startswith("<iframe srcdoc=")
    assert "allow-same-origin" not in frame


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" the", " the"),
        ("\n", "↵"),
        ("a\tb", "a⇥b"),
        ("\u202eabc", "⟨U+202E⟩abc"),
        ("\u2028", "⟨U+2028⟩"),
        ("\ud800", "⟨U+D800⟩"),
        ("\xa0", "⟨U+00A0⟩"),
        ("<b>", "<b>"),
    ],
)
def test_nothing_invisible_is_printed(text, expected):
    assert shown(text) == expected


def test_json_that_cannot_end_its_block():
    data = {"</script>": ["<!--<script>", "&", "\u2028", "\ud800"]}
    text = inert_json(data)
    assert not set("<>&") & set(text)
    assert text.isascii()
    assert json.loads(text) == data


def test_numbers_that_json_has_no_name_for():
    assert [number(x) for x in (float("nan"), float("inf"), -float("inf"), None)] == [
        "nan",
        "inf",
        "-inf",
        None,
    ]
    assert number(1 / 3) == 0.333333


@pytest.mark.parametrize(
    ("prompt", "options", "message"),
    [
        ("", {}, "empty"),
        ("word " * 80, {}, "more than this model's context of 64"),
        (PROMPT, {"target": " two words here"}, "tokens, not one"),
        (PROMPT, {"position": 99}, "outside the prompt"),
        (PROMPT, {"preset": "everything"}, "no preset 'everything'; there are overview"),
        (PROMPT, {"sections": ["hedas"]}, "no section .*hedas.* story, circuit"),
    ],
)
def test_bad_input_is_named(model, prompt, options, message):
    with pytest.raises(MechInterpError, match=message):
        mia.report(model, prompt, progress=False, **options)
