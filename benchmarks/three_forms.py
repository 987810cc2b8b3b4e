"""Time and memory of an MLP as MLP, as two-key heads and as dense heads, in one run.

    python benchmarks/three_forms.py --out docs/figures

For the first MLP of a bundled model, at several lengths: ``act(x W_in + b) W_out``; the same with every
neuron's two scores computed as a softmax over {self, bias token}; the same as dense masked softmax heads
on the augmented sequence. Each form is timed in turn, several rounds; the table has the median ratio to
the MLP, in processor time of one thread. Memory is the most bytes alive
at once among what a call allocates, counted by torch's profiler.
Writes three_forms.csv. The page is docs/costs.md.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

import mechinterp_attn as mia
from mechinterp_attn.theorems import Layout, neuron_heads


def forms(bank, n_tokens: int) -> dict[str, Callable[[], Tensor]]:
    """The three forms of one MLP on the same random stream, as functions of nothing."""
    W_in, b_in, W_out = (t.detach() for t in (bank.W_in, bank.b_in, bank.W_out))
    x = torch.randn(n_tokens, len(W_in), generator=torch.Generator().manual_seed(0))
    layout = Layout(len(W_in))
    heads = neuron_heads(layout, W_in, W_out, b_in, activation="silu")
    X = layout.augment(x)

    def two_key() -> Tensor:
        z = x @ W_in + b_in
        pattern = torch.stack([z, torch.zeros_like(z)]).softmax(0)  # {self, bias token}
        return (pattern[0] * z) @ W_out

    return {
        "MLP": lambda: torch.nn.functional.silu(x @ W_in + b_in) @ W_out,
        "two-key heads": two_key,
        "dense heads": lambda: layout.deaugment(heads(X)),
    }


def peak_bytes(run: Callable[[], Tensor]) -> int:
    """The most bytes alive at once among what a call allocates."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as trace:
        run()
    alive = peak = 0
    for event in sorted(trace.profiler.kineto_results.events(), key=lambda e: e.start_ns()):
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    return peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--model", default="gelu-2l")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--lengths", type=int, nargs="+", default=[16, 32, 64, 128, 256])
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.set_num_threads(1)
    model = mia.load(options.model)
    bank = next(bank for bank in model.banks if bank.kind == "mlp")
    rows = []
    for n_tokens in options.lengths:
        runs = forms(bank, n_tokens)
        expected = runs["MLP"]()
        seconds: dict[str, list[float]] = {name: [] for name in runs}
        for _ in range(options.rounds):
            for name, run in runs.items():
                repeats = 50 if name != "dense heads" else 1
                start = time.process_time()
                for _ in range(repeats):
                    out = run()
                seconds[name].append((time.process_time() - start) / repeats)
                assert torch.allclose(out, expected, atol=1e-3)
        baseline = statistics.median(seconds["MLP"])
        for name, run in runs.items():
            rows.append(
                {
                    "form": name,
                    "tokens": n_tokens,
                    "time_over_mlp": statistics.median(seconds[name]) / baseline,
                    "peak_bytes": peak_bytes(run),
                    "pattern_bytes": {
                        "MLP": 0,
                        "two-key heads": 4 * bank.n_heads * n_tokens,
                        "dense heads": 4 * bank.n_heads * (n_tokens + 1) ** 2,
                    }[name],
                }
            )
    frame = pd.DataFrame(rows)
    frame.to_csv(options.out / "three_forms.csv", index=False, float_format="%.4g")
    print(frame.to_string())


if __name__ == "__main__":
    main()
