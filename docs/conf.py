"""Sphinx: MyST pages, the notebooks as they were committed, and an API reference from docstrings."""

import csv
from importlib.metadata import version as installed
from pathlib import Path

project = "mechinterp_attn"
author = "The mechinterp_attn developers"
copyright = f"2026, {author}"
release = version = installed("mechinterp_attn")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]
nitpicky = False  # signatures name types of other packages; docs/check_links.py looks at every link

html_theme = "furo"
html_title = f"mechinterp_attn {release}"
html_show_sourcelink = False
html_static_path = ["_static"]
html_css_files = ["tables.css"]

myst_enable_extensions = ["colon_fence", "deflist", "dollarmath"]
myst_heading_anchors = 3
nb_execution_mode = "off"  # outputs are committed; the tests run the notebooks
nb_output_stderr = "remove"

autodoc_member_order = "groupwise"
autodoc_preserve_defaults = True
napoleon_numpy_docstring = False
napoleon_use_ivar = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88

suppress_warnings = [
    "mystnb.unknown_mime_type",  # plotly's own type; the picture beside it is shown
]


def other_tables(app, docname, source):
    """Benchmark tables that the page does not name itself, each in a section of its own."""
    if docname != "benchmarks":
        return
    folder = Path(app.srcdir) / "benchmarks"
    commands = {
        row["table"]: row["command"]
        for row in csv.DictReader((folder / "runs.csv").read_text().splitlines())
    }
    text, marker = source[0], "<!-- tables"
    parts = []
    for path in sorted(folder.glob("*.csv")):
        if path.name != "runs.csv" and f"benchmarks/{path.name}" not in text:
            title = path.stem.replace("_", " ").capitalize()
            made = f"`{commands.get(path.stem, 'unknown command')}`"
            table = f"```{{csv-table}}\n:file: benchmarks/{path.name}\n:header-rows: 1\n```"
            parts.append(f"## {title}\n\n{made}\n\n{table}\n\n")
    source[0] = text.replace(marker, "".join(parts) + marker)


def setup(app):
    app.connect("source-read", other_tables)
