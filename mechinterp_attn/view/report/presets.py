"""Which sections there are, in the order of the page, and the choices of them that have a name."""

from __future__ import annotations

from collections.abc import Callable

from mechinterp_attn.view.report import sections, sections_pairs, sections_paths
from mechinterp_attn.view.report.blocks import Block
from mechinterp_attn.view.report.study import Study

SECTIONS: dict[str, Callable[[Study], Block | None]] = {
    "summary": sections.summary,
    "provenance": sections.provenance,
    "fidelity": sections.fidelity,
    "orders": sections.loss,
    "importance": sections_paths.importance,
    "heads": sections.heads,
    "patterns": sections.patterns,
    "composition": sections_pairs.composition,
    "vocabulary": sections.vocabulary,
    "paths": sections_paths.top_paths,
    "graph": sections_paths.graph,
    "neurons": sections.neurons,
    "glossary": sections.glossary,
}

_HOW = ("provenance", "fidelity", "glossary")
PRESETS: dict[str, tuple[str, ...]] = {
    "overview": tuple(SECTIONS),
    "induction": ("summary", "heads", "patterns", "composition", "vocabulary", "orders", *_HOW),
    "prediction": ("summary", "neurons", "paths", "graph", "patterns", *_HOW),
}
