"""Edge scores beside those of the peers' own package, on the same models and prompts.

    EAP_IG_PYTHON=... EAP_IG=.../src python benchmarks/peer_eap.py

EAP_IG_PYTHON is the interpreter of an environment with `transformer_lens` 2.16, which must not share one
with this package, and EAP_IG the source of Hanna et al.'s package (github.com/hannamw/EAP-IG, commit
795f560; its `device='cuda'` changed to 'cpu' where there is no GPU). Both compute EAP and EAP-IG (inputs)
for every edge between the embedding, heads (queries, keys and values apart), whole MLPs and the logits, of
bundled models in float64, on 16 prompts of random tokens said twice.

Theirs takes gradients at ``k / steps`` of the way from the counterfactual, from k = 0; ours at the middles
of these steps. The points of twice as many of their steps are their points and our middles, so
``2 * theirs(2 * steps) - theirs(steps)`` must be ours.
"""

from __future__ import annotations

import json
import os
import subprocess
import tempfile
from pathlib import Path

import torch
from publish import publish
from safetensors.torch import load_file, save_file
from torch import Tensor

import mechinterp_attn as mia

MODELS = ("gelu-2l", "swiglu-4l")
WEIGHTS = Path(mia.__file__).parent / "sources" / "weights"
STEPS = 5
PROMPTS = 16


def prompts(model: mia.AttentionOnlyModel) -> tuple[mia.Task, dict[str, Tensor]]:
    task = mia.tasks.induction(model, n=PROMPTS)
    bound = task.bind(model)
    assert bound.answer is not None
    assert bound.against is not None
    assert bound.aligned
    found = {"clean": bound.clean.tokens, "corrupt": bound.counterfactual("this").tokens}
    return task, found | {"answer": bound.answer[:, 0], "against": bound.against[:, 0]}


def our_edge(source: int, reader: str, heads: int) -> tuple[str, str, str]:
    """Their numbers and names as ours: a reader is ``a3.h5<q>``, ``m3`` or ``logits``."""
    layer, index = divmod(source - 1, heads + 1)
    written = "embed" if source == 0 else f"L{layer}N*" if index == heads else f"L{layer}H{index}"
    name, _, mode = reader.partition("<")
    if name.startswith("m"):
        name = f"L{name[1:]}N*"
    elif name.startswith("a"):
        name = "L" + name[1:].replace(".h", "H")
    return written, name, mode[:1].upper()


def compared(
    model: mia.AttentionOnlyModel, task: mia.Task, name: str, folder: Path
) -> list[dict[str, str]]:
    peer = load_file(folder / "scores.safetensors")
    readers = json.loads((folder / "readers.json").read_text())
    keys = peer["real"].nonzero()
    edges = [our_edge(i, readers[j], model.spec.n_heads) for i, j in keys.tolist()]
    methods = {
        "eap": ("EAP", peer["eap"]),
        "eap-ig": (f"EAP-IG, {STEPS} steps", 2 * peer[f"ig {2 * STEPS}"] - peer[f"ig {STEPS}"]),
    }
    rows = []
    for method, (title, scores) in methods.items():
        found = mia.causal.discover(model, task, method, "edges", pools=True, steps=STEPS).frame  # type: ignore[arg-type]
        own = found.set_index(["src", "dst", "mode"])["score"]
        assert set(own.index) == set(edges), "both must have the same edges"
        ours = torch.tensor(own.loc[edges].to_numpy(), dtype=torch.float64)
        peers = scores[keys[:, 0], keys[:, 1]].double()
        rows.append(
            {
                "model": name,
                "method": title,
                "edges": f"{len(edges):,}",
                "largest score": f"{float(peers.abs().max()):.3f}",
                "largest difference": f"{float((ours - peers).abs().max()):.0e}",
            }
        )
    return rows


def main() -> None:
    rows: list[dict[str, str]] = []
    with tempfile.TemporaryDirectory() as name:
        models = {own: mia.load(own, dtype=torch.float64) for own in MODELS}
        tasks, command = {}, [str(Path(__file__).with_name("peer_eap_theirs.py")), str(STEPS)]
        for own, model in models.items():
            folder = Path(name) / own
            folder.mkdir()
            tasks[own], given = prompts(model)
            save_file({key: x.contiguous() for key, x in given.items()}, folder / "prompts.safetensors")
            command += [str(WEIGHTS / own), str(folder)]
        env = dict(os.environ) | {"PYTHONPATH": os.environ.get("EAP_IG", "")}
        subprocess.run([os.environ["EAP_IG_PYTHON"], *command], check=True, env=env)
        for own, model in models.items():
            rows += compared(model, tasks[own], own, Path(name) / own)
    publish("peer_eap", rows, clock="none")


if __name__ == "__main__":
    main()
