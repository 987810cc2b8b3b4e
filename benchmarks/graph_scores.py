"""The two scores of attribution graphs of a real model, by number of nodes.

    MECHINTERP_ATTN_SMOLLM2=folder python benchmarks/graph_scores.py [--nodes 1000]   (`make real`)

SmolLM2-135M-Instruct, its weights rounded to 4 bits, on one prompt of the indirect-object task: how much
of the logit difference runs inside a graph of so many nodes, and how much of it the running model keeps
with all others patched. Without pools first, then with them; ``--nodes`` runs one size with pools alone.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

from publish import publish
from smollm2 import FOLDER

import mechinterp_attn as mia

PROMPT = "When Mary and John went to the store, John gave a drink to"
OTHER = "When Mary and John went to the store, Mary gave a drink to"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nodes", type=int)
    only = parser.parse_args().nodes
    model = mia.load(Path(os.environ.get("MECHINTERP_ATTN_SMOLLM2", FOLDER)))
    frozen = mia.paths.freeze(model, PROMPT)
    rows = []
    sizes = [(False, 1000), *((True, n) for n in (100, 200, 300, 500, 1000))]
    for pools, n in [(True, only)] if only else sizes:
        row: dict[str, object] = {"pools": "yes" if pools else "no", "nodes": n}
        for name, how in {"mean": {"patch": "mean"}, "corrupt": {"corrupt": OTHER}}.items():
            start = time.process_time()
            graph = mia.paths.attribution_graph(
                frozen, target=" Mary", against=" John", max_nodes=n, pools=pools, **how
            )
            spent = time.process_time() - start
            row |= {
                "heads and neurons": f"{graph.nodes['members'].sum():,}",
                "inside": f"{graph.inside:.2f}",
            }
            row[f"faithfulness, {name}"] = f"{graph.faithfulness:.2f}"
            row["seconds"] = f"{spent:.1f}"
        rows.append(row)
        print(row, flush=True)
    if not only:
        publish("graph_scores", rows)


if __name__ == "__main__":
    main()
