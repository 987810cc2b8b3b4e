"""The interactive picture of an attribution graph: one script, no network, safe against token text."""

from __future__ import annotations

import html
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from mechinterp_attn.core.files import write_text
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.core.text import inert_json, number, shown
from mechinterp_attn.paths.graph import AttributionGraph

if TYPE_CHECKING:
    import pandas as pd

TOKENS = 96  # that are drawn, the most influential ones
EDGES = 3000  # that are drawn, the strongest ones
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'"


@dataclass(frozen=True)
class GraphView:
    """A picture of an attribution graph for notebooks and files.

    Attributes:
        data: what ``drawAttributionGraph`` in ``assets/graph.js`` draws, as JSON holds it.
    """

    data: dict[str, Any]

    def page(self) -> str:
        """A whole HTML page that needs nothing but itself."""
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
            f"<title>{html.escape(self.data['title'])}</title><style>{_asset('graph.css')}</style></head>"
            f'<body class="graph-page"><h2>{html.escape(self.data["title"])}</h2>'
            f"<p>{html.escape(self.data['note'])}</p>"
            '<div id="graph"></div>'
            f'<script type="application/json" id="data">{inert_json(self.data)}</script>'
            f"<script>{_asset('graph.js')}\n"
            'drawAttributionGraph(document.getElementById("graph"), '
            'JSON.parse(document.getElementById("data").textContent));'
            'document.documentElement.dataset.ready = "";</script></body></html>'
        )

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_text(path, self.page())

    def _repr_html_(self) -> str:
        """The page in a frame of its own, so that nothing in it meets the notebook."""
        page = html.escape(self.page(), quote=True)
        return (
            f'<iframe srcdoc="{page}" sandbox="allow-scripts" title="attribution graph" width="100%" '
            'height="640" frameborder="0"></iframe>'
        )

    def __repr__(self) -> str:
        nodes, edges = len(self.data["nodes"]), len(self.data["edges"])
        return f"{self.data['title']}: {nodes} nodes, {edges} edges ({self.data['note']})"


@draws(AttributionGraph, form="page")
def graph_view(graph: AttributionGraph, *, most: int = 60) -> GraphView:
    """The picture of a graph; ``.data`` is what a page that embeds it needs.

    Args:
        most: how many heads and neurons to draw, the most influential ones.
    """
    return GraphView(graph_data(graph, most=most))


def graph_data(graph: AttributionGraph, *, most: int = 60) -> dict[str, Any]:
    """Nodes, edges, tokens, columns and rows for ``drawAttributionGraph``.

    Long prompts: only the tokens with most influence get a column, beside those where heads are drawn.
    """
    table, links, inside = _drawn(graph, most)
    n_kept = int(graph.nodes["kind"].isin(["attention", "mlp"]).sum())
    rows: dict[int, str] = {}
    nodes = []
    for n in cast(Iterable[Any], table.itertuples()):
        row = None
        if n.kind in ("attention", "mlp"):
            row = 2 * int(n.layer) + (n.kind == "mlp")
            rows[row] = f"L{n.layer} {'MLP' if n.kind == 'mlp' else 'heads'}"
        nodes.append(
            {
                "id": n.node,
                "label": shown(n.label),
                "kind": n.kind,
                "row": row,
                "position": None if n.kind == "bias" else int(n.position),
                "value": number(n.value),
                "share": number(n.share) if n.share == n.share else None,
                "rest": number(n.rest),
                "head": n.node.split("<-")[0] if n.kind == "score" else None,
            }
        )
    edges = [
        {"source": e.source, "target": e.target, "kind": e.kind, "weight": number(e.weight)}
        for e in cast(Iterable[Any], links.itertuples())
        if e.kind != "pattern"
    ]
    return {
        "title": f"Where {shown(graph.about)} = {graph.total:.3f} comes from",
        "note": (
            f"{n_kept:,} of {graph.n_candidates:,} heads and neurons at positions are in the graph, the "
            f"{inside} most influential are drawn{_tokens(graph)}; paths inside the graph give "
            f"{graph.kept:.3f} of {graph.total:.3f}"
        ),
        "tokens": [shown(token) for token in graph.tokens],
        "columns": sorted(table.loc[table["kind"] != "bias", "position"].astype(int).unique().tolist()),
        "rows": {str(row): name for row, name in rows.items()},
        "nodes": nodes,
        "edges": edges,
    }


def _tokens(graph: AttributionGraph) -> str:
    n = len(graph.tokens)
    return f", and {TOKENS} of {n:,} tokens" if n > TOKENS else ""


def _drawn(graph: AttributionGraph, most: int) -> tuple[pd.DataFrame, pd.DataFrame, int]:
    """The nodes and edges to draw; what is not drawn goes into each node's ``rest``."""
    nodes, edges = graph.nodes, graph.edges
    heads = nodes[nodes["kind"].isin(["attention", "mlp"])].nlargest(most, "influence")["node"]
    others = nodes[nodes["kind"].isin(["bias", "logit"])]["node"]
    tokens = nodes[nodes["kind"] == "token"].nlargest(TOKENS, "influence")["node"]
    names = {*heads, *others, *tokens}
    of_drawn = nodes["node"].map(lambda node: str(node).split("<-")[0] in names)
    names |= set(nodes["node"][of_drawn & (nodes["kind"] == "score")])
    nodes = nodes[nodes["node"].isin(names)]
    edges = edges[edges["source"].isin(names) & edges["target"].isin(names)]
    weak = edges["weight"].abs().nlargest(EDGES).min() if len(edges) > EDGES else 0.0
    edges = edges[(edges["kind"] != "value") | (edges["weight"].abs() >= weak)]
    into = edges[edges["kind"] == "value"].groupby("target")["weight"].sum()
    rest = nodes["value"] - nodes["node"].map(into).fillna(0.0)
    rest = rest.where(nodes["kind"].isin(["attention", "mlp", "logit"]), 0.0)
    return nodes.assign(rest=rest), edges, len(heads)


def _asset(name: str) -> str:
    return (files("mechinterp_attn.view") / "assets" / name).read_text(encoding="utf-8")
