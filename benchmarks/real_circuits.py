"""The strongest circuits of attention heads behind an answer of a real model: values and scores.

    MECHINTERP_ATTN_SMOLLM2=folder python benchmarks/real_circuits.py        (`make real` fetches it)

SmolLM2-135M-Instruct, its weights rounded to 4 bits, on one prompt of the indirect-object task: what the
logit difference is made of, and what decides where its heads look.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

from graph_scores import PROMPT
from publish import publish
from smollm2 import FOLDER

import mechinterp_attn as mia

LISTED = 8


def main() -> None:
    model = mia.load(Path(os.environ.get("MECHINTERP_ATTN_SMOLLM2", FOLDER)))
    frozen = mia.paths.freeze(model, PROMPT)
    start = time.process_time()
    found = mia.paths.top_circuits(
        frozen,
        target=" Mary",
        against=" John",
        scores=True,
        top_k=LISTED,
        max_expansions=100,
        progress=False,
    )
    print(f"{time.process_time() - start:.1f} processor seconds; {found.expansions} chains opened")
    print(f"{found.explained_share:.3f} of {found.total:.3f} explained; {found.receipt}")
    rows = []
    for by_score in (False, True):
        for row in found.frame[found.frame["score"].notna() == by_score].itertuples():
            rows.append(
                {
                    "circuit": row.circuit,
                    "logits": f"{row.contribution:.3f}",
                    "share": f"{row.share:.2f}",
                    "score": row.score if by_score else "",
                }
            )
    publish("real_circuits", rows, clock="none")


if __name__ == "__main__":
    main()
