"""Circuits planted by hand: does a method rank the true heads, and the true edges, before all others?

    OMP_NUM_THREADS=1 python benchmarks/planted_circuits.py

For every circuit of `planted.py` and every method of ``causal.discover``: the AUROC of heads and neurons,
and of edges with the right mode (Q, K or V), among all there are in the model. 1 is a perfect ranking, 0.5
chance. "exact" patches every head in a run of its own; it ranks heads only.
"""

from __future__ import annotations

import planted
from program import Planted, auroc
from publish import publish

import mechinterp_attn as mia

METHODS = ("secant", "gradient", "eap-ig", "relp", "frozen", "exact")


def measure(circuit: Planted, method: str) -> tuple[float, float | None]:
    found = mia.causal.discover(circuit.model, circuit.task, method).frame  # type: ignore[arg-type]
    heads = dict(zip(found["head"], found["score"].abs(), strict=True))
    if method == "exact":
        return auroc(heads, circuit.nodes), None
    found = mia.causal.discover(
        circuit.model,
        circuit.task,
        method,
        units="edges",
        top_k=10**6,  # type: ignore[arg-type]
    ).frame
    keys = found[["src", "dst", "mode"]].itertuples(index=False, name=None)
    edges = dict(zip(keys, found["score"].abs(), strict=True))
    return auroc(heads, circuit.nodes), auroc(edges, circuit.edges)


def main() -> None:
    rows, sums = [], {method: ([], []) for method in METHODS}  # type: ignore[var-annotated]
    for build in planted.ALL:
        circuit = build()
        row = {
            "circuit": circuit.name,
            "heads": f"{len(circuit.nodes)} of {len(circuit.model.heads)}",
            "edges": f"{len(circuit.edges)} of {len(circuit.candidates())}",
        }
        for method in METHODS:
            nodes, edges = measure(circuit, method)
            for values, value in zip(sums[method], (nodes, edges), strict=True):
                values += [] if value is None else [value]
            row[method] = f"{nodes:.2f}" if edges is None else f"{nodes:.2f} / {edges:.2f}"
        rows.append(row)
    for name, pick in (("mean", lambda values: sum(values) / len(values)), ("worst", min)):
        row = {"circuit": name, "heads": "", "edges": ""}
        for method, columns in sums.items():
            row[method] = " / ".join(f"{pick(values):.2f}" for values in columns if values)
        rows.append(row)
    publish("planted_circuits", rows, clock="none")


if __name__ == "__main__":
    main()
