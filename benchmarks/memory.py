"""Peak extra memory of a conversion, with the check and without.

    OMP_NUM_THREADS=1 python benchmarks/memory.py [--layers 12]

A GPT-2-small-shaped Hugging Face model with random weights is converted through the bridge, each time in
a process of its own. Two counts, both taken from the start of ``mia.convert`` to its end:

- tensors: the most bytes alive at once among what torch allocates (its profiler reports every
  allocation and release on the CPU);
- resident: the most resident memory minus that before, read from another thread every five milliseconds
  (Linux). It adds what the C library's allocator keeps of memory already given back.

A tiny model is converted first, so that loading code is not counted. "Beyond the folded weights" leaves
out the weights of the result that are not shared with the source: the copies that folding asks for.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import threading
from pathlib import Path

import torch
from publish import publish

import mechinterp_attn as mia
from mechinterp_attn.sources.huggingface import some_tokenizer

MIB = 2**20


class Resident:
    """Watches resident memory from another thread; ``extra`` is the most it grew, in bytes."""

    def __enter__(self) -> Resident:
        # What the allocator keeps of memory given back earlier would be used again unseen.
        ctypes.CDLL(None).malloc_trim(0)
        self.before = self.most = resident()
        self.stop = threading.Event()
        self.thread = threading.Thread(target=self.watch, daemon=True)
        self.thread.start()
        return self

    def watch(self) -> None:
        while not self.stop.wait(0.005):
            self.most = max(self.most, resident())

    def __exit__(self, *_: object) -> None:
        self.stop.set()
        self.thread.join()
        self.extra = max(self.most, resident()) - self.before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * 4096


def most_alive(profile: torch.profiler.profile) -> int:
    """The most bytes alive at once among what was allocated under the profiler."""
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    alive = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        alive += event.nbytes()
        most = max(most, alive)
    return most


def source(**shape: int) -> object:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(**shape)).eval()
    with some_tokenizer(None, hf.config.vocab_size) as tokenizer:
        return TransformerBridge.boot_transformers("gpt2", hf_model=hf, tokenizer=tokenizer, device="cpu")


def measure(layers: int, check: bool, how: str) -> dict[str, float]:
    mia.convert(source(n_layer=1, n_embd=32, n_head=2, vocab_size=100))
    bridge = source(n_layer=layers)
    gc.collect()
    if how == "tensors":
        activities = [torch.profiler.ProfilerActivity.CPU]
        with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
            model = mia.convert(bridge, check=check)
        peak = most_alive(profile)
    else:
        with Resident() as memory:
            model = mia.convert(bridge, check=check)
        peak = memory.extra
    given = {p.data_ptr() for p in bridge.original_model.parameters()}
    size = {True: 0, False: 0}
    for parameter in model.parameters():
        size[parameter.data_ptr() in given] += parameter.numel() * parameter.element_size()
    return {"shared": size[True] / MIB, "folded": size[False] / MIB, "peak": peak / MIB}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--one", nargs=2, metavar=("CHECK", "HOW"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.layers, args.one[0] == "on", args.one[1])))
        return
    rows = []
    for check in ("off", "on"):
        for how in ("tensors", "resident"):
            command = [sys.executable, __file__, "--layers", str(args.layers), "--one", check, how]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            m = json.loads(printed.splitlines()[-1])
            whole, extra = m["shared"] + m["folded"], m["peak"] - m["folded"]
            sizes = {"model": whole, "shared": m["shared"], "folded": m["folded"], "peak": m["peak"]}
            sizes["beyond the folded weights"] = extra
            rows.append(
                {"check": check, "counted": how}
                | {f"{name} (MiB)": f"{x:.0f}" for name, x in sizes.items()}
                | {"of the model": f"{extra / whole:.1%}"}
            )
    publish("memory", rows, clock="none")


if __name__ == "__main__":
    main()
