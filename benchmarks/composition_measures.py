"""Which measure of composition sees induction circuits?

    OMP_NUM_THREADS=1 python benchmarks/composition_measures.py

A true pair is a previous-token head and a later induction head as behaviour has them
(``detect.score_heads``: at least 0.4 of the attention each), in the bundled models that have both and,
where the test data is, in ``indhead_2l``; in planted circuits it is the edge that was planted. The AUROC
of a measure is the chance that a true pair of a model scores above another pair of attention heads of
it; where a model has a single pair there is none. The last columns have the largest z of a true pair.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import planted
from program import auroc
from publish import publish

import mechinterp_attn as mia

LEAST = 0.4  # of a head's attention
DATA = Path(os.environ.get("MECHINTERP_ATTN_DATA", Path(__file__).parents[2] / "shared" / "data"))


def trained() -> Iterator[tuple[str, Any, set[tuple[str, str]]]]:
    names = list(mia.models()["name"])
    own = DATA / "models" / "indhead_2l"
    for name in [*names, *([str(own)] if own.is_dir() else [])]:
        model = mia.load(name)
        if model.spec.n_layers < 2 or model.spec.no_next_token is not None or not model.spec.causal:
            continue
        frame = mia.detect.score_heads(model).frame
        frame = frame[frame["kind"] == "attention"]
        first = frame[frame["previous_token"] >= LEAST]
        last = frame[frame["induction"] >= LEAST]
        layers = dict(zip(frame["head"], frame["layer"], strict=True))
        true = {(a, b) for a in first["head"] for b in last["head"] if layers[a] < layers[b]}
        if true:
            yield Path(name).name, model, true


def row_of(name: str, model: Any, kind: str, true: set[tuple[str, str]]) -> dict[str, str]:
    found = {
        "Frobenius": mia.circuits.composition(model, kind, "attention", "attention").frame,
        "on tokens": mia.circuits.token_composition(model, kind).frame,
    }
    row = {"model": name, "kind": kind, "true pairs": ""}
    for what, frame in found.items():
        pairs = list(zip(frame["src"], frame["dst"], strict=True))
        row["true pairs"] = f"{len(true)} of {len(pairs)}"
        for column in ("score", "z"):
            scores = dict(zip(pairs, frame[column], strict=True))
            single = len(true) == len(pairs)
            row[f"{what}, {column}"] = "–" if single else f"{auroc(scores, true):.2f}"
        best = frame[[pair in true for pair in pairs]].sort_values("z").iloc[-1]
        row[f"{what}, z of a true pair"] = f"{best['z']:.1f}"
    return row


def main() -> None:
    rows = [row_of(name, model, "K", true) for name, model, true in trained()]
    for build, kind in ((planted.induction, "K"), (planted.query_composition, "Q")):
        circuit = build()
        true = {(a, b) for a, b, mode in circuit.edges if mode == kind and a.startswith("L")}
        rows.append(row_of(f"planted: {circuit.name}", circuit.model, kind, true))
    publish("composition_measures", rows, clock="none")


if __name__ == "__main__":
    main()
