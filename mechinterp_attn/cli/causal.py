"""``causal``: what a behaviour goes through, proven by intervention."""

from __future__ import annotations

from enum import StrEnum
from typing import TYPE_CHECKING, Annotated, Any, cast

import typer

from mechinterp_attn.cli.answer import Answer, answering
from mechinterp_attn.cli.common import (
    TASKS,
    Model,
    Seed,
    Top,
    load,
    one_head,
    remark,
    task_of,
)

if TYPE_CHECKING:
    from mechinterp_attn.causal import Task
    from mechinterp_attn.core.plan import Call
    from mechinterp_attn.core.results import Result
    from mechinterp_attn.model.attention_only import AttentionOnlyModel


class Analysis(StrEnum):
    effects = "effects"
    discover = "discover"
    faithfulness = "faithfulness"
    path = "path"
    loadings = "loadings"
    minimality = "minimality"
    overlap = "overlap"
    clusters = "clusters"


def register(app: typer.Typer) -> None:
    app.command()(answering(causal))
    app.command()(answering(diff))


def causal(
    model: Model,
    analysis: Annotated[
        str,
        typer.Argument(
            help="effects: what the behaviour loses when heads are patched; discover: heads or edges "
            "ranked by what it goes through; faithfulness: what circuits of growing size carry alone, on "
            "prompts held out; path: patches along single paths; loadings: what makes up a "
            "head's score over its other keys; minimality: what each of a circuit's --size heads or edges "
            "is worth, on prompts held out; overlap: whether the circuit is found again on halves of the "
            "prompts and in other wordings; clusters: prompts of several tasks, with commas between, in as "
            "many groups by their circuits.",
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
            help="For effects, heads to patch exactly; for path, paths such as 'L0H2 -K-> L1H3 -> "
            "logits'; for loadings, one head.",
            metavar="HEADS",
        ),
    ] = None,
    method: Annotated[
        str, typer.Option(help="secant, gradient, eap, eap-ig, relp, frozen or exact.")
    ] = "secant",
    units: Annotated[str, typer.Option(help="heads, or edges between them.")] = "heads",
    pools: Annotated[
        bool, typer.Option("--pools", help="Of edges: all neurons of an MLP are one end, L3N*.")
    ] = False,
    patch: Annotated[
        str, typer.Option(help="What a head is given: corrupt, zero, mean or resample.")
    ] = "corrupt",
    size: Annotated[
        int, typer.Option(help="Of minimality and overlap: how many heads or edges a circuit has.", min=1)
    ] = 10,
    prompts: Annotated[int, typer.Option(help="How many prompts, of a behaviour by name.", min=2)] = 32,
    seed: Seed = 0,
    top: Top = None,
    *,
    answer: Answer,
) -> None:
    """What a behaviour goes through, proven by intervention: heads, edges, paths, circuits."""
    from mechinterp_attn import causal as own
    from mechinterp_attn.core.errors import MechInterpError

    if model in tuple(Analysis) and analysis not in tuple(Analysis):
        model, analysis = analysis, model  # the analysis may come first
    if analysis not in tuple(Analysis):
        raise MechInterpError(f"no analysis {analysis!r}; there are {', '.join(Analysis)}")
    if analysis not in (Analysis.effects, Analysis.path, Analysis.loadings) and heads:
        raise MechInterpError(f"{analysis} looks at all heads; leave out {' '.join(heads)}")
    opened = load(model)
    if analysis == Analysis.clusters:
        several = [task_of(opened, one, prompts, seed) for one in task.split(",")]
        call: Call = own.prompt_circuits, (opened, several, method), {"patch": patch}
        groups = answer.run(call).clusters(max(2, len(several)), seed=seed)
        answer.give(groups, groups.frame.head(top or len(groups.frame)))
        return
    behaviour = task_of(opened, task, prompts, seed)
    chosen: dict[str, Any] = {"patch": patch, "seed": seed}
    result: Result
    if analysis in (Analysis.effects, Analysis.path, Analysis.loadings):
        result = answer.run(_patching(opened, behaviour, analysis, heads, chosen))
    else:
        chosen |= {"method": method, "units": units, "pools": pools}
        if analysis == Analysis.overlap:
            others = _rephrasings(opened, task, prompts, seed)
            call = own.overlap, (opened, behaviour, size), chosen | {"rephrasings": others}
            result = answer.run(call)
        elif analysis == Analysis.minimality:
            result = _minimality(opened, behaviour, size, chosen, answer)
        else:
            result = _ranking(opened, behaviour, analysis == Analysis.discover, chosen, answer)
    rows = result.frame.head(top or len(result.frame))
    answer.give(result, rows)


