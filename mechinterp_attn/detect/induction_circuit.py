"""The induction circuit of a model, found three ways: by behaviour, by weights, by intervention."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar

import pandas as pd
import torch

from mechinterp_attn.causal.batches import Batch, look
from mechinterp_attn.causal.circuit import Circuit
from mechinterp_attn.causal.cuts import cut_of, cutting
from mechinterp_attn.causal.head_effects import Effects, effects
from mechinterp_attn.causal.task import Task
from mechinterp_attn.causal.wires import EMBED, LOGITS
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES, Plan, joined, plan, plans
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.detect.ablation import Ablations, ablate
from mechinterp_attn.detect.measures import SEEN, sums_of
from mechinterp_attn.detect.null import DRAWS
from mechinterp_attn.detect.probes import random_repeats
from mechinterp_attn.detect.removals import (
    NULL_SEQUENCES,
    Removals,
    removals_from_repeats,
    removals_from_task,
)
from mechinterp_attn.detect.scores import HeadScores, score_heads
from mechinterp_attn.detect.weights import WeightScores, score_weights
from mechinterp_attn.model.attention_only import AttentionOnlyModel

ATTENDS = 0.4  # least attention on a role's pairs
STANDS_OUT = 5.0  # least standard deviations above the null, of a trace or of a loss
VIEWS = ("by_behaviour", "by_weights", "by_intervention")


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Induction(Result):
    """The induction circuit and the evidence for it.

    Attributes:
        frame: one row per head that was cut, all that move between positions and some neurons:
            ``head, layer, index, kind``; ``role``: "induction", "previous_token" or ""; ``by_behaviour,
            by_weights, by_intervention``: which views name it, and ``views``, how many; the evidence:
            ``induction``, ``previous_token`` (attention), ``trace_z``, ``partner`` (the K-composed QK
            circuit and the head at its other end), ``copying_z``, ``loss_change`` (nats on repeated
            tokens when it is cut) and ``loss_z``; with a task ``effect``, by how much its metric gets
            worse, and ``effect_z``.
        edges: one row per previous-token and induction head that compose: ``src, dst, trace_z,
            matching, attention, attention_without``: induction attention of ``dst``, whole and with
            ``src`` cut.
        gain: what repetition is worth: loss on random tokens minus loss on their repeats (nats); with a
            task, how much worse its metric is on the counterfactuals;
        gain_z: that in standard errors over tokens, or prompts.
        scores, weights, ablations: the three views, whole.
        task: the behaviour of the third view; None: the losses of repeated tokens.
    """

    title: ClassVar[str] = "Induction circuit"
    gain: float
    gain_z: float
    edges: pd.DataFrame
    scores: HeadScores
    weights: WeightScores
    ablations: Ablations | Effects
    task: Task | None = None

    @property
    def found(self) -> bool:
        """Whether at least two views name an induction head and a previous-token head that compose."""
        return not self.edges.empty

    def heads(self, role: str, *, views: int = 2) -> list[str]:
        """Labels of the heads with a role that at least so many views name.

        Args:
            role: "induction" or "previous_token".
            views: by how many of the views a head must be named.
        """
        frame = self.frame[(self.frame["role"] == role) & (self.frame["views"] >= views)]
        return list(frame["head"])

    def spec(self) -> dict[str, Any]:
        """The circuit as ``assert_circuit`` takes it."""
        roles = self.frame.set_index("head")["role"]
        members = [*self.edges["src"].unique(), *self.edges["dst"].unique()]
        return {
            "heads": {head: roles[head] for head in members},
            "edges": [f"{src} -K-> {dst}" for src, dst in self.edges[["src", "dst"]].to_numpy()],
            "behaviour": "induction",
        }

    def circuit(self, task: Task | None = None) -> Circuit:
        """The circuit as an object that runs alone, draws itself and is compared with others.

        The previous-token heads move the tokens they stand on, the induction heads find them with their
        keys, by queries that are the tokens themselves, and copy tokens to the logits.

        Args:
            task: the behaviour it is held to, such as ``mia.tasks.induction(model)``; by default the one
                that it was found with.

        Raises:
            MechInterpError: no circuit was found.
        """
        if not self.found:
            raise MechInterpError(f"{self}; there is no circuit to give")
        pairs = [(str(src), str(dst)) for src, dst in self.edges[["src", "dst"]].to_numpy()]
        edges = [(src, dst, "K") for src, dst in pairs]
        edges += [(EMBED, src, "V") for src in dict.fromkeys(src for src, _ in pairs)]
        for dst in dict.fromkeys(dst for _, dst in pairs):
            edges += [(EMBED, dst, "Q"), (EMBED, dst, "V"), (dst, LOGITS, "")]
        return Circuit.of_edges(edges, task=self.task if task is None else task)

    @property
    def worth(self) -> str:
        """The gain in words."""
        if self.task is None:
            return f"repetition is worth {self.gain:.2f} nats"
        return f"counterfactuals cost {self.gain:.2f} of {self.task.about}"

    def __str__(self) -> str:
        if not self.found:
            return f"no induction circuit found; {self.worth}"
        lines = []
        for dst, group in self.edges.groupby("dst"):
            row = self.frame[self.frame["head"] == dst].iloc[0]
            views = [view.removeprefix("by_") for view in VIEWS if row[view]]
            lines.append(f"{', '.join(group['src'])} -> {dst} ({', '.join(views)})")
        return "; ".join(lines) + f"; {self.worth}"


def _plan(
    model: AttentionOnlyModel, task: Task | None, seed: int, draws: int, neurons: int, max_bytes: int
) -> Plan:
    """Scores, weights and cuts; removals at random are as many runs as there are draws of them."""
    number = len(model.heads.between_positions) + neurons
    more = float(DRAWS)
    if task is None:
        tokens = random_repeats(model, draws=draws, seed=seed).tokens
        estimate, cuts = (plan(ablate, model, tokens, exact=n, max_bytes=max_bytes) for n in (0, number))
        more *= min(NULL_SEQUENCES, len(tokens)) / len(tokens)
    else:
        estimate, cuts = (
            plan(effects, model, task, patch="zero", exact=n, max_bytes=max_bytes) for n in (0, number)
        )
    removals = replace(cuts, flops=int(more * cuts.flops), seconds=more * cuts.seconds)
    parts = [
        plan(score_heads, model, seed=seed, draws=draws, max_bytes=max_bytes),
        plan(score_weights, model, max_bytes=max_bytes),
        estimate,
        cuts,
        removals,
    ]
    made = joined("the induction circuit", parts)
    return replace(made, bytes=max(part.bytes for part in parts))


@plans(_plan)
def induction(
    model: AttentionOnlyModel,
    *,
    task: Task | None = None,
    seed: int = 0,
    draws: int = 10,
    neurons: int = 8,
    max_bytes: int = MAX_BYTES,
) -> Induction:
    """Find the induction circuit: previous-token heads, induction heads, neurons that matter to it.

    Three views, on the same random tokens repeated (Olsson et al. 2022):

    - behaviour: at least 0.4 of a head's attention lies on the pairs of its role;
    - weights: the trace of the K-composed QK circuit of a pair is at least 5 standard deviations
      above random heads in the earlier one's place, and its eigenvalues are mostly positive
      (Elhage et al. 2021);
    - intervention: the loss on repeated tokens rises when the head is cut, by at least 5 standard
      deviations more than when as much is taken out of the stream in random directions
      (``loss_z``), in a model that repetition helps (``gain_z`` of at least 5: what is not there
      cannot be lost). Heads that stand in for one another can hide from this view.

    Args:
        model: the converted model.
        task: a behaviour with counterfactuals, such as ``mia.tasks.induction(model)``: the third view is
            then how much worse its metric gets, beside how much worse random directions make it, in a
            model for which the counterfactuals are worse.
        seed, draws: of the random tokens.
        neurons: how many MLP-derived heads to cut, by their estimates.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: context or vocabulary too small for repeated tokens; a task without
            counterfactuals or of a single prompt; without a task, a model that predicts no next tokens.
    """
    if task is None:
        model.spec.need_next_tokens("the induction circuit by intervention")
    probe = random_repeats(model, draws=draws, seed=seed)
    scores = score_heads(model, seed=seed, draws=draws, max_bytes=max_bytes)
    weights = score_weights(model, seed=seed, max_bytes=max_bytes)
    options = {"neurons": neurons, "seed": seed, "max_bytes": max_bytes}
    if task is None:
        cut = removals_from_repeats(model, probe, **options)
    else:
        cut = removals_from_task(model, task, **options)
    frame = _evidence(scores, weights, cut)
    edges = _edges(model, probe.batch, frame, weights.pairs, max_bytes)
    frame = (
        frame[frame["loss_change"].notna()]
        .sort_values(["views", "loss_change"], ascending=False)
        .reset_index(drop=True)
    )
    checks = (*scores.receipt.checks, *weights.receipt.checks, *cut.result.receipt.checks)
    agree = all(frame[frame["role"] != ""]["views"] == 3)
    notes = {"tokens": str(probe), "seed": seed, "draws": draws, "all views agree": agree}
    if task is not None:
        notes["by intervention"] = f"{task.about}, on {len(task)} prompts of {task.name or 'a task'}"
        if isinstance(cut.result, Effects) and cut.result.standing.absent is not None:
            notes["warning"] = cut.result.standing.absent
        frame = frame.rename(columns={"loss_change": "effect", "loss_z": "effect_z"})
    return Induction(
        frame=frame,
        receipt=Receipt(tuple[Check, ...](checks), notes),
        gain=cut.gain,
        gain_z=cut.gain_z,
        edges=edges,
        scores=scores,
        weights=weights,
        ablations=cut.result,
        task=task,
    )


def _evidence(scores: HeadScores, weights: WeightScores, cut: Removals) -> pd.DataFrame:
    frame = scores.frame[["head", "layer", "index", "kind", "induction", "previous_token"]]
    frame = frame.merge(weights.frame[["head", "copying_z"]], on="head")
    frame["loss_change"] = frame["head"].map(cut.lost)
    pairs = weights.pairs
    pairs = pairs[(pairs["trace_z"] >= STANDS_OUT) & (pairs["matching"] > 0)]
    pairs = pairs.sort_values("trace_z", ascending=False)
    later = pairs.drop_duplicates("dst").set_index("dst")
    earlier = pairs.drop_duplicates("src").set_index("src")
    reads = (frame["induction"] >= ATTENDS) | frame["head"].isin(later.index)
    brings = (frame["previous_token"] >= ATTENDS) | frame["head"].isin(earlier.index)
    frame["role"] = ""
    frame.loc[brings, "role"] = "previous_token"
    frame.loc[reads & (frame["induction"] >= frame["previous_token"]), "role"] = "induction"
    dst, src = frame["role"] == "induction", frame["role"] == "previous_token"
    frame["by_behaviour"] = (dst & (frame["induction"] >= ATTENDS)) | (
        src & (frame["previous_token"] >= ATTENDS)
    )
    frame["by_weights"] = (dst & frame["head"].isin(later.index)) | (
        src & frame["head"].isin(earlier.index)
    )
    mean, std = (frame["head"].map(cut.null[name]) for name in ("mean", "std"))
    frame["loss_z"] = (frame["loss_change"] - mean) / std
    frame["by_intervention"] = (frame["loss_z"] >= STANDS_OUT) & (cut.gain_z >= STANDS_OUT)
    frame["views"] = frame[list(VIEWS)].sum(axis=1)
    ends = (frame["head"].map(later["trace_z"]), frame["head"].map(earlier["trace_z"]))
    frame["trace_z"] = ends[0].where(dst, ends[1])
    frame["partner"] = frame["head"].map(later["src"]).where(dst, frame["head"].map(earlier["dst"]))
    order = ["head", "layer", "index", "kind", "role", *VIEWS, "views", "induction", "previous_token"]
    return frame[[*order, "trace_z", "partner", "copying_z", "loss_change", "loss_z"]]


@torch.no_grad()
def _edges(
    model: AttentionOnlyModel, batch: Batch, frame: pd.DataFrame, pairs: pd.DataFrame, max_bytes: int
) -> pd.DataFrame:
    """Pairs that stand out by weights, between heads that two views name; with ``src`` cut."""
    strong = frame[frame["views"] >= 2]
    sources = strong[strong["role"] == "previous_token"]["head"]
    targets = strong[strong["role"] == "induction"]["head"]
    edges = pairs[
        pairs["src"].isin(sources) & pairs["dst"].isin(targets) & (pairs["trace_z"] >= STANDS_OUT)
    ][["src", "dst", "trace_z", "matching"]].reset_index(drop=True)
    edges["attention"] = edges["dst"].map(frame.set_index("head")["induction"])
    place = {label: i for i, label in enumerate(model.heads)}
    without = {}
    for src in edges["src"].unique():
        with model.hooks(fwd_hooks=cutting(model, [cut_of(model, src, batch)])):
            sums = sums_of(model, batch, look(model, batch, SEEN))
        without[src] = sums.columns()["induction"]
    edges["attention_without"] = [
        float(without[src][place[dst]]) for src, dst in edges[["src", "dst"]].to_numpy()
    ]
    return edges
