"""``causal``: what a behaviour goes through, proven by intervention."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mechinterp_attn.cli.common import (
    AsJson,
    CsvFile,
    FigureFile,
    Model,
    Quiet,
    Seed,
    Top,
    Wide,
    deliver,
    load,
    remark,
)

if TYPE_CHECKING:
    from mechinterp_attn.causal import Task
    from mechinterp_attn.core.results import Result
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

TASKS = ("induction", "ioi", "sva", "greater_than", "pronouns", "docstring", "brackets")


class Analysis(StrEnum):
    effects = "effects"
    discover = "discover"
    faithfulness = "faithfulness"
    path = "path"


def register(app: typer.Typer) -> None:
    app.command()(causal)


def causal(
    model: Model,
    analysis: Annotated[
        str,
        typer.Argument(
            help="effects: what the behaviour loses when heads are patched; discover: heads or edges "
            "ranked by what it goes through; faithfulness: what circuits of growing size carry alone, on "
            "prompts held out; path: patches along single paths.",
            metavar="|".join(Analysis),
            show_default=False,
        ),
    ],
    task: Annotated[
        str,
        typer.Argument(
            help=f"A behaviour: a file that Task.save wrote (.jsonl), or one of {', '.join(TASKS)}.",
            metavar="TASK",
            show_default=False,
        ),
    ],
    heads: Annotated[
        list[str] | None,
        typer.Argument(
            help="For effects, heads to patch exactly; for path, paths such as 'L0H2 -K-> L1H3 -> logits'.",
            metavar="HEADS",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="secant, gradient, eap, eap-ig, relp, frozen or exact.")
    ] = "secant",
    units: Annotated[str, typer.Option(help="heads, or edges between them.")] = "heads",
    patch: Annotated[
        str, typer.Option(help="What a head is given: corrupt, zero, mean or resample.")
    ] = "corrupt",
    prompts: Annotated[int, typer.Option(help="How many prompts, of a behaviour by name.", min=2)] = 32,
    seed: Seed = 0,
    top: Top = None,
    as_json: AsJson = False,
    csv: CsvFile = None,
    figure: FigureFile = None,
    wide: Wide = False,
    quiet: Quiet = False,
) -> None:
    """What a behaviour goes through, proven by intervention: heads, edges, paths, circuits."""
    from mechinterp_attn.core.errors import MechInterpError

    if model in tuple(Analysis) and analysis not in tuple(Analysis):
        model, analysis = analysis, model  # the analysis may come first
    if analysis not in tuple(Analysis):
        raise MechInterpError(f"no analysis {analysis!r}; there are {', '.join(Analysis)}")
    if analysis in (Analysis.discover, Analysis.faithfulness) and heads:
        raise MechInterpError(f"{analysis} looks at all heads; leave out {' '.join(heads)}")
    opened = load(model)
    behaviour = _task(opened, task, prompts, seed)
    result = _run(opened, behaviour, Analysis(analysis), heads, method, units, patch, seed)
    rows = result.frame.head(top or len(result.frame))
    deliver(result, rows, as_json=as_json, csv=csv, figure=figure)


def _run(
    model: AttentionOnlyModel,
    task: Task,
    analysis: Analysis,
    heads: list[str] | None,
    method: str,
    units: str,
    patch: str,
    seed: int,
) -> Result:
    import mechinterp_attn as mia
    from mechinterp_attn.core.errors import MechInterpError

    chosen: dict[str, Any] = {"patch": patch, "seed": seed}
    if analysis is Analysis.effects:
        return mia.causal.effects(model, task, heads or None, **chosen)
    if analysis is Analysis.path:
        if not heads:
            raise MechInterpError("path takes paths; give one such as 'L0H2 -K-> L1H3 -> logits'")
        return mia.causal.path_patch(model, task, heads, **chosen)
    how: dict[str, Any] = {"method": cast(Any, method), "units": cast(Any, units)}
    if analysis is Analysis.discover:
        return mia.causal.discover(model, task, **how, **chosen)
    found_on, held_out = task.split(seed=seed)
    ranking = mia.causal.discover(model, found_on, **how, **chosen)
    result = mia.causal.faithfulness(model, held_out, ranking, seed=seed)
    remark(f"CMD {result.cmd:.3f}, CPR {result.cpr:.3f}; of random rankings {result.cmd_random:.3f}")
    return result


def _task(model: AttentionOnlyModel, name: str, prompts: int, seed: int) -> Task:
    """A behaviour by name, in the model's own tokens, or from a file."""
    import mechinterp_attn as mia
    from mechinterp_attn.core.errors import MechInterpError

    if name in TASKS:
        return getattr(mia.tasks, name)(model, n=prompts, seed=seed)
    if not Path(name).is_file():
        raise MechInterpError(f"{name!r} is no file and no behaviour by name; there are {', '.join(TASKS)}")
    return mia.Task.load(name)
