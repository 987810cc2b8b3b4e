"""Attribution graphs without transcoders: tokens, heads and neurons at positions, exact edges.

Under the frozen pass a target (a logit, or a difference of two) is linear in everything before it.
The edge from a node to a later one is the sum of all paths to the target that use this step, so the
graph is a flow: what comes into a node from tokens, earlier nodes and biases is what the node
contributes, and it leaves the node again through its outgoing edges. Pruning follows the influence
measure of Ameisen et al. 2025 ("Circuit Tracing", absolute normalised edges); unlike there, nothing
is replaced by a trained approximation, so there are no error nodes: what pruning cut off is known.

Most of a prediction runs through many small contributions. So the heads (or neurons) of a bank that
have no node of their own at a position stand in the graph together, as one node that is their sum.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError, below_one
from mechinterp_attn.core.pictures import Page, draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.frozen.behaviour import Behaviour
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.goals import Target, Token, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen, sum_tolerance
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.paths.explanation import Explanation
from mechinterp_attn.paths.export import save_json
from mechinterp_attn.paths.faithful import Faithfulness, Patch, faithfulness
from mechinterp_attn.paths.flow import (
    CHUNK,
    edge_flow,
    influence_of,
    inside,
    largest_nodes,
    most_influential,
    prune_edges,
    regrouped,
    share_of,
)
from mechinterp_attn.paths.graph_tables import Tables


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class AttributionGraph(Explanation):
    """A graph that explains a logit: tokens, heads and neurons at positions, and what flows between them.

    Attributes:
        runs: the target in the three runs behind ``faithfulness``, and what was patched in; None if it was
            not asked for.
        nodes: one row per node, earliest first: ``node`` (its id, such as ``L0H3@5``), ``label``,
            ``kind`` ("token", "attention", "mlp", "bias", "score", "logit"), ``layer, index``,
            ``members`` (1; of a pool, such as ``L0N*@5``, how many heads or neurons are in it),
            ``position, token``, ``value`` (all paths through it, in logits; a score node: the score
            over the other keys), ``share`` of the total, ``influence`` (0 to 1), ``pruned`` (what
            comes into it from nodes that are not in the graph).
        edges: one row per edge: ``source, target, kind, weight, share``. "value" edges are in logits
            and add up: a node's value is the sum of its incoming "value" edges and ``pruned``.
            "query" and "key" edges lead to a score node and are in units of the score, a "pattern"
            edge leads from it to the head: the logits that the head moves from that key.
        strongest: of each pool, the members that contribute the most, signs aside: ``node`` (the pool's
            id), ``head`` and ``value``.
        frame: the edges.
        kept: the part of the total that is inside.
        kept_influence: share of the candidates' influence that the kept nodes hold.
        n_candidates: how many (head, position) pairs there are in the whole frozen pass.
        weights: what was explained: weights of logits, by token id.
        total, target, against, position, about: what is explained, as in ``Explanation``.
        goal_name: the tokens alone, as a viewer labels them.
        tokens: the prompt's tokens as text.
        model_name: the model's.
        probability: what the model gives the target there.
        settings: the thresholds that the graph was cut with.
        banks: the model's, for the names of a pool's members.
    """

    title: ClassVar[str] = "Attribution graph"
    nodes: pd.DataFrame = field(repr=False)
    edges: pd.DataFrame = field(repr=False)
    strongest: pd.DataFrame = field(repr=False)
    kept: float
    kept_influence: float
    n_candidates: int
    runs: Faithfulness | None
    weights: Mapping[int, float]
    tokens: list[str]
    model_name: str
    probability: float
    settings: dict[str, float]
    goal_name: str
    banks: tuple[HeadBank, ...] = field(repr=False)

    @property
    def inside(self) -> float:
        """The share of the target that runs along paths inside the graph's nodes, biases included, in the
        frozen pass: every other head or neuron writes nothing. 1 where nothing is lost.
        """
        return self.kept / self.total if self.total else float("nan")

    @property
    def faithfulness(self) -> float:
        """The same asked of the running model, whose patterns are free to change: with everything outside
        the graph patched, how much is left of the way from the model with every head and neuron patched
        (0) to the whole model (1). NaN if it was not asked for.
        """
        return float("nan") if self.runs is None else self.runs.share

    def members(self, node: str) -> list[str]:
        """The labels of the heads or neurons that a node consists of: many for a pool.

        Args:
            node: the id of a head, a neuron or a pool, as in ``nodes``.

        Raises:
            KeyError: there is no such node, or it is no head, neuron or pool.
        """
        inner = self.nodes[self.nodes["members"].notna()]
        found = inner[inner["node"] == node]
        if found.empty:
            raise KeyError(f"no head, neuron or pool {node!r}; there are {list(inner['node'][:5])}, ...")
        row = found.iloc[0]
        if pd.notna(row["index"]):
            return [row["label"]]
        at = (inner["position"] == row["position"]) & inner["index"].notna()
        apart = set(inner["label"][at])
        (bank,) = (b for b in self.banks if (b.layer, b.kind) == (row["layer"], row["kind"]))
        return [label for label in bank.labels() if label not in apart]

    def save_json(
        self,
        path: str | Path,
        *,
        slug: str | None = None,
        scan: str | None = None,
        pinned: Sequence[str] = (),
        supernodes: Mapping[str, Sequence[str]] | None = None,
    ) -> Path:
        """Write the graph in the JSON that circuit-tracer's and Neuronpedia's viewers read.

        Args:
            path: the file; it is written whole or not at all.
            slug: the graph's name in viewers; by default the file's stem.
            scan: the model's name in viewers, by which they look up descriptions of features; by default
                the model's own.
            pinned: ids of nodes, as in ``nodes``, that are pinned when the graph is opened.
            supernodes: groups of nodes that are drawn as one: names, each with the ids of its nodes, which
                are pinned too.

        Raises:
            MechInterpError: no such nodes, or a node in two groups.
        """
        return save_json(self, Path(path), slug, scan=scan, pinned=pinned, supernodes=supernodes)

    def view(
        self, *, pinned: Sequence[str] = (), supernodes: Mapping[str, Sequence[str]] | None = None
    ) -> Page:
        """The interactive picture: tokens across, layers up; click a node for its inputs and outputs.

        Args:
            pinned: ids of nodes, as in ``nodes``, that are pinned when it is opened.
            supernodes: groups of nodes that its figure draws as one: names, each with the ids of its nodes,
                which are pinned too.

        Raises:
            MechInterpError: no such nodes, or a node in two groups.
        """
        return draw(self, form="page", pinned=pinned, supernodes=supernodes)

    def _repr_html_(self) -> str:
        return self.view()._repr_html_()


def _candidates(max_nodes: int, pools: bool) -> tuple[int, int]:
    """How many single nodes are candidates, and how many pools."""
    return ((max_nodes + 1) // 2, 2 * max_nodes) if pools else (2 * max_nodes, 0)


def _plan(frozen: Frozen, max_nodes: int, pools: bool) -> Plan:
    """What every head holds, the edges among the candidates and their copies while pruning (of which
    one is of 64-bit indices), what the candidates wrote, what some of them read, and the fields on the
    stream.
    """
    pos, d_model = frozen.end.shape
    size = frozen.end.element_size()
    held = sum(bank.z_bias.numel() for bank in frozen.banks)
    n_singles, n_pools = _candidates(max_nodes, pools)
    candidates = min(n_singles, sum(pos * bank.bank.n_heads for bank in frozen.banks))
    candidates += min(n_pools, pos * len(frozen.banks))
    edges = (candidates + 1) * (candidates + pos)
    wrote = (candidates + pos) * (4 * d_model + 4 * pos)
    fields = (3 * len(frozen.sublayers) + 8) * frozen.end.numel()
    widest = max((bank.bank.n_heads * (bank.bank.d_head + 4) for bank in frozen.banks), default=0)
    terms = max((bank.most_terms for bank in frozen.banks), default=0)
    chunk = min(CHUNK, candidates) * (3 * widest + terms * (3 * d_model + 3 * pos + 2 * candidates))
    return plan_runs(
        frozen.model,
        f"an attribution graph of {pos} tokens and {candidates:,} candidates",
        runs=6,
        rows=1,
        positions=pos,
        bytes=size * (2 * held + 8 * edges + wrote + fields + chunk) + 16 * edges,
        result=3 * CELL * edges,  # at most: the table of edges, before pruning
        flops=4 * edges * d_model,
    )


@of_prompt
@plans(_plan)
@torch.no_grad()
def attribution_graph(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Token | None = None,
    task: Behaviour | None = None,
    max_nodes: int = 1000,
    pools: bool = True,
    node_threshold: float = 1.0,
    edge_threshold: float = 0.98,
    scores: bool = False,
    patch: Patch | None = "mean",
    corrupt: str | Tensor | None = None,
    max_bytes: int = MAX_BYTES,
) -> AttributionGraph:
    """Trace a logit back through heads and neurons to the tokens, and keep the parts that matter most.

    Candidates are the heads and neurons at positions with the largest contribution to the target, over
    all paths through them, and pools of all others, one per bank and position. The ``max_nodes`` most
    influential candidates are kept; a head or neuron that is left out goes back into its pool.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        target: the next token (text of one token, or its id), or weights by token for any direction of
            logits; by default the model's own top one.
        position: where the prediction is made; negative counts from the end.
        against: a second token: explain ``logit(target) - logit(against)``.
        task: a behaviour (``mia.Task``) that has this prompt, in place of target, position and against; its
            metric is explained, by its gradient where it is no sum of logits.
        max_nodes: how many nodes to keep, beside tokens, biases and the target. Half as many heads and
            neurons are candidates; without pools, twice as many.
        pools: whether the heads and neurons that have no node of their own are kept together.
        node_threshold, edge_threshold: shares of the influence to keep, in (0, 1]; 1 keeps all.
        scores: also explain where the kept attention heads look: for every head node the key that
            it takes the most from, and what moved its score there.
        patch: what heads and neurons outside the graph hold when ``faithfulness`` is measured, in two
            more runs of the model: "zero", or the "mean" of what they hold over the prompt. None to
            leave that out.
        corrupt: a prompt of as many tokens: what is patched holds what it holds there instead.
        max_bytes: the largest working memory to take.

    Raises:
        MechInterpError: the target or position does not exist, an option is out of range, the work
            needs more than max_bytes, the other prompt has another length, or the model has no layers.
    """
    frozen.model.heads.required()
    goal = resolve_goal(frozen, target=target, against=against, position=position, task=task)
    _check_options(node_threshold, edge_threshold, max_nodes)
    within(_plan(frozen, max_nodes, pools), max_bytes, "a smaller max_nodes, a shorter prompt")
    n_singles, n_pools = _candidates(max_nodes, pools)
    fields = frozen.backward(goal.field(frozen))
    gradients = fields.sums
    candidates, n_all = largest_nodes(frozen, gradients, n_singles, pools=n_pools)
    influence = influence_of(edge_flow(frozen, goal, candidates, gradients))[: len(candidates)]
    chosen = most_influential(influence, node_threshold, max_nodes)
    kept_influence = share_of(influence, chosen)
    kept = regrouped(candidates, chosen)
    flow = edge_flow(frozen, goal, kept, gradients)
    influence = influence_of(flow)
    weights = prune_edges(flow, influence, edge_threshold)
    tables = Tables(frozen, goal, kept, flow, weights, influence, fields)
    if scores:
        tables.add_scores(gradients)
    total_inside = inside(frozen, goal, kept)
    runs = None if patch is None else faithfulness(frozen, goal, kept, patch, corrupt)
    tolerance = sum_tolerance(frozen)
    checks = (
        Check("tokens and biases over all paths sum to the target", tables.error, tolerance),
        Check("what kept nodes read is what they contribute", flow.error, tolerance),
    )
    nodes, edges = tables.nodes(), tables.edges()
    covered = int(nodes["members"].sum())
    notes = {
        **frozen.receipt.notes,
        "nodes kept": f"{len(kept):,}, of {covered:,} of all {n_all:,} heads and neurons at positions",
        "influence kept": f"{kept_influence:.3f}",
        "target inside the graph": f"{total_inside:.4g} of {goal.total:.4g}",
    }
    if runs is not None:
        notes["target with the rest patched"] = (
            f"{runs.kept:.4g} of {runs.whole:.4g}, from {runs.none:.4g}; patched heads hold {runs.about}"
        )
    return AttributionGraph(
        frame=edges,
        receipt=Receipt(checks, notes),
        nodes=nodes,
        edges=edges,
        strongest=tables.members(gradients),
        **Explanation.of(goal),
        kept=total_inside,
        kept_influence=kept_influence,
        n_candidates=n_all,
        runs=runs,
        weights=goal.weights,
        tokens=frozen.str_tokens,
        model_name=str(frozen.model.provenance.get("name", "unnamed")),
        probability=float(frozen.logits[goal.position].softmax(-1)[goal.target]),
        settings={"node_threshold": node_threshold, "edge_threshold": edge_threshold},
        goal_name=goal.name,
        banks=tuple(frozen.model.banks),
    )


def _check_options(node_threshold: float, edge_threshold: float, max_nodes: int) -> None:
    wrong = [
        f"{name}={value}; expected a share in (0, 1]"
        for name, value in (("node_threshold", node_threshold), ("edge_threshold", edge_threshold))
        if not 0 < value <= 1
    ]
    wrong += below_one(max_nodes=max_nodes)
    if wrong:
        raise MechInterpError("; ".join(wrong))
