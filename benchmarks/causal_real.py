"""Causal methods on a real model: circuits, neurons, and the correlation with exact patches.

    OMP_NUM_THREADS=2 python benchmarks/causal_real.py [--only circuits|edges|correlation|speed] [--task X]

The model is SmolLM2-135M-Instruct with weights rounded to 4 bits (`make real`). Rankings are found on one
half of the prompts and measured on the other.

- circuits: MIB's protocol at the granularity of heads and neurons, 46,350 of them; and what is left of the
  behaviour when the ten neurons with the largest scores are held to the counterfactual, or to zero.
- edges: the same protocol at MIB's own granularity: edges between attention heads (queries, keys and
  values apart) and whole MLPs, 123,211 of them, in the published table with the random baseline.
- correlation: Pearson's, over layers and positions, of every method's estimate with the exact effect of
  patching the residual stream, what attention writes, and what the MLP writes, on IOI prompts of one
  length.
- speed: what ranking all heads and neurons costs, in forward and backward passes over the same prompts
  in the same run, by processor time.
"""

from __future__ import annotations

import argparse
import os
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from publish import publish
from smollm2 import FOLDER
from torch import Tensor

import mechinterp_attn as mia
from mechinterp_attn.causal.discovery import METHODS
from mechinterp_attn.causal.gradients import graph
from mechinterp_attn.causal.rules import Rules
from mechinterp_attn.causal.runs import watched

HALF = Rules("fixed", "half", "half")
RULES = {name: METHODS[name] for name in ("secant", "gradient", "eap-ig", "relp", "frozen")}
RULES["relp, half patterns"] = HALF
PASSES = {"secant": "2", "eap-ig": "5"}  # forward and backward, per prompt
KINDS = {"residual": "hook_resid_pre", "attention": "hook_attn_out", "MLP": "hook_mlp_out"}
STEPS = 5


def circuits(model: mia.AttentionOnlyModel, prompts: int, tasks: list[str]) -> None:
    for name in tasks:
        found_on, held_out = getattr(mia.tasks, name)(model, n=prompts).split()
        rows: list[dict[str, str]] = []
        for method, rules in RULES.items():
            start = time.perf_counter()
            given: Any = method if method in METHODS else rules
            ranking = mia.causal.discover(model, found_on, given)
            seconds = time.perf_counter() - start
            draws = 2 if not rows else 0
            result = mia.causal.faithfulness(model, held_out, ranking, draws=draws)
            if draws:
                baseline = {"random": result.cmd_random, "reverse": result.cmd_reverse}
            curve = dict(zip(result.frame["share"].round(3), result.frame["faithfulness"], strict=True))
            neurons = ranking.frame[ranking.frame["kind"] == "mlp"].head(10)["head"].tolist()
            left = []
            for patch in ("corrupt", "zero"):
                cut = mia.causal.effects(model, held_out, [neurons], patch, exact=0)
                left.append(1 - float(cut.frame["effect"][0]) / float(cut.standing.clean.mean()))
            rows.append(
                {
                    "method": method,
                    "CMD": f"{result.cmd:.3f}",
                    "interval": "{:.3f} to {:.3f}".format(*result.cmd_interval),
                    "at 1 %": f"{curve[0.01]:.2f}",
                    "at 10 %": f"{curve[0.1]:.2f}",
                    "without 10 neurons": f"{left[0]:.2f}",
                    "10 neurons zero": f"{left[1]:.2f}",
                    "passes": PASSES.get(method, "1"),
                    "seconds": f"{seconds:.0f}",
                }
            )
            print(rows[-1], flush=True)
        for other, cmd in baseline.items():
            row = dict.fromkeys(rows[0], "") | {"method": other, "CMD": f"{cmd:.3f}"}
            rows.append(row)
        publish(f"causal_{name}", rows)


def ranked(model: mia.AttentionOnlyModel, task: mia.Task, method: str, file: Path | None) -> pd.DataFrame:
    """Edges by a method, with the seconds that it took; from a file where an earlier run has left them."""
    if file is not None and file.exists():
        return pd.read_csv(file, keep_default_na=False)
    start = time.perf_counter()
    given: Any = method if method in METHODS else RULES[method]
    frame = mia.causal.discover(model, task, given, "edges", pools=True).frame
    frame = frame.assign(seconds=time.perf_counter() - start)
    if file is not None:
        frame.to_csv(file, index=False)
    return frame


