"""Nodes and edges of an attribution graph as tables."""

from __future__ import annotations

from typing import Any

import pandas as pd
from torch import Tensor

from mechinterp_attn.frozen.goals import Goal
from mechinterp_attn.frozen.prompt import Fields, Frozen
from mechinterp_attn.paths.flow import POOL, Flow, Nodes
from mechinterp_attn.paths.score_edges import score_edges

MEMBERS = 12  # of a pool, that are listed


class Tables:
    """The rows of both tables, as they are found."""

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
        tokens = frozen.str_tokens
        n = len(nodes)
        named = self._named()
        self.ids = [node for node, *_ in named]
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
            (f"token@{p}", repr(t), "token", None, None, None, p, t, token_values[p], reach[n + p], 0.0)
            for p, t in enumerate(tokens)
        ]
        bias_total = self._bias_value()
        self.error = abs(sum(token_values) + bias_total - goal.total)
        self._nodes.append(("bias", "biases", "bias", *[None] * 4, "", bias_total, None, 0.0))
        self._nodes += [
            (*name, p, tokens[p], value, *rest)
            for name, p, value, *rest in zip(
                named,
                nodes.position.tolist(),
                nodes.value.double().tolist(),
                reach[:n],
                pruned[:n],
                strict=True,
            )
        ]
        last = (goal.position, tokens[goal.position], goal.total, 1.0, pruned[-1])
        self._logit = ("logit", goal.about, "logit", None, goal.target, None, *last)

    def _named(self) -> list[tuple[str, str, str, int, int | None, int]]:
        """For every node: its id, label, kind, layer, index and number of members."""
        found: list[tuple[str, str, str, int, int | None, int]] = []
        for number, frozen_bank in enumerate(self.frozen.banks):
            bank, own = frozen_bank.bank, self.kept.of(number)
            heads, at = self.kept.head[own].tolist(), self.kept.position[own].tolist()
            singles: dict[int, int] = {}
            for head, p in zip(heads, at, strict=True):
                singles[p] = singles.get(p, 0) + (head != POOL)
            for head, p in zip(heads, at, strict=True):
                if head != POOL:
                    label = bank.label(head)
                    found.append((f"{label}@{p}", label, bank.kind, bank.layer, head, 1))
                    continue
                size = bank.n_heads - singles[p]
                label = f"{size:,} {'other ' if singles[p] else ''}L{bank.layer} {bank.part}"
                node = f"L{bank.layer}{bank.letter}*@{p}"
                found.append((node, label, bank.kind, bank.layer, None, size))
        return found

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

    def members(self, gradients: list[Tensor]) -> pd.DataFrame:
        """The members of every pool that contribute the most, signs aside: ``node`` (the pool's), ``head``,
        ``value`` (all paths through it, in logits).
        """
        found: list[tuple[str, str, float]] = []
        number = 0
        for depth, sublayer in enumerate(self.frozen.sublayers):
            for bank, held in zip(sublayer.banks, self.frozen.held[depth], strict=True):
                own = self.kept.of(number)
                number += 1
                pool = self.kept.head[own] == POOL
                if not bool(pool.any()):
                    continue
                inside = self.kept.members(own, bank.bank.n_heads)[pool]
                at = self.kept.position[own[pool]]
                values = (held * bank.unwrite(gradients[depth])).sum(-1)[at]
                best = values.abs().where(inside, -1.0).topk(min(MEMBERS, values.shape[1])).indices
                for row, heads, value, known in zip(
                    own[pool].tolist(),
                    best.tolist(),
                    values.gather(1, best).double().tolist(),
                    inside.gather(1, best).tolist(),
                    strict=True,
                ):
                    found += [
                        (self.ids[row], bank.bank.label(head), v)
                        for head, v, ok in zip(heads, value, known, strict=True)
                        if ok
                    ]
        return pd.DataFrame(found, columns=["node", "head", "value"])

    def nodes(self) -> pd.DataFrame:
        columns = [
            "node", "label", "kind", "layer", "index", "members", "position", "token", "value", "influence",
            "pruned",
        ]  # fmt: skip
        frame = pd.DataFrame([*self._nodes, self._logit], columns=columns)
        frame = frame.astype(
            dict.fromkeys(("layer", "index", "members", "position"), "Int64") | {"influence": float}
        )
        share = (frame["value"] / self.goal.total).where(frame["kind"] != "score")
        frame.insert(9, "share", share)
        return frame

    def edges(self) -> pd.DataFrame:
        frame = pd.DataFrame(self._edges, columns=["source", "target", "kind", "weight"])
        in_logits = frame["kind"].isin(["value", "pattern"])
        frame["share"] = (frame["weight"] / self.goal.total).where(in_logits)
        frame["size"] = frame["weight"].abs()
        frame = frame.sort_values(["kind", "size"], ascending=False, kind="stable")  # "value" first
        return frame.drop(columns="size").reset_index(drop=True)
