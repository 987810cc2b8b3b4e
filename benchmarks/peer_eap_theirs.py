"""The peers' half of `peer_eap.py`: edge scores by the EAP-IG package itself (Hanna et al. 2024).

It runs in an environment of its own, with `transformer_lens` 2 and the `eap` package, and without
mechinterp_attn, which needs a later TransformerLens. It reads prompts in folders and leaves scores there.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import eap.attribute
import torch
from eap.graph import Graph
from safetensors.torch import load_file, save_file
from transformer_lens import HookedTransformer, HookedTransformerConfig


def load(folder: Path) -> HookedTransformer:
    """A model from a folder in TransformerLens's own names, its weights as they are stored, in float64."""
    config = json.loads((folder / "config.json").read_text())
    config["rotary_base"] = int(config.get("rotary_base", 10000))
    model = HookedTransformer(HookedTransformerConfig(**config, dtype=torch.float64, device="cpu"))
    weights = {name: x.double() for name, x in load_file(folder / "model.safetensors").items()}
    grouped = config.get("n_key_value_heads") is not None
    if grouped:
        weights = {re.sub(r"attn\.([Wb]_[KV])$", r"attn._\1", name): x for name, x in weights.items()}
    missing, extra = model.load_state_dict(weights, strict=False)
    assert not extra, extra
    own = dict(model.named_parameters())
    for name in missing:  # biases that the source has not
        assert name not in own or re.search(r"\b_?b_\w+$", name), name
    with torch.no_grad():
        for name in set(missing) & set(own):
            own[name].zero_()
    if grouped:
        model.set_ungroup_grouped_query_attention(True)
    return model


def score(work: Path, source: Path, steps: int) -> None:
    model = load(source)
    model.set_use_attn_result(True)
    model.set_use_split_qkv_input(True)
    model.set_use_hook_mlp_in(True)
    given = load_file(work / "prompts.safetensors")
    rows = torch.arange(len(given["clean"]))

    def tokens(model: HookedTransformer, ids: torch.Tensor) -> tuple[torch.Tensor, None, torch.Tensor, int]:
        return ids, None, torch.full((len(ids),), ids.shape[1]), ids.shape[1]

    def metric(logits: torch.Tensor, *_: object) -> torch.Tensor:
        last = logits[:, -1]
        return -(last[rows, given["answer"]] - last[rows, given["against"]]).sum()

    eap.attribute.tokenize_plus = tokens
    batches = [(given["clean"], given["corrupt"], None)]
    graph = Graph.from_model(model)
    scores = {"eap": eap.attribute.get_scores_eap(model, graph, batches, metric, quiet=True)}
    for many in (steps, 2 * steps):
        found = eap.attribute.get_scores_eap_ig(model, graph, batches, metric, steps=many, quiet=True)
        scores[f"ig {many}"] = found
    scores["real"] = graph.real_edge_mask
    save_file({name: x.contiguous() for name, x in scores.items()}, work / "scores.safetensors")
    (work / "readers.json").write_text(json.dumps(graph.get_dst_nodes()))


def main() -> None:
    """Arguments: a number of steps, then models' folders, each with the folder of its prompts behind it."""
    steps, *folders = sys.argv[1:]
    for source, work in zip(folders[::2], folders[1::2], strict=True):
        score(Path(work), Path(source), int(steps))


if __name__ == "__main__":
    main()
