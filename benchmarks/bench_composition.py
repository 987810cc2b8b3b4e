"""Composition of all heads of a GPT-2-small-shaped model with random weights.

    python benchmarks/bench_composition.py [--threads N] [--skip-bridge] [--device cuda]
    python benchmarks/bench_composition.py --plan       (planning numbers of larger models, no work)

Two comparisons, each within one run: 144 x 144 attention heads against TransformerLens's
``all_composition_scores``, turn about; and the streamed search over all 36,864 + 144 heads against the rate
at which this machine multiplies two 4,096 x 4,096 float32 matrices. That product is made once after every
unit of the search (and its time taken off), because the rate of a shared machine changes from second to
second. All turns stand in the table. With less than the machine use ``--threads 1 --cpu-time``.
"""

from __future__ import annotations

import argparse
import gc
import time
from statistics import median

import torch
from memory import Resident
from publish import publish

import mechinterp_attn as mia
from mechinterp_attn.circuits import composition_scores as search

SHAPE = dict(n_layers=12, n_heads=12, d_model=768, d_head=64, n_ctx=1024, d_vocab=64)
# The vocabulary plays no part in composition and is kept small.
LARGER = {  # layers, heads x d_head, heads, neurons, d_model
    "GPT-2 small": (12, 12 * 64, 12, 3072, 768),
    "Llama-3-8B": (32, 32 * 128, 32, 14336, 4096),
    "Llama-3-70B": (80, 64 * 128, 64, 28672, 8192),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="CPU seconds instead of wall clock")
    parser.add_argument("--skip-bridge", action="store_true")
    parser.add_argument("--skip-dense", action="store_true")
    parser.add_argument("--skip-stream", action="store_true")
    parser.add_argument("--plan", action="store_true", help="only planning numbers of larger models")
    parser.add_argument("--kinds", default="VQ")
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--device", default="cpu")
    args = parser.parse_args()
    if args.plan:
        return print_plans()
    torch.set_num_threads(args.threads)
    clock = time.process_time if args.cpu_time else time.perf_counter
    said = "processor time" if args.cpu_time else "wall clock"
    model = random_model(d_mlp=0 if args.skip_stream else 3072).to(args.device)
    if not args.skip_dense:
        publish("composition_pairs", dense(model, clock, args), clock=said)
    if not args.skip_stream:
        rows = [row for kind in args.kinds for row in stream(model, kind, clock, args.turns)]
        publish("composition_stream", rows, clock=said)


def print_plans() -> None:
    """Pairs and FLOPs of V-composition among all heads; hours are plain division."""
    rows = []
    for name, (layers, vectors, heads, neurons, d_model) in LARGER.items():
        strictly, same = layers * (layers - 1) // 2, layers * (layers + 1) // 2

        def count(a: int, n: int, strictly: int = strictly, same: int = same) -> int:
            """Attention reads earlier layers, neurons their own block's attention too."""
            return (a * a + n * a + n * n) * strictly + a * n * same

        flops = 2 * d_model * count(vectors, neurons)
        rows.append(
            {
                "model": name,
                "heads": f"{layers * neurons:,} + {layers * heads:,}",
                "pairs": f"{count(heads, neurons):.2g}",
                "FLOP": f"{flops:.2g}",
                "bytes of both sides": f"{4 * 2 * layers * (vectors + neurons) * d_model / 2**30:.1f} GiB",
                "at 0.2 TFLOP/s": duration(flops / 0.2e12),
                "at 50 TFLOP/s": duration(flops / 50e12),
            }
        )
    publish("composition_plans", rows, clock="none")


