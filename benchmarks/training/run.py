"""Train a bundled model, check it against a native TransformerBridge, write its folder."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from jaxtyping import Int
from safetensors.torch import save_file
from torch import Generator, Tensor
from tqdm.auto import tqdm

from mechinterp_attn.core.errors import ConversionError
from mechinterp_attn.core.files import write_file, write_text
from mechinterp_attn.sources.bridge import to_bridge
from mechinterp_attn.sources.checkpoint import Checkpoint

from . import novels as corpus
from .dense import Weights, forward, initial_weights, loss_per_token
from .measures import N_AT_ONCE, measure, natural_losses
from .recipe import METHOD, Recipe, config, data_mix, description

LOG_EVERY = 1_000_000
"""Tokens of training between two rows of scores.csv."""
N_LOGGED = 512
"""Held-out documents behind a row of scores.csv; a card's losses are over all of them."""

N_SHIPPED = 128
"""Held-out documents that the package brings along."""


def train(
    cfg: dict[str, Any],
    recipe: Recipe,
    stream: Int[Tensor, " token"],
    held_out: Int[Tensor, "document pos"],
    name: str = "train",
) -> tuple[Weights, list[dict[str, Any]]]:
    """Trained weights, and the rows of scores.csv."""
    weights = initial_weights(cfg, recipe.seed)
    matrices = [value for key, value in weights.items() if ".W_" in key]
    others = [value for key, value in weights.items() if ".W_" not in key]
    groups: list[dict[str, Any]] = [{"params": matrices}]
    groups += [{"params": others, "weight_decay": 0.0}] if others else []
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
    for step in (progress := tqdm(range(n_steps), desc=name, unit="step")):
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
                f"induction {row.get('induction_score', 0):.2f} {row.get('induction_head', 'none')}"
            )
    return {key: value.detach() for key, value in weights.items()}, rows


def learning_rate(tokens: int, recipe: Recipe) -> float:
    """A linear warm-up to the peak, then half a cosine down to zero."""
    if tokens < recipe.warmup_tokens:
        return recipe.peak_lr * (tokens + 1) / recipe.warmup_tokens
    done = (tokens - recipe.warmup_tokens) / (recipe.tokens - recipe.warmup_tokens)
    return recipe.peak_lr * 0.5 * (1 + math.cos(math.pi * min(done, 1.0)))


def check_bridge(weights: Weights, cfg: dict[str, Any], documents: Int[Tensor, "document pos"]) -> float:
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
    check_bridge(initial_weights(cfg, recipe.seed), cfg, held_out[:N_AT_ONCE])
    start = time.perf_counter()
    weights, rows = train(cfg, recipe, stream, held_out[:N_LOGGED], name)
    minutes = (time.perf_counter() - start) / 60
    stored = {key: value.half() for key, value in weights.items()}
    as_stored = {key: value.float() for key, value in stored.items()}
    card = {
        "name": name,
        "description": description(cfg),
        "data": "litbank (https://github.com/dbamman/litbank), 100 English novels: texts in the "
        f"public domain, collection CC-BY 4.0. The last {corpus.N_HELD_OUT} novels are held out.",
        "data_mix": data_mix(recipe, cfg["n_ctx"]),
        "licence": "MIT",
        "command": f"python -m benchmarks.training {name} --corpus litbank.txt.xz "
        f"--out weights --tokens {recipe.tokens} --seed {recipe.seed}",
        "recipe": asdict(recipe) | METHOD,
        "n_parameters": sum(value.numel() for value in weights.values()),
        "tokens": rows[-1]["tokens"],
        "steps": rows[-1]["tokens"] // (recipe.batch * cfg["n_ctx"]),
        "minutes": round(minutes, 1),
        "stored_as": "float16",
        **measure(as_stored, cfg, held_out),
        "loss_float32": natural_losses(weights, cfg, held_out)["loss"],
        "bridge_logit_error": check_bridge(as_stored, cfg, held_out[:N_AT_ONCE]),
        "versions": {"torch": torch.__version__, "transformer_lens": version("transformer_lens")},
    }
    folder = out / name
    folder.mkdir(exist_ok=True)
    write_file(folder / "model.safetensors", lambda path: save_file(stored, path))
    write_text(folder / "config.json", json.dumps(cfg, indent=1))
    write_text(folder / "scores.csv", pd.DataFrame(rows).to_csv(index=False, float_format="%.6g"))
    write_text(folder / "card.json", json.dumps(card, indent=1))
    print(json.dumps(card, indent=1))


def write_statistics(training: Int[Tensor, " token"], unseen: Int[Tensor, " token"], out: Path) -> None:
    """Write `corpus.safetensors`: the bigram counts of the novels that the models are trained on, as
    pairs (first * D_VOCAB + second) and counts, and a few documents of the others, spread over them."""
    counts = corpus.bigram_counts(training).flatten()
    pairs = counts.nonzero()[:, 0]
    documents = corpus.windows(unseen, config("gelu-2l")["n_ctx"])
    chosen = documents[:: len(documents) // N_SHIPPED][:N_SHIPPED]
    tensors = {"pairs": pairs.int(), "counts": counts[pairs].int(), "held_out": chosen.short()}
    write_file(out / "corpus.safetensors", lambda path: save_file(tensors, path))
