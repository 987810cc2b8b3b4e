"""Draw the figures of the theorem pages from the tables in docs/figures, as SVG.

    python benchmarks/theorem_figures.py

Needs a Chromium that Playwright can start: plotly draws the figures in it. Tables that are not there
are left out.
"""

from __future__ import annotations

import argparse
import json
import shutil
import urllib.parse
from pathlib import Path

import pandas as pd
import plotly.graph_objects as go
from playwright.sync_api import sync_playwright
from plotly.offline import get_plotlyjs

from mechinterp_attn.view.figures.theorems import curves_with_spread, lines


def training(frame: pd.DataFrame) -> go.Figure:
    fig = curves_with_spread(
        frame,
        x="tokens",
        y="loss",
        by="variant",
        title="Loss on five held-out novels: mean and range over seeds",
        x_name="tokens of training",
        y_name="loss (nats per token)",
    )
    # Long names: beside the curves they would take a third of the width.
    return fig.update_layout(legend={"x": 1, "xanchor": "right", "y": 1})


def decay(frame: pd.DataFrame) -> go.Figure:
    shown = frame[frame["decayed"] != "none (all exempt)"]
    return lines(
        shown.assign(logit_error=shown["logit_error"].clip(lower=1e-15)),
        x="factor",
        y="logit_error",
        by="decayed",
        title="Parts of the construction after weight decay",
        x_name="what is left of the part",
        y_name="largest error of a logit",
        log=True,
    )


def dropout(frame: pd.DataFrame) -> go.Figure:
    return curves_with_spread(
        frame,
        x="rate",
        y="loss_change",
        by="dropped_in",
        title="Attention dropout in a converted model: mean and range over draws",
        x_name="share of attention weights dropped",
        y_name="change of the loss (nats per token)",
    )


def forms(frame: pd.DataFrame) -> go.Figure:
    fig = lines(
        frame,
        x="tokens",
        y="time_over_mlp",
        by="form",
        title="Time of one MLP in three forms",
        x_name="tokens",
        y_name="time over the MLP's",
        log=True,
    )
    return fig.update_xaxes(type="log", tickvals=sorted(frame["tokens"].unique()))


def memory(frame: pd.DataFrame) -> go.Figure:
    fig = lines(
        frame,
        x="tokens",
        y="peak_bytes",
        by="form",
        title="Memory of one MLP in three forms",
        x_name="tokens",
        y_name="most bytes alive",
        log=True,
    )
    return fig.update_xaxes(type="log", tickvals=sorted(frame["tokens"].unique()))


FIGURES = {
    "training_curves": ("training_curves.csv", training),
    "weight_decay": ("weight_decay.csv", decay),
    "attention_dropout": ("attention_dropout.csv", dropout),
    "three_forms_time": ("three_forms.csv", forms),
    "three_forms_memory": ("three_forms.csv", memory),
}
DRAW = """async spec => {
    const div = document.createElement("div");
    document.body.append(div);
    await Plotly.newPlot(div, spec.data, spec.layout);
    return await Plotly.toImage(div, {format: "svg", width: 760, height: 440});
}"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, default=Path("docs/figures"))
    folder = parser.parse_args().folder
    with sync_playwright() as playwright:
        names = ("chromium", "chromium-browser", "google-chrome", "chrome")
        path = next(filter(None, map(shutil.which, names)), None)  # None: Playwright's own
        browser = playwright.chromium.launch(executable_path=path, args=["--no-sandbox"])
        page = browser.new_page()
        page.set_content("<html><body></body></html>")
        page.add_script_tag(content=get_plotlyjs())
        for name, (table, draw) in FIGURES.items():
            if not (folder / table).exists():
                continue
            figure = draw(pd.read_csv(folder / table))
            image = page.evaluate(DRAW, json.loads(figure.to_json()))
            svg = urllib.parse.unquote(image.removeprefix("data:image/svg+xml,"))
            (folder / f"{name}.svg").write_text(svg, encoding="utf-8")
            print(folder / f"{name}.svg", len(svg))
        browser.close()


if __name__ == "__main__":
    main()
