"""The explorer: what its addresses answer, whom they refuse, and the page in a browser."""

import json
import signal
import socket
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

import mechinterp_attn as mia
import mechinterp_attn.explore
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.text import shown
from mechinterp_attn.explore import app, serve, session
from tests.conftest import tiny_bridge

KEY = "key"
PROMPT = "It was the best of times, it was the"


@pytest.fixture(scope="module")
def client(model):
    from starlette.testclient import TestClient

    return TestClient(app(model, KEY, name="tiny <b>"), base_url="http://127.0.0.1")


def asked(client, what, **question):
    return client.post(f"/{KEY}/{what}", json={"prompt": PROMPT, **question})


def test_a_prediction_is_the_models(client, model):
    got = asked(client, "predict", position=-2).json()
    logits = model(PROMPT)[0, -2].double()
    top = logits.topk(6)
    assert [row["token"] for row in got["rows"]] == [shown(t) for t in model.to_str_tokens(top.indices)]
    expected = logits.softmax(-1)[top.indices].tolist()
    assert [row["before"] for row in got["rows"]] == pytest.approx(
        expected, rel=1e-4
    )  # float32, other order
    assert got["tokens"] == model.to_readable_tokens(PROMPT)
    assert got["position"] == len(got["tokens"]) - 2
    frame = mia.paths.logit_attribution(model, PROMPT, position=-2).frame
    heads = frame[frame["kind"].isin(("attention", "mlp"))].sort_values("value", key=abs, ascending=False)
    assert [head["head"] for head in got["heads"]] == heads["head"].head(24).tolist()


def test_an_edit_is_what_intervene_says(client, model):
    other = PROMPT.replace("best", "worst")
    other = PROMPT if len(model.to_tokens(other)[0]) != len(model.to_tokens(PROMPT)[0]) else other
    edits = [
        {"heads": "L0H1"},
        {"heads": "L1N1, L1N3", "scale": 2, "position": 3},
        {"heads": "L1H0", "source": other},
    ]
    got = asked(client, "edit", edits=edits).json()
    found = mia.causal.intervene(
        model,
        PROMPT,
        [mia.causal.Edit(**(edit | {"heads": edit["heads"].split(", ")})) for edit in edits],
        top_k=6,
    )
    assert [row["token_id"] for row in got["rows"]] == found.frame["token_id"].tolist()
    assert [row["after"] for row in got["rows"]] == found.frame["after"].tolist()
    assert got["ok"]


def test_a_story_is_kept_for_a_while(client, monkeypatch):
    monkeypatch.setattr(session, "STORY", ("provenance",))
    monkeypatch.setattr(session, "STORIES", 1)
    first, last = (asked(client, "story", prompt=text).json()["id"] for text in (PROMPT, "of times"))
    page = client.get(f"/{KEY}/story/{last}")
    assert 'id="provenance"' in page.text
    policy = page.headers["content-security-policy"]
    assert policy.startswith("sandbox allow-scripts")
    assert "allow-same-origin" not in policy  # a story has no origin, and can ask the explorer nothing
    assert client.get(f"/{KEY}/story/{first}").status_code == 404


def test_only_the_key_opens_and_only_from_this_machine(client):
    page = client.get(f"/{KEY}/")
    assert page.status_code == 200
    assert "tiny &lt;b&gt;" in page.text
    assert "script-src 'sha256-" in page.headers["content-security-policy"]
    assert page.headers["referrer-policy"] == "no-referrer"  # the key is in the address
    for path in (
        "/",
        "/other/",
        "/other/predict",
        f"/{KEY}/../",
        f"/{KEY}/etc/passwd",
        f"/{KEY}/story/..%2f..%2fx",
    ):
        assert client.get(path).status_code in (404, 405), path
    rebound = client.get(f"/{KEY}/", headers={"host": "evil.example"})
    assert rebound.status_code == 400


@pytest.mark.parametrize(
    ("what", "body", "message"),
    [
        ("predict", "nonsense", "not JSON"),
        ("predict", {}, "prompt: Field required"),
        ("predict", {"prompt": ""}, "no tokens|empty"),
        ("predict", {"prompt": PROMPT, "position": 99}, "position 99"),
        ("predict", {"prompt": PROMPT, "file": "/etc/passwd"}, "file: Extra inputs are not permitted"),
        ("predict", {"prompt": "a" * 2**21}, "larger than"),
        ("edit", {"prompt": PROMPT, "edits": []}, "no edits"),
        ("edit", {"prompt": PROMPT, "edits": [{"heads": "L9H9"}]}, "no head L9H9"),
        ("edit", {"prompt": PROMPT, "edits": [{"heads": "L0H0", "source": "a"}]}, "same length"),
        ("edit", {"prompt": PROMPT, "edits": [{"heads": "L0H0"}] * 65}, "at most 64"),
        ("story", {"prompt": "\ud800"}, "unicode string"),
    ],
)  # fmt: skip
def test_a_bad_question_is_one_line(as_users_run_it, client, what, body, message):
    content = body if isinstance(body, str) else json.dumps(body)
    answer = client.post(f"/{KEY}/{what}", content=content)
    assert answer.status_code == 400
    error = answer.json()["error"]
    assert any(part in error for part in message.split("|")), error
    assert "\n" not in error


