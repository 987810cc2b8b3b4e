"""Composition of all heads of a GPT-2-small-shaped model with random weights.

    python benchmarks/bench_composition.py [--threads N] [--skip-bridge] [--device cuda]
    python benchmarks/bench_composition.py --plan       (planning numbers of larger models, no work)

Two comparisons, each within one run: 144 x 144 attention heads against TransformerLens's
``all_composition_scores``, and the streamed search over all 36,864 + 144 heads against the rate at which
this machine multiplies float32 matrices. Ratios are printed; so is the memory beyond the model's.
On a shared machine use ``--threads 1`` and compare CPU time (``--cpu-time``).
"""

from __future__ import annotations

import argparse
import gc
import threading
import time
from pathlib import Path

import torch

import mechinterp_attn as mia

SHAPE = dict(n_layers=12, n_heads=12, d_model=768, d_head=64, n_ctx=1024, d_vocab=64)
# The vocabulary plays no part in composition and is kept small.


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall clock")
    parser.add_argument("--skip-bridge", action="store_true")
    parser.add_argument("--skip-stream", action="store_true")
    parser.add_argument("--plan", action="store_true", help="only planning numbers of larger models")
    parser.add_argument("--kinds", default="VQ")
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.plan:
        return print_plans()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    print(f"{args.device}, {args.threads} threads, {'CPU' if args.cpu_time else 'wall-clock'} time")
    model = random_model(d_mlp=0 if args.skip_stream else 3072).to(args.device)
    dense(model, clock, bridge=not args.skip_bridge)
    if not args.skip_stream:
        for kind in args.kinds:
            stream(model, kind, clock)


def print_plans() -> None:
    """Pairs and FLOPs of V-composition among all heads: layers, heads x d_head, d_mlp, d_model."""
    shapes = {
        "GPT-2 small": (12, 12 * 64, 12, 3072, 768),
        "Llama-3-8B": (32, 32 * 128, 32, 14336, 4096),
        "Llama-3-70B": (80, 64 * 128, 64, 28672, 8192),
    }
    for name, (layers, vectors, heads, neurons, d_model) in shapes.items():
        strictly, same = layers * (layers - 1) // 2, layers * (layers + 1) // 2

        def count(a: int, n: int, strictly: int = strictly, same: int = same) -> int:
            """Attention reads earlier layers, neurons their own block's attention too."""
            return (a * a + n * a + n * n) * strictly + a * n * same

        flops = 2 * d_model * count(vectors, neurons)
        print(
            f"{name}: {layers * neurons:,} neurons + {layers * heads:,} heads, "
            f"{count(heads, neurons):.3g} pairs, {flops:.3g} FLOP"
        )


def dense(model: mia.AttentionOnlyModel, clock, *, bridge: bool) -> None:
    ours, memory, result = measured(
        lambda: mia.circuits.composition(model, "K", "attention", "attention"), clock
    )
    print(f"144 x 144 heads, K: {ours:.2f} s, {memory / 2**20:.0f} MiB extra")
    if not bridge:
        return
    source = as_bridge(model)
    theirs, their_memory, scores = measured(lambda: source.all_composition_scores("K"), clock, warm=False)
    error = (
        (scores.scores.flatten(0, 1).flatten(1, 2).double() - result.scores.nan_to_num().cpu()).abs().max()
    )
    print(
        f"all_composition_scores: {theirs:.2f} s, {their_memory / 2**20:.0f} MiB extra: "
        f"ours is {theirs / ours:.1f} times faster; largest difference {float(error):.1e}"
    )


def stream(model: mia.AttentionOnlyModel, kind: str, clock) -> None:
    plan = mia.circuits.composition(model, kind, top_k=1000, plan=True)
    print(plan)
    rate = matmul_rate(model.W_E.device, clock)
    seconds, memory, result = measured(
        lambda: mia.circuits.composition(model, kind, top_k=1000), clock, warm=False
    )
    rate = (rate + matmul_rate(model.W_E.device, clock)) / 2  # the machine's mood before and after
    print(
        f"{kind}, all heads, top 1,000: {plan.flops / seconds / 1e9:.0f} GFLOP/s, "
        f"{plan.flops / seconds / rate:.0%} of this machine's float32 matmul rate, "
        f"{memory / 2**20:.0f} MiB extra; {result.receipt.checks[0]}"
    )


def matmul_rate(device: torch.device, clock, size: int = 4096) -> float:
    """FLOP per second of a large square float32 multiplication."""
    a, b = torch.randn(size, size, device=device), torch.randn(size, size, device=device)
    out = a @ b
    times = []
    for _ in range(3):
        start = clock()
        torch.mm(a, b, out=out)
        if device.type == "cuda":
            torch.cuda.synchronize()
        times.append(clock() - start)
    return 2 * size**3 / min(times)


def measured(work, clock, *, warm: bool = True):
    """Seconds, extra bytes at the peak (resident memory, or the GPU's own count), and the result."""
    if warm:
        work()
    gc.collect()
    with PeakMemory() as peak:
        start = clock()
        result = work()
        seconds = clock() - start
    return seconds, peak.extra, result


class PeakMemory:
    """Watches resident memory from another thread, every 2 ms."""

    def __enter__(self) -> PeakMemory:
        self.before = self.most = resident()
        self.on_gpu = torch.cuda.is_available()
        if self.on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            self.gpu_before = torch.cuda.memory_allocated()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.002):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.extra = self.most - self.before
        if self.on_gpu:
            self.extra = torch.cuda.max_memory_allocated() - self.gpu_before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def random_model(**changes: int) -> mia.AttentionOnlyModel:
    cfg = SHAPE | changes | {"normalization_type": None, "act_fn": "gelu_new"}
    generator = torch.Generator().manual_seed(0)
    d, h, k, m, v = (cfg[n] for n in ("d_model", "n_heads", "d_head", "d_mlp", "d_vocab"))
    shapes = {"embed.W_E": (v, d), "pos_embed.W_pos": (cfg["n_ctx"], d), "unembed.W_U": (d, v)}
    for layer in range(cfg["n_layers"]):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.attn.W_{x}": (h, d, k) for x in "QKV"} | {f"{at}.attn.W_O": (h, k, d)}
        if m:
            shapes |= {f"{at}.mlp.W_in": (d, m), f"{at}.mlp.W_out": (m, d)}
    weights = {n: torch.randn(s, generator=generator) * 0.02 for n, s in shapes.items()}
    if not m:
        cfg |= {"attn_only": True}
    return mia.convert(mia.Checkpoint(cfg, weights), check=False)


def as_bridge(model: mia.AttentionOnlyModel):
    """The attention heads of a model as TransformerLens's own."""
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    cfg = TransformerBridgeConfig(**SHAPE, attn_only=True, normalization_type=None, seed=0)
    bridge = TransformerBridge.boot_native(cfg).eval()
    with torch.no_grad():
        for layer, block in enumerate(bridge.blocks):
            bank = next(b for b in model.banks if b.layer == layer and b.kind == "attention")
            for name in ("W_Q", "W_K", "W_V", "W_O"):
                getattr(block.attn, name).copy_(getattr(bank, name))
    return bridge


if __name__ == "__main__":
    with torch.no_grad():
        main()
