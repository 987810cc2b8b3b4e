"""Tests of circuits: a circuit in a few lines of YAML, checked against a model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from fnmatch import fnmatchcase
from typing import Any, ClassVar, cast

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.causal.batches import Batch, as_batch, look, pad, plan_sequences, sequence_bytes
from mechinterp_attn.causal.cuts import EDGE, cut_of
from mechinterp_attn.causal.head_effects import effects
from mechinterp_attn.causal.metrics import LARGER_IS_WORSE
from mechinterp_attn.causal.patches import Patch
from mechinterp_attn.causal.task import Task, bound_to
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.plan import MAX_BYTES, Plan, joined, plan, plans, within
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.detect.ablation import ablate
from mechinterp_attn.detect.circuit_spec import Behaviour, Spec, Written, read_spec
from mechinterp_attn.detect.probes import random_repeats
from mechinterp_attn.detect.scores import score_heads
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank

CARRIES = 0.5  # share of a behaviour that a circuit carries where the spec names no number


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CircuitCheck(Result):
    """Every claim of a circuit and what was measured.

    Attributes:
        frame: one row per claim: ``claim, measured, at_least, ok``.
        ok: whether all of them hold.
    """

    title: ClassVar[str] = "Circuit"

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return bool(self.frame["ok"].all())


def _plan(
    model: AttentionOnlyModel, spec: Spec, task: Task | None, seed: int, draws: int, max_bytes: int
) -> Plan:
    """Scores for the roles, seven runs for an edge, and three cuts for the behaviour."""
    circuit = read_spec(spec, shown=task is not None)
    _heads(model, circuit)
    batch, _ = _shown(model, circuit.behaviour, task, seed=seed, draws=draws)
    parts = [plan_sequences(model, "edges", batch, max_bytes, runs=7 * len(circuit.edges))]
    if circuit.edges:  # which are found on all sequences together
        parts[0] = replace(parts[0], bytes=len(batch) * sequence_bytes(model, batch.tokens.shape[1]))
    parts.append(plan(score_heads, model, seed=seed, draws=draws, max_bytes=max_bytes))
    if task is not None:
        parts += 3 * [plan(effects, model, task, [list(model.heads)], exact=0, max_bytes=max_bytes)]
    elif circuit.behaviour is not None:
        cuts = {"heads": list(model.heads), "together": True, "max_bytes": max_bytes}
        parts += 3 * [plan(ablate, model, batch.tokens, **cuts)]
    made = joined(f"a check of {len(circuit.heads)} heads and {len(circuit.edges)} edges", parts)
    return replace(made, bytes=max(part.bytes for part in parts))


@plans(_plan)
def assert_circuit(
    model: AttentionOnlyModel,
    spec: Spec,
    tolerance: float = 0.05,
    *,
    task: Task | None = None,
    seed: int = 0,
    draws: int = 10,
    max_bytes: int = MAX_BYTES,
) -> CircuitCheck:
    """Check that a circuit is in a model; made for tests.

    The circuit as YAML::

        heads:
          L0H2: previous_token
          L1H3: {induction: 0.9}
          L0N*: member
        edges:
          - L0H2 -K-> L1H3
        behaviour: {task: induction, carries: 0.8, needed: 0.5}

    - ``heads``: labels (``*`` stands for any characters) with a role of ``score_heads``, whose score
      must be at least 0.4, or the number given; ``member`` claims nothing.
    - ``edges``: ``-Q->``, ``-K->``, ``-V->``: when the queries, keys or values of the second head are
      those of a run without the first one, what it holds where the behaviour is shown changes by at
      least 0.3 of its norm, or by the number given: ``{L0H2 -K-> L1H3: 0.8}``. The first may act
      through heads in between; other heads that stand in for the second do not hide an edge.
    - ``behaviour``: ``induction`` (the repeats in repeated random tokens), or a mapping with ``task:
      induction``, ``texts: [...]``, or ``prompts: [{prompt: ..., answer: ...}]``; ``carries``: with
      all heads outside the circuit replaced by their means, at least this share of the loss
      between no heads and all heads is kept (0.5 where neither number is given); ``needed``: with
      the circuit replaced, at least this share is lost.

    Args:
        model: the converted model.
        spec: a mapping, YAML text, or the path of a YAML file.
        tolerance: how far below its number a measured score or share may be.
        task: the behaviour that the circuit carries, where its metric says so rather than a loss: edges are
            looked at where it is read, and heads outside are held to its counterfactuals (to their means
            where it has none). The spec's behaviour then gives the numbers only: ``{carries: 0.8}``.
        seed, draws: of the random tokens.
        max_bytes: memory beyond the model's that may be used, the result included.

    Returns:
        every claim with what was measured.

    Raises:
        AssertionError: claims that do not hold, all of them, with what was measured.
        MechInterpError: the spec cannot be read; lists everything that is wrong.
    """
    result = check_circuit(model, spec, tolerance, task=task, seed=seed, draws=draws, max_bytes=max_bytes)
    failed = result.frame[~result.frame["ok"]]
    if len(failed):
        lines = [
            f"  {row.claim}: {row.measured:.3f}, expected at least {row.at_least:.3f}"
            for row in failed.itertuples()
        ]
        held = [str(claim) for claim in result.frame[result.frame["ok"]]["claim"]]
        lines += [f"  (these hold: {', '.join(held)})"] if held else []
        raise AssertionError(
            "\n".join([f"{len(failed)} of {len(result.frame)} claims do not hold:", *lines])
        )
    return result


@plans(_plan)
def check_circuit(
    model: AttentionOnlyModel,
    spec: Spec,
    tolerance: float = 0.05,
    *,
    task: Task | None = None,
    seed: int = 0,
    draws: int = 10,
    max_bytes: int = MAX_BYTES,
) -> CircuitCheck:
    """``assert_circuit`` without the assertion: what holds and what does not.

    Args:
        model: the converted model.
        spec: a file, a dictionary or YAML text: what the circuit is claimed to be.
        tolerance: how far a number may be from its claim.
        task: the behaviour that the circuit carries, instead of one about losses.
        seed: of the random draws.
        draws: how many random sequences.
        max_bytes: memory beyond the model's that may be used, the result included.
    """
    circuit = read_spec(spec, shown=task is not None)
    within(_plan(model, spec, task, seed, draws, max_bytes), max_bytes, "fewer draws")
    members, roles = _heads(model, circuit)
    claims: list[tuple[str, float, float]] = []
    checks: list[Check] = []
    if roles:
        scored = score_heads(model, seed=seed, draws=draws, max_bytes=max_bytes)
        checks += scored.receipt.checks
        scores = scored.frame.set_index("head")
        for head, role, least in roles:
            claims.append((f"{head} {role}", float(scores[role][head]), least - tolerance))
    batch, where = _shown(model, circuit.behaviour, task, seed=seed, draws=draws)
    for edge, least in circuit.edges:
        measured, check = _dependence(model, edge, batch, where)
        claims.append((edge, measured, least - tolerance))
        checks.append(check)
    if circuit.behaviour is not None or task is not None:
        worth_of = _by_task(model, task, max_bytes) if task else _by_loss(model, batch, where, max_bytes)
        more, own = _carried(model, circuit.behaviour or {}, members, worth_of, tolerance)
        claims += more
        checks += own
    frame = pd.DataFrame(claims, columns=["claim", "measured", "at_least"])
    frame["ok"] = frame["measured"] >= frame["at_least"]
    notes = {"heads in the circuit": len(members), "seed": seed, "draws": draws, "tolerance": tolerance}
    return CircuitCheck(frame=frame, receipt=Receipt(tuple(checks), notes))


def _dependence(model: AttentionOnlyModel, edge: str, batch: Batch, where: Tensor) -> tuple[float, Check]:
    """How much of what an edge's second head holds changes without the edge, as a share of its norm,
    where the behaviour is shown; and the last sequence's change again, on its own.
    """
    (((path, index), part),) = cut_of(model, edge, batch).parts.items()
    bank = cast(HeadBank, model.get_submodule(path))
    z = look(model, batch, ("z",))[bank.hook("z")][:, :, index].reshape(part.shape)
    change, whole = (x[where].double().norm() for x in (part, z))
    error = (part[-1][batch.real[-1]] - _alone(model, edge, batch)).norm() / z[-1].norm().clamp_min(1e-30)
    check = Check(f"{edge} on one sequence without padding", float(error), TOLERANCE[model.W_E.dtype] * 10)
    return (float(change / whole) if whole > 0 else 0.0), check


def _alone(model: AttentionOnlyModel, edge: str, batch: Batch) -> Tensor:
    """What an edge brings on the last sequence, from three runs with nothing beside it."""
    match = EDGE.fullmatch(edge)
    assert match is not None  # checked by read_spec
    (first, i), (last, index) = (model.heads.find(match[end]) for end in (1, 3))
    tokens = batch.tokens[-1:, batch.real[-1]]
    side, z = last.hook(match[2].lower()), last.hook("z")

    def without(held: Tensor, hook: Any) -> Tensor:
        held = held.clone()
        held[:, :, i] = 0
        return held

    with torch.no_grad():
        whole = model.run_with_cache(tokens, return_cache_object=False)[1][z]
        with model.hooks(fwd_hooks=[(first.hook("z"), without)]):
            changed = model.run_with_cache(tokens, return_cache_object=False)[1][side]
        with model.hooks(fwd_hooks=[(side, lambda held, hook: changed)]):
            cut = model.run_with_cache(tokens, return_cache_object=False)[1][z]
    return (whole - cut)[0, :, index].reshape(tokens.shape[1], -1)


Worth = Callable[[list[str]], tuple[float, tuple[Check, ...]]]  # what is lost when heads are replaced


def _by_loss(model: AttentionOnlyModel, batch: Batch, where: Tensor, max_bytes: int) -> Worth:
    """The loss of the tokens behind some positions; replaced heads hold their means."""

    def worth(heads: list[str]) -> tuple[float, tuple[Check, ...]]:
        counted = where[:, :-1].cpu()
        cut = ablate(
            model, batch.tokens, heads, together=True, replace="mean", where=counted, max_bytes=max_bytes
        )
        return float(cut.frame["loss_change"][0]), cut.receipt.checks

    return worth


def _by_task(model: AttentionOnlyModel, task: Task, max_bytes: int) -> Worth:
    """A task's metric; replaced heads hold its counterfactuals, or their means where it has none."""
    patch: Patch = "mean" if task.corrupt is None else "corrupt"
    sign = -1 if task.metric in LARGER_IS_WORSE else 1

    def worth(heads: list[str]) -> tuple[float, tuple[Check, ...]]:
        found = effects(model, task, [heads], patch, exact=0, max_bytes=max_bytes)
        return sign * float(found.frame["effect"][0]), found.receipt.checks

    return worth


