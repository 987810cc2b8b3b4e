"""Attribution graphs as the JSON that circuit-tracer's and Neuronpedia's viewers read.

A file holds ``metadata``, ``qParams``, ``nodes`` and ``links``. What follows is how the viewers read it
(circuit-tracer: ``frontend/graph_models.py`` and ``attribution_graph/util-cg.js``; Neuronpedia:
``graph-schema.json`` and ``graph/utils.ts``):

- a node's type is one of four. Heads, neurons, pools and what the biases add are written as features
  ("cross layer transcoder"), with their true names in ``clerp``; a "mlp reconstruction error" is what
  comes in from outside the graph, which is what viewers mean by it;
- a logit's label stands between the first two double quotes of its ``clerp``, its probability behind
  ``(p=``, without which the page fails;
- ``influence`` is a rank, not a size: the share of all influence held by this node and by all larger
  ones. A viewer hides the nodes above its threshold;
- tooltips are set as HTML, so a ``clerp`` holds no character that is markup;
- supernodes group pinned nodes only: ``[name, node_id, ...]``.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import pandas as pd

from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.files import write_text
from mechinterp_attn.version import __version__

# Numbers of features in a layer: heads from 0, then their pool; neurons, then theirs; the biases (layer 0).
HEAD_POOL, NEURONS, NEURON_POOL, BIASES = 999, 1000, 10**6 - 1, 10**6
MARKUP = str.maketrans({"<": "\u2039", ">": "\u203a", "&": "\uff06", '"': "\u2033"})  # look-alikes


@runtime_checkable
class Drawn(Protocol):
    """What is written of an ``AttributionGraph``; its attributes are described there."""

    @property
    def nodes(self) -> pd.DataFrame: ...
    @property
    def edges(self) -> pd.DataFrame: ...
    @property
    def tokens(self) -> list[str]: ...
    @property
    def goal_name(self) -> str: ...
    @property
    def about(self) -> str: ...
    @property
    def target(self) -> int: ...
    @property
    def position(self) -> int: ...
    @property
    def probability(self) -> float: ...
    @property
    def total(self) -> float: ...
    @property
    def inside(self) -> float: ...
    @property
    def faithfulness(self) -> float: ...
    @property
    def model_name(self) -> str: ...
    @property
    def settings(self) -> dict[str, float]: ...


def graph_json(
    graph: Drawn,
    slug: str,
    *,
    scan: str | None = None,
    pinned: Sequence[str] = (),
    supernodes: Mapping[str, Sequence[str]] | None = None,
) -> dict[str, Any]:
    """The graph as plain data. Links are the "value" edges; score nodes are left out.

    Args:
        slug: the graph's name in viewers.
        scan: the model's name in viewers; by default the model's own.
        pinned: ids of nodes to pin, as in ``graph.nodes``.
        supernodes: names of groups, each with the ids of its nodes; they are pinned too.

    Raises:
        MechInterpError: no such nodes, or a node in two groups.
    """
    rows = graph.nodes[graph.nodes["kind"] != "score"]
    layers = rows["layer"].dropna()
    logit_layer = int(layers.max()) + 2 if len(layers) else 1
    rank = _cumulative(rows.set_index("node")["influence"])
    groups = {name: list(members) for name, members in (supernodes or {}).items()}
    check_pins(set(rows["node"]), pinned, groups)
    ids: dict[str, str] = {}
    nodes = []
    for row in cast(Iterable[Any], rows.itertuples()):
        entry = _node(graph, row, logit_layer, rank.get(row.node))
        ids[str(row.node)] = entry["node_id"]
        nodes.append(entry)
    links = [
        {"source": ids[e.source], "target": ids[e.target], "weight": e.weight}
        for e in cast(Iterable[Any], graph.edges.itertuples())
        if e.kind == "value"
    ]
    left_out, into = _left_out(graph, rows, ids)
    chosen = dict.fromkeys([*pinned, *(node for members in groups.values() for node in members)])
    q_params = {
        "linkType": "both",
        "pinnedIds": [ids[node] for node in chosen],
        "clickedId": ids["logit"],
        "supernodes": [[name, *(ids[node] for node in members)] for name, members in groups.items()],
        "sg_pos": "",
    }
    metadata = _metadata(graph, slug, scan or graph.model_name)
    return {
        "metadata": metadata,
        "qParams": q_params,
        "nodes": nodes + left_out,
        "links": links + into,
    }


def save_json(graph: Drawn, path: Path, slug: str | None, **options: Any) -> Path:
    """Write ``graph_json`` to a file, whole or not at all."""
    data = graph_json(graph, slug or path.stem, **options)
    return write_text(path, json.dumps(data, ensure_ascii=True, allow_nan=False))


def _metadata(graph: Drawn, slug: str, scan: str) -> dict[str, Any]:
    scores = {"inside": graph.inside, "faithfulness": graph.faithfulness}
    return {
        "slug": slug,
        "scan": scan,
        "prompt_tokens": graph.tokens,
        "prompt": "".join(graph.tokens),
        "schema_version": 1,  # features are numbered by layer and index, paired
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
        **{name: None if score != score else score for name, score in scores.items()},
    }


def check_pins(known: set[str], pinned: Sequence[str], groups: Mapping[str, Sequence[str]]) -> None:
    """Raise an error with everything that is wrong with pinned nodes and groups of them."""
    every = [*pinned, *(node for members in groups.values() for node in members)]
    wrong = [f"no node {node!r}" for node in dict.fromkeys(every) if node not in known]
    owner: dict[str, str] = {}
    for name, members in groups.items():
        wrong += [f"{node} is in {owner[node]!r} and in {name!r}" for node in members if node in owner]
        owner |= dict.fromkeys(members, name)
    if wrong:
        some = ", ".join(sorted(known)[:5])
        raise MechInterpError(listing(f"pinned nodes and supernodes (nodes are {some}, ...)", wrong))


def _cumulative(influence: pd.Series) -> dict[str, float]:
    """For every node with an influence: the share of all of it that it and all larger ones hold."""
    ordered = influence.drop("logit").dropna().sort_values(ascending=False, kind="stable")
    share = (ordered.cumsum() / ordered.sum()).clip(upper=1.0) if ordered.sum() else ordered
    return {str(node): float(value) for node, value in share.items()}


def _node(graph: Drawn, row: Any, logit_layer: int, influence: float | None) -> dict[str, Any]:
    """One node in the viewers' terms."""
    position = graph.position if row.kind == "bias" else int(row.position)
    kind, probability = "cross layer transcoder", 0.0
    name = row.label.translate(MARKUP)
    if row.kind == "token":
        layer, feature, kind = "E", position, "embedding"
    elif row.kind == "logit":
        layer, feature, kind = str(logit_layer), graph.target, "logit"
        probability = graph.probability
        label = graph.goal_name.translate(MARKUP).replace("(p=", "(p =")
        name = f'Output "{label}" (p={probability:.3f})'
    elif row.kind == "bias":
        layer, feature = "0", BIASES
    else:
        layer, pool = str(row.layer), pd.isna(row.index)
        heads = row.kind == "attention"
        if pool:
            feature = HEAD_POOL if heads else NEURON_POOL
        else:
            feature = int(row.index) + (0 if heads else NEURONS)
    is_feature = kind == "cross layer transcoder"
    return _entry(
        layer,
        feature,
        position,
        kind,
        name,
        feature=_paired(int(layer), feature) if is_feature else feature,
        influence=influence,
        activation=row.value,
        token_prob=probability,
        is_target_logit=kind == "logit",
    )


