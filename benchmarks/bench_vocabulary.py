"""Top entries of an OV circuit over 50,257 x 50,257 tokens, d_head 64, random weights.

    python benchmarks/bench_vocabulary.py [--threads N] [--cpu-time] [--rows 50257] [--device cuda]

The yardstick is this very multiplication, [50257, 64] x [64, 50257] in float32, into 10 GB that are there
already and touched before (give fewer ``--rows`` where memory is short). It is bound by memory. A second,
stricter one is the same product cut into blocks, written over and over into one reused buffer and never
looked at, at the fastest block shape on this machine. Searches and yardsticks take turns. With less than
the machine use ``--threads 1 --cpu-time``.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import torch
from bench_composition import memory_of, timed
from publish import publish

import mechinterp_attn as mia

VOCABULARY, D_MODEL, D_HEAD = 50257, 768, 64
SHAPES = ((256, 1024), (512, 1024), (1024, 1024), (1024, 2048), (2048, 2048))
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
    print(mia.plan(mia.circuits.ov_top, model, "L0H0", sources=sources))
    flops = 2 * args.rows * VOCABULARY * D_HEAD
    yardsticks = Yardsticks(device, args.rows, clock)
    work = {
        name: partial(mia.circuits.ov_top, model, "L0H0", sources=sources, **options)
        for name, options in SEARCHES.items()
    }
    memory = {name: memory_of(search) for name, search in work.items()}
    rows = []
    for turn in range(args.turns):
        for name, search in work.items():
            whole, blocks = yardsticks.rates()
            seconds, result = timed(search, clock)
            rate = flops / seconds
            rows.append(
                {
                    "search": f"{name}, turn {turn + 1}",
                    "seconds": f"{seconds:.2f}",
                    "GFLOP/s": f"{rate / 1e9:.0f}",
                    "the product itself": f"{whole / 1e9:.0f}",
                    "share": f"{rate / whole:.0%}",
                    "the product in blocks": f"{blocks / 1e9:.0f}",
                    "share of that": f"{rate / blocks:.0%}",
                    "extra memory": f"{memory[name] / 2**20:.0f} MiB",
                    "float64 check": f"{result.receipt.checks[0].error:.0e}",
                }
            )
    publish("vocabulary_top", rows, clock="processor time" if args.cpu_time else "wall clock")


class Yardsticks:
    """The product that the searches look through, made whole and made in blocks."""

    def __init__(self, device: torch.device, rows: int, clock):
        self.left = torch.randn(rows, D_HEAD, device=device)
        self.right = torch.randn(D_HEAD, VOCABULARY, device=device)
        self.out = torch.zeros(rows, VOCABULARY, device=device)
        self.clock = clock
        self.shape = max(SHAPES, key=lambda shape: self._rate(lambda: self._blocks(*shape)))

    def rates(self) -> tuple[float, float]:
        """FLOP per second: whole, and in blocks."""
        return self._rate(self._whole), self._rate(lambda: self._blocks(*self.shape))

    def _rate(self, work) -> float:
        start = self.clock()
        work()
        if self.out.device.type == "cuda":
            torch.cuda.synchronize()
        return 2 * self.out.numel() * D_HEAD / (self.clock() - start)

    def _whole(self) -> None:
        torch.mm(self.left, self.right, out=self.out)

    def _blocks(self, rows: int, columns: int) -> None:
        buffer = self.out.view(-1)[: rows * columns]
        for stripe in self.left.split(rows):
            for part in self.right.split(columns, dim=1):
                shape = len(stripe), part.shape[1]
                torch.mm(stripe, part, out=buffer[: shape[0] * shape[1]].view(shape))


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