def diff(
    model: Model,
    other: Annotated[
        str,
        typer.Argument(
            help="The model it became: the same architecture, such as a fine-tuned copy.",
            metavar="OTHER",
            show_default=False,
        ),
    ],
    task: Annotated[
        str,
        typer.Argument(
            help=f"A behaviour: a file that Task.save wrote (.jsonl), or one of {', '.join(TASKS)}; or a "
            "text file, a document a line, whose next-token loss is compared.",
            metavar="TASK",
            show_default=False,
        ),
    ],
    prompts: Annotated[int, typer.Option(help="How many prompts, of a behaviour by name.", min=2)] = 32,
    exact: Annotated[
        int, typer.Option(help="How many heads are put into the other model one by one.", min=0)
    ] = 16,
    seed: Seed = 0,
    top: Top = None,
    *,
    answer: Answer,
) -> None:
    """What changed from one model to another: heads and neurons, in weights, outputs and effects."""
    import mechinterp_attn as mia

    one, two = load(model), load(other)
    behaviour = _corpus(task) if task.endswith(".txt") else task_of(one, task, prompts, seed)
    call: Call = mia.diff, (one, two, behaviour), {"exact": exact, "seed": seed}
    result = answer.run(call)
    answer.give(result, result.frame.head(top or len(result.frame)))


def _corpus(file: str) -> list[str]:
    """The lines of a text file that are not empty."""
    from mechinterp_attn.core.reading import read_text

    return [line for line in read_text(file).splitlines() if line.strip()]


def _patching(
    model: AttentionOnlyModel, task: Task, analysis: str, heads: list[str] | None, chosen: dict[str, Any]
) -> Call:
    from mechinterp_attn import causal as own
    from mechinterp_attn.core.errors import MechInterpError

    if analysis == Analysis.effects:
        return own.effects, (model, task, heads or None), chosen
    if analysis == Analysis.loadings:
        return (
            own.head_loadings,
            (model, task, one_head(heads, "causal ... loadings")),
            {"against": "others"},
        )
    if not heads:
        raise MechInterpError("path takes paths; give one such as 'L0H2 -K-> L1H3 -> logits'")
    return own.path_patch, (model, task, heads), chosen


def _ranking(
    model: AttentionOnlyModel,
    task: Task,
    ranked_only: bool,
    chosen: dict[str, Any],
    answer: Answer,
) -> Result:
    """Heads or edges ranked, and how much circuits of the first of them carry alone."""
    from mechinterp_attn import causal as own
    from mechinterp_attn.core.errors import MechInterpError

    if ranked_only:
        return cast("Result", answer.run((own.discover, (model, task), chosen)))
    found_on, held_out = task.split(seed=chosen["seed"])
    ranking: Call = own.discover, (model, found_on), chosen
    if answer.plan:
        if chosen["units"] != "heads":
            raise MechInterpError(
                "the cost of circuits of edges depends on the ranking; plan discover alone"
            )
        behind: Call = own.faithfulness, (model, held_out, list(model.heads)), {"seed": chosen["seed"]}
        answer.run(ranking, behind)
    ranked = answer.now(ranking)
    options = {"seed": chosen["seed"]}
    result = answer.now((own.faithfulness, (model, held_out, ranked), options))
    remark(f"CMD {result.cmd:.3f}, CPR {result.cpr:.3f}; of random rankings {result.cmd_random:.3f}")
    return cast("Result", result)


def _minimality(
    model: AttentionOnlyModel, task: Task, size: int, chosen: dict[str, Any], answer: Answer
) -> Result:
    """The circuit of one half of the prompts, its parts taken out one by one on the other half."""
    from mechinterp_attn import causal as own
    from mechinterp_attn.core.errors import MechInterpError

    found_on, held_out = task.split(seed=chosen["seed"])
    ranking: Call = own.discover, (model, found_on), chosen
    options = {"seed": chosen["seed"]}
    if answer.plan:
        if chosen["units"] != "heads":
            raise MechInterpError(
                "the cost of circuits of edges depends on the ranking; plan discover alone"
            )
        answer.run(ranking, (own.minimality, (model, held_out, list(model.heads)[:size]), options))
    circuit = answer.now(ranking).circuit(size)
    result = answer.now((own.minimality, (model, held_out, circuit), options))
    remark(f"faithfulness of the circuit {result.faithfulness:.3f}")
    return cast("Result", result)


def _rephrasings(model: AttentionOnlyModel, name: str, prompts: int, seed: int) -> list[Task]:
    """A behaviour by name in each of its wordings alone; none of a file."""
    import mechinterp_attn as mia

    return [
        getattr(mia.tasks, name)(model, n=prompts, seed=seed + 1, wording=k)
        for k in range(mia.tasks.WORDINGS.get(name, 0))
    ]
