"""Transcoders for a bundled model: sparse features that read what an MLP reads and write what it writes.

    python -m benchmarks.training.dictionaries gelu-2l --corpus litbank.txt.xz --out weights

BatchTopK (Bussmann, Leask and Nanda 2024): of all features at all tokens of a step, the ``k`` per token
with the largest pre-activations are active. Behind the training a single threshold takes their place, the
mean of the smallest active one. Features that have been silent for long learn to write what is left over
(the auxiliary loss of Gao et al. 2024).
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer
from torch import Generator, Tensor
from tqdm.auto import tqdm

import mechinterp_attn as mia

from . import novels as corpus


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run besides the model and the corpus."""

    n_features: int = 1024
    k: int = 24
    """Active features at a token, on average."""
    tokens: int = 1_500_000
    seed: int = 0
    batch: int = 16
    """Documents of n_ctx tokens in a step."""
    repeated: int = 2
    """How many of them repeat a span: half of the spans are random tokens, half passages."""
    lr: float = 1e-3
    silent: int = 200
    """Steps without being active, after which a feature counts as dead and learns from what is left
    over.
    """
    revived: int = 64
    """How many dead features write at a token."""
    auxiliary: float = 1 / 32


@dataclass(eq=False)
class Training:
    """One transcoder on the way: its weights, and what it needs besides them."""

    W_enc: Float[Tensor, "d_model feature"]
    b_enc: Float[Tensor, " feature"]
    W_dec: Float[Tensor, "feature d_model"]
    b_dec: Float[Tensor, " d_model"]
    silent_for: Int[Tensor, " feature"]
    threshold: float = 0.0
    optimizer: Any = field(default=None)

    @property
    def parameters(self) -> list[Tensor]:
        return [self.W_enc, self.b_enc, self.W_dec, self.b_dec]


def begin(recipe: Recipe, target: Float[Tensor, "token d_model"], generator: Generator) -> Training:
    """Random unit encoders and no decoder yet, but for the mean of what is to be written."""
    d_model, n = target.shape[1], recipe.n_features
    W_enc = torch.nn.functional.normalize(torch.randn(d_model, n, generator=generator), dim=0)
    W_dec = 0.1 * W_enc.T.contiguous()
    weights = [W_enc, torch.zeros(n), W_dec, target.mean(0)]
    for tensor in weights:
        tensor.requires_grad_()
    optimizer = torch.optim.Adam(weights, lr=recipe.lr, betas=(0.9, 0.99), fused=True)
    return Training(*weights, torch.zeros(n, dtype=torch.long), optimizer=optimizer)


