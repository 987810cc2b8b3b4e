"""What each mode costs in fidelity: logit error, KL and loss change on real models.

    python benchmarks/modes.py FOLDER_OR_NAME TEXT ... [--tokens 2048]

Prints a MyST table, one row for each model, mode and number of heads per neuron; the rows in
docs/modes.md come from here.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import mechinterp_attn as mia
from mechinterp_attn.cli.models import windows
from mechinterp_attn.sources.doors import open_source


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="+", help="model and text file, model and text file, ...")
    parser.add_argument("--tokens", type=int, default=2048)
    args = parser.parse_args()
    columns = (
        "model, mode, heads per neuron, max logit error, of the scale, KL, loss change, same top token"
    )
    print("| " + " | ".join(columns.split(", ")) + " |")
    print("|---|---|--:|--:|--:|--:|--:|--:|")
    for name, text in zip(args.pairs[::2], args.pairs[1::2], strict=True):
        source = open_source(name)
        exact = mia.convert(source, check=False)
        tokens = windows(exact, Path(text).read_text(encoding="utf-8"), args.tokens)
        modes = [("exact", 1), ("silu", 1)] + [("mixture", k) for k in (1, 2, 3, 4, 6, 8)]
        for mode, k in modes:
            try:
                model = mia.convert(source, mlp=mode, components=k, check=False)
            except mia.MechInterpError:
                continue  # no fit with so many heads, or no softmax head at all
            if mode == "mixture" and len(model.spec.mixtures[0][0]) != k:
                continue
            with torch.no_grad():
                f = mia.verify(model, source, tokens)
            print(
                f"| {Path(name).name} | {mode} | {k} | {f.max_logit_error:.1e} | {f.relative_error:.1e} | "
                f"{f.kl:.1e} | {f.loss_model - f.loss_source:+.1e} | {f.top1_agreement:.2%} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