def _left_out(
    graph: Drawn, rows: pd.DataFrame, ids: Mapping[str, str]
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """What comes into the nodes from outside the graph, as one error node and its links."""
    pruned = rows.set_index("node")["pruned"]
    pruned = pruned[pruned.abs() > 1e-4 * abs(graph.total)]
    if pruned.empty:
        return [], []
    entry = _entry(
        "0",
        -1,
        graph.position,
        "mlp reconstruction error",
        "heads and neurons outside the graph",
        feature=-1,
    )
    links = [
        {"source": entry["node_id"], "target": ids[str(node)], "weight": float(weight)}
        for node, weight in pruned.items()
    ]
    return [entry], links


def _entry(
    layer: str,
    number: int,
    position: int,
    kind: str,
    name: str,
    *,
    feature: int,
    influence: float | None = None,
    activation: float | None = None,
    token_prob: float = 0.0,
    is_target_logit: bool = False,
) -> dict[str, Any]:
    return {
        "node_id": f"{layer}_{number}_{position}",
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": token_prob,
        "is_target_logit": is_target_logit,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{number}-{position}",
        "clerp": name,
        "influence": influence,
        "activation": activation,
    }


def _paired(layer: int, feature: int) -> int:
    """Cantor's pairing of layer and index, by which viewers tell features apart."""
    return (layer + feature) * (layer + feature + 1) // 2 + feature
