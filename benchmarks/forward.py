"""Forward passes of the converted model beside its source, in one run.

    python benchmarks/forward.py [--batch 4] [--tokens 128] [--rounds 7] [--layers 12]

GPT-2-small shape with random weights. Rows: the plain Hugging Face model, the TransformerBridge
around it, the converted model, and two other ways to run neurons as heads: a {self, bias} pair of
keys for every neuron written out (padded), and full T x T patterns (dense, one layer's worth, scaled).
Rounds are interleaved and the least processor time of each is taken, so that a busy machine matters
little; with OMP_NUM_THREADS=1 it is the time of a quiet one.
"""

from __future__ import annotations

import argparse
import copy
import time
from collections.abc import Callable

import torch
from publish import publish

import mechinterp_attn as mia
from mechinterp_attn.sources.huggingface import some_tokenizer


def padded(model: mia.AttentionOnlyModel, tokens: torch.Tensor) -> torch.Tensor:
    """The converted model with every neuron's two scores and its softmax over them written out."""

    def attend(score: torch.Tensor, hook: object) -> torch.Tensor:
        two = torch.stack([score, torch.zeros_like(score)], -1)  # the own token, the bias token
        two.softmax(-1)
        return score

    names = [bank.hook("q") for bank in model.banks if bank.kind == "mlp"]
    return model.run_with_hooks(tokens, fwd_hooks=[(name, attend) for name in names])


def dense_layer(model: mia.AttentionOnlyModel, x: torch.Tensor, neurons: int) -> torch.Tensor:
    """``neurons`` neurons of the first MLP as literal attention heads with T x T masked patterns."""
    bank = next(bank for bank in model.banks if bank.kind == "mlp")
    T = x.shape[1]
    z = x @ bank.stacked("Q")[:neurons, :, 0].T  # [batch, pos, neuron]
    scores = z.permute(0, 2, 1)[..., None].expand(-1, -1, -1, T)
    allowed = torch.eye(T, dtype=torch.bool)
    scores = torch.cat([scores.masked_fill(~allowed, -torch.inf), torch.zeros(*scores.shape[:3], 1)], -1)
    pattern = scores.softmax(-1)[..., :T]
    out = torch.einsum("bnqk,bkn->bqn", pattern, z)
    return out @ bank.stacked("O")[:neurons, 0]


def fastest(runs: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    times = {name: float("inf") for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            start = time.process_time()
            run()
            times[name] = min(times[name], time.process_time() - start)
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--layers", type=int, default=12)
    args = parser.parse_args()
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    hf = GPT2LMHeadModel(GPT2Config(n_layer=args.layers)).eval()
    with some_tokenizer(None, hf.config.vocab_size) as tokenizer:
        bridge = TransformerBridge.boot_transformers(
            "gpt2", hf_model=copy.deepcopy(hf), tokenizer=tokenizer, device="cpu"
        )
    model = mia.convert(bridge)
    start = time.perf_counter()
    n_heads = len(model.heads.frame)
    index_seconds = time.perf_counter() - start
    tokens = torch.randint(50257, (args.batch, args.tokens), generator=torch.Generator().manual_seed(0))
    x = torch.randn(args.batch, args.tokens, hf.config.n_embd)
    some = 64  # of 3,072 neurons: all at once would need many GB
    with torch.no_grad():
        times = fastest(
            {
                "hf": lambda: hf(tokens, use_cache=False).logits,
                "bridge": lambda: bridge(tokens),
                "converted": lambda: model(tokens),
                "padded": lambda: padded(model, tokens),
                "dense": lambda: dense_layer(model, x, some),
            },
            args.rounds,
        )
    times["dense"] = times["converted"] + times["dense"] * 4 * hf.config.n_embd / some * args.layers
    print(f"batch {args.batch} x {args.tokens}, {args.layers} layers")
    print(f"index of {n_heads:,} heads in {index_seconds:.2f} s")
    names = {
        "hf": "Hugging Face (sdpa)",
        "bridge": "TransformerBridge",
        "converted": "converted, exact",
        "padded": "converted, two keys per neuron written out",
        "dense": f"dense T x T patterns (estimated from {some} neurons)",
    }
    rows = [
        {
            "model": label,
            "seconds": f"{times[name]:.2f}",
            "of the bridge": f"{times[name] / times['bridge']:.2f}",
            "of plain Hugging Face": f"{times[name] / times['hf']:.2f}",
        }
        for name, label in names.items()
    ]
    publish("forward", rows, clock="processor time")


if __name__ == "__main__":
    main()
