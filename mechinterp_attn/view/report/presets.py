"""Which sections there are, in the order of the page, and the choices of them that have a name."""

from __future__ import annotations

from collections.abc import Callable

from mechinterp_attn.view.report import (
    sections_about,
    sections_circuit,
    sections_glossary,
    sections_heads,
    sections_pairs,
    sections_paths,
    sections_story,
)
from mechinterp_attn.view.report.blocks import Block
from mechinterp_attn.view.report.study import Study

SECTIONS: dict[str, Callable[[Study], Block | None]] = {
    "story": sections_story.story,
    "circuit": sections_circuit.circuit,
    "summary": sections_about.summary,
    "provenance": sections_about.provenance,
    "fidelity": sections_about.fidelity,
    "orders": sections_paths.loss,
    "importance": sections_paths.importance,
    "heads": sections_heads.heads,
    "patterns": sections_heads.attention_patterns,
    "composition": sections_pairs.composition,
    "vocabulary": sections_heads.vocabulary,
    "paths": sections_paths.top_paths,
    "graph": sections_paths.graph,
    "neurons": sections_heads.neurons,
    "glossary": sections_glossary.glossary,
}

_HOW = ("provenance", "fidelity", "glossary")
PRESETS: dict[str, tuple[str, ...]] = {
    "overview": tuple(SECTIONS),
    "induction": (
        "story",
        "circuit",
        "summary",
        "heads",
        "patterns",
        "composition",
        "vocabulary",
        "orders",
        *_HOW,
    ),
    "prediction": ("story", "summary", "neurons", "paths", "graph", "patterns", *_HOW),
    "large": ("heads", "patterns", "neurons", "graph", *_HOW),
}
LARGE = 5 * 10**8  # weights; beyond, cutting heads one by one and term importance take many minutes


def preset_for(n_weights: int) -> str:
    """The preset of a report that does not say which: all sections, or those whose cost is a few runs.

    Args:
        n_weights: numbers in the model's weights.
    """
    return "large" if n_weights > LARGE else "overview"