def edges(
    model: mia.AttentionOnlyModel, prompts: int, tasks: list[str], methods: list[str], keep: Path | None
) -> None:
    for name in tasks:
        found_on, held_out = getattr(mia.tasks, name)(model, n=prompts).split()
        rows: list[dict[str, str]] = []
        for method in methods:
            file = None if keep is None else keep / f"{name}_{prompts}_{method}.csv"
            ranking = ranked(model, found_on, method, file)
            result = mia.causal.faithfulness(model, held_out, ranking, draws=0)
            curve = dict(zip(result.frame["share"].round(3), result.frame["faithfulness"], strict=True))
            rows.append(
                {
                    "method": method,
                    "CMD": f"{result.cmd:.3f}",
                    "interval": "{:.3f} to {:.3f}".format(*result.cmd_interval),
                    "CPR": f"{result.cpr:.3f}",
                    "at 0.1 %": f"{curve[0.001]:.2f}",
                    "at 1 %": f"{curve[0.01]:.2f}",
                    "at 10 %": f"{curve[0.1]:.2f}",
                    "seconds": f"{ranking['seconds'][0]:.0f}",
                }
            )
            print(rows[-1], flush=True)
        if "secant" in methods:
            drawn = ranking.sample(frac=1, random_state=0)
            order = list(drawn[["src", "dst", "mode"]].itertuples(index=False, name=None))
            chance = mia.causal.faithfulness(model, held_out, order, draws=0)
            rows.append(dict.fromkeys(rows[0], "") | {"method": "random", "CMD": f"{chance.cmd:.3f}"})
        publish(f"causal_edges_{name}", rows, key="method")


def correlation(model: mia.AttentionOnlyModel, prompts: int) -> None:
    task = mia.tasks.ioi(model, n=8 * prompts)
    lengths = [len(model.as_tokens(text)[0]) for text in task.clean]
    (common, _), *_ = Counter(lengths).most_common(1)
    task = task.take([i for i, n in enumerate(lengths) if n == common][:prompts])
    exact = patches(model, task)
    rows = []
    for method, rules in RULES.items():
        found = estimates(model, task, rules, STEPS if method == "eap-ig" else 1)
        row = {"method": method}
        for kind in KINDS:
            pair = torch.stack([exact[kind].flatten(), found[kind].flatten()])
            row[kind] = f"{float(torch.corrcoef(pair)[0, 1]):.3f}"
        rows.append(row)
        print(row, flush=True)
    publish("causal_correlation", rows, clock="none")


def speed(model: mia.AttentionOnlyModel, prompts: int) -> None:
    task = mia.tasks.sva(model, n=prompts)
    bound = task.bind(model)

    def forward_backward() -> None:
        logits = model(bound.clean.tokens)
        bound.measure(logits[torch.arange(len(bound)), bound.position][:, None]).sum().backward()
        model.zero_grad(set_to_none=True)

    def seconds(work: Callable[[], object]) -> float:
        start = time.process_time()
        work()
        return time.process_time() - start

    unit = min(seconds(forward_backward) for _ in range(3))
    rows = []
    for method in ("secant", "gradient", "relp", "frozen", "eap-ig"):
        given: Any = method
        spent = seconds(lambda given=given: mia.causal.discover(model, task, given, steps=STEPS))
        steps = STEPS if method == "eap-ig" else 1
        rows.append(
            {
                "method": method,
                "passes": f"{spent / unit:.1f}",
                "steps": steps,
                "passes for each step": f"{spent / unit / steps:.1f}",
            }
        )
        print(rows[-1], flush=True)
    publish("causal_speed", rows, clock="processor time")


