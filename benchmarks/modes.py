"""What each mode costs in fidelity: logit error, KL and loss change on real models.

    python benchmarks/modes.py [MODEL TEXT ...] [--tokens 512]

Without arguments: every bundled model with MLPs, on the first tokens of docs/idea.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from publish import publish

import mechinterp_attn as mia
from mechinterp_attn.cli.models import windows
from mechinterp_attn.sources.doors import open_source
from mechinterp_attn.sources.zoo import bundled_names

TEXT = Path(__file__).resolve().parents[1] / "docs" / "idea.md"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pairs", nargs="*", help="model and text file, model and text file, ...")
    parser.add_argument("--tokens", type=int, default=512)
    args = parser.parse_args()
    pairs = args.pairs or [word for name in bundled_names() for word in (name, str(TEXT))]
    rows = []
    for name, text in zip(pairs[::2], pairs[1::2], strict=True):
        source = open_source(name)
        exact = mia.convert(source, check=False)
        if exact.spec.attn_only:
            continue
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
            rows.append(
                {
                    "model": Path(name).name,
                    "mode": mode,
                    "heads per neuron": k,
                    "max logit error": f"{f.max_logit_error:.1e}",
                    "of the scale": f"{f.relative_error:.1e}",
                    "KL (nats)": f"{f.kl:.1e}",
                    "loss change (nats)": f"{f.loss_model - f.loss_source:+.1e}",
                    "same top token": f"{f.top1_agreement:.2%}",
                }
            )
    publish("modes", rows, clock="none")


if __name__ == "__main__":
    main()
