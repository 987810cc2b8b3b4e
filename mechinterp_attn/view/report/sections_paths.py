"""The sections about paths: what orders are worth, the strongest paths, the attribution graph."""

from __future__ import annotations

from mechinterp_attn.view.graph import graph_data
from mechinterp_attn.view.report.blocks import Block, chart, column, section, table, token
from mechinterp_attn.view.report.study import Study
from mechinterp_attn.view.text import signed


def importance(study: Study) -> Block | None:
    """What each order is worth, paths through attention heads and through MLP-derived heads apart."""
    if len(study.frozen.tokens) < 2:
        return None
    result = study.importance
    lead = [
        [
            "What the paths of one order change in the loss when they are added to all shorter ones: a "
            "negative change is a gain. Order 0 is measured against guessing blindly."
        ]
    ]
    heads = result.heads.dropna(subset=["alone"])
    blocks = [
        chart(
            "importance-of-orders",
            "Change of the loss with each order",
            "bars",
            [(f"order {o}", c) for o, c in zip(result.frame["order"], result.frame["change"], strict=True)],
            x="change of the loss (nats)",
        ),
        table(
            "importance",
            "Change of the loss by order",
            result.frame,
            [
                column("order", "Order", "text"),
                column("change", "Change (nats)", "signed"),
                column("attention_only", "Attention heads only"),
                column("with_mlp", "With MLP-derived heads"),
            ],
        ),
        table(
            "importance-of-heads",
            "Change of the loss by the head that paths end in (the strongest ones)",
            heads,
            [
                column("head", "Head", "head"),
                column("kind", "Kind", "kind"),
                column("order", "Order", "text"),
                column("alone", "Added alone (nats)", "signed"),
                column("given_others", "Given the others (nats)", "signed"),
            ],
            sort="alone",
            rows=10,
        ),
    ]
    return section("importance", "Term importance", lead, blocks, {"term importance": result.receipt})


def top_paths(study: Study) -> Block:
    """The strongest paths from a token through heads to the predicted logit."""
    result = study.top_paths
    best = (
        "No other path is larger than those listed."
        if result.proven
        else f"The search was cut short: a path not listed may reach {result.bound:.2f}."
    )
    lead = [
        [
            "The strongest single paths from a token through heads to the logit of ",
            token(study.token(result.target)),
            f". Those listed add up to {signed(result.explained)} of {result.total:.2f}; all other "
            "paths to "
            f"{signed(result.remainder)}. {best}",
        ]
    ]
    columns = [
        column("path", "Path", "text"),
        column("order", "Heads on it", "id"),
        column("token", "From token", "token"),
        column("contribution", "Contribution (logits)", "signed"),
        column("share", "Share"),
    ]
    block = table("top-paths", "The strongest paths", result.frame, columns, rows=15)
    return section("paths", "Top paths", lead, [block], {"paths": result.receipt})


def graph(study: Study) -> Block:
    """The interactive attribution graph, its nodes as a table beside it."""
    result = study.graph
    drawn = graph_data(result)
    lead = [
        [
            f"{drawn['title']}. Tokens stand across, layers upwards. Choose a node to see what "
            "comes into it "
            f"and where it goes. {drawn['note'][0].upper()}{drawn['note'][1:]}."
        ]
    ]
    columns = [
        column("label", "Node", "text"),
        column("kind", "Kind", "kind"),
        column("token", "Token", "token"),
        column("value", "Value (logits)", "signed"),
        column("share", "Share"),
        column("influence", "Influence", "score", "share of the target that runs through it, signs aside"),
    ]
    nodes = result.nodes[result.nodes["kind"] != "score"]
    nodes = nodes.assign(token=nodes["token"].fillna(""))
    blocks = [
        {"type": "graph", "id": "graph", "graph": drawn},
        table("graph-nodes", "The nodes of the graph", nodes, columns, sort="influence", rows=10),
    ]
    return section("graph", "Attribution graph", lead, blocks, {"graph": result.receipt})
