"""Cost of path analyses in GPT-2-small shape with random weights: time and memory, as ratios.

Run: python benchmarks/bench_paths.py [--tokens 64] [--max-order 8]
     python benchmarks/bench_paths.py --long [--small] [--tokens 2300] [--layers 3] [--only orders]
     python benchmarks/bench_paths.py --announced 2300 6000

Times are processor seconds over all threads; every one is compared with one forward and backward pass
of the same model in the same run. ``--long`` measures a prompt of 1,024 tokens or ``--tokens``: what each
analysis adds to the memory in use, and its time; ``--small`` does so in a model of 4 layers, ``--layers``
in one of GPT-2 small's shape with fewer. Above 1,024 tokens the model's context is as long as the prompt,
and the unit is a forward pass alone. ``--announced`` runs nothing: it prints how much memory freezing
prompts of such lengths would need at most.
"""

from __future__ import annotations

import argparse
import os
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from transformer_lens import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import mechinterp_attn as mia
from mechinterp_attn.frozen.prompt import Frozen

SHAPE = dict(d_model=768, d_head=64, n_heads=12, n_layers=12, n_ctx=1024, d_vocab=50257, d_mlp=3072)
SMALL = dict(d_model=256, d_head=32, n_heads=8, n_layers=4, n_ctx=1024, d_vocab=8192, d_mlp=1024)


def model(shape: dict[str, int]) -> mia.AttentionOnlyModel:
    torch.manual_seed(0)
    config = TransformerBridgeConfig(**shape, act_fn="gelu", normalization_type="LN", seed=0)
    bridge = TransformerBridge.boot_native(config).eval()
    with torch.no_grad():  # residual streams and patterns with some structure in them
        for name, parameter in bridge.named_parameters():
            if parameter.ndim > 1:  # [out, in], or an embedding
                starts = "embed" in name or name.startswith("pos")
                parameter.normal_(std=1.0 if starts else parameter.shape[-1] ** -0.5)
    return mia.convert(bridge, check=False)


def seconds(work: Callable[[], object], repeats: int = 1) -> float:
    """Processor seconds over all threads, the best of a few runs: a busy machine does not change them
    much, and divided by the number of threads they are the time on an idle one."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return min(times)


def peak_gib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


@torch.no_grad()
def frozen_pass(frozen: Frozen) -> torch.Tensor:
    return frozen.read_out(frozen.forward(frozen.start))


@torch.no_grad()
def dense_edges_of_one_sublayer_pair(frozen: Frozen, position: int) -> torch.Tensor:
    """Activation times gradient between all neurons of two MLPs at one position, every entry."""
    early, late = frozen.sublayers[1].banks[0], frozen.sublayers[3].banks[0]
    n = early.bank.n_heads
    every = torch.arange(n)
    z = (early.read(frozen.sublayers[1].stream) + early.z_bias)[position]
    written = early.write_at(z, every, torch.full_like(every, position))
    field = frozen.backward(torch.ones_like(frozen.end)).streams[4][position]
    return written @ late.pull(field.expand(n, -1), every).T


def resident() -> float:
    """GiB in use now."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**30


def watched(work: Callable[[], object]) -> tuple[object, float, float]:
    """What some work gives, its processor seconds, and the most GiB that it added, by sampling."""
    before = top = resident()
    done = threading.Event()

    def watch() -> None:
        nonlocal top
        while not done.wait(0.005):
            top = max(top, resident())

    thread = threading.Thread(target=watch)
    thread.start()
    start = time.process_time()
    try:
        result = work()
    finally:
        done.set()
        thread.join()
    return result, time.process_time() - start, top - before


def long_prompt(small: bool, n: int, layers: int | None, only: list[str]) -> None:
    shape = (SMALL if small else SHAPE) | {"n_ctx": max(n, 1024)}
    shape |= {} if layers is None else {"n_layers": layers}
    net = model(shape)
    tokens = torch.randint(shape["d_vocab"], (n,), generator=torch.Generator().manual_seed(0))
    print(f"{net}\n{n:,} tokens, {torch.get_num_threads()} threads; {resident():.2f} GiB before work")
    trained = n <= 1024  # a backward pass of a longer prompt would hold more than what is measured

    def once() -> None:
        with torch.set_grad_enabled(trained):
            loss = net(tokens, return_type="loss")
        if trained:
            loss.backward()

    _, both, extra = watched(once)
    net.zero_grad(set_to_none=True)
    name = "forward + backward" if trained else "forward"
    print(f"{name:26} {both:6.1f} s   1.00x  +{extra:.2f} GiB", flush=True)
    frozen, spent, extra = watched(lambda: mia.paths.freeze(net, tokens, max_bytes=8 << 30))
    print(f"{'freeze':26} {spent:6.1f} s  {spent / both:5.2f}x  +{extra:.2f} GiB", flush=True)
    paths, last = mia.paths, shape["n_layers"] - 1
    works: dict[str, Callable[[], object]] = {
        "logit attribution": lambda: paths.logit_attribution(frozen),
        "attribution graph": lambda: paths.attribution_graph(frozen, max_bytes=8 << 30),
        "score of a head": lambda: paths.expand_score(
            frozen, f"L{last}H0", -1, 5, against="others", keep=8
        ),
        "20 partial paths": lambda: paths.top_paths(frozen, top_k=10, max_expansions=20, progress=False),
        "orders 0..4": lambda: paths.orders(frozen, max_order=4),
        "term importance, 4 heads": lambda: paths.term_importance(net, tokens, heads=4),
    }
    for name, work in works.items():
        if only and not any(part in name for part in only):
            continue
        result, spent, extra = watched(work)
        print(
            f"{name:26} {spent:6.1f} s  {spent / both:5.2f}x  +{extra:.2f} GiB   {result.receipt}",
            flush=True,
        )
    print(f"peak {peak_gib():.2f} GiB, the model included")


