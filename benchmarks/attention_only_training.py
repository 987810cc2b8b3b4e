"""Does an attention-only transformer in the paper's form train as well as one with MLPs?

    python benchmarks/attention_only_training.py --corpus litbank.txt.xz --out docs/figures
    python benchmarks/attention_only_training.py --corpus litbank.txt.xz --out docs/figures --speed 40

Huben & Morris 2023 leave the question open. Here it is asked at a very small scale: five models of
d_model 64 on the same novels, tokenizer, batches, schedule and seeds. Writes training_curves.csv (a
row per evaluation) and training_runs.csv (a row per run) after every run, so that it may be stopped;
runs already in the file are not repeated. With --speed it trains nothing to the end: it times steps
of all variants in turn and writes training_speed.csv. The page is docs/training_comparison.md.
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
from training import novels as corpus

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
    tokens: int = 3_000_000
    batch: int = 16
    peak_lr: float = 4e-3
    warmup: float = 0.05
    weight_decay: float = 0.1
    clip: float = 1.0
    evaluations: int = 12
    held_out: int = 64  # documents of each held-out novel


class Run:
    """One model on its way: `step` takes a batch and returns its loss."""

    def __init__(self, variant: Variant, seed: int, recipe: Recipe, stream: Tensor) -> None:
        self.model, self.recipe, self.stream = Model(variant, seed), recipe, stream
        decayed = [p for p in self.model.parameters() if p.ndim == 2]
        others = [p for p in self.model.parameters() if p.ndim != 2]
        groups = [
            {"params": decayed, "weight_decay": recipe.weight_decay},
            {"params": others, "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.generator = torch.Generator().manual_seed(seed)  # the same batches for every variant
        self.steps, self.taken = math.ceil(recipe.tokens / (recipe.batch * N_CTX)), 0

    def step(self) -> float:
        self.taken += 1
        done = self.taken / self.steps
        warm = min(done / self.recipe.warmup, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.peak_lr * warm * 0.5 * (1 + math.cos(math.pi * done))
        documents = corpus.sample_documents(
            self.stream,
            n_natural=self.recipe.batch,
            n_repeated=0,
            length=N_CTX + 1,
            generator=self.generator,
        )
        loss = self.model.loss(documents)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.recipe.clip)
        self.optimizer.step()
        return loss.item()


def train(
    variant: Variant, seed: int, recipe: Recipe, stream: Tensor, held_out: Tensor
) -> tuple[dict, list[dict]]:
    run = Run(variant, seed, recipe, stream)
    at = {round(run.steps * (i + 1) / recipe.evaluations) for i in range(recipe.evaluations)}
    rows, losses, cpu, wall = [], [], 0.0, 0.0
    for step in range(1, run.steps + 1):
        start = time.process_time(), time.perf_counter()
        losses.append(run.step())
        cpu += time.process_time() - start[0]
        wall += time.perf_counter() - start[1]
        if step in at:
            with torch.no_grad():  # documents are as many for every novel: the mean of means is the mean
                measured = sum(float(run.model.loss(part)) for part in held_out) / len(held_out)
            row = {"variant": variant.name, "seed": seed, "tokens": step * recipe.batch * N_CTX}
            rows.append(row | {"loss": measured, "loss_train": sum(losses) / len(losses)})
            losses = []
    tokens, parts = run.steps * recipe.batch * N_CTX, list(run.model.sublayers)
    summary = {
        "variant": variant.name,
        "seed": seed,
        "tokens": tokens,
        "loss": rows[-1]["loss"],
        "parameters": sum(p.numel() for p in run.model.parameters()),
        "sublayer_parameters": sum(p.numel() for part in parts for p in part.parameters()),
        "heads": sum(part.n_heads for part in parts if not isinstance(part, MLP)),
        "forward_flops_per_token": sum(part.flops for part in parts) + 2 * D_MODEL * corpus.D_VOCAB,
        "cpu_seconds": cpu,
        "wall_seconds": wall,
    }
    return summary, rows


def speed(recipe: Recipe, stream: Tensor, steps: int, rounds: int = 5) -> list[dict]:
    """Training steps of every variant in turn, some rounds of them, so that all meet the same machine;
    in seconds of processor time, which other work on the machine changes least."""
    runs = {variant.name: Run(variant, 0, recipe, stream) for variant in VARIANTS}
    rows = []
    for i in range(rounds + 1):
        for name, run in runs.items():
            start = time.process_time()
            for _ in range(steps):
                run.step()
            seconds = time.process_time() - start
            if i:  # the first round warms up
                rate = steps * recipe.batch * N_CTX / seconds
                rows.append({"round": i, "variant": name, "tokens_per_second": rate})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--corpus", type=Path, required=True, help="litbank.txt.xz")
    parser.add_argument("--out", type=Path, default=Path("docs/figures"))
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--novels", type=int, default=20, help="how many to train on")
    parser.add_argument("--speed", type=int, metavar="STEPS", help="only time so many steps a round")
    options = parser.parse_args()
    torch.set_num_threads(1)
    novels = corpus.read_novels(options.corpus)
    tokenizer = Tokenizer.from_file(str(TOKENIZER))
    stream = corpus.encode(tokenizer, novels[: options.novels])
    recipe = Recipe(tokens=options.tokens)
    print(asdict(recipe), f"{len(stream):,} tokens of {options.novels} novels", flush=True)
    if options.speed:
        table = pd.DataFrame(speed(recipe, stream, options.speed))
        table.to_csv(options.out / "training_speed.csv", index=False, float_format="%.5g")
        print(table.groupby("variant", sort=False)["tokens_per_second"].median())
        return
    held_out = torch.stack(
        [
            corpus.windows(corpus.encode(tokenizer, [novel]), N_CTX + 1)[: recipe.held_out]
            for novel in novels[-corpus.N_HELD_OUT :]
        ]
    )
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
            took = f"{run['cpu_seconds']:.0f} s of CPU, {run['wall_seconds']:.0f} s"
            print(f"{variant.name:36s} seed {seed}: {run['loss']:.4f}, {took}", flush=True)


if __name__ == "__main__":
    main()
