"""The kinds of report: of a prompt, of two prompts, of a behaviour. Each says which sections it has."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

from mechinterp_attn import paths
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, joined, plan
from mechinterp_attn.core.text import shown
from mechinterp_attn.view.report.blocks import Block
from mechinterp_attn.view.report.cost import plan_second, plan_sections, plan_task
from mechinterp_attn.view.report.inputs import Prompt, pair_of, tokens_of, two_of
from mechinterp_attn.view.report.presets import PRESETS, SECTIONS, TASK_SECTIONS, preset_for
from mechinterp_attn.view.report.sections_compare import comparison, two_prompts
from mechinterp_attn.view.report.sections_difference import difference
from mechinterp_attn.view.report.study import Study
from mechinterp_attn.view.report.task_study import TaskStudy

if TYPE_CHECKING:
    from torch import Tensor

    from mechinterp_attn.model.attention_only import AttentionOnlyModel

Maker = Callable[[], Block | None]


@dataclass(frozen=True)
class Asked:
    """What the caller of ``mia.report`` chose: see there."""

    target: str | int | None
    position: int
    preset: str | None
    sections: Sequence[str] | None
    heads: tuple[str, ...]


@dataclass(frozen=True)
class Made:
    """A report to be.

    Attributes:
        makers: its sections by name, in order.
        plan: what it would cost.
        study: gives the prompt that cards of heads are about.
        subject: what the report is about, where that is more than this prompt.
        which: what to call this prompt.
    """

    makers: Mapping[str, Maker]
    plan: Callable[[], Plan]
    study: Callable[[], Study]
    subject: str = ""
    which: str = "this prompt"


def of_prompt(
    model: AttentionOnlyModel, prompt: Prompt, asked: Asked, compare: AttentionOnlyModel | None, seed: int
) -> Made:
    """The report of a single prompt.

    Raises:
        MechInterpError: an unknown preset or section; a bad prompt, target or position.
    """
    n_weights = sum(weight.numel() for weight in model.parameters())
    preset = preset_for(n_weights) if asked.preset is None else asked.preset
    if preset not in PRESETS:
        raise MechInterpError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    names = _known(PRESETS[preset] if asked.sections is None else asked.sections, SECTIONS)
    study = _study(model, tokens_of(model, prompt), asked, seed)
    if asked.preset is None and asked.sections is None and preset != "overview":
        why = f"since the model has {n_weights:,} weights; preset='overview' makes them all"
        study.left_out = f"preset {preset!r}, {why}"
    makers: dict[str, Maker] = {name: partial(SECTIONS[name], study) for name in names}
    if compare is not None:
        beside = _beside(study, compare)
        task = Task(
            study.frozen.tokens[None], answer=[study.attribution.target],
            position=study.attribution.position, metric="loss",
        )  # fmt: skip
        makers["difference"] = partial(difference, model, compare, task, seed)
        makers["comparison"] = partial(comparison, study, beside)
    return Made(makers, partial(_plan_of_prompt, study, names, compare), lambda: study)


def of_task(
    model: AttentionOnlyModel, subject: Any, asked: Asked, compare: AttentionOnlyModel | None, seed: int
) -> Made:
    """The report of a behaviour, or of two prompts, of which the second is the counterfactual.

    Raises:
        MechInterpError: options that a behaviour has itself, an unknown section, a task that does not fit.
    """
    names = _known(TASK_SECTIONS if asked.sections is None else asked.sections, TASK_SECTIONS)
    if asked.preset is not None:
        raise MechInterpError(f"preset={asked.preset!r} is for a report of one prompt; give sections=")
    model.heads.required()
    both = two_of(subject)
    more: dict[str, Maker] = {}
    if both is None:
        if asked.target is not None or asked.position != -1:
            raise MechInterpError("a task says itself what is explained: leave out target and position")
        task, which = subject, "the first prompt for testing"
        about = f"{shown(task.name or 'A behaviour')}: {len(task):,} prompts. As an example, the first one "
        about += "for testing:"
    else:
        first, second = (tokens_of(model, one) for one in both)
        own = _study(model, first, asked, seed)
        same = replace(asked, target=own.attribution.target)  # of both, the logit of one token
        more["comparison"] = partial(two_prompts, own, _study(model, second, same, seed))
        which, about = "the first prompt", "Two prompts side by side. The first one:"
        if first.shape != second.shape:  # no position of one has its partner in the other
            made = of_prompt(model, both[0], asked, compare, seed)
            return replace(made, makers=_behind_story(made.makers, more), subject=about, which=which)
        task = pair_of(model, first, second, asked.position, asked.target)
    bound_to(model, task)  # what does not fit is said before any work
    study = TaskStudy(model, task, seed, asked.heads)
    makers = _behind_story({name: partial(TASK_SECTIONS[name], study) for name in names}, more)
    if compare is not None:
        makers["difference"] = partial(difference, model, compare, task, seed)
    return Made(makers, partial(plan_task, study), lambda: study.example, about, which)


def _plan_of_prompt(study: Study, names: list[str], compare: AttentionOnlyModel | None) -> Plan:
    """The prompt, frozen, and everything that stands on it."""
    parts = [plan(paths.freeze, study.model, study.frozen.tokens)]
    if compare is not None:
        names = [*names, "comparison"]
        parts += [plan(paths.freeze, compare, study.frozen.tokens), plan_second(_beside(study, compare))]
    made = plan_sections(study, names)
    return joined(made.what, [*parts, made])


def _behind_story(makers: Mapping[str, Maker], more: Mapping[str, Maker]) -> dict[str, Maker]:
    """Sections with some others behind the first one."""
    first, *rest = makers
    return {first: makers[first], **more, **{name: makers[name] for name in rest}}


def _known(names: Sequence[str] | Mapping[str, Any], known: Mapping[str, Any]) -> list[str]:
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise MechInterpError(f"no section {unknown}; there are {', '.join(known)}")
    return list(names)


def _study(model: AttentionOnlyModel, tokens: Tensor, asked: Asked, seed: int) -> Study:
    """A prompt, frozen with whatever that takes: nothing of a report can be had without."""
    frozen = paths.freeze(model, tokens, max_bytes=max(MAX_BYTES, plan(paths.freeze, model, tokens).bytes))
    study = Study(
        model, frozen, target=asked.target, position=asked.position, seed=seed, chosen=asked.heads
    )
    study.attribution  # noqa: B018  (a bad target or position stops here, not in every section)
    return study


def _beside(study: Study, model: AttentionOnlyModel) -> Study:
    """A second model on the same tokens, explaining the same prediction."""
    for name in ("d_vocab", "d_vocab_out"):
        own, other = getattr(study.model.spec, name), getattr(model.spec, name)
        if own != other:
            raise MechInterpError(
                f"compare: the second model's {name} is {other:,}, the first one's {own:,}; only models "
                "with one vocabulary can be set side by side"
            )
    attribution, own_heads = study.attribution, set(model.heads)
    chosen = tuple(label for label in study.chosen if label in own_heads)
    asked = Asked(attribution.target, attribution.position, None, None, chosen)
    return _study(model, study.frozen.tokens, asked, study.seed)
