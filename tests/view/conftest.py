"""A small model that speaks with the bundled tokenizer, a report of it, and a browser cut off from the
network."""

import os
import shutil
from importlib.resources import files

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import tiny_bridge

PROMPT = "It was the best of times, it was the"


@pytest.fixture(scope="session")
def tokenizer():
    from mechinterp_attn.sources.tokenizer import read_tokenizer

    return read_tokenizer(
        files("mechinterp_attn") / "sources" / "weights" / "tokenizer.json", "<|endoftext|>"
    )


@pytest.fixture(scope="session")
def model(tokenizer):
    """Random weights: 8 attention heads and 48 MLP-derived ones over the bundled vocabulary."""
    bridge = tiny_bridge(torch.float32, d_vocab=len(tokenizer), n_ctx=64, d_model=32, d_head=8, d_mlp=24)
    converted = mia.convert(bridge)
    converted.tokenizer = tokenizer
    converted.provenance["name"] = "tiny <b>&amp; random"  # a name is text too
    return converted


@pytest.fixture(scope="session")
def report(model):
    return mia.report(model, PROMPT, progress=False)


@pytest.fixture(scope="session")
def chromium():
    """A headless Chromium, or the reason why there is none."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("MECHINTERP_ATTN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no Chromium found; install it or set MECHINTERP_ATTN_CHROMIUM to its path")
    args = ["--headless", "--no-sandbox", "--no-first-run", "--disable-gpu", "--disable-quic"]
    args += ["--disable-background-networking", "--disable-component-update", "--disable-sync"]
    with sync_api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=path, args=args)
        yield browser
        browser.close()


class Watched:
    """A page, and all that it must not do: ask a host, log an error, run what it was handed."""

    def __init__(self, page):
        self.page = page
        self.requests, self.errors, self.dialogs = [], [], []
        page.context.set_offline(True)
        page.route("**/*", self._route)
        page.on("console", lambda m: self.errors.append(m.text) if m.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("dialog", self._dialog)

    def _route(self, route):
        if route.request.url.startswith(("file://", "blob:", "data:")):
            route.continue_()
        else:
            self.requests.append(route.request.url)
            route.abort()

    def _dialog(self, dialog):
        self.dialogs.append(dialog.message)
        dialog.dismiss()

    def open(self, path, *, folded=False):
        """Open a page, with all its sections unfolded."""
        self.page.goto(path.as_uri())
        self.page.wait_for_selector("html[data-ready]", state="attached")
        if folded:
            return self.page
        if self.page.locator(".fold:not([open])").count():
            self.page.locator("#unfold").click()
        self.page.evaluate("typeof drawIn === 'undefined' || drawIn(document)")  # the graph alone has none
        self.page.wait_for_function(
            "document.querySelectorAll(':is(.patterns, .matrix):not([data-ready])').length === 0"
        )
        return self.page

    def wait_until(self, holds, seconds=20):
        """Wait for what a page does in its own time: `holds` is asked again until it is true."""
        for _ in range(20 * seconds):
            if holds():
                return
            self.page.wait_for_timeout(50)
        raise AssertionError(f"did not come true in {seconds} seconds")

    def assert_quiet(self):
        assert self.requests == []
        assert self.errors == []
        assert self.dialogs == []


@pytest.fixture
def watched(chromium):
    page = chromium.new_page(viewport={"width": 1280, "height": 900})
    yield Watched(page)
    page.close()
