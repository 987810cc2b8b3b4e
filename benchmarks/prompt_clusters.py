"""Do prompts of two tasks come apart by their circuits, and would other prompts give the same circuit?

    OMP_NUM_THREADS=1 python benchmarks/prompt_clusters.py

For every pair of ready tasks that a bundled model's tokenizer can write: 24 prompts of each, scored
together by ``causal.prompt_circuits`` and put into two groups that know nothing of the tasks. The adjusted
Rand index is 1 where the groups are the tasks and 0 at chance; the silhouette stands beside that of
shuffled scores. Then, for every task, how many of the ten and twenty heads with the largest mean scores a
resample has too. The models have the behaviour only where ``right`` says so: two tasks come apart by what
their metric goes through, done well or not.
"""

from __future__ import annotations

import itertools
import warnings

from publish import publish

import mechinterp_attn as mia

MODELS = ("attn-2l", "relu-1l", "silu-2l", "gelu-2l", "swiglu-4l")
TASKS = ("induction", "sva", "pronouns", "brackets")
PROMPTS = 24
SIZES = (10, 20)  # of circuits


def main() -> None:
    pairs: list[dict[str, str]] = []
    single: list[dict[str, str]] = []
    for name in MODELS:
        model = mia.load(name)
        tasks = {task: getattr(mia.tasks, task)(model, n=PROMPTS) for task in TASKS}
        for task, prompts in tasks.items():
            circuits = mia.causal.prompt_circuits(model, prompts)
            if model.n_heads > max(SIZES):
                row = {"model": name, "task": task, "heads": f"{model.n_heads:,}"}
                row["right"] = f"{(prompts.score(model) > 0).double().mean():.2f}"
                found = [circuits.stability(size) for size in SIZES]
                single.append(row | {f"overlap, top {one.size}": f"{one.overlap:.2f}" for one in found})
        row = {"model": name, "heads": f"{model.n_heads:,}"}
        for one, two in itertools.combinations(tasks, 2):
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", mia.FailedCheckWarning)  # the table has what it says
                found = mia.causal.prompt_circuits(model, [tasks[one], tasks[two]]).clusters(2)
            row[f"{one}, {two}"] = (
                f"{found.adjusted_rand:.2f} ({found.silhouette:.2f}, {found.silhouette_null:.2f})"
            )
        pairs.append(row)
        print(pairs[-1], flush=True)
    publish("prompt_clusters", pairs, clock="none")
    publish("prompt_stability", single, clock="none")


if __name__ == "__main__":
    main()