def _carried(
    model: AttentionOnlyModel, stated: Behaviour, members: list[str], worth_of: Worth, tolerance: float
) -> tuple[list[tuple[str, float, float]], list[Check]]:
    everything = list(model.heads)
    outside = sorted(set(everything) - set(members))
    change = {}
    checks: list[Check] = []
    for name, heads in (("none", everything), ("circuit", outside), ("rest", members)):
        change[name], own = worth_of(heads) if heads else (0.0, ())
        checks += own
    worth = change["none"]
    if worth <= 0:
        raise MechInterpError(
            f"ablating the heads costs {worth:.3f} on this behaviour: the model does not have it, so "
            "no circuit can carry it"
        )
    claims = []
    if "carries" in stated or "needed" not in stated:
        kept = 1 - change["circuit"] / worth
        claims.append(("carries the behaviour", kept, stated.get("carries", CARRIES) - tolerance))
    if "needed" in stated:
        claims.append(("needed for the behaviour", change["rest"] / worth, stated["needed"] - tolerance))
    return claims, checks


def _shown(
    model: AttentionOnlyModel, stated: Behaviour | None, task: Task | None, *, seed: int, draws: int
) -> tuple[Batch, Tensor]:
    """The prompts, and the positions where the behaviour is shown, ``[batch, pos]``."""
    if task is None:
        batch, predicted = _behaviour(model, stated, seed=seed, draws=draws)
        return batch, torch.nn.functional.pad(predicted, (0, 1))
    bound = bound_to(model, task)
    if not bound.at_position:
        return bound.clean, bound.clean.real
    where = torch.zeros_like(bound.clean.real)
    where[torch.arange(len(bound), device=where.device), bound.position] = True
    return bound.clean, where