def step(one: Training, recipe: Recipe, x: Tensor, y: Float[Tensor, "token d_model"]) -> float:
    """One step on tokens that the MLP reads as ``x`` and writes as ``y``; what is explained of them."""
    z = torch.addmm(one.b_enc, x, one.W_enc)
    positive = z.relu()
    some = positive.detach()[::8].flatten()  # enough tokens to know the threshold by
    smallest = some.kthvalue(some.numel() - some.numel() * recipe.k // recipe.n_features).values
    active = positive * (positive > smallest)
    left = y - torch.addmm(one.b_dec, active, one.W_dec)
    scale = (y - y.mean(0)).square().sum()
    loss = left.square().sum() / scale
    dead = one.silent_for > recipe.silent
    if int(dead.sum()) > 1:
        top = z[:, dead].topk(min(recipe.revived, int(dead.sum())), dim=1)
        spare = torch.zeros_like(z[:, dead]).scatter(1, top.indices, top.values.relu())
        loss = loss + recipe.auxiliary * (left.detach() - spare @ one.W_dec[dead]).square().sum() / scale
    one.optimizer.zero_grad()
    loss.backward()
    torch.nn.utils.clip_grad_norm_(one.parameters, 1.0)
    one.optimizer.step()
    with torch.no_grad():
        one.silent_for += 1
        one.silent_for[(active > 0).any(0)] = 0
        one.threshold += 0.01 * (float(smallest) - one.threshold)
    return 1 - float(left.detach().square().sum() / scale)


def train(
    model: mia.AttentionOnlyModel, layer: int, recipe: Recipe, stream: Int[Tensor, " token"]
) -> mia.Dictionary:
    """A transcoder for one layer."""
    generator = Generator().manual_seed(recipe.seed)
    names = f"blocks.{layer}.ln2.hook_normalized", f"blocks.{layer}.hook_mlp_out"
    one = None
    n_steps = recipe.tokens // (recipe.batch * model.spec.n_ctx)
    for number in (progress := tqdm(range(n_steps), desc=f"layer {layer}", unit="step", mininterval=5)):
        documents = corpus.sample_documents(
            stream,
            n_natural=recipe.batch - recipe.repeated,
            n_repeated=recipe.repeated,
            length=model.spec.n_ctx,
            generator=generator,
        )
        with torch.no_grad():
            _, cache = model.run_with_cache(documents, names_filter=[*names], return_cache_object=False)
        x, y = (cache[name].flatten(0, 1) for name in names)
        one = one or begin(recipe, y, generator)
        for group in one.optimizer.param_groups:
            group["lr"] = recipe.lr * min(1.0, (number + 1) / 100, 3 * (1 - number / n_steps))
        explained = step(one, recipe, x, y)
        if number % 50 == 0:
            dead = int((one.silent_for > recipe.silent).sum())
            progress.set_postfix_str(f"explained {explained:.3f}, dead {dead}", refresh=False)
    return finished(one, recipe)


def finished(one: Training, recipe: Recipe) -> mia.Dictionary:
    """What is stored: weights in half precision, the threshold as it was in the last hundred steps."""
    weights = [tensor.detach().half() for tensor in one.parameters]
    return mia.Dictionary(*weights, threshold=torch.full((recipe.n_features,), one.threshold).half())


def card(
    model: mia.AttentionOnlyModel,
    dictionary: mia.Dictionary,
    layer: int,
    recipe: Recipe,
    name: str,
    **facts: Any,
) -> dict[str, Any]:
    """What a reader should know of a dictionary, with its measures on the bundled held-out documents."""
    attached = mia.attach(model, widened(dictionary), layer=layer)
    measured = mia.detect.reconstruction(attached, mia.held_out())
    assert measured.receipt.ok, measured.receipt
    row = measured.frame.iloc[0].drop(["dictionary", "layer", "features"]).astype(float).to_dict()
    novels = facts.pop("novels")
    return {
        "model": name,
        "layer": layer,
        "at": "mlp",
        "description": f"transcoder of layer {layer}, {recipe.n_features} features, BatchTopK",
        "data": f"litbank (https://github.com/dbamman/litbank), its first {novels} novels: texts in the "
        "public domain, collection CC-BY 4.0. Measured on the last 5, which neither this nor the model "
        "saw.",
        "data_mix": f"{recipe.batch} documents of {model.spec.n_ctx} tokens in a step, {recipe.repeated} "
        "of which repeat one span: half of the spans are random tokens, half passages.",
        "licence": "MIT",
        "command": f"python -m benchmarks.training.dictionaries {name} --layer {layer} "
        f"--tokens {recipe.tokens} --seed {recipe.seed}",
        "recipe": asdict(recipe),
        "stored_as": "float16",
        **facts,
        **row,
        "measured_on": f"{measured.n_tokens} held-out tokens",
        "versions": {"torch": torch.__version__},
    }


def widened(dictionary: mia.Dictionary) -> mia.Dictionary:
    """As ``Dictionary.load`` reads what is stored."""
    return replace(dictionary, **{name: tensor.float() for name, tensor in dictionary.tensors.items()})


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.training.dictionaries", description=__doc__)
    parser.add_argument("model", help="a bundled model with MLPs")
    parser.add_argument("--corpus", type=Path, required=True, help="litbank.txt.xz")
    parser.add_argument("--tokenizer", type=Path, required=True, help="the bundled models' tokenizer.json")
    parser.add_argument("--out", type=Path, required=True, help="where transcoders/layer_{i}/ are made")
    parser.add_argument("--layer", type=int, help="one layer; all by default")
    parser.add_argument("--novels", type=int, default=10, help="how many novels are read, from the first")
    parser.add_argument("--tokens", type=int, default=Recipe.tokens)
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    options = parser.parse_args()
    recipe = Recipe(tokens=options.tokens, seed=options.seed)
    novels = corpus.read_novels(options.corpus)[: -corpus.N_HELD_OUT][: options.novels]
    stream = corpus.encode(Tokenizer.from_file(str(options.tokenizer)), novels)
    model = mia.load(options.model)
    layers = range(model.spec.n_layers) if options.layer is None else [options.layer]
    for layer in layers:
        start = time.perf_counter()
        dictionary = train(model, layer, recipe, stream)
        minutes = (time.perf_counter() - start) / 60
        folder = options.out / "transcoders"
        folder.mkdir(parents=True, exist_ok=True)
        facts = {"novels": options.novels, "minutes": round(minutes, 1)}
        about = card(model, dictionary, layer, recipe, options.model, **facts)
        replace(dictionary, card=about).save(folder / f"layer_{layer}")
        print(about, flush=True)


if __name__ == "__main__":
    main()
