"""What path analyses of a real model cost, against one forward and backward pass in the same run.

    MECHINTERP_ATTN_SMOLLM2=folder python benchmarks/real_paths.py        (`make real` fetches it)

SmolLM2-135M-Instruct, its weights rounded to 4 bits, on a prompt of 14 tokens; the analyses with options
as the report has them. Processor seconds, over all threads.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path

from publish import publish
from smollm2 import FOLDER

import mechinterp_attn as mia

PROMPT = "When Mary and John went to the store, John gave a drink to"


def seconds(work: Callable[[], object]) -> float:
    start = time.process_time()
    work()
    return time.process_time() - start


def main() -> None:
    model = mia.load(Path(os.environ.get("MECHINTERP_ATTN_SMOLLM2", FOLDER)))
    frozen = mia.paths.freeze(model, PROMPT)

    def forward_backward() -> None:
        model(frozen.tokens[None], return_type="loss").backward()
        model.zero_grad(set_to_none=True)

    unit = min(seconds(forward_backward) for _ in range(3))
    paths, quiet = mia.paths, {"progress": False}
    works: dict[str, Callable[[], object]] = {
        "forward and backward": forward_backward,
        "freeze": lambda: paths.freeze(model, PROMPT),
        "orders 0..12": lambda: paths.orders(frozen, max_order=12),
        "term importance": lambda: paths.term_importance(model, frozen.tokens, heads=16, **quiet),
        "top paths, 200 opened": lambda: paths.top_paths(frozen, top_k=30, max_expansions=200, **quiet),
        "attribution graph": lambda: paths.attribution_graph(frozen),
    }
    rows = []
    for name, work in works.items():
        spent = seconds(work)
        rows.append({"work": name, "seconds": f"{spent:.1f}", "passes": f"{spent / unit:.1f}"})
        print(rows[-1], flush=True)
    publish("real_paths", rows, clock="processor time")


if __name__ == "__main__":
    main()
