"""Attribution graphs without transcoders: tokens, heads and neurons at positions, exact edges.

Under the frozen pass a target (a logit, or a difference of two) is linear in everything before it.
The edge from a node to a later one is the sum of all paths to the target that use this step, so the
graph is a flow: what comes into a node from tokens, earlier nodes and biases is what the node
contributes, and it leaves the node again through its outgoing edges. Pruning follows the influence
measure of Ameisen et al. 2025 ("Circuit Tracing", absolute normalised edges); unlike there, nothing
is replaced by a trained approximation, so there are no error nodes: what pruning cut off is known.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import Page, draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.frozen.goals import Goal, Target, resolve_goal
from mechinterp_attn.frozen.prompt import Fields, Frozen, sum_tolerance
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.paths.flow import (
    Flow,
    Nodes,
    edge_flow,
    influence_of,
    inside,
    largest_nodes,
    most_influential,
    prune_edges,
    share_of,
)
from mechinterp_attn.paths.score_edges import score_edges


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttributionGraph(Result):
    """Where a logit comes from: a graph of tokens, heads and neurons at positions.

    Attributes:
        target: id of the token whose logit is explained.
        against: id of the token whose logit is subtracted, or none.
        position: where the logit is read.
        about: a line on what the graph explains.
        tokens: the prompt's tokens as text.
        model_name: of the model.
        probability: the model's for the target there.
        settings: thresholds the graph was cut with.
        nodes: one row per node, earliest first: ``node`` (its id, such as ``L0H3@5``), ``label``,
            ``kind`` ("token", "attention", "mlp", "bias", "score", "logit"), ``layer, index,
            position, token``, ``value`` (all paths through it, in logits; a score node: the score over
            the other keys), ``share`` of the total, ``influence`` (0 to 1), ``pruned`` (what comes
            into it from nodes that are not in the graph).
        edges: one row per edge: ``source, target, kind, weight, share``. "value" edges are in logits
            and add up: a node's value is the sum of its incoming "value" edges and ``pruned``.
            "query" and "key" edges lead to a score node and are in units of the score, a "pattern"
            edge leads from it to the head: the logits that the head moves from that key.
        frame: the edges.
        total: the target itself, as the model computed it.
        kept: what the target would be from paths that run inside the graph's nodes only, biases
            included: every other head or neuron writes nothing.
        kept_influence: share of the candidates' influence that the kept nodes hold.
        n_candidates: how many (head, position) nodes there are in the whole frozen pass.
    """

    title: ClassVar[str] = "Attribution graph"
    nodes: pd.DataFrame = field(repr=False)
    edges: pd.DataFrame = field(repr=False)
    total: float
    kept: float
    kept_influence: float
    n_candidates: int
    target: int
    against: int | None
    position: int
    about: str
    tokens: list[str]
    model_name: str
    probability: float
    settings: dict[str, float]

    def save_json(self, path: str | Path, *, slug: str | None = None) -> Path:
        """Write the graph in the JSON that circuit-tracer and Neuronpedia viewers read.

        Args:
            path: the file; it is written whole or not at all.
            slug: the graph's name in viewers; by default the file's stem.
        """
        from mechinterp_attn.paths.export import save_json

        return save_json(self, Path(path), slug)

    def view(self) -> Page:
        """The interactive picture: tokens across, layers up; click a node for its inputs and outputs."""
        return draw(self, form="page")

    def _repr_html_(self) -> str:
        return self.view()._repr_html_()


def _plan(frozen: Frozen, max_nodes: int) -> Plan:
    """What every head holds, the edges among the candidates and their copies while pruning (of which
    one is of 64-bit indices), what the candidates wrote, and the fields on the stream.
    """
    pos, d_model = frozen.end.shape
    size = frozen.end.element_size()
    held = sum(bank.z_bias.numel() for bank in frozen.banks)
    candidates = min(max_nodes, sum(pos * bank.bank.n_heads for bank in frozen.banks))
    edges = (candidates + 1) * (candidates + pos)
    wrote = (candidates + pos) * (4 * d_model + 4 * pos)
    fields = (3 * len(frozen.sublayers) + 8) * frozen.end.numel()
    return plan_runs(
        frozen.model,
        f"an attribution graph of {pos} tokens and {candidates:,} candidates",
        runs=4,
        rows=1,
        positions=pos,
        bytes=size * (2 * held + 8 * edges + wrote + fields) + 16 * edges,
        result=3 * CELL * edges,  # at most: the table of edges, before pruning
        flops=4 * edges * d_model,
    )


@plans(_plan)
@torch.no_grad()
def attribution_graph(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Target | None = None,
    node_threshold: float = 0.8,
    edge_threshold: float = 0.98,
    max_nodes: int = 2000,
    scores: bool = False,
    max_bytes: int = MAX_BYTES,
) -> AttributionGraph:
    """Trace a logit back to tokens through heads and neurons, and keep what matters.

    Candidates are the ``max_nodes`` (head or neuron, position) pairs with the largest contribution to
    the target, over all paths through them. Among them the ``node_threshold`` most influential
    ones are kept, then the edges up to ``edge_threshold`` of the remaining influence.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``.
        max_nodes: how many heads and neurons at most.
        target: the next token (text of one token, or its id); by default the model's own top one.
        position: where the prediction is made; negative counts from the end.
        against: a second token: explain ``logit(target) - logit(against)``.
        node_threshold, edge_threshold: shares of the influence to keep, in (0, 1]; 1 keeps all.
        scores: also explain where the kept attention heads look: for every head node the key that
            it takes the most from, and what moved its score there.
        max_bytes: the largest working memory to take.

    Raises:
        MechInterpError: the target or position does not exist, an option is out of range, the work
            needs more than max_bytes, or the model has no layers.
    """
    frozen.model.heads.required()
    goal = resolve_goal(frozen, target=target, against=against, position=position)
    _check_options(node_threshold, edge_threshold, max_nodes)
    within(_plan(frozen, max_nodes), max_bytes, "a smaller max_nodes, a shorter prompt")
    fields = frozen.backward(goal.field(frozen))
    gradients = fields.sums
    candidates, n_all = largest_nodes(frozen, gradients, max_nodes)
    flow = edge_flow(frozen, goal, candidates, gradients)
    influence = influence_of(flow)
    chosen = most_influential(influence[: len(candidates)], node_threshold)
    kept_influence = share_of(influence[: len(candidates)], chosen)
    kept = candidates.select(chosen)
    flow = edge_flow(frozen, goal, kept, gradients)
    influence = influence_of(flow)
    weights = prune_edges(flow, influence, edge_threshold)
    tables = _Tables(frozen, goal, kept, flow, weights, influence, fields)
    if scores:
        tables.add_scores(gradients)
    total_inside = inside(frozen, goal, kept)
    tolerance = sum_tolerance(frozen)
    checks = (
        Check("tokens and biases over all paths sum to the target", tables.error, tolerance),
        Check("what kept nodes read is what they contribute", flow.error, tolerance),
    )
    notes = {
        **frozen.receipt.notes,
        "nodes kept": f"{len(kept)} of {n_all:,}",
        "influence kept": f"{kept_influence:.3f}",
        "logit inside the graph": f"{total_inside:.4g} of {goal.total:.4g}",
    }
    return AttributionGraph(
        frame=tables.edges(),
        receipt=Receipt(checks, notes),
        nodes=tables.nodes(),
        edges=tables.edges(),
        total=goal.total,
        kept=total_inside,
        kept_influence=kept_influence,
        n_candidates=n_all,
        target=goal.target,
        against=goal.against,
        position=goal.position,
        about=goal.about,
        tokens=frozen.str_tokens,
        model_name=str(frozen.model.provenance.get("name", "unnamed")),
        probability=float(frozen.logits[goal.position].softmax(-1)[goal.target]),
        settings={"node_threshold": node_threshold, "edge_threshold": edge_threshold},
    )


class _Tables:
    """Nodes and edges as data frames."""

    def __init__(
        self,
        frozen: Frozen,
        goal: Goal,
        nodes: Nodes,
        flow: Flow,
        weights: Tensor,
        influence: Tensor,
        fields: Fields,
    ):
        self.frozen, self.goal, self.kept = frozen, goal, nodes
        self._fields = fields
        banks = [bank.bank for bank in frozen.banks]
        owners = [banks[i] for i in nodes.bank.tolist()]
        heads, positions = nodes.head.tolist(), nodes.position.tolist()
        labels = [bank.label(h) for bank, h in zip(owners, heads, strict=True)]
        n = len(nodes)
        self.ids = [f"{label}@{p}" for label, p in zip(labels, positions, strict=True)]
        tokens = frozen.str_tokens
        sources = self.ids + [f"token@{p}" for p in range(len(tokens))]
        targets = [*self.ids, "logit"]
        row, column = weights.nonzero(as_tuple=True)
        values = weights[row, column].double().tolist()
        self._edges: list[tuple[str, str, str, float]] = [
            (sources[c], targets[r], "value", v)
            for r, c, v in zip(row.tolist(), column.tolist(), values, strict=True)
        ]
        self._edges += [
            ("bias", targets[r], "value", float(b)) for r, b in enumerate(flow.bias.double()) if b != 0
        ]
        pruned = (flow.pruned + (flow.weights - weights).sum(-1)).double().tolist()
        reach = influence.double().tolist()
        token_values = self._token_values()
        self._nodes: list[tuple[Any, ...]] = [
            (f"token@{p}", repr(t), "token", None, None, p, t, token_values[p], reach[n + p], 0.0)
            for p, t in enumerate(tokens)
        ]
        bias_total = self._bias_value()
        self.error = abs(sum(token_values) + bias_total - goal.total)
        self._nodes.append(("bias", "biases", "bias", None, None, None, "", bias_total, None, 0.0))
        self._nodes += [
            (self.ids[i], labels[i], owners[i].kind, owners[i].layer, heads[i], p, tokens[p], value, *rest)
            for i, (p, value, *rest) in enumerate(
                zip(positions, nodes.value.double().tolist(), reach[:n], pruned[:n], strict=True)
            )
        ]
        last = (goal.position, tokens[goal.position], goal.total, 1.0, pruned[-1])
        self._logit = ("logit", goal.about, "logit", None, goal.target, *last)

    def _bias_value(self) -> float:
        """All paths from a bias to the target."""
        total, sums = self.goal.offset, self._fields.sums
        for source in self.frozen.sources:
            if source.kind == "bias":
                total += float(self._fields.through(source).sum())
        for depth, sublayer in enumerate(self.frozen.sublayers):
            total += sum(float((bank.constant * sums[depth]).sum()) for bank in sublayer.banks)
        return total

    def _token_values(self) -> list[float]:
        """All paths from the token (and the position) at every place to the target."""
        return (self._fields.streams[0] * self.frozen.start).sum(-1).double().tolist()

    def add_scores(self, gradients: list[Tensor]) -> None:
        """A node for where each kept attention head looks, with the edges into its score."""
        nodes, edges = score_edges(self.frozen, self.kept, self.ids, gradients)
        self._nodes += nodes
        self._edges += edges

    def nodes(self) -> pd.DataFrame:
        columns = [
            "node", "label", "kind", "layer", "index", "position", "token", "value", "influence", "pruned",
        ]  # fmt: skip
        frame = pd.DataFrame([*self._nodes, self._logit], columns=columns)
        frame = frame.astype({"layer": "Int64", "index": "Int64", "position": "Int64", "influence": float})
        share = (frame["value"] / self.goal.total).where(frame["kind"] != "score")
        frame.insert(8, "share", share)
        return frame

    def edges(self) -> pd.DataFrame:
        frame = pd.DataFrame(self._edges, columns=["source", "target", "kind", "weight"])
        in_logits = frame["kind"].isin(["value", "pattern"])
        frame["share"] = (frame["weight"] / self.goal.total).where(in_logits)
        frame["size"] = frame["weight"].abs()
        frame = frame.sort_values(["kind", "size"], ascending=False, kind="stable")  # "value" first
        return frame.drop(columns="size").reset_index(drop=True)


def _check_options(node_threshold: float, edge_threshold: float, max_nodes: int) -> None:
    wrong = [
        f"{name}={value}; expected a share in (0, 1]"
        for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold))
        if not 0 < value <= 1
    ]
    if max_nodes < 1:
        wrong.append(f"max_nodes={max_nodes}; expected 1 or more")
    if wrong:
        raise MechInterpError("; ".join(wrong))
