"""Size and speed of a report in GPT-2-small shape with random weights, driven in headless Chromium.

Run: python benchmarks/bench_report.py --tokenizer gpt2/tokenizer.json [--out report.html]
     python benchmarks/bench_report.py --small --tokens 1024   (a long prompt, a model of 4 layers)
     python benchmarks/bench_report.py --page report.html   (only the browser, on a page that is there)

Making it: seconds and memory, section by section. Opening it: the file is read offline by a Chromium that
starts anew; first view is when text is on the screen (first contentful paint), ready is when tables,
patterns and graph answer. Then the table of all heads is sorted and filtered, a pattern is walked, and
the page is scrolled from top to bottom. Without ``--tokenizer`` tokens are named by their ids.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from memory import Resident
from transformer_lens import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import mechinterp_attn as mia
from mechinterp_attn.sources.tokenizer import read_tokenizer
from mechinterp_attn.view.report import presets

SHAPE = dict(d_model=768, d_head=64, n_heads=12, n_layers=12, n_ctx=1024, d_vocab=50257, d_mlp=3072)
SMALL = dict(d_model=256, d_head=32, n_heads=8, n_layers=4, n_ctx=1024, d_vocab=8192, d_mlp=1024)
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, "
LIMITS = {"size": 8 * 10**6, "view": 2.0}  # bytes and seconds that a page of 64 tokens must keep


def model(shape: dict[str, int], tokenizer: Path | None) -> mia.AttentionOnlyModel:
    torch.manual_seed(0)
    config = TransformerBridgeConfig(**shape, act_fn="gelu_new", normalization_type="LN", seed=0)
    bridge = TransformerBridge.boot_native(config).eval()
    with torch.no_grad():  # residual streams and patterns with some structure in them
        for name, parameter in bridge.named_parameters():
            if parameter.ndim > 1:
                starts = "embed" in name or name.startswith("pos")
                parameter.normal_(std=1.0 if starts else parameter.shape[-1] ** -0.5)
    converted = mia.convert(bridge, check=False)
    converted.provenance["name"] = f"random weights, {shape['n_layers']} layers of width {shape['d_model']}"
    if tokenizer is not None:
        converted.tokenizer = read_tokenizer(tokenizer, "<|endoftext|>")
    return converted


def prompt(net: mia.AttentionOnlyModel, n: int) -> torch.Tensor:
    if net.tokenizer is None:
        return torch.randint(net.spec.d_vocab, (n,), generator=torch.Generator().manual_seed(0))
    ids = net.tokenizer(TEXT * (n // 16 + 1))["input_ids"]
    return torch.tensor(ids[:n])


def make(net: mia.AttentionOnlyModel, n: int, out: Path) -> None:
    def timed(name: str, maker: Any) -> Any:
        def run(study: Any) -> Any:
            start = time.perf_counter()
            try:
                return maker(study)
            finally:
                print(f"    {name:12} {time.perf_counter() - start:6.1f} s", flush=True)

        return run

    for name, maker in list(presets.SECTIONS.items()):
        presets.SECTIONS[name] = timed(name, maker)
    tokens = prompt(net, n)
    with Resident() as peak:
        start = time.perf_counter()
        report = mia.report(net, tokens, progress=False)
        made = time.perf_counter() - start
        report.save(out)
        spent = time.perf_counter() - start
    print(
        f"made in {made:.1f} s, written in {spent - made:.1f} s; "
        f"memory {peak.before / 2**30:.2f} GiB before, {peak.most / 2**30:.2f} GiB at most "
        f"(+{peak.extra / 2**30:.2f}); peak of the process "
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.2f} GiB"
    )


def in_browser(page_file: Path, rounds: int = 3) -> dict[str, float]:
    """Medians over a few fresh browsers; nothing where there is no playwright or no Chromium."""
    try:
        from playwright.sync_api import sync_playwright
    except ImportError:
        print("playwright is not installed: the page is not opened")
        return {}
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("MECHINTERP_ATTN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        print("no Chromium found (MECHINTERP_ATTN_CHROMIUM may name it): the page is not opened")
        return {}
    args = ["--headless", "--no-sandbox", "--disable-gpu"]
    rows = []
    with sync_playwright() as playwright:
        for _ in range(rounds):
            browser = playwright.chromium.launch(executable_path=path, args=args)
            page = browser.new_page(viewport={"width": 1280, "height": 900})
            page.context.set_offline(True)
            rows.append(_drive(page, page_file))
            browser.close()
    return {name: statistics.median(row[name] for row in rows) for name in rows[0]}


PAINT = """new Promise(done => new PerformanceObserver(list => {
    const found = list.getEntriesByName('first-contentful-paint');
    if (found.length) done(found[0].startTime / 1000);
}).observe({ type: 'paint', buffered: true }))"""

# What a click costs until the next frame is on the screen, in the page's own clock.
UNTIL_PAINTED = """async (work) => {
    const start = performance.now();
    eval(work);
    await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
    return (performance.now() - start) / 1000;
}"""

SCROLL = """async () => {
    const step = innerHeight, frames = [];
    let last = performance.now();
    for (let y = 0; y < document.documentElement.scrollHeight; y += step) {
        scrollTo({ top: y, behavior: 'instant' });
        await new Promise(done => requestAnimationFrame(() => setTimeout(done)));
        frames.push(performance.now() - last);
        last = performance.now();
    }
    return Math.max(...frames) / 1000;
}"""


def _drive(page: Any, file: Path) -> dict[str, float]:
    start = time.perf_counter()
    page.goto(file.resolve().as_uri(), wait_until="commit", timeout=120_000)
    page.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
    if page.locator(".patterns").count():
        page.wait_for_selector(".patterns[data-ready]", state="attached", timeout=120_000)
    ready = time.perf_counter() - start
    times = {"first contentful paint": page.evaluate(PAINT)}
    navigation = "performance.getEntriesByType('navigation')[0]"
    times["load"] = page.evaluate(f"{navigation}.loadEventEnd / 1000")
    times["ready (clock outside the page)"] = ready
    heads = "document.querySelector('#table-heads').closest('.table')"
    works = {
        "sort all heads by effect": f"{heads}.querySelector('th:last-child button').click()",
        "sort all heads by name": f"{heads}.querySelector('th:first-child button').click()",
        "filter all heads by kind": f"(s => {{ s.value = 'mlp'; s.onchange || 0; "
        f"s.dispatchEvent(new Event('change')); }})({heads}.querySelector('select[aria-label=Kind]'))",
        "filter all heads by label": "(s => { s.value = 'L1'; s.dispatchEvent(new Event('input')); })"
        f"({heads}.querySelector('input[type=search]'))",
        "walk a pattern by a token": "document.querySelector('.patterns .strip').dispatchEvent("
        "new KeyboardEvent('keydown', { key: 'ArrowLeft', bubbles: true }))",
    }
    for name, work in works.items():
        times[name] = page.evaluate(f"({UNTIL_PAINTED})({work!r})")
    times["slowest screen while scrolling"] = page.evaluate(f"({SCROLL})()")
    return times


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--small", action="store_true", help="4 layers of width 256")
    parser.add_argument("--tokenizer", type=Path, help="GPT-2's tokenizer.json")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--page", type=Path, help="measure this page instead of making one")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        out = args.page or args.out or Path(folder) / "report.html"
        if args.page is None:
            net = model(SMALL if args.small else SHAPE, args.tokenizer)
            print(f"{net}\n{args.tokens} tokens, {torch.get_num_threads()} threads", flush=True)
            make(net, args.tokens, out)
        size = out.stat().st_size
        print(f"size {size / 10**6:.2f} MB")
        times = in_browser(out)
    for name, seconds in times.items():
        print(f"    {name:32} {seconds:6.3f} s")
    if times and args.tokens <= 64 and not args.small:
        kept = size <= LIMITS["size"] and times["first contentful paint"] <= LIMITS["view"]
        print("8 MB and 2 s are kept" if kept else "8 MB or 2 s are NOT kept")


if __name__ == "__main__":
    main()
