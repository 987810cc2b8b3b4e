"""The sections about paths: loss by order, what orders are worth, the strongest paths, the graph."""

from __future__ import annotations

import math

from mechinterp_attn.core.text import signed
from mechinterp_attn.view.charts import loss_by_order, worth_of_orders
from mechinterp_attn.view.graph import graph_data
from mechinterp_attn.view.report.blocks import (
    Block,
    Spans,
    chart_block,
    column,
    missing,
    section,
    table,
    token,
)
from mechinterp_attn.view.report.study import LONG, Study

LEAST = 0.3  # share of the logit that the strongest paths must explain to be listed
EDGES = 200  # listed as a table
DRAWN = 20_000  # edges of the picture, which keeps the page small


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
            "Loss on this prompt with the paths up to each order",
            frame.assign(loss=missing(frame["loss"]), gain=missing(-frame["change"])),
            [
                column("order", "Order", "text"),
                column("loss", "Loss (nats)"),
                column("gain", "Gain", "signed", "how much the loss falls with it"),
                column("logit_norm", "Logits, root mean square"),
            ],
        )
    ]
    finding: Spans = [f"{study.no_loss[0].upper()}{study.no_loss[1:]}"]
    if study.has_loss:
        blank = math.log(study.model.spec.d_vocab_out)
        finding = [
            f"{frame['loss'].iloc[0]:.2f} nats a token through no head, {frame['loss'].iloc[-1]:.2f} "
        ]
        finding += [f"through all; a blind guess costs {blank:.2f}"]
        blocks.insert(
            0,
            chart_block("loss-by-order", loss_by_order([study.orders])),
        )
    else:
        lead.append([f"{study.no_loss[0].upper()}{study.no_loss[1:]}."])
    receipts = {"orders": study.orders.receipt}
    return section("orders", "Loss by path order", lead, blocks, receipts, finding=finding)


