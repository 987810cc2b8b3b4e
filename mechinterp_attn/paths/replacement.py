"""How much of a prediction runs through features, and how much through what they leave out.

The replacement and completeness scores of attribution graphs (Ameisen et al. 2025, "Circuit Tracing:
Revealing Computational Graphs in Language Models", section "Evaluating replacement models"), by the
formulas of circuit-tracer (``compute_graph_scores`` in its ``graph.py``; Hanna et al. 2025). Their nodes
are active features and errors at positions, tokens and logits; attention and norms are frozen, and so are
the linear parts of skip-transcoders: a direct effect runs through any number of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, plans, within
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.behaviour import Behaviour
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.goals import Goal, Target, Token, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.paths.explanation import Explanation
from mechinterp_attn.paths.faithful import Faithfulness, Patch, faithfulness
from mechinterp_attn.paths.flow import POOL, Nodes

MASS, MOST = 0.95, 10  # the logits: the fewest tokens that hold so much probability, at most so many
ROWS = 64  # targets whose effects are traced back at once


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ReplacementScores(Explanation):
    """How much of a prediction runs through features.

    Attributes:
        replacement: of what reaches the logits from tokens and errors along any chain of direct effects,
            the share that begins at tokens.
        completeness: the share of what nodes read directly that does not come from errors, a mean over
            nodes weighted by how much of the logits runs through them.
        runs: the explained logits in three runs of the model: whole, with the errors patched, and with
            every head patched.
        frame: one row for the tokens and one for each bank: ``nodes, kind, layer`` (-1 for tokens),
            ``active`` (nodes), ``influence`` (on the logits, over all chains of direct effects),
            ``from_errors`` (of what its nodes read directly, weighted by their influence; NaN for tokens
            and errors, which read nothing).
        total, target, against, position, about: what ``runs`` measures, as in ``Explanation``.
    """

    title: ClassVar[str] = "Replacement scores"
    replacement: float
    completeness: float
    runs: Faithfulness | None

    @property
    def faithfulness(self) -> float:
        """The same asked of the running model: with only the errors patched, how much is left of the way
        from the model with every head patched (0) to the whole model (1). NaN if it was not asked for.
        """
        return float("nan") if self.runs is None else self.runs.share


@dataclass(frozen=True, eq=False)
class _Part:
    """The nodes of one bank, as columns of the direct effects.

    Attributes:
        bank, number, depth: the bank, its number in ``frozen.banks`` and its sublayer.
        position, head: of its nodes; of errors the head is 0.
        start: its first column.
    """

    bank: FrozenBank
    number: int
    depth: int
    position: Int[Tensor, " node"]
    head: Int[Tensor, " node"]
    start: int

    @property
    def is_error(self) -> bool:
        return not self.bank.bank.has_circuit

    @property
    def columns(self) -> slice:
        return slice(self.start, self.start + len(self.position))


def _plan(frozen: Frozen) -> Plan:
    """All direct effects, and the fields of some targets with what every bank makes of them."""
    pos, d_model = frozen.end.shape
    size = frozen.end.element_size()
    active = sum(len(part.position) for part in _parts(frozen))
    widest = max((bank.bank.n_heads * bank.bank.d_head for bank in frozen.banks), default=0)
    rows = active + MOST
    return plan_runs(
        frozen.model,
        f"the direct effects among {active:,} features and errors at positions",
        runs=3,
        rows=1,
        positions=pos,
        bytes=size * (2 * rows * (active + pos) + ROWS * pos * (6 * d_model + 3 * widest)),
        result=CELL * 8 * len(frozen.banks),
        flops=4 * rows * pos * sum(bank.bank.n_heads * bank.bank.d_head for bank in frozen.banks) * d_model,
    )


@of_prompt
@plans(_plan)
@torch.no_grad()
def replacement_scores(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Token | None = None,
    task: Behaviour | None = None,
    patch: Patch | None = "mean",
    corrupt: str | Tensor | None = None,
    max_bytes: int = MAX_BYTES,
) -> ReplacementScores:
    """Score how much of a prediction the features of attached dictionaries explain.

    ``A[i, j]`` is the size of the direct effect of node j on node i, each row divided by its sum; ``w`` are
    the logits' weights, their probabilities. A node's influence is ``b = w A + w A^2 + ...``. Then

    - replacement = ``b(tokens) / (b(tokens) + b(errors))``
    - completeness = ``sum_i (b_i + w_i) (1 - A[i, errors].sum()) / sum_i (b_i + w_i)``, over all nodes;
      tokens and errors read nothing, so their term is ``b_i``

    As in circuit-tracer, the logits are the most probable tokens that together have probability 0.95, at
    most ten, each less the mean over the vocabulary; biases are no nodes, nor are features and errors at
    the first position. Unlike there, a layer without a dictionary has its neurons as nodes, which leave
    nothing out; no active feature is left out; and a token's vector is all that the stream starts with,
    learned positions included.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        target: instead of the most probable tokens one target: a token (its text or id), or weights by
            token for any direction of logits.
        position: where the prediction is made; negative counts from the end.
        against: a second token: ``logit(target) - logit(against)``.
        task: a behaviour (``mia.Task``) that has this prompt, in place of target, position and against.
        patch: what errors hold when ``faithfulness`` is measured, in two more runs of the model: "zero", or
            the "mean" of what they hold over the prompt. None to leave that out.
        corrupt: a prompt of as many tokens: errors hold what they hold there instead.
        max_bytes: the largest working memory to take.

    Raises:
        MechInterpError: the target or position does not exist, the work needs more than max_bytes, the
            other prompt has another length, or the model has no layers.
    """
    frozen.model.heads.required()
    goal = resolve_goal(frozen, target=target, against=against, position=position, task=task)
    within(_plan(frozen), max_bytes, "a shorter prompt, dictionaries in place of all neurons")
    chosen = target is not None or task is not None
    parts = list(_parts(frozen))
    fields, of = _logits(frozen, goal, chosen)
    effects, error = _effects(frozen, parts, fields)
    size = effects.abs()
    size = size / size.sum(-1, keepdim=True).clamp_min(torch.finfo(size.dtype).tiny)
    n = size.shape[1]
    influence = of @ size[-len(of) :]
    for part in reversed(parts):  # nodes stand in the order of the pass, errors read nothing
        if not part.is_error:
            influence += influence[part.columns] @ size[part.columns]
    errors = torch.zeros(n, dtype=torch.bool, device=size.device)
    for part in parts:
        errors[part.columns] = part.is_error
    pos = len(frozen.tokens)
    tokens, lost = influence[-pos:].sum(), influence[errors].sum()
    through = torch.cat([influence[:-pos], of])
    whole = through.sum() + tokens
    from_errors = (through * size[:, errors].sum(-1)).sum()
    runs = None if patch is None else faithfulness(frozen, goal, _without_errors(frozen), patch, corrupt)
    notes = dict(frozen.receipt.notes) | {"nodes": f"{n:,}", "logits": len(of)}
    if runs is not None:
        notes["target with the errors patched"] = (
            f"{runs.kept:.4g} of {runs.whole:.4g}, from {runs.none:.4g}; patched heads hold {runs.about}"
        )
    check = Check("direct effects and biases sum to what a node reads", error, TOLERANCE[size.dtype])
    return ReplacementScores(
        frame=_frame(parts, influence, size, errors, pos),
        receipt=Receipt((check,), notes),
        replacement=float(tokens / (tokens + lost)),
        completeness=float(1 - from_errors / whole),
        runs=runs,
        **Explanation.of(goal),
    )


def _parts(frozen: Frozen) -> Iterator[_Part]:
    """Features that are active and errors, behind the first position."""
    start = number = 0
    for depth, sublayer in enumerate(frozen.sublayers):
        for bank, held in zip(sublayer.banks, sublayer.held, strict=True):
            if bank.bank.has_gate or not bank.bank.has_circuit:
                at = held.abs().amax(-1) > 0
                at[0] = False
                position, head = at.nonzero().unbind(-1)
                yield _Part(bank, number, depth, position, head, start)
                start += len(position)
            number += 1


def _logits(
    frozen: Frozen, goal: Goal, chosen: bool
) -> tuple[Float[Tensor, "logit pos d_model"], Float[Tensor, " logit"]]:
    """The logits as fields on the last stream, and their weights."""
    W_U, at = frozen.model.W_U.detach().to(frozen.end.dtype), goal.position
    if chosen:
        ids = torch.tensor([list(goal.weights)], device=W_U.device)
        of = frozen.end.new_tensor([list(goal.weights.values())])
        weight = frozen.end.new_ones(1)
    else:
        p, order = frozen.logits[at].softmax(-1).sort(descending=True)
        enough = min(int((p.cumsum(0) < MASS).sum()) + 1, MOST, len(p))
        ids, of, weight = order[:enough, None], torch.ones_like(p[:enough, None]), p[:enough]
    direction = torch.einsum("dnk,nk->nd", W_U[:, ids], of) - of.sum(-1, keepdim=True) * W_U.mean(-1)
    fields = frozen.end.new_zeros(len(ids), *frozen.end.shape)
    fields[:, at] = direction
    return frozen.read_back(fields), weight


def _effects(
    frozen: Frozen, parts: list[_Part], logits: Float[Tensor, "logit pos d_model"]
) -> tuple[Float[Tensor, "target source"], float]:
    """Direct effects on every node and, in the last rows, on the logits; of every node and, in the last
    columns, of the tokens. A row is known up to a factor. And the largest difference between a row's sum
    with biases and what its target reads, as a share of the row's absolute sum.
    """
    pos = len(frozen.tokens)
    n = sum(len(part.position) for part in parts)
    effects = frozen.end.new_zeros(n + len(logits), n + pos)
    error = 0.0
    for part in (part for part in parts if not part.is_error):
        for rows in torch.arange(part.start, part.columns.stop, device=effects.device).split(ROWS):
            own = rows - part.start
            fields = _reads(part.bank, part.head[own], part.position[own])
            error = max(error, _traced(frozen, parts, fields, part.depth, effects, rows))
    rows = torch.arange(n, n + len(logits), device=effects.device)
    return effects, max(error, _traced(frozen, parts, logits, len(frozen.sublayers), effects, rows))


def _reads(
    bank: FrozenBank, head: Int[Tensor, " n"], position: Int[Tensor, " n"]
) -> Float[Tensor, "n pos d_model"]:
    """What single features read at their positions, as fields on the stream in front of them."""
    one = bank.pattern.new_ones(len(head), 1)
    at = bank.pattern.new_zeros(len(head), len(bank.pattern))
    at[torch.arange(len(head)), position] = 1
    out = bank.write_at(one, head, position)  # any direction that the feature writes along will do
    return bank.spread(at, head)[..., None] * bank.pull(out, head)[:, None]


def _traced(
    frozen: Frozen, parts: list[_Part], y: Tensor, depth: int, effects: Tensor, rows: Int[Tensor, " n"]
) -> float:
    """Carry the fields ``y`` in front of a sublayer back to the tokens, past all that is a node."""
    stream = frozen.residuals[depth]
    whole = (y * stream).sum((-1, -2))
    so_far, scale = torch.zeros_like(whole), torch.zeros_like(whole)
    number = sum(len(sublayer.banks) for sublayer in frozen.sublayers[:depth])
    nodes = {part.number: part for part in parts}
    for sublayer in reversed(frozen.sublayers[:depth]):
        so_far = so_far + (y * sublayer.beside).sum((-1, -2))
        y = sublayer.carry_back(y)
        passed = [sublayer.kept(y)]
        for bank, held in zip(reversed(sublayer.banks), reversed(sublayer.held), strict=True):
            number -= 1
            part = nodes.get(number)
            if part is None:
                so_far = so_far + (y * bank.constant).sum((-1, -2))
                passed.append(bank.adjoint(y))
            else:
                given = (held * bank.unwrite(y)).sum(-1)
                effects[rows, part.columns] = given[:, part.position, part.head]
                so_far, scale = so_far + given.sum((-1, -2)), scale + given.abs().sum((-1, -2))
        y = sum(passed[1:], passed[0])
    tokens = (y * frozen.start).sum(-1)
    effects[rows, -len(frozen.tokens) :] = tokens
    off = (so_far + tokens.sum(-1) - whole).abs()
    return float((off / (scale + tokens.abs().sum(-1)).clamp_min(1e-30)).max()) if len(off) else 0.0


def _without_errors(frozen: Frozen) -> Nodes:
    """Every head at every position but the errors."""
    pos = len(frozen.tokens)
    bank = [i for i, part in enumerate(frozen.banks) if part.bank.has_circuit]
    number = torch.tensor(bank, device=frozen.tokens.device).repeat_interleave(pos)
    position = torch.arange(pos, device=frozen.tokens.device).repeat(len(bank))
    pool = torch.full_like(number, POOL)
    return Nodes(number, torch.zeros_like(number), pool, position, frozen.end.new_zeros(len(number)))


def _frame(parts: list[_Part], influence: Tensor, size: Tensor, errors: Tensor, pos: int) -> pd.DataFrame:
    rows = [("tokens", "token", -1, pos, float(influence[-pos:].sum()), float("nan"))]
    for part in parts:
        own, bank = influence[part.columns], part.bank.bank
        lost = float("nan")
        if not part.is_error and bool(own.any()):
            lost = float(own @ size[part.columns][:, errors].sum(-1) / own.sum())
        rows.append((f"L{bank.layer} {bank.part}", bank.kind, bank.layer, len(own), float(own.sum()), lost))
    return pd.DataFrame(rows, columns=["nodes", "kind", "layer", "active", "influence", "from_errors"])
