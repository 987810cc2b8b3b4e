"""The sections about paths: loss by order, what orders are worth, the strongest paths, the graph."""

from __future__ import annotations

import math

from mechinterp_attn.core.text import number, signed
from mechinterp_attn.view.graph import graph_data
from mechinterp_attn.view.report.blocks import Block, chart, column, missing, section, table, token
from mechinterp_attn.view.report.study import LONG, Study

EDGES = 200  # listed as a table


def loss(study: Study) -> Block:
    """Loss by path order."""
    frame = study.orders.frame
    lead = [
        [
            "Every logit is a sum over paths from a token through heads to the output. Order 0 "
            "passes through no head, order 1 through one, order 2 through two composed ones. "
            "MLP-derived heads count as heads. A single order may well make the loss worse: only "
            "the sum is the model."
        ]
    ]
    blocks = [
        table(
            "orders",
            "Loss with the paths up to each order",
            frame.assign(loss=missing(frame["loss"]), change=missing(frame["change"])),
            [
                column("order", "Order", "text"),
                column("loss", "Loss (nats)"),
                column("change", "Change", "signed"),
                column("logit_norm", "Logits, root mean square"),
            ],
        )
    ]
    if study.has_loss:
        blank = math.log(study.model.spec.d_vocab_out)
        blocks.insert(
            0,
            chart(
                "loss-by-order",
                "Loss with the paths up to each order",
                "line",
                list(zip(frame["order"], frame["loss"], strict=True)),
                x="paths through at most this many heads",
                y="loss (nats)",
                reference={"label": "blind guess", "value": number(blank)},
            ),
        )
    else:
        lead.append([f"{study.no_loss[0].upper()}{study.no_loss[1:]}."])
    return section("orders", "Loss by path order", lead, blocks, {"orders": study.orders.receipt})


def importance(study: Study) -> Block | None:
    """What each order is worth, paths through attention heads and through MLP-derived heads apart."""
    if not study.has_loss:
        return None
    result = study.importance
    lead = [
        [
            "What the paths of one order change in the loss when they are added to all shorter ones: a "
            "negative change is a gain. Order 0 is measured against guessing blindly."
        ]
    ]
    heads = result.heads.dropna(subset=["alone"]) if len(result.heads) else result.heads
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
            result.frame.assign(
                **{name: missing(result.frame[name]) for name in ("attention_only", "with_mlp")}
            ),
            [
                column("order", "Order", "text"),
                column("change", "Change (nats)", "signed"),
                column("attention_only", "Attention heads only (nats)", "signed"),
                column("with_mlp", "With MLP-derived heads (nats)", "signed"),
            ],
        ),
    ]
    if len(heads):
        columns = [
            column("head", "Head", "head"),
            column("kind", "Kind", "kind"),
            column("order", "Order", "text"),
            column("alone", "Added alone (nats)", "signed"),
            column("given_others", "Given the others (nats)", "signed"),
        ]
        caption = "Change of the loss by the head that paths end in (the strongest ones)"
        blocks.append(table("importance-of-heads", caption, heads, columns, sort="alone", rows=10))
    elif len(study.frozen.tokens) > LONG:
        lead.append([f"Single heads are measured on prompts of up to {LONG} tokens; this one is longer."])
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


def graph(study: Study) -> Block | None:
    """The interactive attribution graph, its nodes and edges as tables beside it."""
    if not study.model.n_heads:
        return None
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
    edges = result.edges[result.edges["kind"] == "value"]
    edges = edges.loc[edges["weight"].abs().sort_values(ascending=False, kind="stable").index[:EDGES]]
    nodes = result.nodes[result.nodes["kind"] != "score"]
    nodes = nodes.assign(token=nodes["token"].fillna(""))
    blocks = [
        {"type": "graph", "id": "graph", "graph": drawn},
        table("graph-nodes", "The nodes of the graph", nodes, columns, sort="influence", rows=10),
        table(
            "graph-edges",
            "The strongest edges of the graph",
            edges,
            [
                column("source", "From", "text"),
                column("target", "To", "text"),
                column("weight", "Weight (logits)", "signed"),
                column("share", "Share"),
            ],
            rows=10,
        ),
    ]
    return section("graph", "Attribution graph", lead, blocks, {"graph": result.receipt})
