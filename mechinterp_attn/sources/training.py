"""How the bundled models were made, and how to make them again.

    python -m mechinterp_attn.sources.training tokenizer --corpus litbank.txt.xz --out weights
    python -m mechinterp_attn.sources.training gelu-2l --corpus litbank.txt.xz --out weights

A model starts as a native TransformerBridge and is trained on its weights under their
TransformerLens names. The arithmetic is `forward` below: without the bridge's hooks and with
attention in bfloat16, a step takes about two thirds of the time. The model is written, as a
TL-convention checkpoint, only after a native bridge with the stored weights has given the same
logits. Every number in a model's card is measured here.

With MALLOC_MMAP_THRESHOLD_=4294967296 and MALLOC_TRIM_THRESHOLD_=17179869184 in the environment
glibc keeps freed memory for the next step, which made steps a third faster on two cores. On
cores that others use too, OMP_NUM_THREADS=1 is faster still: no thread waits for another.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Generator, Tensor
from tqdm.auto import tqdm

from mechinterp_attn.errors import CheckpointError, ConversionError
from mechinterp_attn.sources import corpus
from mechinterp_attn.sources.bridge import to_bridge
from mechinterp_attn.sources.checkpoint import Checkpoint
from mechinterp_attn.sources.saved import output_folder, write_atomic

Weights = dict[str, Tensor]
"""Weights by TransformerLens's names (`blocks.0.attn.W_Q` is [head, d_model, d_head], ...)."""

ARCHITECTURES = {  # name: (layers, activation of the MLPs or None where there are none)
    "attn-1l": (1, None),
    "attn-2l": (2, None),
    "silu-2l": (2, "silu"),
    "gelu-2l": (2, "gelu"),
}
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu}
METHOD = {
    "optimizer": "AdamW",
    "schedule": "linear warm-up, then a cosine to zero",
    "precision": "bfloat16 autocast over float32 weights",
    "init": "boot_native, init_mode gpt2: normal, 0.8 / sqrt(d_model)",
}
LOG_EVERY = 1_000_000
"""Tokens of training between two rows of scores.csv."""
N_PROBES = 128
"""Held-out documents behind a row of scores.csv; a card's losses are over all of them."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run, besides the corpus and the tokenizer."""

    tokens: int = 40_000_000
    seed: int = 0
    batch: int = 32
    """Documents of n_ctx tokens in a step."""
    repeated: int = 8
    """How many of them repeat a span, until the circuit has formed for sure."""
    repeated_late: int = 4
    """How many from then on, when it only has to stay and natural text is what is left."""
    late_from: int = 20_000_000
    """Tokens after which that is; the phase change came by 10 M."""
    peak_lr: float = 4e-3
    warmup_tokens: int = 1_000_000
    betas: tuple[float, float] = (0.9, 0.98)
    weight_decay: float = 0.1
    """On the weight matrices, not on biases and norms."""
    clip: float = 1.0
    """Largest norm of the gradient."""


def config(name: str) -> dict:
    """The shape of a bundled model, in HookedTransformer's names."""
    n_layers, act_fn = ARCHITECTURES[name]
    return {
        "n_layers": n_layers,
        "n_heads": 4,
        "d_model": 128,
        "d_head": 32,
        "d_mlp": 512 if act_fn else None,
        "n_ctx": 128,
        "d_vocab": corpus.D_VOCAB,
        "d_vocab_out": corpus.D_VOCAB,
        "act_fn": act_fn,
        "normalization_type": "LN",
        "eps": 1e-5,
        "positional_embedding_type": "standard",
        "attention_dir": "causal",
        "attn_only": act_fn is None,
    }