def announced(lengths: list[int]) -> None:
    net = model(SHAPE | {"n_ctx": max(lengths)})
    for n in lengths:
        print(f"{n:,} tokens: {mia.plan(mia.paths.freeze, net, torch.zeros(n, dtype=torch.long))}")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--announced", type=int, nargs="+", metavar="TOKENS")
    parser.add_argument("--tokens", type=int, help="by default 64, and 1,024 of --long")
    parser.add_argument("--max-order", type=int, default=8)
    parser.add_argument("--long", action="store_true")
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--layers", type=int, help="of --long, how many instead of the shape's own")
    parser.add_argument("--only", nargs="+", default=[], help="of --long, analyses whose names hold these")
    args = parser.parse_args()
    if args.announced:
        announced(args.announced)
        return
    if args.long:
        long_prompt(args.small, args.tokens or 1024, args.layers, args.only)
        return
    args.tokens = args.tokens or 64
    net = model(SHAPE)
    tokens = torch.randint(SHAPE["d_vocab"], (args.tokens,), generator=torch.Generator().manual_seed(0))
    print(f"{net}\n{args.tokens} tokens, {torch.get_num_threads()} threads")

    def forward_backward() -> None:
        net.zero_grad()
        net(tokens, return_type="loss").backward()

    both = seconds(forward_backward, 2)
    net.zero_grad(set_to_none=True)
    before = peak_gib()
    print(f"forward + backward: {both:.2f} s (1.0x); peak so far {before:.2f} GiB, the model included")
    start = time.process_time()
    frozen = mia.paths.freeze(net, tokens)
    freezing = time.process_time() - start
    print(f"freeze, receipt included: {freezing:.2f} s ({freezing / both:.2f}x)   {frozen.receipt}")

    start = time.process_time()
    graph = mia.paths.attribution_graph(frozen)
    graph_time = time.process_time() - start + freezing
    print(
        f"attribution graph, freeze included: {graph_time:.2f} s ({graph_time / both:.2f}x), peak "
        f"{peak_gib():.2f} GiB (+{peak_gib() - before:.2f})\n    {graph.receipt}"
    )
    dense = seconds(lambda: dense_edges_of_one_sublayer_pair(frozen, args.tokens - 1))
    entries, pairs = SHAPE["d_mlp"] ** 2, 66  # of MLPs in 12 layers
    print(
        f"dense activation-times-gradient edges between two MLPs at one position: {dense:.2f} s for "
        f"{entries:,} edges; all {pairs} pairs of MLPs at {args.tokens} positions would take "
        f"{dense * pairs * args.tokens:,.0f} s and {pairs * args.tokens * entries * 4 / 2**30:,.0f} GiB"
    )
    one = seconds(lambda: frozen_pass(frozen), 2)
    order_time = seconds(lambda: mia.paths.orders(frozen, max_order=args.max_order), 2)
    print(
        f"orders 0..{args.max_order}: {order_time:.2f} s = {order_time / one:.1f} frozen passes "
        f"(goal: {args.max_order + 2})"
    )
    start = time.process_time()
    few = mia.paths.top_paths(frozen, top_k=10, max_expansions=1, progress=False)
    first = time.process_time() - start
    start = time.process_time()
    paths = mia.paths.top_paths(frozen, top_k=10, max_expansions=30, progress=False)
    more = time.process_time() - start
    rate = (paths.expansions - few.expansions) / (more - first)
    print(f"top paths: {first:.2f} s to begin, then {rate:.1f} partial paths opened per second")
    print(f"    {paths.receipt}")
    print(f"peak {peak_gib():.2f} GiB")


if __name__ == "__main__":
    main()
