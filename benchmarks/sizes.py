"""Times and memory by model size: loading, scores, effects, an attribution graph and the report.

    python benchmarks/sizes.py [--models gelu-2l llama-1b] [--steps load report]

Every step runs in a process of its own, which loads the model first. Three models: the bundled gelu-2l,
SmolLM2-135M as a Hugging Face folder (``make real`` fetches it, or the environment variable
``MECHINTERP_ATTN_SMOLLM2`` names it), and a folder in the shape of Llama 3.2 1B with random weights in
bfloat16, written shard by shard to a temporary folder and loaded with ``dtype=torch.bfloat16``. The prompt
has 64 tokens.

Times are those of the clock and those of the processors, which count no waiting for others on a shared
machine. Peaks are the process's resident memory, sampled every five milliseconds: of loading, beyond what
the imported packages take; of the other steps, beyond the loaded model. A run with ``--models`` or
``--steps`` renews its rows of the published table and leaves the others.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from memory import Resident
from publish import publish
from safetensors.torch import save_file
from smollm2 import FOLDER
from torch import Tensor

GIB = 2**30
N_TOKENS = 64
LLAMA = dict(
    num_hidden_layers=16,
    hidden_size=2048,
    num_attention_heads=32,
    num_key_value_heads=8,
    intermediate_size=8192,
    head_dim=64,
    vocab_size=128_256,
)
ROPE = dict(
    rope_type="llama3", rope_theta=500_000.0, factor=32.0, low_freq_factor=1.0, high_freq_factor=4.0,
    original_max_position_embeddings=8192,
)  # fmt: skip
NAMES = {
    "gelu-2l": "gelu-2l (bundled, float32)",
    "smollm2": "SmolLM2-135M (float32)",
    "llama-1b": "Llama 3.2 1B's shape (random, bfloat16)",
}


def write_llama(folder: Path, shape: dict[str, int] = LLAMA) -> None:
    """A Hugging Face Llama folder with random weights in bfloat16, one layer in memory at a time."""
    generator = torch.Generator().manual_seed(0)
    d, m, k = (shape[name] for name in ("hidden_size", "intermediate_size", "head_dim"))
    q, kv = shape["num_attention_heads"] * k, shape["num_key_value_heads"] * k

    def W(out: int, read: int) -> Tensor:
        return (torch.randn(out, read, generator=generator) * read**-0.5).bfloat16()

    def gain() -> Tensor:
        return (1 + 0.1 * torch.randn(d, generator=generator)).bfloat16()

    def layer(i: int) -> dict[str, Tensor]:
        sizes = {"self_attn.q_proj": (q, d), "self_attn.k_proj": (kv, d), "self_attn.v_proj": (kv, d)}
        sizes |= {"self_attn.o_proj": (d, q), "mlp.gate_proj": (m, d), "mlp.up_proj": (m, d)}
        sizes["mlp.down_proj"] = (d, m)
        tensors = {f"{name}.weight": W(*size) for name, size in sizes.items()}
        tensors |= {f"{name}_layernorm.weight": gain() for name in ("input", "post_attention")}
        return {f"model.layers.{i}.{name}": tensor for name, tensor in tensors.items()}

    config = dict(
        architectures=["LlamaForCausalLM"], model_type="llama", hidden_act="silu", rms_norm_eps=1e-5,
        max_position_embeddings=131_072, tie_word_embeddings=True, dtype="bfloat16", rope_parameters=ROPE,
        bos_token_id=0, eos_token_id=1,
    )  # fmt: skip
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config | shape), encoding="utf-8")
    where: dict[str, str] = {}
    for i in range(shape["num_hidden_layers"] + 1):
        embedding = {"model.embed_tokens.weight": W(shape["vocab_size"], d), "model.norm.weight": gain()}
        tensors = layer(i - 1) if i else embedding
        file = f"model-{i + 1:05}-of-{shape['num_hidden_layers'] + 1:05}.safetensors"
        save_file(tensors, folder / file, metadata={"format": "pt"})
        where |= dict.fromkeys(tensors, file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")


def steps() -> dict[str, Callable[[Any, Tensor], Any]]:
    import mechinterp_attn as mia

    def task(tokens: Tensor) -> Any:
        clean, corrupt = tokens[None], tokens[None].clone()
        corrupt[0, 8:16] = tokens[16:24]
        return mia.Task(clean, corrupt=corrupt, answer=[int(tokens[5])], against=[int(tokens[6])])

    return {
        "score_heads": lambda model, _: mia.detect.score_heads(model),
        "effects, estimated": lambda model, tokens: mia.causal.effects(
            model, task(tokens), exact=0, max_bytes=4 * GIB
        ),
        "attribution graph": lambda model, tokens: mia.paths.attribution_graph(
            mia.paths.freeze(model, tokens, max_bytes=4 * GIB)
        ),
        "report": lambda model, tokens: mia.report(model, tokens, progress=False),
    }


def measure(name: str, folder: str, step: str) -> dict[str, Any]:
    """One step in this process, the loading before it included."""
    import transformer_lens  # noqa: F401  (what the packages take is not the model's)
    import transformers  # noqa: F401
    from transformer_lens.model_bridge import TransformerBridge  # noqa: F401

    import mechinterp_attn as mia

    options = {"dtype": torch.bfloat16} if name == "llama-1b" else {}
    with Resident() as memory:
        start, worked = time.perf_counter(), time.process_time()
        model = mia.load(folder, **options)
        seconds, work = time.perf_counter() - start, time.process_time() - worked
    weights = sum(W.numel() * W.element_size() for W in model.parameters())
    if step != "load":
        generator = torch.Generator().manual_seed(0)
        tokens = torch.randint(2, model.spec.d_vocab, (N_TOKENS,), generator=generator)
        with Resident() as memory:
            start, worked = time.perf_counter(), time.process_time()
            result = steps()[step](model, tokens)
            seconds, work = time.perf_counter() - start, time.process_time() - worked
        assert result is not None
    return {
        "heads": model.n_heads,
        "weights": weights,
        "seconds": seconds,
        "work": work,
        "peak": memory.extra,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(NAMES), choices=list(NAMES))
    parser.add_argument("--steps", nargs="+", default=["load", *steps()])
    parser.add_argument("--folder", type=Path, help="where Llama's shape is, or is to be written and kept")
    parser.add_argument("--one", nargs=3, metavar=("MODEL", "FOLDER", "STEP"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(*args.one)))
        return
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        llama = args.folder or Path(temporary) / "llama"
        if "llama-1b" in args.models and not (llama / "config.json").exists():
            write_llama(llama)
        places = {
            "gelu-2l": "gelu-2l",
            "smollm2": os.environ.get("MECHINTERP_ATTN_SMOLLM2", str(FOLDER)),
            "llama-1b": str(llama),
        }
        for name in args.models:
            for step in args.steps:
                command = [sys.executable, __file__, "--one", name, places[name], step]
                printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
                m = json.loads(printed.splitlines()[-1])
                rows.append(
                    {
                        "model": NAMES[name],
                        "heads": f"{m['heads']:,}",
                        "weights (GiB)": f"{m['weights'] / GIB:.2f}",
                        "step": step,
                        "time (s)": f"{m['seconds']:.1f}",
                        "of processors (s)": f"{m['work']:.1f}",
                        "peak (GiB)": f"{m['peak'] / GIB:.2f}",
                        "of the weights": f"{m['peak'] / m['weights']:.2f}",
                    }
                )
                print(rows[-1], file=sys.stderr, flush=True)
    measured = {(row["model"], row["step"]) for row in rows}
    kept = [row for row in earlier() if (row["model"], row["step"]) not in measured]
    place = {name: i for i, name in enumerate([*NAMES.values(), "load", *steps()])}
    rows = sorted([*kept, *rows], key=lambda row: (place[row["model"]], place[row["step"]]))
    publish("sizes", rows)


def earlier() -> list[dict[str, str]]:
    """The table as it is: a run measures some rows, and the others stay."""
    file = Path(os.environ.get("BENCH_TABLES", "")) / "sizes.csv"
    if "BENCH_TABLES" not in os.environ or not file.exists():
        return []
    return list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))


if __name__ == "__main__":
    main()
