"""Text from outside is never markup; what it says reads as itself. And the page is usable by everyone."""

import copy
import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.core.text import shown
from mechinterp_attn.view.charts import Matrix
from mechinterp_attn.view.report.blocks import (
    column,
    fact,
    matrix,
    pattern,
    patterns,
    section,
    table,
    token,
)

HOSTILE = [
    "</script>",
    "<!--<script>",
    "<script>document.title = 'owned'</script>",
    "<img src=x onerror=\"document.title='owned'\">",
    "<svg/onload=alert(1)>",
    "\"><iframe src='javascript:alert(1)'></iframe>",
    "javascript:alert(1)",
    "{{ 7 * 7 }}",
    "</style><style>*{display:none}</style>",
    "</title><script>alert(1)</script>",
    "]]>",
    "&lt;b&gt; &amp;",
    "https://example.invalid/x.png",
    "url(https://example.invalid/y.png)",
    "\u2028 \u2029",
    "\u202egnp.exe\u202c",
    "\u2066\u2069\u200f",
    "\ud800",
    "\udfff\ud800",
    "\x00\x1b[31m",
    "=cmd|'/c calc'!A1",
    "\ufeff",
    "x \u00a0 \u200b",
    "__proto__",
]


def lead_of(texts):
    return [token(t) for t in texts]


def hostile_report(report):
    """The report with every text in it replaced by hostile ones, wherever a token or label can stand."""
    data = copy.deepcopy(report.data)
    for key in ("title", "model", "software"):
        data[key] = shown(" ".join(HOSTILE))
    data["prompt"] = [shown(t) for t in HOSTILE]
    n = len(HOSTILE)
    weights = np.tril(np.ones((n, n + 1))) / n
    groups = [(kind, HOSTILE[2], {t: (t, weights) for t in HOSTILE}) for kind in ("attention", "mlp")]
    rows = pd.DataFrame({"token": HOSTILE, "head": HOSTILE, "text": HOSTILE, "kind": HOSTILE}, dtype=object)
    rows["tokens"] = [HOSTILE] * n
    columns = [
        column("token", HOSTILE[0], "token", HOSTILE[3]),
        column("head", "Head", "head"),
        column("text", "Text", "text"),
        column("kind", "Kind", "kind"),
        column("tokens", HOSTILE[3], "tokens"),
    ]
    blocks = [
        {"type": "prompt", "tokens": data["prompt"], "ids": list(range(n))},
        patterns("patterns", HOSTILE, groups, caption=HOSTILE[2], circuitsvis=True),
        table("hostile", HOSTILE[2], rows, columns, filters=("head", "kind"), rows=len(HOSTILE)),
        {
            "type": "chart",
            "id": HOSTILE[3],
            "caption": HOSTILE[2],
            "kind": "bars",
            "labels": data["prompt"],
            "series": [
                {"name": HOSTILE[1], "kind": "mlp", "values": [1.0, "nan", "inf"] + [-0.5] * (n - 3)},
                {"name": HOSTILE[3], "kind": HOSTILE[2], "values": [0.5] * n},
            ],
            "value": HOSTILE[0],
        },
        {
            "type": "facts",
            "items": [fact(shown(t), t, t, receipt=Receipt((Check(shown(t), 0.0, 1.0),))) for t in HOSTILE],
        },
        {
            "type": "words",
            "words": {
                shown(t): {"meaning": shown(t), "links": [{"text": shown(t), "url": None}]} for t in HOSTILE
            },
        },
        matrix(
            "matrix",
            Matrix(
                HOSTILE[2], tuple(HOSTILE), tuple(HOSTILE), np.eye(n), (HOSTILE[0], HOSTILE[3]), HOSTILE[1]
            ),
        ),
    ]
    graph = next(b for s in report.data["sections"] for b in s["blocks"] if b["type"] == "graph")
    graph = json.loads(json.dumps(graph))
    graph["graph"]["title"] = graph["graph"]["note"] = shown(HOSTILE[2])
    for i, node in enumerate(graph["graph"]["nodes"]):
        node["label"] = shown(HOSTILE[i % n])
    graph["graph"]["scores"] = [
        {
            "head": n["id"],
            "label": shown(HOSTILE[3]),
            "value": 1.0,
            "moves": 1.0,
            "query": [[0, 1.0]],
            "key": [],
        }
        for n in graph["graph"]["nodes"]
    ]
    graph["graph"]["tokens"] = [shown(HOSTILE[i % n]) for i in range(len(graph["graph"]["tokens"]))]
    texts = data["prompt"]
    told = [
        {"spans": [*lead_of(HOSTILE), {"head": shown(t)}], "test": shown(t), "see": shown(t)}
        for t in HOSTILE
    ]
    arc = {
        "from": n - 1,
        "to": 1,
        "label": shown(HOSTILE[2]),
        "weight": 0.5,
        "kind": "brings",
        "title": texts[0],
    }
    blocks += [
        {"type": "circuit", "id": "wires", "caption": texts[2], "rows": [texts[:2], texts[2:4]],
         "edges": [{"from": texts[0], "to": texts[2], "mode": "K", "weight": 1.0, "title": texts[3]}]},
        {"type": "story", "id": "told", "sentences": told},
        {"type": "arcs", "id": "arcs", "caption": texts[2], "tokens": texts, "position": n - 1,
         "answer": texts[0], "p": texts[3], "arcs": [arc]},
    ]  # fmt: skip
    card = copy.deepcopy(next(c for c in report.data["cards"].values() if c["kind"] == "attention"))
    card |= {
        "weights": pattern(weights),
        "way": texts[2],
        "looks": [[i, 0.1, 0.1] for i in range(n)],
        "raises": [[t, 1.0] for t in texts],
        "lowers": [[t, -1.0] for t in texts],
        "partners": [["K", "reads", t, 5.0] for t in texts],
        "passages": [{"before": t, "token": t, "after": t} for t in texts],
    }
    data["cards"] = dict.fromkeys(texts, card)
    lead = [lead_of(HOSTILE)]
    data["sections"] = [section("hostile", shown(HOSTILE[0]), lead, [*blocks, graph], {})]
    return mia.Report(data)


