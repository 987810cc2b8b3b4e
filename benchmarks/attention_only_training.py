"""Does an attention-only transformer in the paper's form train as well as one with MLPs?

    python benchmarks/attention_only_training.py --corpus litbank.txt.xz --out docs/figures

Huben & Morris 2023 leave the question open. Here it is asked at a very small scale: five models of
d_model 64 on the same novels, tokenizer, batches, schedule and seeds. Writes training_curves.csv (a
row per evaluation) and training_runs.csv (a row per run) after every run, so that it may be stopped;
runs already in the file are not repeated. The page is docs/training_comparison.md.
"""

from __future__ import annotations

import argparse
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import pandas as pd
import torch
import torch.nn.functional as F
from tokenizers import Tokenizer
from torch import Tensor, nn

from mechinterp_attn.sources import corpus

D_MODEL, N_HEADS, N_CTX, D_MLP = 64, 4, 128, 256
TOKENIZER = Path(corpus.__file__).parent / "weights" / "tokenizer.json"


@dataclass(frozen=True)
class Variant:
    """A row of sublayers: "a" for attention, "m" for an MLP, "u" for untied neuron heads."""

    name: str
    sublayers: str
    width: int = D_MLP


VARIANTS = (
    Variant("MLP", "amam"),
    # The paper's neuron heads with query, value and output weights of their own.
    Variant("untied neuron heads", "auau"),
    Variant("untied, as many parameters", "auau", D_MLP * 2 // 3),
    Variant("attention only, as many parameters", "aaaaaa"),
    Variant("attention only, as many FLOPs", "aaaa"),
)


class Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D_MODEL, 3 * D_MODEL)
        self.out = nn.Linear(D_MODEL, D_MODEL)
        self.n_heads, self.flops = N_HEADS, 8 * D_MODEL**2 + 4 * N_CTX * D_MODEL

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, N_HEADS, -1)).permute(2, 0, 3, 1, 4)
        z = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(z.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.out = nn.Linear(D_MODEL, width), nn.Linear(width, D_MODEL)
        self.n_heads, self.flops = width, 4 * D_MODEL * width

    def forward(self, x: Tensor) -> Tensor:
        return self.out(F.silu(self.read(x)))


class NeuronHeads(nn.Module):
    """Neuron heads over {self, bias token}: softmax of the scores (q, 0), on the values (v, 0)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.query, self.value = nn.Linear(D_MODEL, width), nn.Linear(D_MODEL, width)
        self.out = nn.Linear(width, D_MODEL)
        self.n_heads, self.flops = width, 6 * D_MODEL * width

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.sigmoid(self.query(x)) * self.value(x))


class Model(nn.Module):
    def __init__(self, variant: Variant, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        make = {
            "a": Attention,
            "m": lambda: MLP(variant.width),
            "u": lambda: NeuronHeads(variant.width),
        }
        self.embed = nn.Embedding(corpus.D_VOCAB, D_MODEL)
        self.positions = nn.Embedding(N_CTX, D_MODEL)
        self.sublayers = nn.ModuleList(make[kind]() for kind in variant.sublayers)
        self.norms = nn.ModuleList(nn.LayerNorm(D_MODEL) for _ in variant.sublayers)
        self.final = nn.LayerNorm(D_MODEL)
        self.unembed = nn.Linear(D_MODEL, corpus.D_VOCAB, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.8 / math.sqrt(D_MODEL))
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens) + self.positions.weight[: tokens.shape[1]]
        for norm, sublayer in zip(self.norms, self.sublayers, strict=True):
            x = x + sublayer(norm(x))
        return self.unembed(self.final(x))

    def loss(self, documents: Tensor) -> Tensor:
        logits = self(documents[:, :-1])
        return F.cross_entropy(logits.flatten(0, 1), documents[:, 1:].flatten())


@dataclass(frozen=True)
class Recipe:
    tokens: int = 600_000
    batch: int = 16
    peak_lr: float = 4e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluations: int = 12
    held_out: int = 64  # documents


def train(
    variant: Variant, seed: int, recipe: Recipe, stream: Tensor, held_out: Tensor
) -> tuple[dict, list[dict]]:
    model = Model(variant, seed)
    decayed = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim != 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ],
        betas=(0.9, 0.98),
    )
    generator = torch.Generator().manual_seed(seed)  # the same batches for every variant
    steps = math.ceil(recipe.tokens / (recipe.batch * N_CTX))
    at = {round(steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    rows, losses, seconds = [], [], 0.0
    for step in range(1, steps + 1):
        start = time.process_time()
        done = step / steps
        warm = min(done / recipe.warmup, 1.0)
        lr = recipe.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        for group in optimizer.param_groups:
            group["lr"] = lr
        documents = corpus.sample_documents(
            stream, n_natural=recipe.batch, n_repeated=0, length=N_CTX + 1, generator=generator
        )
        loss = model.loss(documents)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
        seconds += time.process_time() - start
        if step in at:
            with torch.no_grad():
                measured = float(model.loss(held_out))
            row = {"variant": variant.name, "seed": seed, "tokens": step * recipe.batch * N_CTX}
            rows.append(row | {"loss": measured, "loss_train": sum(losses) / len(losses)})
            losses = []
    parts = list(model.sublayers)
    run = {
        "variant": variant.name,
        "seed": seed,
        "tokens": steps * recipe.batch * N_CTX,
        "loss": rows[-1]["loss"],
        "parameters": sum(p.numel() for p in model.parameters()),
        "sublayer_parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "heads": sum(part.n_heads for part in parts if not isinstance(part, MLP)),
        "forward_flops_per_token": sum(part.flops for part in parts) + 2 * D_MODEL * corpus.D_VOCAB,
        "cpu_seconds": seconds,
        "tokens_per_cpu_second": steps * recipe.batch * N_CTX / seconds,
    }
    return run, rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="litbank.txt.xz")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--novels", type=int, default=20, help="how many to train on")
    parser.add_argument("--runs", type=int, default=1000, help="stop after so many new ones")
    options = parser.parse_args()
    torch.set_num_threads(1)
    novels = corpus.read_novels(options.corpus)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    stream = corpus.encode(tokenizer, novels[: options.novels])
    recipe = Recipe(tokens=options.tokens)
    held_out = corpus.windows(corpus.encode(tokenizer, novels[-1:]), N_CTX + 1)[: recipe.held_out]
    print(asdict(recipe), f"{len(stream):,} tokens of {options.novels} novels", flush=True)
    files = options.out / "training_runs.csv", options.out / "training_curves.csv"
    tables = [pd.read_csv(f) if f.exists() else pd.DataFrame() for f in files]
    for seed in range(options.seeds):
        for variant in VARIANTS:
            if len(tables[0]) and ((tables[0].variant == variant.name) & (tables[0].seed == seed)).any():
                continue
            run, rows = train(variant, seed, recipe, stream, held_out)
            for i, new in enumerate(([run], rows)):
                tables[i] = pd.concat([tables[i], pd.DataFrame(new)], ignore_index=True)
                tables[i].to_csv(files[i], index=False, float_format="%.5g")
            print(
                f"{variant.name:36s} seed {seed}: {run['loss']:.4f}, {run['cpu_seconds']:.0f} s", flush=True
            )


if __name__ == "__main__":
    main()