def _behaviour(
    model: AttentionOnlyModel, stated: Behaviour | None, *, seed: int, draws: int
) -> tuple[Batch, Tensor]:
    """The tokens of a behaviour, and which next tokens show it; repeats where none is stated."""
    stated = stated or {"task": "induction"}
    if "texts" in stated:
        batch = as_batch(model, stated["texts"])
        return batch, batch.predicts
    if "prompts" in stated:
        rows, starts = [], []
        for one in stated["prompts"]:
            prompt = model.as_tokens(one["prompt"])[0]
            answer = model.to_tokens(one["answer"], prepend_bos=False)[0]
            rows.append(torch.cat([prompt, answer]))
            starts.append(len(prompt))
        batch = pad(model, rows)
        position = torch.arange(1, batch.tokens.shape[1], device=batch.tokens.device)
        start = torch.tensor(starts, device=batch.tokens.device)
        return batch, batch.predicts & (position[None, :] >= start[:, None])
    probe = random_repeats(model, draws=draws, seed=seed)
    return probe.batch, probe.repeated


def _heads(model: AttentionOnlyModel, circuit: Written) -> tuple[list[str], list[tuple[str, str, float]]]:
    """The labels of the circuit's heads, and its claims (head, role, least score)."""
    members: list[str] = []
    claims, wrong = [], []
    for label, roles in circuit.heads.items():
        found = [head for head in model.heads if fnmatchcase(head, label)]
        if not found:
            wrong.append(f"no head {label}; this model has {model.heads!r}")
        members += found
        claims += [
            (head, role, least) for role, least in roles.items() if role != "member" for head in found
        ]
    for edge, _ in circuit.edges:
        ends = EDGE.fullmatch(edge)
        assert ends is not None  # checked by read_spec
        wrong += [
            f"edge {edge!r}: {end} is not among the heads" for end in ends.group(1, 3) if end not in members
        ]
    if wrong:
        raise MechInterpError(listing("the circuit does not fit the model", wrong))
    return list(dict.fromkeys(members)), claims
