"""Which heads and edges a behaviour goes through, ranked from a few backward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.circuit import Circuit
from mechinterp_attn.causal.edges import edge_cost, edge_scores
from mechinterp_attn.causal.head_effects import effects
from mechinterp_attn.causal.passes import scores_by_prompt
from mechinterp_attn.causal.patches import Fill, Patch, ValueBias, fill_of, value_bias_note
from mechinterp_attn.causal.pooled_edges import pooled_edge_scores
from mechinterp_attn.causal.rules import FROZEN, RELP, SECANT, TRUE, Rules
from mechinterp_attn.causal.runs import (
    MAX_BYTES,
    Standing,
    head_rows,
    plan_prompts,
    ready,
    standing,
)
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.causal.wires import Edges
from mechinterp_attn.causal.written import pool_bytes
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, TABLE, Plan, plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.index import Heads

METHODS: dict[str, Rules] = {
    "secant": SECANT,
    "gradient": TRUE,
    "eap": TRUE,
    "eap-ig": TRUE,
    "eap-ig-activations": TRUE,
    "relp": RELP,
    "frozen": FROZEN,
}
EDGES = 5000  # that are kept where nobody says how many
Method = Literal["secant", "gradient", "eap", "eap-ig", "eap-ig-activations", "relp", "frozen", "exact"]


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Discovery(Result):
    """Heads, or the edges between them, ranked by how much the behaviour loses without them.

    Attributes:
        frame: one row per head, ``head, layer, index, kind, score``, and ``position`` where positions
            were asked for; or per edge, ``src, dst, mode, edge, score``, where mode says what of ``dst``
            reads it: "Q", "K" or "V" ("" for the logits). Scores are in the metric's unit, means over
            prompts; sorted by size, largest first.
        standing: how the whole model does on the behaviour.
        task: the prompts it was found on.
        units: "heads" or "edges".
        method: how.
        total: how many heads or edges were ranked, also where ``frame`` holds the top ones only.
    """

    title: ClassVar[str] = "What the behaviour goes through"
    sort_by: ClassVar[str | None] = "score"
    standing: Standing
    task: Task
    units: str
    method: str
    total: int

    def circuit(self, n: int) -> Circuit:
        """The ``n`` heads or edges with the largest scores, whatever their sign.

        Args:
            n: how many heads or edges.

        Raises:
            MechInterpError: fewer than one, or more than the table has.
        """
        if not 1 <= n <= len(self.frame):
            raise MechInterpError(
                f"n={n}; this table has {len(self.frame)} {self.units}: expected 1 to that number"
            )
        top = self.frame.head(n)
        if self.units == "edges":
            edges = tuple(top[["src", "dst", "mode"]].itertuples(index=False, name=None))
            return Circuit.of_edges(edges, task=self.task, scores=tuple(top["score"]))
        heads = tuple(dict.fromkeys(top["head"]))
        return Circuit(
            heads=heads, task=self.task, scores=tuple(top.groupby("head", sort=False)["score"].sum())
        )


def _plan(
    model: AttentionOnlyModel,
    task: Task,
    method: Method | Rules,
    units: str,
    positions: str,
    steps: int,
    top_k: int | None,
    pools: bool,
    max_bytes: int,
) -> Plan:
    """A backward pass, one for every step; scores of edges are products over all tokens."""
    bound = bound_to(model, task)
    each = bound.clean.tokens.shape[1] if positions == "each" else 1
    if method == "exact":
        options: dict[str, Any] = {"positions": positions, "exact": model.n_heads * each}
        return plan(effects, model, task, **options, max_bytes=max_bytes)
    passes = {"eap-ig": steps, "eap-ig-activations": steps * len(model.sublayers())}.get(str(method), 1)
    edges = units == "edges"
    kept, flops = (0, 0)
    if edges and pools:
        kept = 2 * passes * pool_bytes(model, bound.clean.tokens.shape[1])
    elif edges:
        kept, flops = edge_cost(model, bound, passes)
    result = 3 * CELL * TABLE * (_kept(model, top_k, pools) if edges else model.n_heads * each)
    return plan_prompts(
        model, bound, f"scores of {units}", max_bytes, runs=5 + 4 * passes, result=result, kept=kept,
        flops=flops, backward=True, times=2,
    )  # fmt: skip


def _kept(model: AttentionOnlyModel, top_k: int | None, pools: bool) -> int:
    """How many edges are kept."""
    return (len(Edges.of(model, pools=True)) if pools else EDGES) if top_k is None else top_k


@plans(_plan)
def discover(
    model: AttentionOnlyModel,
    task: Task,
    method: Method | Rules = "secant",
    units: Literal["heads", "edges"] = "heads",
    *,
    heads: Heads | None = None,
    positions: Literal["all", "each"] = "all",
    pools: bool = False,
    patch: Patch = "corrupt",
    value_bias: ValueBias = "cut",
    steps: int = 5,
    top_k: int | None = None,
    seed: int = 0,
    max_bytes: int = MAX_BYTES,
) -> Discovery:
    """Rank heads of every kind, or the edges between them, by how much of a behaviour goes through them.

    A score is ``(z - patch) . g``: what a head holds, less what it would hold, along the gradient of the
    metric under the method's rules (``causal.Rules``); for an edge, what ``src`` writes along the gradient
    at the queries, keys or values of ``dst``.

    Args:
        model: the converted model.
        task: the behaviour.
        method:
            - "secant": slopes of chords between the clean and the counterfactual run: complete (the scores
              of the inputs add up to the metric's difference) from one backward pass over both.
            - "gradient", or "eap" for edges: the model's own derivatives at the clean run (attribution
              patching; Nanda 2023, Syed et al. 2023).
            - "eap-ig": the mean of them at ``steps`` inputs between the counterfactual and the clean one
              (Hanna et al. 2024); "eap-ig-activations": between the heads' own activations, layer by layer
              (heads only; as many times ``steps`` passes as there are sublayers).
            - "relp": Jafari et al. 2025; "frozen": patterns, gates and norms are constants.
            - "exact": every head patched in a run of its own (heads only).
            - or ``causal.Rules`` of your own.
        units: "heads", or "edges" with their mode Q, K or V.
        heads: rank these only (labels, heads, a kind, a pattern such as ``"L1H*"``), or the edges between
            them, the embedding and the logits; all by default.
        positions: "each" gives every position a score of its own (heads; prompts of one length).
        pools: of edges: all neurons of an MLP are one end, ``L3N*``, as in MIB: far fewer edges.
        patch: what heads would hold instead; "corrupt" needs counterfactuals, as "secant" and "eap-ig" do.
        value_bias: as for ``effects``.
        steps: of "eap-ig".
        top_k: of edges, how many with the largest scores are kept; all are scored. By default 5,000, and
            all of them with ``pools``.
        seed: of ``patch="resample"``.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: everything in which the task does not fit the model or the choices.
    """
    rules = _rules(method, units, positions, patch, steps, pools)
    name = method if isinstance(method, str) else str(method)
    made = _plan(model, task, method, units, positions, steps, top_k, pools, max_bytes)
    whole, max_bytes = max_bytes, within(made, max_bytes, "fewer prompts").left(max_bytes)
    bound = ready(model, bound_to(model, task), max_bytes)
    chosen = None if heads is None else model.heads.labels(heads)
    if chosen is not None and (virtual := sorted(set(chosen) - set(model.heads))):
        raise MechInterpError(f"{', '.join(virtual[:3])}: virtual heads are not ranked; see causal.effects")
    if method == "exact":
        places = bound.clean.tokens.shape[1] if positions == "each" else 1
        found = effects(
            model, task, chosen, patch, positions=positions, value_bias=value_bias, seed=seed,
            exact=None if chosen is not None else len(model.heads) * places, max_bytes=whole,
        )  # fmt: skip
        frame = found.frame.drop(columns="estimate").rename(columns={"effect": "score"})
        return Discovery(
            frame=_sorted(frame), receipt=found.receipt, standing=found.standing, task=task, units=units,
            method=name, total=len(frame),
        )  # fmt: skip
    bound.differentiable(f"method={name!r}")
    if positions == "each" and not bound.aligned:
        raise MechInterpError("positions='each' compares positions, so all prompts must be equally long")
    fill = fill_of(model, bound, patch, value_bias=value_bias, seed=seed, max_bytes=max_bytes)
    state = standing(model, bound, max_bytes)
    notes: dict[str, Any] = {"metric": bound.about, "method": name, "patch": patch, **state.notes}
    notes["dtype"] = str(model.W_E.dtype).removeprefix("torch.")
    notes |= value_bias_note(patch, value_bias)
    if units == "edges":
        made_of: dict[str, Any] = {"steps": steps if method == "eap-ig" else 1, "fill": fill}
        made_of |= {"heads": chosen, "max_bytes": max_bytes}
        if pools:
            frame, total, into = pooled_edge_scores(model, bound, rules, top_k=top_k, **made_of)
        else:
            kept = _kept(model, top_k, pools)
            frame, total, into = edge_scores(model, bound, rules, top_k=kept, **made_of)
        notes["edges"] = f"{total:,} scored, the top {len(frame):,} kept"
        checks = complete(model, state, rules, patch, torch.tensor([into]), notes)
        return Discovery(
            frame=frame, receipt=Receipt(checks, notes), standing=state, task=task, units=units,
            method=name, total=total,
        )  # fmt: skip
    each = positions == "each"
    scores, inputs = _head_scores(model, bound, fill, rules, name, steps, each, max_bytes)
    frame = head_rows(model, bound if each else None).assign(score=scores.flatten().numpy())
    if chosen is not None:
        frame = frame[frame["head"].isin(chosen)]
    checks = complete(model, state, rules, patch, inputs, notes)
    return Discovery(
        frame=_sorted(frame), receipt=Receipt(checks, notes), standing=state, task=task, units=units,
        method=name, total=len(frame),
    )  # fmt: skip


def complete(
    model: AttentionOnlyModel,
    state: Standing,
    rules: Rules,
    patch: str,
    inputs: Tensor,
    notes: dict[str, Any],
) -> tuple[Check, ...]:
    """Whether the scores of the inputs add up to the metric's difference: a check of chords, which must,
    and a note on other slopes.

    Args:
        state: how the model does on the behaviour.
        rules, patch: what the scores were made with.
        notes: a receipt's, which get the note.
        inputs: their sum for every prompt, or its mean over them.
    """
    if state.corrupt is None or patch != "corrupt":
        return ()
    change = (state.clean - state.corrupt).double()
    apart = inputs - (change if len(inputs) == len(change) else change.mean())
    share = float(apart.abs().mean()) / max(float(change.abs().mean()), 1e-9)
    if rules == SECANT and not _approximate(model):
        return (Check("scores of the inputs add up to the metric's difference (share of it)", share, 0.01),)
    notes["the inputs' scores miss the metric's difference by"] = f"{share:.1%}"
    return ()


def _approximate(model: AttentionOnlyModel) -> bool:
    """Whether the model has an operation whose chord is only approximated (by the mean of two slopes)."""
    spec = model.spec
    capped = spec.score_cap is not None or spec.logit_cap is not None
    top_k = any(one.k for one in spec.dictionaries)
    return capped or top_k or str(spec.act_fn).startswith("solu")


def _rules(method: Any, units: str, positions: str, patch: str, steps: int, pools: bool) -> Rules:
    wrong = []
    if not isinstance(method, Rules) and method not in (*METHODS, "exact"):
        wrong.append(f"method={method!r}; expected {', '.join(METHODS)}, exact, or causal.Rules(...)")
    if units not in ("heads", "edges"):
        wrong.append(f"units={units!r}; expected 'heads' or 'edges'")
    if positions not in ("all", "each"):
        wrong.append(f"positions={positions!r}; expected 'all' or 'each'")
    if units == "heads" and pools:
        wrong.append("pools=True is for units='edges', whose ends they are; heads are ranked one by one")
    if units == "edges" and positions == "each":
        wrong.append("positions='each' is for heads; edges are summed over positions")
    if units == "edges" and method in ("exact", "eap-ig-activations"):
        wrong.append(f"method={method!r} is for heads; for single edges use causal.path_patch")
    if steps < 1:
        wrong.append(f"steps={steps}; expected at least 1")
    rules = method if isinstance(method, Rules) else METHODS.get(str(method), TRUE)
    if patch != "corrupt" and (rules.paired or method in ("eap-ig", "eap-ig-activations")):
        wrong.append(
            f"method={method!r} goes between the prompt and its counterfactual: patch='corrupt' only"
        )
    if wrong:
        raise MechInterpError("; ".join(wrong))
    return rules


def rules_of(method: Method | Rules, steps: int, patch: str) -> Rules:
    """The rules behind a method that ranks heads.

    Raises:
        MechInterpError: an unknown method, or one that does not go with the other choices.
    """
    return _rules(method, "heads", "all", patch, steps, pools=False)


def _sorted(frame: Any) -> Any:
    order = frame["score"].abs().sort_values(ascending=False, kind="stable").index
    return frame.loc[order].reset_index(drop=True)


def _head_scores(
    model: AttentionOnlyModel,
    bound: Bound,
    fill: Fill,
    rules: Rules,
    method: str,
    steps: int,
    each: bool,
    max_bytes: int,
) -> tuple[Tensor, Tensor]:
    """``[head]`` or ``[head, pos]``, float64, means over prompts; and the inputs' scores, by prompt."""
    width = bound.clean.tokens.shape[1]
    total = torch.zeros(len(model.heads), width, dtype=torch.float64)
    inputs = torch.zeros(len(bound), dtype=torch.float64)
    for at, scores, own in scores_by_prompt(model, bound, fill, rules, method, steps, max_bytes):
        total[:, : scores.shape[2]] += scores.sum(0)
        inputs[at] = own
    total /= len(bound)
    return (total if each else total.sum(1)), inputs
