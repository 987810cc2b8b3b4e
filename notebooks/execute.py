"""Run every notebook from a clean kernel and keep its outputs (`make notebooks`).

    python notebooks/execute.py [--pictures] [NOTEBOOK ...]

Plotly's figures are data that only Jupyter draws. Each gets a picture beside it, for the
documentation and for places that run no scripts; that needs Chromium. With ``--pictures`` only this is
done, and nothing is run.
"""

import argparse
import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient

WIDGET = "application/vnd.jupyter.widget-view+json"
PLOTLY = "application/vnd.plotly.v1+json"
PICTURE = "image/png"


def execute(notebook: nbformat.NotebookNode) -> None:
    """Run one notebook; what stays is what a reader needs: no times, no finished progress bars."""
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(
            notebook,
            timeout=600,
            kernel_name="python3",
            record_timing=False,
            resources={"metadata": {"path": folder}},
        ).execute()
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = [out for out in cell.outputs if WIDGET not in out.get("data", {})]
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    notebook.metadata = {"kernelspec": kernel, "language_info": {"name": "python"}}


def figures(notebook: nbformat.NotebookNode) -> list[Any]:
    """The outputs that hold a plotly figure."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [out for cell in cells for out in cell.outputs if PLOTLY in out.get("data", {})]


def add_pictures(notebook: nbformat.NotebookNode) -> None:
    """A PNG beside every plotly figure, drawn by plotly itself in a headless Chromium."""
    found = figures(notebook)
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    browser_path = os.environ.get("MECHINTERP_ATTN_CHROMIUM") or next(
        filter(None, map(shutil.which, names)), None
    )
    if not found or browser_path is None:
        return
    from playwright.sync_api import sync_playwright
    from plotly.offline import get_plotlyjs

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=browser_path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content("<!doctype html><title>figures</title>")
        page.add_script_tag(content=get_plotlyjs())
        for output in found:
            figure = output["data"][PLOTLY]
            height = figure.get("layout", {}).get("height", 420)
            url = page.evaluate(
                "([figure, size]) => Plotly.toImage(figure, size)",
                [json.loads(json.dumps(figure)), {"format": "png", "width": 820, "height": height}],
            )
            output["data"][PICTURE] = url.split(",", 1)[1]
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="*", type=Path)
    parser.add_argument("--pictures", action="store_true", help="run nothing, only draw the figures")
    args = parser.parse_args()
    for path in args.notebooks or sorted(Path(__file__).parent.glob("*.ipynb")):
        print(path)
        notebook = nbformat.read(path, as_version=4)
        if not args.pictures:
            execute(notebook)
        add_pictures(notebook)
        nbformat.write(notebook, path)


if __name__ == "__main__":
    main()
