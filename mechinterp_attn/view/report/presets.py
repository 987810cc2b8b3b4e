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
    sections_task,
)
from mechinterp_attn.view.report.blocks import Block
from mechinterp_attn.view.report.study import Study
from mechinterp_attn.view.report.task_study import TaskStudy

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


def _on_example(maker: Callable[[Study], Block | None]) -> Callable[[TaskStudy], Block | None]:
    """A section about one prompt, made of the example, which it says."""

    def made(study: TaskStudy) -> Block | None:
        part = maker(study.example)
        if part is not None:
            which = "first prompt" if not study.held_out else "first prompt for testing"
            part["lead"].insert(0, [f"“This prompt” is the {which}."])
        return part

    return made


TASK_SECTIONS: dict[str, Callable[[TaskStudy], Block | None]] = {
    "story": sections_task.task_story,
    "circuit": sections_task.task_circuit,
    "faithfulness": sections_task.faithfulness,
    "heads": sections_task.task_heads,
    "prompts": sections_task.prompts,
    "patterns": _on_example(sections_heads.attention_patterns),
    "provenance": _on_example(sections_about.provenance),
    "fidelity": lambda study: sections_about.fidelity(study.example),
    "glossary": lambda study: sections_glossary.glossary(study.example),
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