@torch.no_grad()
def patches(model: mia.AttentionOnlyModel, task: mia.Task) -> dict[str, Tensor]:
    """Exact effects ``[layer, pos]`` by kind, means over prompts: what the metric loses."""
    bound = task.bind(model)
    clean, corrupt = bound.clean.tokens, bound.counterfactual("this").tokens
    n, width = clean.shape
    names = [f"blocks.{layer}.{hook}" for layer in range(model.spec.n_layers) for hook in KINDS.values()]
    whole, cache = model.run_with_cache(clean, names_filter=lambda name: name in names)
    other = model.run_with_cache(corrupt, names_filter=lambda name: name in names)[1]
    score = bound.measure(whole[:, -1:])
    first = int((clean != corrupt).any(0).nonzero()[0])  # nothing differs before
    out = {kind: torch.zeros(model.spec.n_layers, width, dtype=torch.float64) for kind in KINDS}
    places = range(first, width)
    for layer in range(model.spec.n_layers):
        stream = cache[f"blocks.{layer}.hook_resid_pre"].repeat(len(places), 1, 1)
        for kind, hook in KINDS.items():
            name = f"blocks.{layer}.{hook}"

            def put(x: Tensor, hook: object, name: str = name) -> Tensor:
                x = x.clone().unflatten(0, (len(places), n))
                for i, place in enumerate(places):
                    x[i, :, place] = other[name][:, place]
                return x.flatten(0, 1)

            with model.hooks(fwd_hooks=[(name, put)]):
                logits = model(stream, start_at_layer=layer)[:, -1:]
            metric = bound.repeat(len(places)).measure(logits).unflatten(0, (len(places), n))
            out[kind][layer, first:] = (score - metric).double().mean(1)
    return out


def estimates(model: mia.AttentionOnlyModel, task: mia.Task, rules: Rules, steps: int) -> dict[str, Tensor]:
    bound = task.bind(model)
    clean, corrupt = bound.clean, bound.counterfactual("this")
    names = [f"blocks.{layer}.{hook}" for layer in range(model.spec.n_layers) for hook in KINDS.values()]
    one, two = (watched(model, bound, batch, {*names, "hook_embed"})[0] for batch in (clean, corrupt))
    total = dict.fromkeys(names, torch.zeros(()))
    for step in range(steps):
        seen: dict[str, Tensor] = {}

        def viewed(x: Tensor, hook: object, name: str, seen: dict[str, Tensor] = seen) -> Tensor:
            seen[name] = x.view_as(x)
            return seen[name]

        hooks = [(name, lambda x, hook, name=name: viewed(x, hook, name)) for name in names]
        if steps > 1:
            share = (step + 0.5) / steps
            middle = two["hook_embed"] + share * (one["hook_embed"] - two["hook_embed"])
            hooks = [("hook_embed", lambda x, hook, m=middle: m.clone().requires_grad_()), *hooks]
        run = graph(model, bound, clean, rules, hooks=hooks, other=corrupt)
        for name, gradient in zip(names, run.gradients([seen[name] for name in names]), strict=True):
            both = gradient.unflatten(0, (2, -1)).mean(0) if rules.paired else gradient
            total[name] = total[name] + both / steps
    scores = {name: ((one[name] - two[name]) * total[name]).sum(-1).mean(0) for name in names}
    return {
        kind: torch.stack(
            [scores[f"blocks.{layer}.{hook}"] for layer in range(model.spec.n_layers)]
        ).double()
        for kind, hook in KINDS.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("circuits", "edges", "correlation", "speed"))
    parser.add_argument("--methods", default="secant,eap-ig,gradient", help="of edges")
    parser.add_argument("--keep", type=Path, help="a folder for rankings of edges, to go on from")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--task", choices=("ioi", "sva"), help="circuits of this one alone")
    given = parser.parse_args()
    model = mia.load(Path(os.environ.get("MECHINTERP_ATTN_SMOLLM2", FOLDER)))
    tasks = [given.task] if given.task else ["ioi", "sva"]
    if given.only in (None, "correlation"):
        correlation(model, min(given.prompts, 16))
    if given.only in (None, "circuits"):
        circuits(model, given.prompts, tasks)
    if given.only in (None, "speed"):
        speed(model, min(given.prompts, 8))
    if given.only in (None, "edges"):
        edges(model, given.prompts, tasks, given.methods.split(","), given.keep)


if __name__ == "__main__":
    main()
