"""What a report would cost, section by section, before it is made: ``mia.plan(mia.report, ...)``."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mechinterp_attn.circuits.streaming import plan_product
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import Call, Plan, joined, plan
from mechinterp_attn.view.report import (
    cards,
    sections_circuit,
    sections_heads,
    sections_pairs,
    story,
    study,
)
from mechinterp_attn.view.report.study import Study
from mechinterp_attn.view.report.task_study import TaskStudy

# The analyses of a study that each section shows, beside those that the cards of heads need in any case.
NEEDS: dict[str, tuple[str, ...]] = {
    "summary": ("orders",),
    "orders": ("orders",),
    "importance": ("importance",),
    "paths": ("top_paths", "top_circuits"),
    "graph": ("graph",),
    "comparison": ("orders",),
}
# Analyses that a section leaves out where they would take too many operations.
LIMITED = {
    "circuit": (
        (sections_circuit.induction_call, sections_circuit.FLOPS),
        (sections_circuit.edges_call, sections_circuit.FLOPS),
    ),
    "composition": ((sections_pairs.pairs_call, sections_pairs.FLOPS),),
}


def plan_sections(made: Study, names: Sequence[str]) -> Plan:
    """The cost of some sections and of the cards of heads; where it hangs on what is found, the most.

    Args:
        made: the study, of which little is computed for this.
        names: of sections.
    """
    needed = ["attribution", *(need for name in names for need in NEEDS.get(name, ()))]
    if made.n_attention:
        needed += ["scores", *(f"composition_{side}" for side in made.sides_read)]
    parts = [_plan_of(made.calls[name]) for name in dict.fromkeys(needed)]
    if made.model.n_heads:
        cuts = study.WAYS + (story.MOST_RUNS if "story" in names else 0)
        parts += [made.causes.plan(cuts), *_vocabulary(made, names)]
    parts += [found for name in names for found in _limited(made, name)]
    sections = f"{len(names)} section" + ("" if len(names) == 1 else "s")
    return joined(f"a report of {sections} on {len(made.names):,} tokens", parts)


def plan_second(other: Study) -> Plan:
    """The cost of what a comparison shows of a second model.

    Args:
        other: its study.
    """
    names = ["attribution", "orders", *(["scores"] if other.n_attention else [])]
    return joined("the second model", [_plan_of(other.calls[name]) for name in names])


def plan_task(made: TaskStudy) -> Plan:
    """The cost of the report of a behaviour, but for its example, which is one prompt.

    Args:
        made: the study, of which nothing is computed for this.
    """
    return joined(
        f"a report of {len(made.task):,} prompts", [_plan_of(call) for call in made.calls().values()]
    )


def _plan_of(call: Call) -> Plan:
    function, args, options = call
    return plan(function, *args, **options)


def _limited(made: Study, name: str) -> Iterator[Plan]:
    """The analyses that a section makes only where they are quick."""
    for call_of, most in LIMITED.get(name, ()):
        try:
            found = _plan_of(call_of(made))
        except MechInterpError:  # it cannot be had of this model, and the section will say so
            continue
        if found.flops <= most:
            yield found


def _vocabulary(made: Study, names: Sequence[str]) -> Iterator[Plan]:
    """What heads read and write in the vocabulary: of the cards, of neurons, of some heads in full."""
    model, heads = made.model, min(cards.MOST, made.model.n_heads)
    if "neurons" in names:
        heads += len(sections_heads.SIDES) * min(sections_heads.NEURONS, len(model.heads.of("mlp")))
    shape = (min(heads, cards.ROWS), model.spec.d_model, model.spec.d_vocab_out)
    yield plan_product("tokens of heads", shape, model.W_E.device, times=-(-heads // shape[0]))
    if "vocabulary" in names:
        # Which heads is found by their scores, unless they were asked for; all cost the same.
        likely = made.chosen or list(model.heads.of("attention"))[: len(study.CIRCUITS_OF)]
        wide = [label for label in likely if model[label].kind != "mlp"]
        yield from map(_plan_of, sections_heads.pair_calls(made, wide).values())
