"""How good the detectors are: estimates against exact cuts, and which heads stand out of the null.

    python benchmarks/detectors.py [estimates] [intervention] [--models NAME ...]

``estimates``: every bundled model with heads to rank, on held-out text and on the repeats of random
tokens. Cut exactly are all attention heads, 100 neurons drawn at random, and the 32 that each estimate
puts first. ``all`` is the rank correlation over the attention heads and the drawn neurons, ``top`` that
over the estimate's own first 32, ``found`` the share of the 32 largest exact effects that are among
them (of all that were cut). "First order" is what a plain gradient gives.

``intervention``: the z-score of the loss on repeats when a head is cut (``detect.induction``): the
least of the heads that attention and weights both name, the largest of the other attention heads, and
of all heads of the same model with its weights shuffled.
"""

from __future__ import annotations

import argparse
from dataclasses import replace

import pandas as pd
import torch
from publish import publish
from torch import Tensor

import mechinterp_attn as mia
from mechinterp_attn.causal.batches import as_batch
from mechinterp_attn.causal.cuts import next_token
from mechinterp_attn.detect.induction_circuit import STANDS_OUT
from mechinterp_attn.sources.zoo import bundled_names, read_bundled

TOP, DRAWN, DRAWS = 32, 100, 4


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("parts", nargs="*", default=["estimates", "intervention"])
    parser.add_argument("--models", nargs="*", default=bundled_names())
    args = parser.parse_args()
    models = {name: mia.load(name) for name in args.models}
    models = {name: model for name, model in models.items() if model.n_heads > 1}
    if "estimates" in args.parts:
        rows = [row for name, model in models.items() for row in estimates(name, model)]
        publish("detector_estimates", rows, clock="none")
    if "intervention" in args.parts:
        rows = [intervention(name, model) for name, model in models.items()]
        publish("detector_intervention", rows, clock="none")


def estimates(name: str, model: mia.AttentionOnlyModel) -> list[dict[str, object]]:
    probe = mia.detect.random_repeats(model, draws=DRAWS, seed=1)
    text = mia.held_out()[::32]  # 4 documents
    return [
        row
        for tokens, where, on in ((text, None, "text"), (probe.tokens, probe.repeated, "repeats"))
        for row in _ranked(name, model, tokens, where, on)
    ]


def _ranked(
    name: str, model: mia.AttentionOnlyModel, tokens: Tensor, where: Tensor | None, on: str
) -> list[dict[str, object]]:
    table = mia.detect.ablate(model, tokens, exact=0, where=where).frame.set_index("head")
    kinds = {"first order": first_order(model, tokens, where), "estimate": table["estimate"]}
    drawn = table[table["kind"] == "mlp"].sort_index()
    drawn = drawn.sample(min(DRAWN, len(drawn)), random_state=0).index
    fair = [*table.index[table["kind"] == "attention"], *drawn]
    first = {kind: list(e.abs().sort_values(ascending=False).index[:TOP]) for kind, e in kinds.items()}
    cut = list(dict.fromkeys([*fair, *(head for heads in first.values() for head in heads)]))
    exact = mia.detect.ablate(model, tokens, cut, where=where).frame.set_index("head")["loss_change"]
    largest = set(exact.abs().sort_values(ascending=False).index[:TOP])
    rows: list[dict[str, object]] = []
    for kind, estimate in kinds.items():
        found = len(largest & set(first[kind])) / len(largest)
        row = {"model": name, "tokens": on, "gradient": kind, "all": _rank(estimate, exact, fair)}
        rows.append(row | {"top": _rank(estimate, exact, first[kind]), "found": f"{found:.2f}"})
    return rows


def _rank(estimate: pd.Series, exact: pd.Series, heads: list[str]) -> str:
    return f"{estimate[heads].rank().corr(exact[heads].rank()):.2f}"


def first_order(model: mia.AttentionOnlyModel, tokens: Tensor, where: Tensor | None) -> pd.Series:
    """Attribution by a plain gradient: ``-z . dL/dz``, summed over positions."""
    batch = as_batch(model, tokens)
    held: dict[str, Tensor] = {}

    def keep(z: Tensor, hook: object, path: str) -> None:
        held[path] = z

    hooks = [(bank.hook("z"), lambda z, hook, path=bank.path: keep(z, hook, path)) for bank in model.banks]
    with model.hooks(fwd_hooks=hooks):
        loss, _ = next_token(model(batch.tokens), batch)
    counted = batch.predicts if where is None else where
    mean = (loss * counted).sum() / counted.sum()
    gradients = torch.autograd.grad(mean, list(held.values()))
    parts = [-(z * g).detach() for z, g in zip(held.values(), gradients, strict=True)]
    sums = [(p if p.ndim == 3 else p.sum(-1)).sum((0, 1)) for p in parts]
    return pd.Series(torch.cat(sums).double().numpy(), index=list(model.heads))


def intervention(name: str, model: mia.AttentionOnlyModel) -> dict[str, object]:
    found = mia.detect.induction(model, draws=DRAWS).frame
    null = mia.detect.induction(_shuffled(name, seed=0), draws=DRAWS).frame["loss_z"]
    both = found["by_behaviour"] & found["by_weights"]
    attention = found["kind"] == "attention"
    others = found[attention & ~both & (found["loss_z"] >= STANDS_OUT)]["head"]
    return {
        "model": name,
        "named by attention and weights": ", ".join(found["head"][both]) or "none",
        "least z": _number(found["loss_z"][both].min()),
        "others above 5": ", ".join(others) or "none",
        "largest z, weights shuffled": f"{null.max():.1f}",
        "heads": len(null),
    }


def _number(z: float) -> str:
    return "" if pd.isna(z) else f"{z:.0f}"


def _shuffled(name: str, *, seed: int) -> mia.AttentionOnlyModel:
    """A bundled model's shape and norms with every weight matrix shuffled."""
    source = read_bundled(name)
    generator = torch.Generator().manual_seed(seed)
    weights = {
        key: W.flatten()[torch.randperm(W.numel(), generator=generator)].view_as(W)
        for key, W in source.state_dict.items()
    }
    return mia.convert(replace(source, state_dict=weights))


if __name__ == "__main__":
    main()