def duration(seconds: float) -> str:
    for size, unit in ((86400, "days"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:.1f} {unit}"
    return f"{seconds:.2g} s"


def dense(model: mia.AttentionOnlyModel, clock, args: argparse.Namespace) -> list[dict[str, str]]:
    def ours():
        return mia.circuits.composition(model, "K", "attention", "attention")

    memory = memory_of(ours)
    if not args.skip_bridge:
        source = as_bridge(model)

        def theirs():
            return source.all_composition_scores("K")

        their_memory = memory_of(theirs)
    ours_all, theirs_all = [], []
    for _ in range(args.turns):
        seconds, result = timed(ours, clock)
        ours_all.append(seconds)
        if not args.skip_bridge:
            seconds, scores = timed(theirs, clock)
            theirs_all.append(seconds)
            found = scores.scores.flatten(0, 1).flatten(1, 2).double()
            error = float((found - result.scores.nan_to_num().cpu()).abs().max())
            del scores, found
    rows = [row_of("ours", ours_all, memory)]
    if not args.skip_bridge:
        ratio = median(theirs_all) / median(ours_all)
        rows.append(row_of("all_composition_scores", theirs_all, their_memory))
        rows[0] |= {"medians": f"{ratio:.1f} times faster", "largest difference": f"{error:.0e}"}
        rows[1] |= {"medians": "", "largest difference": ""}
    return rows


def row_of(who: str, seconds: list[float], memory: int) -> dict[str, str]:
    return {
        "144 x 144 heads, K": who,
        "seconds": ", ".join(f"{s:.2f}" for s in seconds),
        "extra memory": f"{memory / 2**20:.0f} MiB",
    }


def stream(model: mia.AttentionOnlyModel, kind: str, clock, turns: int) -> list[dict[str, str]]:
    def search_all():
        return mia.circuits.composition(model, kind, top_k=1000)

    plan = mia.plan(mia.circuits.composition, model, kind, top_k=1000)
    print(plan)
    memory = memory_of(search_all)
    yardstick = Yardstick(model.W_E.device, clock)
    found, took = [], []  # FLOP per second of the yardstick, seconds of the search
    for _ in range(turns):
        with yardstick:
            seconds, result = timed(search_all, clock)
        found.append(yardstick.rate)
        took.append(seconds - yardstick.seconds)
    rows = [
        {
            "all heads, top 1,000": what,
            "seconds": f"{seconds:.1f}",
            "GFLOP/s": f"{plan.flops / seconds / 1e9:.0f}",
            "4096-cubed product": f"{rate / 1e9:.0f}",
            "share": f"{plan.flops / seconds / rate:.0%}",
        }
        for what, seconds, rate in [
            *((f"{kind}, turn {i + 1}", s, r) for i, (s, r) in enumerate(zip(took, found, strict=True))),
            (f"{kind}, the middle of all turns", median(took), median(found)),
        ]
    ]
    more = {"extra memory": f"{memory / 2**20:.0f} MiB"}
    more |= {"float64 check": f"{result.receipt.checks[0].error:.0e}"}
    return [*(row | dict.fromkeys(more, "") for row in rows[:-1]), rows[-1] | more]


class Yardstick:
    """Multiplies two square float32 matrices after every unit of a search, while entered.

    Attributes:
        seconds: what that took since it was entered;  rate: FLOP per second.
    """

    def __init__(self, device: torch.device, clock, size: int = 4096):
        self.left, self.right, self.out = (torch.randn(size, size, device=device) for _ in range(3))
        self.clock = clock
        self._multiply()  # the first is slow, and not counted

    def __enter__(self) -> None:
        self.seconds, self.flops = 0.0, 0
        unit = self.unit = search._unit_alone

        def unit_then_product(*args):
            part = unit(*args)
            start = self.clock()
            self._multiply()
            self.seconds += self.clock() - start
            self.flops += 2 * len(self.out) ** 3
            return part

        search._unit_alone = unit_then_product

    def __exit__(self, *raised: object) -> None:
        search._unit_alone = self.unit

    @property
    def rate(self) -> float:
        return self.flops / self.seconds

    def _multiply(self) -> None:
        torch.mm(self.left, self.right, out=self.out)
        if self.out.device.type == "cuda":
            torch.cuda.synchronize()


def timed(work, clock):
    """Seconds, and the result."""
    start = clock()
    result = work()
    return clock() - start, result


def memory_of(work) -> int:
    """Extra bytes at the peak: resident memory, or the GPU's own count. Such a run is not timed, since
    it has to touch all its memory for the first time."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        work()
        return torch.cuda.max_memory_allocated() - held
    with Resident() as peak:
        work()
    return peak.extra


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
