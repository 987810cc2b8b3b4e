"""Cost of path analyses in GPT-2-small shape with random weights: time and memory, as ratios.

Run: python benchmarks/bench_paths.py [--tokens 64] [--max-order 8]

Times are processor seconds over all threads; every one is compared with one forward and backward pass
of the same model in the same run.
"""

from __future__ import annotations

import argparse
import resource
import time
from collections.abc import Callable

import torch
from transformer_lens import TransformerBridgeConfig
from transformer_lens.model_bridge import TransformerBridge

import mechinterp_attn as mia
from mechinterp_attn.paths.frozen import Frozen

SHAPE = dict(d_model=768, d_head=64, n_heads=12, n_layers=12, n_ctx=1024, d_vocab=50257, d_mlp=3072)


def model() -> mia.AttentionOnlyModel:
    torch.manual_seed(0)
    config = TransformerBridgeConfig(**SHAPE, act_fn="gelu", normalization_type="LN", seed=0)
    bridge = TransformerBridge.boot_native(config).eval()
    with torch.no_grad():  # residual streams and patterns with some structure in them
        for name, parameter in bridge.named_parameters():
            if parameter.ndim > 1 and "embed" not in name:
                parameter.normal_(std=parameter.shape[-2] ** -0.5)
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
    x = frozen.start
    for sublayer in frozen.sublayers:
        x = x + sum(bank.apply(x) + bank.constant + bank.bias for bank in sublayer.banks)
    return frozen.read_out(x)


@torch.no_grad()
def dense_edges_of_one_sublayer_pair(frozen: Frozen, position: int) -> torch.Tensor:
    """Activation times gradient between all neurons of two MLPs at one position, every entry."""
    early, late = frozen.sublayers[1].banks[0], frozen.sublayers[3].banks[0]
    n = early.bank.n_heads
    every = torch.arange(n)
    z = (early.read(frozen.sublayers[1].stream) + early.z_bias)[position]
    written = early.write_at(z, every, torch.full_like(every, position))
    field = frozen.gradients(torch.ones_like(frozen.end))[4][position]
    return written @ late.pull(field.expand(n, -1), every).T


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--max-order", type=int, default=8)
    args = parser.parse_args()
    net = model()
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
    entries = SHAPE["d_mlp"] ** 2
    entries, pairs = SHAPE["d_mlp"] ** 2, 66  # of MLPs in 12 layers
    print(
        f"dense activation-times-gradient edges between two MLPs at one position: {dense:.2f} s for "
        f"{entries:,} edges; all {pairs} pairs of MLPs at {args.tokens} positions would take "
        f"{dense * pairs * args.tokens:,.0f} s and {pairs * args.tokens * entries * 4 / 2**30:,.0f} GiB"
    )
    one = seconds(lambda: frozen_pass(frozen), 2)
    order_time = seconds(lambda: mia.paths.orders(frozen, max_order=args.max_order))
    print(
        f"orders 0..{args.max_order}: {order_time:.2f} s = {order_time / one:.1f} frozen passes "
        f"(goal: {args.max_order + 2})"
    )
    search_time = seconds(lambda: mia.paths.top_paths(frozen, k=10, max_expansions=20, progress=False))
    print(f"top paths: {search_time / 20:.3f} s per opened partial path")
    print(f"peak {peak_gib():.2f} GiB")


if __name__ == "__main__":
    main()