def initial_weights(cfg: dict, seed: int) -> Weights:
    """A native bridge's own initialisation: standard deviation 0.8 / sqrt(d_model)."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    # An attention-only config still names an activation and an MLP width: its defaults, unused.
    named = {key: value for key, value in cfg.items() if value is not None}
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**named, seed=seed))
    weights = {}
    for name, value in bridge.tl_named_parameters():
        filled_in = name == "unembed.b_U" or (cfg["attn_only"] and ".mlp." in name)
        if not filled_in:  # with zeros, by the bridge: the native model has no such weight
            weights[name] = value.detach().clone().contiguous().requires_grad_()
    return weights


def forward(
    weights: Weights, cfg: dict, tokens: Int[Tensor, "document pos"]
) -> tuple[Float[Tensor, "document pos vocab"], list[Float[Tensor, "document head query key"]]]:
    """Logits, and the attention patterns layer by layer."""
    n_pos = tokens.shape[1]
    future = torch.full((n_pos, n_pos), -math.inf).triu(1)

    def norm(x: Tensor, name: str) -> Tensor:
        gain, bias = weights[f"{name}.w"], weights[f"{name}.b"]
        return F.layer_norm(x, (cfg["d_model"],), gain, bias, cfg["eps"])

    patterns = []
    residual = F.embedding(tokens, weights["embed.W_E"]) + weights["pos_embed.W_pos"][:n_pos]
    for layer in range(cfg["n_layers"]):
        w = {key.split(".")[-1]: value for key, value in weights.items() if f"s.{layer}." in key}
        x = norm(residual, f"blocks.{layer}.ln1")
        q, k, v = (
            F.linear(x, w[f"W_{letter}"].mT.flatten(0, 1), w[f"b_{letter}"].flatten())
            .unflatten(-1, (cfg["n_heads"], cfg["d_head"]))
            .transpose(1, 2)
            for letter in "QKV"
        )
        scores = q @ k.mT / math.sqrt(cfg["d_head"])
        with torch.autocast("cpu", enabled=False):  # it would make the softmax float32, and slow
            pattern = (scores + future.to(scores.dtype)).softmax(dim=-1)
        patterns.append(pattern)
        z = (pattern @ v).transpose(1, 2).flatten(2)
        residual = residual + F.linear(z, w["W_O"].flatten(0, 1).T, w["b_O"])
        if not cfg["attn_only"]:
            hidden = F.linear(norm(residual, f"blocks.{layer}.ln2"), w["W_in"].T, w["b_in"])
            hidden = ACTIVATIONS[cfg["act_fn"]](hidden)
            residual = residual + F.linear(hidden, w["W_out"].T, w["b_out"])
    return norm(residual, "ln_final") @ weights["unembed.W_U"], patterns


def loss_per_token(
    weights: Weights, cfg: dict, documents: Int[Tensor, "document pos"]
) -> Float[Tensor, "document pos_minus_1"]:
    """Cross-entropy in nats of every token after the first, given the ones before it."""
    logits = forward(weights, cfg, documents[:, :-1])[0].float()
    targets = documents[:, 1:]
    losses = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view(targets.shape)


@torch.no_grad()
def mean_loss(weights: Weights, cfg: dict, documents: Int[Tensor, "document pos"]) -> float:
    """Mean loss in nats per token, in float32."""
    losses = [loss_per_token(weights, cfg, chunk) for chunk in documents.split(N_PROBES)]
    return torch.cat(losses).mean().item()


@torch.no_grad()
def repeat_losses(weights: Weights, cfg: dict, *, draws: int = 16) -> dict[str, float]:
    """Loss in nats on random tokens seen for the first time, and on their later repeats.

    Mean over periods from 10 to 60. The first token of the second pass belongs to neither: that
    the span starts over cannot be known before it has.
    """
    generator = Generator().manual_seed(0)
    first, later = [], []
    for period in (10, 20, 30, 40, 50, 60):
        documents = corpus.random_repeats(draws, period, cfg["n_ctx"] // period, generator)
        loss = loss_per_token(weights, cfg, documents)
        first.append(loss[:, :period].mean())
        later.append(loss[:, period + 1 :].mean())
    return {
        "loss_first_pass": torch.stack(first).mean().item(),
        "loss_later_passes": torch.stack(later).mean().item(),
    }


@torch.no_grad()
def induction_scores(
    weights: Weights, cfg: dict, *, period: int = 25, n_repeats: int = 4, draws: int = 10
) -> Float[Tensor, "layer head"]:
    """Prefix-matching score of every head (Olsson et al. 2022, "In-context Learning and Induction
    Heads"): on distinct random tokens repeated, how much a head attends from a token of a later
    pass to the tokens that followed its earlier occurrences. In [0, 1], mean over draws.
    """
    documents = corpus.random_repeats(draws, period, n_repeats, Generator().manual_seed(0))
    query, key = torch.meshgrid(*[torch.arange(documents.shape[1])] * 2, indexing="ij")
    # Key 1 is skipped: it follows the BOS, not an earlier occurrence of the query's token.
    followed = ((query - key + 1) % period == 0) & (key > 1) & (key < query)
    pattern = torch.stack(forward(weights, cfg, documents)[1], dim=1)
    return (pattern * followed).sum(-1)[..., period + 1 :].mean((0, -1))


@torch.no_grad()
def previous_token_scores(
    weights: Weights, cfg: dict, documents: Int[Tensor, "document pos"]
) -> Float[Tensor, "layer head"]:
    """Mean attention of every head to the token just before, in [0, 1]."""
    pattern = torch.stack(forward(weights, cfg, documents[:, : cfg["n_ctx"]])[1], dim=1)
    # Query 1 is skipped: it has only itself and the BOS to look at.
    return pattern.diagonal(-1, dim1=-2, dim2=-1)[..., 1:].mean((0, -1))


def best_head(scores: Float[Tensor, "layer head"]) -> tuple[float, str]:
    """The highest score and the label of its head, such as 0.93 and "L1H2"."""
    layer, head = divmod(int(scores.argmax()), scores.shape[1])
    return scores[layer, head].item(), f"L{layer}H{head}"


def measure(weights: Weights, cfg: dict, held_out: Int[Tensor, "document pos"]) -> dict:
    """Losses in nats per token (`loss` is the one on the held-out novels) and the best heads."""
    induction, induction_head = best_head(induction_scores(weights, cfg))
    previous, previous_head = best_head(previous_token_scores(weights, cfg, held_out[:N_PROBES]))
    return {
        "loss": mean_loss(weights, cfg, held_out),
        **repeat_losses(weights, cfg),
        "induction_score": induction,
        "induction_head": induction_head,
        "previous_token_score": previous,
        "previous_token_head": previous_head,
    }


def train(
    cfg: dict,
    recipe: Recipe,
    stream: Int[Tensor, " token"],
    held_out: Int[Tensor, "document pos"],
    description: str = "train",
) -> tuple[Weights, list[dict]]:
    """Trained weights, and the rows of scores.csv."""
    weights = initial_weights(cfg, recipe.seed)
    matrices = [value for name, value in weights.items() if ".W_" in name]
    others = [value for name, value in weights.items() if ".W_" not in name]
    groups: list[dict[str, Any]] = [{"params": matrices}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(
        groups,
        betas=recipe.betas,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    generator = Generator().manual_seed(recipe.seed)
    step_tokens = recipe.batch * cfg["n_ctx"]
    n_steps = math.ceil(recipe.tokens / step_tokens)
    rows, losses = [], []
    for step in (progress := tqdm(range(n_steps), desc=description, unit="step")):
        lr = learning_rate(step * step_tokens, recipe)
        for group in optimizer.param_groups:
            group["lr"] = lr
        late = step * step_tokens >= recipe.late_from
        repeated = recipe.repeated_late if late else recipe.repeated
        documents = corpus.sample_documents(
            stream,
            n_natural=recipe.batch - repeated,
            n_repeated=repeated,
            length=cfg["n_ctx"] + 1,
            generator=generator,
        )
        with torch.autocast("cpu", torch.bfloat16):
            loss = loss_per_token(weights, cfg, documents).mean()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), recipe.clip)
        optimizer.step()
        losses.append(loss.item())
        tokens = (step + 1) * step_tokens
        if tokens % LOG_EVERY < step_tokens or step == n_steps - 1:
            row = {"tokens": tokens, "lr": lr, "loss_train": sum(losses) / len(losses)}
            row |= measure(weights, cfg, held_out)
            rows.append(row)
            losses = []
            progress.set_postfix_str(
                f"natural {row['loss']:.3f}, repeats {row['loss_later_passes']:.3f}, "
                f"induction {row['induction_score']:.2f} {row['induction_head']}"
            )
    return {name: value.detach() for name, value in weights.items()}, rows


def learning_rate(tokens: int, recipe: Recipe) -> float:
    """A linear warm-up to the peak, then half a cosine down to zero."""
    if tokens < recipe.warmup_tokens:
        return recipe.peak_lr * (tokens + 1) / recipe.warmup_tokens
    done = (tokens - recipe.warmup_tokens) / (recipe.tokens - recipe.warmup_tokens)
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def check_bridge(weights: Weights, cfg: dict, documents: Int[Tensor, "document pos"]) -> float:
    """Largest difference between our logits and those of a native bridge given these weights."""
    tokens = documents[:, : cfg["n_ctx"]]
    with torch.no_grad():
        expected = to_bridge(Checkpoint(cfg, weights))(tokens)
        error = (forward(weights, cfg, tokens)[0] - expected).abs().max().item()
    if not error < 1e-3:
        raise ConversionError(
            f"the logits differ by {error:.2g} from those of a native TransformerBridge with the "
            "same weights; expected less than 1e-3. Compare `forward` with NativeModel of "
            f"transformer-lens {version('transformer_lens')}"
        )
    return error


def make_model(
    name: str,
    recipe: Recipe,
    stream: Int[Tensor, " token"],
    held_out: Int[Tensor, "document pos"],
    out: Path,
) -> None:
    """Train a model, check it against the bridge and write its folder, the card last."""
    cfg = config(name)
    # Before the training too: a disagreement should not cost a night.
    check_bridge(initial_weights(cfg, recipe.seed), cfg, held_out[:N_PROBES])
    start = time.perf_counter()
    weights, rows = train(cfg, recipe, stream, held_out[:N_PROBES], description=name)
    minutes = (time.perf_counter() - start) / 60
    stored = {key: value.half() for key, value in weights.items()}
    as_stored = {key: value.float() for key, value in stored.items()}
    card = {
        "name": name,
        "description": f"{cfg['n_layers']} layer{'s' * (cfg['n_layers'] > 1)}, "
        f"{cfg['n_heads']} heads of {cfg['d_head']}, "
        + ("attention only" if cfg["attn_only"] else f"MLPs of {cfg['d_mlp']} {cfg['act_fn']}")
        + f", d_model {cfg['d_model']}, context {cfg['n_ctx']}; English novels, byte-level BPE",
        "data": "litbank (https://github.com/dbamman/litbank), 100 English novels: texts in the "
        f"public domain, collection CC-BY 4.0. The last {corpus.N_HELD_OUT} novels are held out.",
        "data_mix": f"{recipe.batch} documents of {cfg['n_ctx'] + 1} tokens in a step. "
        f"{recipe.repeated} of them ({recipe.repeated_late} after {recipe.late_from:,} tokens) "
        f"repeat one span of {corpus.PERIODS[0]} to {corpus.PERIODS[1]} tokens from a random "
        "phase: half of the spans are random tokens, half passages of the novels. The others are "
        "passages.",
        "licence": "MIT",
        "command": f"python -m mechinterp_attn.sources.training {name} --corpus litbank.txt.xz "
        f"--out weights --tokens {recipe.tokens} --seed {recipe.seed}",
        "recipe": asdict(recipe) | METHOD,
        "n_parameters": sum(value.numel() for value in weights.values()),
        "tokens": rows[-1]["tokens"],
        "steps": rows[-1]["tokens"] // (recipe.batch * cfg["n_ctx"]),
        "minutes": round(minutes, 1),
        "stored_as": "float16",
        **measure(as_stored, cfg, held_out),
        "loss_float32": mean_loss(weights, cfg, held_out),
        "bridge_logit_error": check_bridge(as_stored, cfg, held_out[:N_PROBES]),
        "versions": {"torch": torch.__version__, "transformer_lens": version("transformer_lens")},
    }
    folder = output_folder(out / name)
    write_atomic(folder / "model.safetensors", lambda path: save_file(stored, path))
    write_text(folder / "config.json", json.dumps(cfg, indent=1))
    write_text(folder / "scores.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    write_text(folder / "card.json", json.dumps(card, indent=1))
    print(json.dumps(card, indent=1))


def write_text(path: Path, text: str) -> None:
    """Write a small text file, whole or not at all."""
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def main() -> None:
    """The command line of this file: make the tokenizer, or train models with it."""
    parser = argparse.ArgumentParser(description="Train the bundled tokenizer and models.")
    parser.add_argument("names", nargs="+", choices=["tokenizer", *ARCHITECTURES], metavar="NAME")
    parser.add_argument("--corpus", type=Path, required=True, help="litbank.txt.xz")
    parser.add_argument("--out", type=Path, required=True, help="where NAME/ is made")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    novels = corpus.read_novels(options.corpus)
    tokenizer_file = output_folder(options.out) / "tokenizer.json"
    if "tokenizer" in options.names:
        tokenizer = corpus.train_tokenizer(novels)
        write_atomic(tokenizer_file, lambda path: tokenizer.save(str(path)))
    names = [name for name in options.names if name != "tokenizer"]
    if not names:
        return
    if not tokenizer_file.exists():
        raise CheckpointError(str(options.out), ["no tokenizer.json: give the name tokenizer first"])
    tokens = corpus.encode(Tokenizer.from_file(str(tokenizer_file)), novels)
    first_held_out = (tokens == corpus.BOS).nonzero()[-corpus.N_HELD_OUT].item()
    length = config(names[0])["n_ctx"] + 1
    held_out = corpus.windows(tokens[first_held_out:], length)
    recipe = Recipe(tokens=options.tokens, seed=options.seed)
    for name in names:
        make_model(name, recipe, tokens[:first_held_out], held_out, options.out)


if __name__ == "__main__":
    main()
