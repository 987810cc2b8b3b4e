"""Attribution graphs as the JSON that circuit-tracer and Neuronpedia viewers read.

A file holds ``metadata``, ``qParams``, ``nodes`` and ``links``. Viewers know four types of node;
heads and neurons are written as features ("cross layer transcoder"), each with its true label in
``clerp``; what biases add is one node of the type that viewers draw as a remainder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mechinterp_attn.core.files import write_text
from mechinterp_attn.version import __version__

if TYPE_CHECKING:
    from mechinterp_attn.paths.graph import AttributionGraph


def graph_json(graph: AttributionGraph, slug: str) -> dict[str, Any]:
    """The graph as plain data. Links are the "value" edges; score nodes are left out."""
    rows = graph.nodes[graph.nodes["kind"] != "score"]
    layers = rows["layer"].dropna()
    logit_layer = int(layers.max()) + 2 if len(layers) else 1
    ids: dict[str, str] = {}
    nodes = []
    for row in cast(Iterable[Any], rows.itertuples()):
        entry = _node(graph, row, logit_layer)
        ids[str(row.node)] = entry["node_id"]
        nodes.append(entry)
    links = [
        {"source": ids[e.source], "target": ids[e.target], "weight": e.weight}
        for e in cast(Iterable[Any], graph.edges.itertuples())
        if e.kind == "value"
    ]
    metadata = {
        "slug": slug,
        "scan": graph.model_name,
        "prompt_tokens": graph.tokens,
        "prompt": "".join(graph.tokens),
        "schema_version": 1,
        "transcoder_list": [],
        "info": {
            "creator_name": "mechinterp_attn",
            "creator_url": "",
            "generator": {"name": "mechinterp_attn", "version": __version__, "url": ""},
        },
        "pruning_settings": dict(graph.settings),
        "node_threshold": graph.settings["node_threshold"],
        "target": graph.about,
        "target_value": graph.total,
        "value_inside_graph": graph.kept,
    }
    q_params = {"linkType": "both", "pinnedIds": [], "clickedId": "", "supernodes": [], "sg_pos": ""}
    return {"metadata": metadata, "qParams": q_params, "nodes": nodes, "links": links}


def save_json(graph: AttributionGraph, path: Path, slug: str | None) -> Path:
    """Write ``graph_json`` to a file, whole or not at all."""
    text = json.dumps(graph_json(graph, slug or path.stem), ensure_ascii=True, allow_nan=False)
    return write_text(path, text)


def _node(graph: AttributionGraph, row: Any, logit_layer: int) -> dict[str, Any]:
    """One node in the viewers' terms; ids are ``layer_feature_position``."""
    position = graph.position if row.kind == "bias" else int(row.position)
    layer, feature, kind, name = {
        "token": ("E", position, "embedding", row.token),
        "bias": ("0", -1, "mlp reconstruction error", "biases"),
        "logit": (str(logit_layer), graph.target, "logit", row.label),
    }.get(row.kind, ("", 0, "cross layer transcoder", row.label))
    if not layer:  # neurons stand behind the heads of their layer, so that ids stay apart
        shift = 0 if row.kind == "attention" else 1000
        layer, feature = str(row.layer), int(row.index) + shift
    node_id = f"{layer}_{feature}_{position}"
    return {
        "node_id": node_id,
        "feature": _paired(int(layer), feature) if kind.startswith("cross") else feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": graph.probability if row.kind == "logit" else 0.0,
        "is_target_logit": row.kind == "logit",
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-{position}",
        "clerp": name,
        "influence": None if row.influence != row.influence else row.influence,
        "activation": row.value,
    }


def _paired(layer: int, feature: int) -> int:
    """Cantor's pairing of layer and index, by which viewers tell features apart."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
