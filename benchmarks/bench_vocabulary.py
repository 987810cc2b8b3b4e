"""Top entries of an OV circuit over 50,257 x 50,257 tokens, d_head 64, random weights.

    python benchmarks/bench_vocabulary.py [--threads N] [--cpu-time] [--rows 50257] [--device cuda]

Compared, in one run, with the rate at which this machine makes the same product in the same blocks
without looking at it, and in stripes as wide as the vocabulary. On a shared machine use ``--threads 1
--cpu-time``, and fewer rows.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_composition import measured

import mechinterp_attn as mia
from mechinterp_attn.circuits.streaming import block_shape

VOCABULARY, D_MODEL, D_HEAD = 50257, 768, 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall clock")
    parser.add_argument("--rows", type=int, default=VOCABULARY, help="source tokens")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{args.device}, {args.threads} threads, {'CPU' if args.cpu_time else 'wall-clock'} time")
    model = random_model().to(args.device)
    sources = list(range(args.rows))
    print(mia.circuits.ov_top(model, "L0H0", sources=sources, plan=True))
    flops = 2 * args.rows * VOCABULARY * D_HEAD
    rows, columns = block_shape(model.W_E.device)
    bare = bare_rate(model.W_E.device, args.rows, rows, columns, clock)
    wide = bare_rate(model.W_E.device, min(args.rows, 8192), rows, VOCABULARY, clock)
    for name, options in (
        ("global top 10", {"top_k": 10}),
        ("global top 1,000", {"top_k": 1000}),
        ("top 10 of every row", {"top_k": 10, "over": "rows"}),
    ):
        seconds, memory, result = measured(
            lambda options=options: mia.circuits.ov_top(model, "L0H0", sources=sources, **options), clock
        )
        rate = flops / seconds
        print(
            f"{name}: {rate / 1e9:.0f} GFLOP/s, {rate / bare:.0%} of the bare product in blocks, "
            f"{rate / wide:.0%} of it in stripes, {memory / 2**20:.0f} MiB extra"
        )
        print(result.receipt.checks[0])


def bare_rate(device: torch.device, n: int, rows: int, columns: int, clock) -> float:
    """FLOP per second of the product in blocks, nothing done with it."""
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
