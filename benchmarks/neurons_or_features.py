"""Neurons or features: which of the two describe what a model does with fewer nodes?

    OMP_NUM_THREADS=1 python benchmarks/neurons_or_features.py [--task induction]

The bundled gelu-2l once with its 1,024 neurons as heads and once with its bundled dictionaries attached,
their features and two errors in the neurons' place; attention heads are nodes in both. Rankings are found
on one half of the prompts (``causal.discover``) and measured on the other (``causal.faithfulness``): CMD
over MIB's shares of all nodes, and the fewest nodes that carry 0.8 of the behaviour and every larger
circuit tried does too. The tasks:

- induction: ``mia.tasks.induction``.
- text: passages of the held-out novels at whose end the model is sure of the right token (probability above
  0.5); the counterfactual is another such passage with another answer.

In the rows "errors always in" the two errors are put first in the ranking: what is left is what features
add once everything that they leave out is there. "errors never in" takes them out of the ranking.
"""

from __future__ import annotations

import argparse

import pandas as pd
import torch
from publish import publish

import mechinterp_attn as mia

MODEL = "gelu-2l"
METHODS = ("secant", "gradient")
ENOUGH = 0.8
SHOWN = (20, 100, 500)  # nodes whose faithfulness is in the table
LENGTH = 32  # tokens of a passage
SIZES = (
    1,
    2,
    3,
    5,
    8,
    10,
    15,
    20,
    30,
    40,
    60,
    80,
    100,
    150,
    200,
    250,
    300,
    350,
    400,
    450,
    500,
    550,
    600,
    700,
    800,
)


def passages(model: mia.AttentionOnlyModel, n: int) -> mia.Task:
    """Held-out text at places where the model is sure and right."""
    documents = mia.held_out()
    logits = torch.cat([model(part) for part in documents.split(32)])
    p = logits[:, :-1].softmax(-1).gather(-1, documents[:, 1:, None])[..., 0]
    rows = []
    for document, sure in zip(documents, p > 0.5, strict=True):
        ends = sure.nonzero()[:, 0]
        ends = ends[ends >= LENGTH - 2]
        rows += [(document, int(end)) for end in ends[:2]]
    prompts = [torch.cat([d[:1], d[end - LENGTH + 2 : end + 1]]) for d, end in rows]
    answers = [int(d[end + 1]) for d, end in rows]
    logits = model(torch.stack(prompts))[:, -1]
    right = (logits.argmax(-1) == torch.tensor(answers)).tolist()
    prompts = [prompt for prompt, yes in zip(prompts, right, strict=True) if yes]
    answers = [answer for answer, yes in zip(answers, right, strict=True) if yes]
    pairs = []
    for i, answer in enumerate(answers):
        other = next(j for j in range(i + 1, i + len(answers)) if answers[j % len(answers)] != answer)
        pairs.append(other % len(answers))
    chosen = range(min(n, len(answers)))
    return mia.Task(
        torch.stack([prompts[i] for i in chosen]),
        corrupt=torch.stack([prompts[pairs[i]] for i in chosen]),
        answer=[answers[i] for i in chosen],
        against=[answers[pairs[i]] for i in chosen],
        name="text",
    )


def rankings(model: mia.AttentionOnlyModel, task: mia.Task, method: str) -> dict[str, list[str]]:
    """Heads in order, by what they are called in the table."""
    frame = mia.causal.discover(model, task, method).frame
    order = frame["head"].tolist()
    errors = list(model.heads.of("error")) if model.spec.dictionaries else []
    if not errors:
        return {"neurons": order}
    rest = [head for head in order if head not in errors]
    return {
        "features": order,
        "features, errors always in": [*errors, *rest],
        "features, errors never in": rest,
    }


def fewest(curve: pd.DataFrame) -> str:
    """The size from which on every circuit tried carries enough."""
    short = curve[curve["faithfulness"] < ENOUGH]
    at = curve if short.empty else curve[curve["size"] > short["size"].max()]
    return "–" if at.empty else f"{at['size'].iloc[0]:,}"


def measured(task: mia.Task, models: list[mia.AttentionOnlyModel]) -> list[dict[str, str]]:
    """A row for every ranking of every model."""
    found_on, held_out = task.split()
    rows: list[dict[str, str]] = []
    for method in METHODS:
        for model in models:
            for nodes, order in rankings(model, found_on, method).items():
                sizes = [*(n for n in SIZES if n < len(order)), len(order)]
                curve = mia.causal.faithfulness(model, held_out, order, sizes=sizes, draws=0).frame
                draws = 1 if method == METHODS[0] else 0
                shares = mia.causal.faithfulness(model, held_out, order, draws=draws)
                at = curve.set_index("size")["faithfulness"]
                row = {
                    "ranked by": method,
                    "nodes": nodes,
                    "of": f"{model.n_heads:,}",
                    "CMD": f"{shares.cmd:.3f}",
                }
                row["CMD, random"] = f"{shares.cmd_random:.3f}" if draws else "–"
                row["nodes for 0.8"] = fewest(curve)
                row |= {f"faithfulness of {n}": f"{at[n]:.2f}" for n in SHOWN}
                rows.append(row)
                print(row, flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--prompts", type=int, default=40)
    parser.add_argument("--task", choices=["induction", "text"])
    options = parser.parse_args()
    plain = mia.load(MODEL)
    described = plain
    for layer in range(plain.spec.n_layers):
        described = mia.attach(described, mia.Dictionary.load(MODEL, layer=layer), layer=layer)
    makers = {"induction": mia.tasks.induction, "text": passages}
    for name, make in makers.items():
        if options.task in (None, name):
            rows = measured(make(plain, options.prompts), [plain, described])
            publish(f"neurons_or_features_{name}", rows, clock="none")


if __name__ == "__main__":
    main()