def test_a_bug_is_told_to_the_terminal_not_to_the_page(client, monkeypatch, capsys):
    monkeypatch.setattr(session.causal, "intervene", lambda *args, **kwargs: 1 / 0)
    answer = asked(client, "edit", edits=[{"heads": "L0H1"}])
    assert answer.status_code == 500
    assert answer.json() == {"error": "this is a bug; the terminal says more"}
    assert "ZeroDivisionError" in capsys.readouterr().err


def test_refusals_before_it_listens(model):
    with pytest.raises(MechInterpError, match="has no tokenizer"):
        serve(mia.convert(tiny_bridge()), ready=pytest.fail)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        with pytest.raises(MechInterpError, match=r"port \d+ of 127.0.0.1 cannot be used"):
            serve(model, port=taken.getsockname()[1], ready=pytest.fail)


def test_without_the_extra_it_says_which(model, monkeypatch):
    monkeypatch.setitem(sys.modules, "mechinterp_attn.explore.web", None)
    monkeypatch.delattr(mechinterp_attn.explore, "web")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    with pytest.raises(MechInterpError, match=r"pip install 'mechinterp_attn\[explore\]'"):
        app(model, KEY)


@pytest.fixture(scope="module")
def address():
    """A bundled model, served as a user does it; Ctrl-C ends it."""
    command = [
        sys.executable,
        "-c",
        "from mechinterp_attn.cli import main; main()",
        "explore",
        "gelu-2l",
        PROMPT,
        "--quiet",
    ]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as server:
        yield server.stdout.readline().strip()
        server.send_signal(signal.SIGINT)
        _, errors = server.communicate(timeout=60)
        assert (server.returncode, errors) == (0, "")


def test_served_on_loopback_under_a_fresh_key(address):
    assert address.startswith("http://127.0.0.1:")
    assert len(address.rstrip("/").rsplit("/", 1)[1]) >= 20
    with urllib.request.urlopen(address) as page:
        assert page.status == 200


def test_cutting_a_head_from_its_card_changes_the_prediction(address, chromium):
    """As a person does it: read, open a card in the story, cut the head, scale it, undo."""
    from playwright.sync_api import expect

    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    errors = []
    page.on("console", lambda m: errors.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(address)
    rows = page.locator("#prediction tbody tr")
    rows.nth(0).wait_for()
    plain = page.locator("#said").inner_text()
    story = page.frame_locator("#frame")
    story.locator("html[data-ready]").wait_for(state="attached")
    if story.locator("#unfold").count():
        story.locator("#unfold").click()
    story.locator("button[data-head='L0H2']").first.click()
    story.locator("#card .cut").click()
    page.locator("#edits li").wait_for()
    page.locator("#receipt", has_text="ok:").wait_for()
    own = mia.load("gelu-2l")
    found = mia.causal.intervene(own, PROMPT, mia.causal.Edit("L0H2"), top_k=6).frame
    row = found.loc[found["before"].idxmax()]
    shown = page.locator("#said strong").nth(1).inner_text().removesuffix(" %")
    assert float(shown) == pytest.approx(100 * row["after"], rel=0.06)  # shown with two digits
    page.locator("#edits input[type=range]").fill("2")
    page.locator("#receipt", has_text="L0H2 times 2").wait_for()
    page.locator("#edits .remove").click()
    expect(page.locator("#said")).to_have_text(plain, use_inner_text=True, timeout=30_000)
    expect(page.locator("#receipt")).to_be_empty()
    assert errors == []
    page.close()


def test_a_prompt_of_markup_is_text(address, chromium):
    hostile = "<img src=x onerror=alert(1)></textarea><script>alert(2)</script>"
    from playwright.sync_api import expect

    page = chromium.new_page()
    dialogs = []
    page.on("dialog", lambda dialog: (dialogs.append(dialog.message), dialog.dismiss()))
    page.goto(address)
    page.locator("#prediction tbody tr").nth(0).wait_for()
    page.locator("#prompt").fill(hostile)
    page.locator("#ask button[type=submit]").click()
    n = len(mia.load("gelu-2l").to_tokens(hostile)[0])
    expect(page.locator("#at option")).to_have_count(
        n, timeout=30_000
    )  # the first story is still being written
    page.locator("#head").fill("<b>L0H1</b>")
    page.locator("#head").press("Enter")
    page.locator("#error", has_text="<b").wait_for()
    page.frame_locator("#frame").locator("html[data-ready]").wait_for(state="attached")
    assert dialogs == []
    assert page.locator(".desk img, #edits b").count() == 0
    page.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_axe_finds_no_serious_violation(address, chromium, scheme):
    context = chromium.new_context(color_scheme=scheme, bypass_csp=True)  # axe is put in by the test
    page = context.new_page()
    page.goto(address)
    page.locator("#prediction tbody tr").nth(0).wait_for()
    page.locator("#heads button").first.click()
    page.locator("#receipt", has_text="ok:").wait_for()
    page.add_script_tag(path=Path(__file__).parent / "vendor" / "axe.min.js")
    found = page.evaluate("axe.run('.desk', { resultTypes: ['violations'] })")["violations"]
    context.close()
    serious = [f"{v['id']}: {v['help']}" for v in found if v["impact"] in ("serious", "critical")]
    assert serious == []
