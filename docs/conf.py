"""Sphinx: MyST pages, the notebooks as they were committed, and an API reference from docstrings."""

from importlib.metadata import version as installed

project = "mechinterp_attn"
author = "The mechinterp_attn developers"
copyright = f"2026, {author}"
release = version = installed("mechinterp_attn")

extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx.ext.viewcode"]
exclude_patterns = ["_build"]

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
    "mystnb.unknown_mime_type",  # plotly's own type; the HTML beside it is shown
]
