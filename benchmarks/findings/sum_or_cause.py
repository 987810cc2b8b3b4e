"""Does the exact sum tell the cause? Direct effect of every head against the effect of cutting it.

    python benchmarks/findings/sum_or_cause.py [--models gelu-2l ...] [--smollm2 --tasks ioi sva]

A logit difference is exactly the sum of what every head writes straight to it, the *direct effect*. The
*effect* of a head is what the difference loses when the head is cut (its output set to zero) and the model
runs on. For every attention head, and for the neurons with the largest direct effect and the largest
gradient estimate, both are measured over the prompts of a task; so is the effect with all attention
patterns held as they were (a head *acts through patterns* if that halves its effect, or more), and what one
backward pass of the frozen model says.

A head *matters* if its effect is at least 2 % of the logit difference. Where it matters, direct effect and
effect *disagree* if their signs differ or one is ten times the other. All are measured on the same prompts,
so that no sampling stands between them; what does is rounding (1e-6) and nothing else. For comparison the
same is asked of the gradient estimate, which is causal but linear. Every seed draws other prompts.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

import mechinterp_attn as mia
from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.cuts import Cut, cutting
from mechinterp_attn.causal.rules import Hook
from mechinterp_attn.causal.runs import run, scores

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # beside the other benchmarks
from publish import publish
from smollm2 import FOLDER

MATTERS = 0.02  # of the logit difference
TIMES = 10
NEURONS = 50  # by direct effect, and as many by estimate
SHOWN = "gelu-2l"  # whose heads stand in a table of their own
TASKS = ("induction", "ioi", "sva", "greater_than", "pronouns")


def direct(model: mia.AttentionOnlyModel, task: mia.Task, rows: list[Tensor]) -> pd.Series:
    """What every head writes straight to the metric, mean over prompts."""
    total: pd.Series | None = None
    for tokens in rows:
        terms = mia.paths.logit_attribution(model, tokens, task=task).frame
        own = terms[terms["kind"].isin(("attention", "mlp"))].set_index("head")["value"]
        total = own if total is None else total + own
    assert total is not None
    return total / len(rows)


@torch.no_grad()
def cut(model: mia.AttentionOnlyModel, bound: Bound, labels: list[str], *, hold: bool) -> Tensor:
    """The metric of every prompt with each head cut alone, ``[head, n]``, patterns free or held."""
    held: list[Hook] = []
    if hold:
        seen: dict[str, Tensor] = {}
        names = [bank.hook("pattern") for bank in model.banks if bank.mixes_positions]
        run(
            model,
            bound,
            bound.clean,
            [(name, lambda x, hook: seen.__setitem__(hook.name, x)) for name in names],
        )
        held = [(name, lambda x, hook: seen[hook.name]) for name in names]
    out = []
    for label in labels:
        bank, index = model.heads.find(label)
        hooks = cutting(model, [Cut(label, whole={bank.path: [index]})]) + held
        out.append(bound.measure(run(model, bound, bound.clean, hooks)))
    return torch.stack(out)


def disagree(a: pd.Series, b: pd.Series) -> pd.DataFrame:
    """Whether two effects have other signs, or one is ten times the other."""
    sign = a * b < 0
    return pd.DataFrame(
        {
            "sign": sign,
            "small": ~sign & (a.abs() * TIMES < b.abs()),
            "large": ~sign & (a.abs() > TIMES * b.abs()),
        }
    )


def study(model: mia.AttentionOnlyModel, task: mia.Task) -> tuple[pd.DataFrame, float]:
    """One row per head with everything that is compared, and the logit difference."""
    bound = task.bind(model)
    rows = [row[real] for row, real in zip(bound.clean.tokens, bound.clean.real, strict=True)]
    frame = mia.causal.discover(model, task, "gradient", patch="zero").frame
    frame = frame.set_index("head")[["kind", "layer", "score"]].rename(columns={"score": "gradient"})
    frame["frozen"] = mia.causal.discover(model, task, "frozen", patch="zero").frame.set_index("head")[
        "score"
    ]
    frame["direct"] = direct(model, task, rows)
    neurons = frame[frame["kind"] == "mlp"]
    chosen = {
        *neurons["direct"].abs().nlargest(NEURONS).index,
        *neurons["gradient"].abs().nlargest(NEURONS).index,
    }
    frame = frame[(frame["kind"] == "attention") | frame.index.isin(chosen)].copy()
    whole = scores(model, bound)
    frame["effect"] = (whole - cut(model, bound, list(frame.index), hold=False)).mean(1).tolist()
    frame["held"] = (whole - cut(model, bound, list(frame.index), hold=True)).mean(1).tolist()
    return frame, float(whole.mean())


def summary(frames: list[pd.DataFrame]) -> dict[str, str]:
    """How often the two agree among the heads that matter, over all seeds, with the seeds' range."""
    matter = [frame[frame["effect"].abs() >= MATTERS * frame["total"].abs()] for frame in frames]
    every = pd.concat(matter)
    if len(every) < 5:
        return {}
    own = [disagree(one["direct"], one["effect"]) for one in matter if len(one)]
    signs = [float(one["sign"].mean()) for one in own]
    spread = f" ({min(signs):.0%} to {max(signs):.0%})"
    apart = pd.concat(own).any(axis=1)
    linear = disagree(every["gradient"], every["effect"]).any(axis=1)
    halved = apart & (every["held"].abs() < every["effect"].abs() / 2)
    tops = [frame.loc[frame["direct"].abs().nlargest(10).index] for frame in frames]
    idle = [float((top["effect"].abs() < MATTERS * top["total"].abs()).mean()) for top in tops]
    off = (every["gradient"] - every["frozen"]).abs() / every["gradient"].abs()
    whole = pd.concat(frames)
    ranks = {
        name: whole[name].corr(whole["effect"], method="spearman")
        for name in ("direct", "frozen", "gradient")
    }
    return {
        "matter": f"{len(every) / len(frames):.0f} of {len(whole) / len(frames):.0f}",
        "other sign": f"{pd.concat(own)['sign'].mean():.0%}" + (spread if len(signs) > 1 else ""),
        "direct 10x too small": f"{pd.concat(own)['small'].mean():.0%}",
        "10x too large": f"{pd.concat(own)['large'].mean():.0%}",
        "gradient disagrees": f"{linear.mean():.0%}",
        "act through patterns": f"{halved.sum()} of {apart.sum()}",
        "idle among top 10 direct": f"{sum(idle) / len(idle):.0%}",
        **{f"rank corr. {name}": f"{value:.2f}" for name, value in ranks.items()},
        "told beforehand": auroc(off, apart),
    }


