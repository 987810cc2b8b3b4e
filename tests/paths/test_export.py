"""The JSON of attribution graphs, read as circuit-tracer's and Neuronpedia's viewers read it.

The reader below is written from their public code: the models of circuit-tracer's
``frontend/graph_models.py``, ``formatData`` in its ``util-cg.js``, and Neuronpedia's
``graph-schema.json`` and ``formatCLTGraphData``.
"""

import json
import math
from dataclasses import replace

import pandas as pd
import pytest
from pydantic import BaseModel, ConfigDict

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge

ALIKE = str.maketrans({"<": "\u2039", ">": "\u203a", '"': "\u2033"})  # in labels, for what is markup
TYPES = {"cross layer transcoder", "mlp reconstruction error", "embedding", "logit"}


class Metadata(BaseModel):
    model_config = ConfigDict(strict=True)
    slug: str
    scan: str
    transcoder_list: list[str]
    prompt_tokens: list[str]
    prompt: str
    node_threshold: float | None
    schema_version: int | None


class QParams(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    pinnedIds: list[str]
    supernodes: list[list[str]]
    linkType: str
    clickedId: str
    sg_pos: str


class Node(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    node_id: str
    feature: int
    layer: str
    ctx_idx: int
    feature_type: str
    token_prob: float
    is_target_logit: bool
    run_idx: int
    reverse_ctx_idx: int
    jsNodeId: str
    clerp: str
    influence: float | None
    activation: float | None


class Link(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    source: str
    target: str
    weight: float


class File(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid")
    metadata: Metadata
    qParams: QParams
    nodes: list[Node]
    links: list[Link]


class View:
    """What a viewer makes of a file, its slider at ``threshold``."""

    def __init__(self, text: str, threshold: float | None = None):
        data = File.model_validate(json.loads(text))
        self.data = data
        threshold = data.metadata.node_threshold if threshold is None else threshold
        always = {"embedding", "logit"}
        self.nodes = {
            n.node_id: n
            for n in data.nodes
            if n.feature_type in always
            or (n.influence or 0) <= threshold  # null counts as 0
            or n.node_id in data.qParams.pinnedIds
        }
        self.links = [link for link in data.links if {link.source, link.target} <= set(self.nodes)]
        self.names = {}
        for n in self.nodes.values():
            assert n.feature_type in TYPES
            if n.feature_type == "embedding":
                assert n.layer == "E"
                self.names[n.node_id] = f"Emb: {data.metadata.prompt_tokens[n.ctx_idx]}"
                continue
            assert int(n.layer) >= 0
            if n.feature_type == "logit":
                self.label = n.clerp.split('"')[1].split('" k(p=')[0]
                self.percent = float(n.clerp.split("(p=")[1].split(")")[0])
            self.names[n.node_id] = n.clerp
        self.groups = {}
        for name, *members in data.qParams.supernodes:  # of pinned nodes only
            self.groups[name] = [m for m in members if m in data.qParams.pinnedIds and m in self.nodes]


@pytest.fixture(scope="module")
def frozen():
    model = mia.convert(tiny_bridge(), check=False)
    return mia.paths.freeze(model, random_tokens(model, 1, 8)[0])


@pytest.fixture(scope="module")
def graph(frozen):
    return mia.paths.attribution_graph(frozen, max_nodes=60, scores=True)


def read(graph, folder, threshold=None, **options):
    return View(graph.save_json(folder / "a graph.json", **options).read_text(), threshold)


def test_a_viewer_reads_it_whole(graph, frozen, tmp_path):
    view = read(graph, tmp_path)
    assert view.data.metadata.slug == "a graph"
    assert view.data.metadata.prompt_tokens == frozen.str_tokens
    kinds = graph.nodes["kind"].value_counts()
    assert len(view.data.nodes) == len({n.node_id for n in view.data.nodes}) == len(view.nodes)
    outside = [n for n in view.data.nodes if n.feature_type == "mlp reconstruction error"]
    assert len(view.nodes) == kinds.drop("score").sum() + len(outside)
    features = [n for n in view.data.nodes if n.feature_type == "cross layer transcoder"]
    assert len({(n.feature, n.ctx_idx) for n in features}) == len(features)
    labels = set(graph.nodes["label"][graph.nodes["kind"].isin(["attention", "mlp", "bias"])])
    assert {n.clerp for n in features} == labels
    ids = {n.node_id for n in view.data.nodes}
    assert all({link.source, link.target} <= ids for link in view.data.links)


def test_the_logit_has_its_label_and_probability(graph, frozen, tmp_path):
    view = read(graph, tmp_path)
    target = int(frozen.logits[-1].argmax())
    assert view.label == frozen.model.to_str_tokens([target])[0].translate(ALIKE)
    assert view.percent == pytest.approx(float(frozen.logits[-1].softmax(-1)[target]), abs=5e-4)
    pair = mia.paths.attribution_graph(frozen, target=3, against=5, max_nodes=10)
    assert read(pair, tmp_path).label == "'<3>' - '<5>'".translate(ALIKE)


def test_tokens_that_try_to_be_markup_or_labels(graph, tmp_path):
    evil = '"<img src=x onerror=alert(1)> (p=0.9)'
    view = read(replace(graph, goal_name=evil), tmp_path)
    assert view.percent == pytest.approx(graph.probability, abs=5e-4)
    assert view.label == '"<img src=x onerror=alert(1)> (p =0.9)'.translate(ALIKE)
    assert not any("<" in name for id, name in view.names.items() if not id.startswith("E"))


def test_influence_is_the_share_held_by_a_node_and_all_larger_ones(graph, tmp_path):
    view = read(graph, tmp_path)
    own = {n.node_id: n.influence for n in view.data.nodes if n.influence is not None}
    sizes = graph.nodes.set_index("node")["influence"].drop("logit").dropna()
    ordered = sizes.sort_values(ascending=False)
    assert sorted(own.values()) == pytest.approx(list(ordered.cumsum() / ordered.sum()))
    assert max(own.values()) == pytest.approx(1)
    largest = graph.nodes.query("kind in ['attention', 'mlp']").nlargest(1, "influence").iloc[0]
    half = read(graph, tmp_path, threshold=0.5)
    assert 0 < len(half.nodes) < len(view.nodes)
    assert any(n.clerp == largest["label"] for n in half.nodes.values())


def unpaired(z: int) -> tuple[int, int]:
    """Layer and index of a feature, as viewers read Cantor's pairing of them backwards."""
    w = (math.isqrt(8 * z + 1) - 1) // 2
    index = z - w * (w + 1) // 2
    return w - index, index


def test_a_feature_is_numbered_by_its_head(graph, tmp_path):
    """Heads from 0, neurons from 1000, pools behind their own, the biases at the end of layer 0."""
    data = read(graph, tmp_path).data
    features = [n for n in data.nodes if n.feature_type == "cross layer transcoder"]
    rows = graph.nodes.set_index(["label", "position"])
    seen = set()
    for n in features:
        layer, index = unpaired(n.feature)
        assert (str(layer), f"{layer}_{index}_{n.ctx_idx}") == (n.layer, n.node_id)
        assert n.jsNodeId == f"{layer}_{index}-{n.ctx_idx}"
        if n.clerp == "biases":
            assert (layer, index) == (0, 10**6)
            continue
        row = rows.loc[(n.clerp, n.ctx_idx)]
        pool, heads = pd.isna(row["index"]), row["kind"] == "attention"
        own = (999 if heads else 10**6 - 1) if pool else int(row["index"]) + (0 if heads else 1000)
        assert (layer, index) == (row["layer"], own)
        seen.add((pool, heads))
    assert len(seen) == 4  # heads, neurons, and a pool of each
    (logit,) = (n for n in data.nodes if n.is_target_logit)
    assert (logit.layer, logit.feature) == (str(2 + 1), graph.target)
    tokens = [n for n in data.nodes if n.feature_type == "embedding"]
    assert [n.feature for n in tokens] == [n.ctx_idx for n in tokens]
    assert not any(n.is_target_logit or n.token_prob for n in data.nodes if n is not logit)


def test_influence_of_each_node(graph, tmp_path):
    """Node by node; where nothing has an influence, all of it is 0 and none is NaN."""
    rows = graph.nodes.dropna(subset=["influence"]).query("kind != 'logit'")
    total = rows["influence"].sum()
    got = {(n.clerp, n.ctx_idx): n.influence for n in read(graph, tmp_path).data.nodes}
    for row in rows.query("kind in ['attention', 'mlp']").itertuples():
        held = rows["influence"][rows["influence"] >= row.influence].sum() / total
        assert got[row.label, int(row.position)] == pytest.approx(held, abs=1e-12)  # float64
    nothing = graph.nodes.assign(influence=graph.nodes["influence"] * 0)
    idle = read(replace(graph, nodes=nothing), tmp_path).data.nodes
    assert {n.influence for n in idle} == {0.0, None}


def test_links_into_a_node_add_up_to_it(frozen, tmp_path):
    """With the node for what is outside, which stands only where something is."""
    for graph in (
        mia.paths.attribution_graph(frozen, max_nodes=30, edge_threshold=1.0),
        mia.paths.attribution_graph(frozen, max_nodes=10**5, edge_threshold=1.0),
    ):
        view = read(graph, tmp_path)
        into = dict.fromkeys(view.nodes, 0.0)
        for link in view.links:
            into[link.target] += link.weight
        rows = graph.nodes[graph.nodes["kind"].isin(["attention", "mlp", "logit"])]
        inner = [n for n in view.data.nodes if n.feature_type != "embedding" and n.activation is not None]
        inner = [n for n in inner if n.clerp != "biases"]
        assert len(inner) == len(rows)
        for n in inner:  # a remainder below 1e-4 of the target is left out
            assert into[n.node_id] == pytest.approx(n.activation, abs=1.1e-4 * abs(graph.total))
        errors = [n for n in view.data.nodes if n.feature_type == "mlp reconstruction error"]
        assert len(errors) == (graph.inside != pytest.approx(1))


def test_pinned_nodes_supernodes_and_scan(graph, tmp_path):
    heads = list(graph.nodes["node"][graph.nodes["kind"] == "attention"][:2])
    neuron = graph.nodes["node"][graph.nodes["kind"] == "mlp"].iloc[0]
    groups = {"two heads": heads}
    view = read(graph, tmp_path, threshold=0.0, scan="gpt2", pinned=[neuron], supernodes=groups)
    assert view.data.metadata.scan == "gpt2"
    assert len(view.data.qParams.pinnedIds) == 3
    assert len(view.groups["two heads"]) == 2
    label = graph.nodes.set_index("node")["label"]
    assert [view.names[id] for id in view.data.qParams.pinnedIds] == list(label[[neuron, *heads]])
    assert view.names[view.data.qParams.clickedId].startswith("Output")
    with pytest.raises(
        MechInterpError, match=r"nodes are (\S+, ){5}\.\.\.\): no node 'L9H9@0'; .* is in 'a' and in 'b'"
    ):
        graph.save_json(tmp_path / "x", supernodes={"a": [heads[0], "L9H9@0"], "b": heads[:1]})
    assert not (tmp_path / "x").exists()
