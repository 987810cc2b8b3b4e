"""Frames a second of the attribution-graph viewer while it is panned and zoomed, in headless Chromium.

Run: python benchmarks/bench_graph.py --model SmolLM2-135M-Instruct [--out graph.html]
     python benchmarks/bench_graph.py --page graph.html   (only the browser, on a page that is there)

The graph is that of an indirect-object prompt, all its edges kept. In the page, requestAnimationFrame moves
the window at every frame, and the intervals between frames are the measure; first with nothing moving, as
the machine gives them at best. Edges: those drawn at first, then all. Beside it stands the
processor time of the whole browser for a frame, which other work on the machine changes less. Headless
Chromium draws without a GPU, and asks for 60 frames a second.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import mechinterp_attn as mia

PROMPT = (
    "Then, Mary and John went to the store. Mary had a basket, and John had a list. "
    "At the counter, John gave a bottle of milk to"
)

# Calls `step(i)` at every frame; milliseconds between frames.
FRAMES = """async ([step, n]) => {
    const viewer = document.querySelector(".attribution-graph").viewer;
    const move = new Function("viewer", "i", step), times = [];
    await new Promise((done) => {
        const frame = (now) => {
            times.push(now);
            if (times.length > n) return done();
            move(viewer, times.length);
            requestAnimationFrame(frame);
        };
        requestAnimationFrame(frame);
    });
    return times.slice(1).map((t, i) => t - times[i]);
}"""


def processor_time(root: int) -> float:
    """Seconds that a process and all below it have used (Linux)."""
    used: dict[int, float] = {}
    below: dict[int, list[int]] = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rsplit(")", 1)[1].split()
        except OSError:  # it has ended
            continue
        used[int(folder.name)] = (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
        below.setdefault(int(fields[1]), []).append(int(folder.name))
    total, todo = 0.0, [root]
    while todo:
        process = todo.pop()
        total += used.get(process, 0.0)
        todo += below.get(process, [])
    return total


STEPS = {
    "nothing moves": "",
    "panning": "const way = i % 120 < 60 ? 1 : -1; viewer.panBy(-12 * way, -5 * way);",
    "zooming": "viewer.zoomBy(i % 120 < 60 ? 1.02 : 1 / 1.02);",
}


def page_of(model: Path, out: Path) -> None:
    net = mia.load(str(model))
    start = time.perf_counter()
    frozen = mia.paths.freeze(net, PROMPT)
    graph = mia.paths.attribution_graph(
        frozen, target=" Mary", against=" John", max_nodes=800, edge_threshold=1.0, scores=True, patch=None
    )
    made = time.perf_counter() - start
    view = graph.view()
    view.save(out)
    print(view)
    print(f"graph in {made:.1f} s, page of {out.stat().st_size / 1e6:.1f} MB")


def measure(page: Any, n: int) -> None:
    for edges in ("drawn at first", "all"):
        if edges == "all":
            page.get_by_label("smallest edge shown").fill("0")
        page.get_by_label("show the whole graph").click()
        page.evaluate("document.querySelector('.attribution-graph').viewer.zoomBy(2.5)")
        start = time.perf_counter()
        page.wait_for_function(
            "document.querySelector('.attribution-graph').viewer.painted()", timeout=60_000
        )
        painted = time.perf_counter() - start
        print(f"{page.locator('.graph-count').inner_text()} edges ({edges}), painted in {painted:.2f} s")
        for name, step in STEPS.items():
            before = processor_time(os.getpid())
            times = sorted(page.evaluate(FRAMES, [step, n]))
            each = 1000 * (processor_time(os.getpid()) - before) / n
            print(
                f"  {name:14} {1000 / statistics.mean(times):5.1f} frames a second; between frames: median "
                f"{statistics.median(times):.1f} ms, 95 % below {times[int(0.95 * len(times))]:.1f} ms, "
                f"longest {times[-1]:.0f} ms; {each:.1f} ms of processor time a frame"
            )


def in_browser(file: Path, n: int) -> None:
    from playwright.sync_api import sync_playwright

    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    path = os.environ.get("MECHINTERP_ATTN_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        # the page forbids code from outside, which the loop over frames is
        page = browser.new_page(viewport={"width": 1280, "height": 900}, bypass_csp=True)
        page.context.set_offline(True)
        start = time.perf_counter()
        page.goto(file.resolve().as_uri(), timeout=120_000)
        page.wait_for_selector("html[data-ready]", state="attached", timeout=120_000)
        print(f"opened in {time.perf_counter() - start:.1f} s")
        measure(page, n)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--model", type=Path, default=os.environ.get("MECHINTERP_ATTN_SMOLLM2"))
    parser.add_argument("--page", type=Path, help="a page that is there")
    parser.add_argument("--out", type=Path, help="keep the page here")
    parser.add_argument("--frames", type=int, default=240)
    args = parser.parse_args()
    if args.page is None and args.model is None:
        parser.error("give --model, a folder of SmolLM2, or --page")
    with tempfile.TemporaryDirectory() as folder:
        file = args.page or args.out or Path(folder) / "graph.html"
        if args.page is None:
            page_of(Path(args.model), file)
        in_browser(file, args.frames)


if __name__ == "__main__":
    main()