def auroc(score: pd.Series, truth: pd.Series) -> str:
    """Chance that one that disagrees scores above one that agrees; a dash where there are too few."""
    yes, no = score[truth], score[~truth]
    if min(len(yes), len(no)) < 3:
        return "–"
    more = (yes.to_numpy()[:, None] > no.to_numpy()).mean() + 0.5 * (
        yes.to_numpy()[:, None] == no.to_numpy()
    ).mean()
    return f"{more:.2f}"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="*", default=["attn-2l", "gelu-2l", "silu-2l", "swiglu-4l"])
    parser.add_argument("--smollm2", action="store_true", help="SmolLM2-135M instead (`make real`)")
    parser.add_argument("--tasks", nargs="*", default=TASKS)
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--seeds", type=int, default=3)
    options = parser.parse_args()
    rows = []
    for name in ["SmolLM2-135M"] if options.smollm2 else options.models:
        model = mia.load(FOLDER if options.smollm2 else name)
        for task in options.tasks:
            frames = list(studied(model, name, task, options.prompts, options.seeds))
            for kind, shown in (("attention", "heads"), ("mlp", "neurons")):
                found = summary([frame[frame["kind"] == kind] for frame in frames]) if frames else {}
                if found:
                    total = pd.concat(frames)["total"].mean()
                    row = {"model": name, "task": task, "logit difference": f"{total:.1f}", "kind": shown}
                    rows.append(row | found)
                    print(rows[-1], flush=True)
            if frames and name == SHOWN:
                publish("sum_or_cause_heads", heads(frames[0]), clock="none")
    publish("sum_or_cause_smollm2" if options.smollm2 else "sum_or_cause", rows, clock="none")


def heads(frame: pd.DataFrame) -> list[dict[str, str]]:
    """The attention heads of one draw of prompts."""
    own = frame[frame["kind"] == "attention"].sort_values("effect", key=abs, ascending=False)
    columns = {"direct": "direct", "cut": "effect", "cut, patterns held": "held", "gradient": "gradient"}
    return [
        {"head": str(label), **{shown: f"{row[name]:+.2f}" for shown, name in columns.items()}}
        for label, row in own.iterrows()
    ]


def studied(
    model: mia.AttentionOnlyModel, name: str, task_name: str, prompts: int, seeds: int
) -> Iterator[pd.DataFrame]:
    """The heads of every seed; nothing, and why, where the model does not have the behaviour."""
    for seed in range(seeds):
        try:
            task = getattr(mia.tasks, task_name)(model, n=prompts, seed=seed)
        except mia.MechInterpError as error:
            print(name, task_name, "left out:", str(error)[:90])
            return
        accuracy = mia.causal.effects(model, task, [], exact=0).standing.accuracy
        if accuracy < 0.75:
            print(name, task_name, f"left out: right in {accuracy:.0%} of prompts")
            return
        frame, total = study(model, task)
        yield frame.assign(total=total)


if __name__ == "__main__":
    main()