def test_hostile_text_is_only_text(report, watched, tmp_path):
    page = watched.open(hostile_report(report).save(tmp_path / "hostile.html"))
    assert page.title().split() == shown(" ".join(HOSTILE)).split()  # nobody renamed the page
    assert page.locator("main :is(img, iframe, script, style, object, embed), body > img").count() == 0
    assert page.locator("main [onerror], main [onload]").count() == 0
    read = page.locator("#table-hostile td:nth-child(1)").all_inner_texts()
    # trim: a table cell's inner text ends in no space of its own
    assert [r.strip() for r in read] == [shown(t).strip() for t in HOSTILE]
    for name in page.locator(".story [data-head]").all()[:3]:
        name.click()
        dialog = page.locator("dialog#card")
        watched.wait_until(lambda: dialog.locator(".heatmap").count() == 1)  # noqa: B023
        assert dialog.locator(":is(img, iframe, script, style, object, embed)").count() == 0
        assert dialog.locator("[data-head]").all_text_contents() == [shown(t) for t in HOSTILE]
        dialog.press("Escape")
    page.get_by_text("heads in CircuitsVis").click()
    page.wait_for_selector("#circuitsvis-mlp canvas", timeout=90_000)
    assert page.locator(".circuitsvis :is(img, iframe, script, style)").count() == 0
    assert watched.requests == []
    assert watched.dialogs == []
    assert [e for e in watched.errors if "WebGL" not in e] == []


