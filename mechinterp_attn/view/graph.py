"""The interactive picture of an attribution graph: one script, no network, safe against token text."""

from __future__ import annotations

import html
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mechinterp_attn.core.files import write_text
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.core.text import inert_json, number, shown
from mechinterp_attn.paths.export import check_pins
from mechinterp_attn.paths.graph import AttributionGraph
from mechinterp_attn.view.inline import GRAPH_SCRIPTS, asset, policy

if TYPE_CHECKING:
    import pandas as pd

TOKENS = 96  # that are drawn, the most influential ones
EDGES = 150_000  # that are drawn, the strongest ones
_START = """
const drawing = JSON.parse(document.getElementById("data").textContent);
drawAttributionGraph(document.getElementById("graph"), drawing);
document.documentElement.dataset.ready = "";
"""


@dataclass(frozen=True)
class GraphView:
    """A picture of an attribution graph for notebooks and files.

    Attributes:
        data: what ``drawAttributionGraph`` in ``assets/graph.js`` draws, as JSON holds it.
    """

    data: dict[str, Any]

    def page(self) -> str:
        """A whole HTML page that needs nothing but itself."""
        title, style = html.escape(self.data["title"]), asset(("graph.css",))
        code = asset(("element.js", "core.js", "figure.js", *GRAPH_SCRIPTS)) + _START
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{policy((code,), style)}">'
            '<meta name="viewport" content="width=device-width, initial-scale=1">'
            f"<title>{title}</title><style>{style}</style></head>"
            f'<body class="graph-page"><main><h1>{title}</h1><p>{html.escape(self.data["note"])}</p>'
            '<div id="graph"></div></main>'
            f'<script type="application/json" id="data">{inert_json(self.data)}</script>'
            f"<script>{code}</script></body></html>"
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_text(path, self.page())

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that nothing in it meets the notebook."""
        page = html.escape(self.page(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts allow-downloads" title="attribution graph" '
            'width="100%" height="900" frameborder="0"></iframe>'
        )

    def __repr__(self) -> str:
        nodes, edges = len(self.data["nodes"]), len(self.data["edges"]["weight"])
        return f"{self.data['title']}: {nodes} nodes, {edges:,} edges ({self.data['note']})"


@draws(AttributionGraph, form="page")
def graph_view(
    graph: AttributionGraph,
    *,
    pinned: Sequence[str] = (),
    supernodes: Mapping[str, Sequence[str]] | None = None,
) -> GraphView:
    """The picture of a graph; ``.data`` is what a page that embeds it needs.

    Args:
        pinned, supernodes: as in ``AttributionGraph.view``.

    Raises:
        MechInterpError: no such nodes, or a node in two groups.
    """
    return GraphView(with_pins(graph_data(graph), pinned, supernodes))


def with_pins(
    data: dict[str, Any], pinned: Sequence[str], supernodes: Mapping[str, Sequence[str]] | None
) -> dict[str, Any]:
    """The data of ``graph_data``, less its own pins, with these.

    Raises:
        MechInterpError: no such nodes, or a node in two groups.
    """
    groups = {shown(name): list(nodes) for name, nodes in (supernodes or {}).items()}
    check_pins({node["id"] for node in data["nodes"]}, pinned, groups)
    return data | {"pinned": list(pinned), "supernodes": groups}


def graph_data(graph: AttributionGraph, *, edges: int = EDGES) -> dict[str, Any]:
    """What every picture of a graph is drawn from: nodes, edges, scores, tokens, columns and rows.

    ``nodes`` is a list of dicts. ``edges`` holds three lists, the strongest edge first: the places of
    ``source`` and ``target`` in the list of nodes, and ``weight``. ``scores`` says where heads look
    and which nodes move query and key there; ``members`` lists the strongest of each pool. Long
    prompts: only the tokens with most influence get a column, beside those where heads are drawn.

    Args:
        edges: how many edges to draw, the strongest ones; what others bring is in the ``rest`` of a node.
    """
    table, links = _drawn(graph, edges)
    rows: dict[int, str] = {}
    nodes = []
    for n in cast(Iterable[Any], table.itertuples()):
        row = None
        if n.inner:
            row = 2 * int(n.layer) + (n.kind != "attention")
            rows[row] = f"L{n.layer} {'heads' if n.kind == 'attention' else 'MLP'}"
        nodes.append(
            {
                "id": n.node,
                "label": shown(n.label),
                "kind": n.kind,
                "row": row,
                "position": None if n.kind == "bias" else int(n.position),
                "members": int(n.members) if n.inner else None,
                "value": number(n.value),
                "share": number(n.share) if n.share == n.share else None,
                "influence": number(n.influence, 3) if n.influence == n.influence else None,
                "rest": number(n.rest),
            }
        )
    place = {node["id"]: i for i, node in enumerate(nodes)}
    return {
        "title": f"Where {shown(graph.about)} = {graph.total:.3f} comes from",
        "note": _note(graph, len(table), len(links)),
        "tokens": [shown(token) for token in graph.tokens],
        "columns": sorted(table.loc[table["kind"] != "bias", "position"].astype(int).unique().tolist()),
        "rows": {str(row): name for row, name in rows.items()},
        "nodes": nodes,
        "edges": {
            "source": links["source"].map(place).tolist(),
            "target": links["target"].map(place).tolist(),
            "weight": [number(weight, 4) for weight in links["weight"]],
        },
        "scores": _scores(graph, place),
        "members": {
            node: [
                [label, number(value, 4)] for label, value in zip(own["head"], own["value"], strict=True)
            ]
            for node, own in graph.strongest.groupby("node", sort=False)
        },
    }


def _note(graph: AttributionGraph, drawn: int, edges: int) -> str:
    every = graph.nodes[graph.nodes["members"].notna()]
    heads, pools = int((every["members"] == 1).sum()), int((every["members"] > 1).sum())
    value = int((graph.edges["kind"] == "value").sum())
    few = f", the {edges:,} strongest of {value:,} edges" if edges < value else f", {value:,} edges"
    n = len(graph.tokens)
    tokens = f", {TOKENS} of {n:,} tokens" if n > TOKENS else ""
    pooled = f", and {pools:,} pools of others" if pools else ""
    return (
        f"{heads:,} of {graph.n_candidates:,} heads and neurons at positions{pooled}{few}{tokens}; paths "
        f"inside the graph give {graph.kept:.3f} of {graph.total:.3f}"
    )


def _scores(graph: AttributionGraph, place: Mapping[str, int]) -> list[dict[str, Any]]:
    """For every head with a score node: the key it takes most from, what it moves from there, and what
    moves its score on either side, strongest first.
    """
    scores = graph.nodes[graph.nodes["kind"] == "score"]
    edges = graph.edges[graph.edges["kind"].isin(["query", "key", "pattern"])]
    into = dict(iter(edges.groupby(["target", "kind"], sort=False)))
    moved = edges[edges["kind"] == "pattern"].set_index("source")["weight"]

    def side(node: str, kind: str) -> list[list[Any]]:
        own = into.get((node, kind))
        if own is None:
            return []
        pairs = zip(own["source"], own["weight"], strict=True)
        return [[place[source], number(weight, 4)] for source, weight in pairs if source in place]

    return [
        {
            "head": n.node.split("<-")[0],
            "label": shown(n.label),
            "value": number(n.value),
            "moves": number(moved[n.node]) if n.node in moved.index else None,
            "query": side(n.node, "query"),
            "key": side(n.node, "key"),
        }
        for n in cast(Iterable[Any], scores.itertuples())
        if n.node.split("<-")[0] in place
    ]


def _drawn(graph: AttributionGraph, most: int) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The nodes and edges to draw; what is not drawn goes into each node's ``rest``."""
    nodes = graph.nodes[graph.nodes["kind"] != "score"]
    edges = graph.edges[graph.edges["kind"] == "value"]
    tokens = nodes[nodes["kind"] == "token"].nlargest(TOKENS, "influence").index
    nodes = nodes[(nodes["kind"] != "token") | nodes.index.isin(tokens)]
    names = set(nodes["node"])
    edges = edges[edges["source"].isin(names) & edges["target"].isin(names)]
    edges = edges.loc[edges["weight"].abs().sort_values(ascending=False, kind="stable").index[:most]]
    into = edges.groupby("target")["weight"].sum()
    inner = nodes["members"].notna()
    rest = nodes["value"] - nodes["node"].map(into).fillna(0.0)
    rest = rest.where(inner | (nodes["kind"] == "logit"), 0.0)
    return nodes.assign(rest=rest, inner=inner), edges