def importance(study: Study) -> Block | None:
    """What each order is worth, paths through attention heads and through MLP-derived heads apart."""
    if not study.has_loss:
        return None
    result = study.importance
    lead = [
        [
            "How much the loss falls when the paths of one order are added to all shorter ones: below zero "
            "they make it worse. Order 0 is measured against guessing blindly."
        ]
    ]
    heads = result.heads.dropna(subset=["alone"]) if len(result.heads) else result.heads
    names = ("change", "attention_only", "with_mlp")
    gains = result.frame.assign(**{name: missing(-result.frame[name]) for name in names})
    points = list(zip(result.frame["order"], -result.frame["change"], strict=True))
    blocks = [
        chart_block("importance-of-orders", worth_of_orders(result)),
        table(
            "importance",
            "What each order gains",
            gains,
            [
                column("order", "Order", "text"),
                column("change", "Gain (nats)", "signed"),
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
        caption = "Gain by the head that paths end in (the strongest ones)"
        heads = heads.assign(alone=-heads["alone"], given_others=-heads["given_others"])
        blocks.append(table("importance-of-heads", caption, heads, columns, sort="alone", rows=10))
    elif len(study.frozen.tokens) > LONG:
        lead.append([f"Single heads are measured on prompts of up to {LONG} tokens; this one is longer."])
    order, gain = max(points[1:] or points, key=lambda pair: pair[1])
    finding: Spans = [f"Beyond the tokens alone, order {order} gains most: {gain:.2f} nats a token"]
    receipts = {"term importance": result.receipt}
    return section("importance", "Term importance", lead, blocks, receipts, finding=finding)


def top_paths(study: Study) -> Block:
    """The strongest paths from a token through heads to the predicted logit."""
    result = study.top_paths
    best = (
        "No other path is larger than those listed."
        if result.proven
        else f"The search was cut short: a path not listed may reach {result.bound:.2f}."
    )
    logit: Spans = ["the logit of ", token(study.token(result.target))]
    together = f"{signed(result.explained)} of {result.total:.2f}"
    circuits = study.top_circuits
    n = len(circuits.frame)
    listed = "The strongest chain adds" if n == 1 else f"The {n} strongest chains of heads add"
    finding: Spans = [f"{listed} up to "]
    finding += [f"{signed(circuits.explained)} of {result.total:.2f}"]
    receipts = {"circuits": circuits.receipt, "paths": result.receipt}
    if abs(result.explained) < LEAST * abs(result.total):
        lead = [[f"The {len(result.frame)} strongest single paths to ", *logit, f" add up to {together}, "
                 "which is too little to tell anything by: the logit is a sum over very many small ones. "
                 "They are not listed; mia.paths.top_paths lists them."]]  # fmt: skip
        return section(
            "paths", "Top paths", [_pooled(study), *lead], [_chains(study)], receipts, finding=finding
        )
    lead = [
        [
            "The strongest single paths from a token through heads to ",
            *logit,
            f". Those listed add up to {together}; all other paths to {signed(result.remainder)}. {best}",
            *([" Paths cancel each other, so that their shares may pass 1."] if _cancel(study) else []),
        ]
    ]
    columns = [
        column("path", "Path", "text"),
        column("order", "Heads on it", "id"),
        column("token", "From token", "token"),
        column("contribution", "Contribution (logits)", "signed"),
        *([] if study.near_zero else [column("share", "Share")]),
    ]
    block = table("top-paths", "The strongest paths", result.frame, columns, rows=15)
    blocks = [_chains(study), block]
    return section("paths", "Top paths", [_pooled(study), *lead], blocks, receipts, finding=finding)


def _pooled(study: Study) -> Spans:
    """What chains with neurons pooled explain."""
    result = study.top_circuits
    return [
        "First, chains of attention heads, each reading the one before as its values, directly or "
        f"through any number of neurons: those listed add up to {signed(result.explained)} of "
        f"{result.total:.2f}, others that were found to {signed(result.others)}, those not looked at to "
        f"{signed(result.unopened)}."
    ]


def _chains(study: Study) -> Block:
    columns = [
        column("circuit", "Chain", "text"),
        column("heads", "Heads on it", "id"),
        column("contribution", "Contribution (logits)", "signed"),
        *([] if study.near_zero else [column("share", "Share")]),
    ]
    frame = study.top_circuits.frame
    return table("top-circuits", "The strongest chains of heads, neurons pooled", frame, columns, rows=10)


def _explains(study: Study) -> str:
    """How much of the prediction the graph holds, frozen and with patterns free."""
    result = study.graph
    inside = (
        "" if study.near_zero else f"{result.inside:.0%} of the target runs on paths inside the graph. "
    )
    if math.isnan(result.faithfulness):
        return inside
    return (
        f"{inside}With everything outside it patched in the running model, {result.faithfulness:.0%} of "
        "the way from no heads to the whole model is left (faithfulness)."
    )


def _cancel(study: Study) -> bool:
    return not study.near_zero and bool((study.top_paths.frame["share"].abs() > 1).any())


def graph(study: Study) -> Block | None:
    """The interactive attribution graph, its nodes and edges as tables beside it."""
    if not study.model.n_heads:
        return None
    result = study.graph
    drawn = graph_data(result, edges=DRAWN)
    lead = [
        [
            f"{drawn['title']}. Tokens stand across, layers upwards. Choose a node to see what "
            f"comes into it and where it goes. {drawn['note'][0].upper()}{drawn['note'][1:]}."
        ],
    ]
    columns = [
        column("label", "Node", "text"),
        column("kind", "Kind", "kind"),
        column("token", "Token", "token"),
        column("value", "Value (logits)", "signed"),
        *([] if study.near_zero else [column("share", "Share")]),
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
                *([] if study.near_zero else [column("share", "Share")]),
            ],
            rows=10,
        ),
    ]
    finding: Spans = [f"{len(nodes):,} nodes. {_explains(study)}"]
    receipts = {"graph": result.receipt}
    return section("graph", "Attribution graph", lead, blocks, receipts, finding=finding)