def test_every_token_of_gpt2_reads_as_itself(watched, data, report, tmp_path):
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(data / "tokenizers" / "gpt2" / "tokenizer.json"))
    n = tokenizer.get_vocab_size()
    texts = [tokenizer.decode([i], skip_special_tokens=False) for i in range(n)]
    expected = [shown(t) for t in texts]
    rows = pd.DataFrame({"token": texts, "token_id": range(n)})
    columns = [column("token", "Token", "token"), column("token_id", "Id", "id")]
    block = table("vocabulary", "All", rows, columns, rows=2000)
    page_data = report.data | {"sections": [section("all", "All", [], [block], {})]}
    page = watched.open(mia.Report(page_data).save(tmp_path / "all.html"))
    cells = "Array.from(document.querySelectorAll('#table-vocabulary td:first-child'), n => n.textContent)"
    read = page.evaluate(cells)
    while page.get_by_role("button", name="Next").is_enabled():
        page.get_by_role("button", name="Next").dispatch_event("click")
        read += page.evaluate(cells)
    assert ["" if r == "–" and not e else r for r, e in zip(read, expected, strict=True)] == expected
    kinds = page.evaluate("[...new Set(Array.from(document.querySelectorAll('main *'), n => n.localName))]")
    assert not {"img", "iframe", "script", "style", "object", "embed"} & set(kinds)
    watched.assert_quiet()


def test_what_is_no_number_is_drawn_as_such(report, watched, tmp_path):
    weights = np.full((3, 4), 0.25)
    weights[1, 0], weights[2, 0], weights[2, 1] = np.nan, 1.5, -0.5
    group = ("attention", "Heads", {"L0H0": ("odd", weights)})
    frame = pd.DataFrame({"value": [1.0, float("nan"), float("inf"), -float("inf")]})
    data = report.data | {"prompt": ["a", "b", "c"]}
    data["sections"] = [
        section("odd", "Odd", [], [
            patterns("patterns", ["a", "b", "c"], [group]),
            table("odd", "Odd", frame, [column("value", "Value", "signed")]),
        ], {})
    ]  # fmt: skip
    page = watched.open(mia.Report(data).save(tmp_path / "odd.html"))
    assert page.locator("#table-odd td").all_inner_texts() == ["+1.000", "× NaN", "∞", "−∞"]
    page.locator("#table-odd th button").click()
    assert page.locator("#table-odd td").all_inner_texts() == ["∞", "+1.000", "−∞", "× NaN"]  # NaN last
    titles = page.locator(".panel .strip li").evaluate_all("(nodes) => nodes.map((n) => n.title)")
    assert [t.split(": ")[1] for t in titles] == ["> 1", "< 0", "0.25", "0.25"]
    assert page.locator(".heatmap .odd").all_text_contents() == [
        "×",
        "+",
        "−",
    ]  # and crossed out where drawn
    watched.assert_quiet()


@pytest.fixture(scope="module")
def presets(report, model):
    from tests.view.conftest import PROMPT

    made = {
        name: mia.report(model, PROMPT, preset=name, progress=False) for name in ("induction", "prediction")
    }
    beside = mia.report(model, PROMPT, sections=["summary"], compare=model, progress=False)
    return {"overview": report, "comparison": beside, **made}


@pytest.mark.parametrize(
    ("preset", "width"),
    [
        ("overview", 390),
        ("overview", 1280),
        ("induction", 1280),
        ("prediction", 1280),
        ("comparison", 1280),
    ],
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(presets, preset, chromium, tmp_path, scheme, width):
    """axe-core's rules, contrast AA included. It is put in by the test; the page's policy forbids it."""
    context = chromium.new_context(
        color_scheme=scheme, viewport={"width": width, "height": 900}, bypass_csp=True
    )
    page = context.new_page()
    page.goto(presets[preset].save(tmp_path / "report.html").as_uri())
    page.wait_for_selector("html[data-ready]", state="attached")
    page.locator("#unfold").click()
    page.evaluate("drawIn(document)")
    for summary in page.locator("details:not(.fold):not(:has(.circuitsvis)) > summary").all():
        if "CircuitsVis" not in summary.inner_text():
            summary.click()
    page.add_script_tag(path=Path(__file__).parent / "vendor" / "axe.min.js")
    found = page.evaluate("axe.run(document, { resultTypes: ['violations'] })")["violations"]
    page.evaluate("openCard(Object.keys(report.cards)[0])")  # and with a card on top
    page.wait_for_selector("dialog .heatmap, dialog .strip")
    found += page.evaluate("axe.run('dialog', { resultTypes: ['violations'] })")["violations"]
    context.close()
    serious = [
        f"{v['id']}: {v['help']}: {[n['target'] for n in v['nodes']][:4]}"
        for v in found
        if v["impact"] in ("serious", "critical")
    ]
    assert serious == []
