"""What weight decay and attention dropout do to a converted model, measured.

    python benchmarks/regularisation.py --corpus litbank.txt.xz --out docs/figures

Converts a bundled model literally, with its masks in the weights, and lets the parts that carry the
construction decay, each alone and all together, without gradients: the worst that weight decay can do.
Then drops attention weights in its neuron heads, its attention heads and both. Errors are against the
model with exact masks; losses are on held-out text. Writes weight_decay.csv and attention_dropout.csv.
The page is docs/regularisation.md.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd
import torch
from training import novels as corpus

import mechinterp_attn as mia
from mechinterp_attn import theorems

FACTORS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
DECAYS = {
    "Omega": ["omega"],
    "positions": ["positions"],
    "constant": ["constant"],
    "all three": ["omega", "positions", "constant"],
    "none (all exempt)": [],
}
RATES = (0.0, 0.05, 0.1, 0.2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="litbank.txt.xz")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--model", default="gelu-2l")
    parser.add_argument("--omega", type=float, default=30.0)
    parser.add_argument("--documents", type=int, default=1, help="of each held-out novel")
    parser.add_argument("--length", type=int, default=48)
    parser.add_argument("--draws", type=int, default=6)
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    model = mia.load(options.model, dtype=torch.float64)
    documents = []
    for novel in corpus.read_novels(options.corpus)[-corpus.N_HELD_OUT :]:
        stream = torch.tensor(model.tokenizer(novel[10_000:40_000])["input_ids"])
        documents.append(corpus.windows(stream, options.length)[: options.documents])
    documents = torch.cat(documents)
    exact = theorems.attention_only(model)
    logits, loss = exact(documents, return_type="both")
    literal = theorems.attention_only(model, masks="weights", omega=options.omega)

    rows = []
    for name, only in DECAYS.items():
        for factor in FACTORS:
            got, own = theorems.decay(literal, factor, only=only)(documents, return_type="both")
            error = float((got - logits).abs().max())
            rows.append((name, factor, error, float(own), float(own - loss)))
    columns = ["decayed", "factor", "logit_error", "loss", "loss_change"]
    decay = pd.DataFrame(rows, columns=columns)
    decay.to_csv(options.out / "weight_decay.csv", index=False, float_format="%.4g")
    print(decay.to_string())

    rows = []
    chosen = {"neuron heads": ".neurons.", "attention heads": ".attn.", "all heads": "."}
    for name, part in chosen.items():
        for rate in RATES:
            for seed in range(options.draws if rate else 1):
                hooks = theorems.attention_dropout(exact, rate, torch.Generator().manual_seed(seed))
                hooks = [hook for hook in hooks if part in hook[0]]
                own = exact.run_with_hooks(documents, return_type="loss", fwd_hooks=hooks)
                rows.append((name, rate, seed, float(own), float(own - loss)))
    dropout = pd.DataFrame(rows, columns=["dropped_in", "rate", "seed", "loss", "loss_change"])
    dropout.to_csv(options.out / "attention_dropout.csv", index=False, float_format="%.4g")
    print(dropout.groupby(["dropped_in", "rate"], sort=False)["loss_change"].agg(["mean", "min", "max"]))


if __name__ == "__main__":
    main()
