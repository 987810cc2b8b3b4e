"""Top entries of an OV circuit over 50,257 x 50,257 tokens, d_head 64, random weights.

    python benchmarks/bench_vocabulary.py [--threads N] [--cpu-time] [--rows 50257] [--device cuda]

The yardstick is the strictest there is: the same product, [rows, 64] x [64, 50257] in float32, made in
blocks into one reused buffer, nothing looked at, at whichever block shape is fastest on this machine.
(Made in stripes as wide as the vocabulary, as a plain ``left[a:b] @ right`` is, it is bound by memory and
much slower; the table shows that rate too.) Searches and yardstick take turns. On a shared machine use
``--threads 1 --cpu-time``, and fewer rows.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_composition import measured
from publish import publish

import mechinterp_attn as mia

VOCABULARY, D_MODEL, D_HEAD = 50257, 768, 64
SHAPES = ((256, 1024), (256, 2048), (512, 1024), (512, 2048), (1024, 1024), (1024, 2048))
SEARCHES = {
    "global top 10": {"top_k": 10},
    "global top 1,000": {"top_k": 1000},
    "top 10 of every row": {"top_k": 10, "over": "rows"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall clock")
    parser.add_argument("--rows", type=int, default=VOCABULARY, help="source tokens")
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    model = random_model().to(args.device)
    device = model.W_E.device
    sources = list(range(args.rows))
    print(mia.circuits.ov_top(model, "L0H0", sources=sources, plan=True))
    flops = 2 * args.rows * VOCABULARY * D_HEAD
    some = min(args.rows, 16384)
    best = max(SHAPES, key=lambda shape: bare_rate(device, some, *shape, clock))
    stripes = bare_rate(device, min(args.rows, 4096), 512, VOCABULARY, clock)
    rows = []
    before = bare_rate(device, some, *best, clock)
    for turn in range(args.turns):
        for name, options in SEARCHES.items():
            seconds, memory, result = measured(
                lambda options=options: mia.circuits.ov_top(model, "L0H0", sources=sources, **options),
                clock,
                warm=False,
            )
            after = bare_rate(device, some, *best, clock)
            rows.append(
                {
                    "search": f"{name}, turn {turn + 1}",
                    "seconds": f"{seconds:.2f}",
                    "GFLOP/s": f"{flops / seconds / 1e9:.0f}",
                    f"bare product in blocks of {best[0]} x {best[1]}": (
                        f"{before / 1e9:.0f} and {after / 1e9:.0f}"
                    ),
                    "share": f"{flops / seconds / ((before + after) / 2):.0%}",
                    "share of stripes": f"{flops / seconds / stripes:.0%}",
                    "extra memory": f"{memory / 2**20:.0f} MiB",
                    "float64 check": f"{result.receipt.checks[0].error:.0e}",
                }
            )
            before = after
    publish("vocabulary_top", rows, clock="processor time" if args.cpu_time else "wall clock")


def bare_rate(device: torch.device, n: int, rows: int, columns: int, clock) -> float:
    """FLOP per second of the product in blocks, nothing done with it; the best of three."""
    left = torch.randn(n, D_HEAD, device=device)
    right = torch.randn(D_HEAD, VOCABULARY, device=device)
    out = torch.empty(rows * columns, device=device)
    times = []
    for _ in range(3):
        start = clock()
        for a in range(0, n, rows):
            for b in range(0, VOCABULARY, columns):
                stripe, part = left[a : a + rows], right[:, b : b + columns]
                shape = len(stripe), part.shape[1]
                torch.mm(stripe, part, out=out[: shape[0] * shape[1]].view(shape))
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 2 * n * VOCABULARY * D_HEAD / min(times)


def random_model() -> mia.AttentionOnlyModel:
    generator = torch.Generator().manual_seed(0)
    cfg = dict(n_layers=1, n_heads=1, d_model=D_MODEL, d_head=D_HEAD, n_ctx=8, d_vocab=VOCABULARY)
    cfg |= dict(attn_only=True, normalization_type=None)
    shapes = {"embed.W_E": (VOCABULARY, D_MODEL), "unembed.W_U": (D_MODEL, VOCABULARY)}
    shapes |= {f"blocks.0.attn.W_{x}": (1, D_MODEL, D_HEAD) for x in "QKV"}
    shapes |= {"blocks.0.attn.W_O": (1, D_HEAD, D_MODEL), "pos_embed.W_pos": (8, D_MODEL)}
    state = {n: torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}
    return mia.convert(mia.Checkpoint(cfg, state), check=False)


if __name__ == "__main__":
    with torch.no_grad():
        main()
