"""The strongest circuits behind a logit: from a token through attention heads, MLPs part of the wires.

``top_paths`` tells every neuron apart, so a deep model's prediction is spread over countless paths. A
circuit here is a chain of attention heads, with all paths between them through any number of neurons
added up: the path expansion with the MLPs in the wires (Elhage et al. 2021 for models without MLPs; with
gates frozen the wires stay linear). What biases add, wherever they enter, is one start. So circuits are
few, and they still sum to the logit exactly.

A head can also be entered through its score: by what its queries or keys read, along the derivative of its
softmax. Such a circuit says what decides where a head looks; it is no part of the logit's sum.
"""

from __future__ import annotations

import heapq
import itertools
from dataclasses import dataclass
from typing import ClassVar, Literal, NamedTuple

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError, below_one
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.frozen.attention import FrozenAttention
from mechinterp_attn.frozen.behaviour import Behaviour
from mechinterp_attn.frozen.given import of_prompt
from mechinterp_attn.frozen.goals import Goal, Target, Token, resolve_goal
from mechinterp_attn.frozen.prompt import Frozen, Place, sum_tolerance
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.paths.by_order import counted
from mechinterp_attn.paths.explanation import Explanation, Parts
from mechinterp_attn.paths.through_scores import FLOATS, Scores

AT_ONCE = 16  # chains opened together: the weights of every bank are read once for all of them


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TopCircuits(Parts):
    """The circuits with the largest contributions to a logit, by absolute value.

    Attributes:
        explained: the sum of the listed circuits through values alone; ``explained_share``, of the total.
        others: the sum of all such circuits that were found and are not listed.
        unopened: the exact sum of all such circuits that were not looked at; 0 where the search ended.
        expansions: how many chains of heads were opened.
        total, target, against, position, about: what is explained, as in ``Explanation``.
        frame: one row per circuit, largest first: ``circuit`` (such as ``' Mary'@1 -V-> L9H6 -> logit``:
            each head reads the one before as its values), ``heads`` (how many), ``contribution, share``,
            ``token_position, token`` (missing where it starts at biases), ``score``. With ``scores=True``
            there are circuits such as ``L0H1 -K-> L1H0`` too, where a head is entered by its queries (Q) or
            keys (K): to first order, what the target owes to where the head looks because of what is read
            there. ``score`` names the scores on the way, each by the query and key on which the target
            depends the most (``L1H0@9<-4``); it is missing where there is none.
    """

    title: ClassVar[str] = "Top circuits"
    sort_by: ClassVar[str | None] = "contribution"
    others: float
    unopened: float
    expansions: int


def _plan(frozen: Frozen, top_k: int, max_expansions: int, scores: bool = False) -> Plan:
    """A field for every bank of attention heads behind every chain that was opened; what one bank's heads
    hold, for the chains opened together; the scores of all banks, with a few gradients at those of one.
    """
    size, pos = frozen.end.element_size(), len(frozen.tokens)
    banks = [bank for bank in frozen.banks if counted(bank, "attention")]
    widest = max((bank.bank.n_heads * bank.bank.d_head for bank in frozen.banks), default=0)
    fields = (max_expansions * len(banks) + 8 * AT_ONCE) * frozen.end.numel()
    held = sum(bank.z_bias.numel() for bank in frozen.banks)
    pairs = [bank.pattern.numel() for bank in banks] if scores else []
    looked_at = 2 * sum(pairs) + 5 * max([FLOATS, *pairs]) if scores else 0
    result = CELL * TABLE * top_k * (2 if scores else 1)
    return plan_runs(
        frozen.model,
        f"the {top_k:,} strongest circuits, at most {max_expansions:,} chains of heads opened",
        runs=max_expansions,
        rows=1,
        positions=pos,
        bytes=size * (fields + looked_at + held + 4 * AT_ONCE * pos * widest) + 3 * result,
        result=result,
        chunks=max_expansions,
    )


@of_prompt
@plans(_plan)
@torch.no_grad()
def top_circuits(
    frozen: Frozen,
    *,
    target: Target | None = None,
    position: int = -1,
    against: Token | None = None,
    task: Behaviour | None = None,
    top_k: int = 20,
    scores: bool = False,
    max_expansions: int = 100,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
) -> TopCircuits:
    """Find the strongest chains of attention heads from a token (or biases) to a logit, neurons pooled.

    Args:
        frozen: the frozen prompt, from ``paths.freeze``; or the model, and the prompt after it.
        target: the next token (text of one token, or its id), or weights by token for any direction of
            logits; by default the model's own top one.
        position: where the prediction is made; negative counts from the end.
        against: a second token: explain ``logit(target) - logit(against)``.
        task: a behaviour (``mia.Task``) that has this prompt, in place of target, position and against; its
            metric is explained, by its gradient where it is no sum of logits.
        top_k: how many circuits.
        scores: list as many circuits through scores, too, which say why heads look where they do.
        max_expansions: how many chains to open, those through which most passes first.
        max_bytes: memory beyond the model's and the frozen prompt's that may be used, the result included.
        progress: show a progress bar.

    Raises:
        MechInterpError: the target or position does not exist, an option is out of range, or it needs
            more than max_bytes.
    """
    goal = resolve_goal(frozen, target=target, against=against, position=position, task=task)
    wrong = below_one(top_k=top_k, max_expansions=max_expansions)
    if wrong:
        raise MechInterpError("; ".join(wrong))
    within(
        _plan(frozen, top_k, max_expansions, scores), max_bytes, "fewer max_expansions or a shorter prompt"
    )
    search = _Search(frozen, goal, scores)
    with Progress(total=max_expansions, desc="circuits", show=progress, stops=True) as bar:
        while search.queue and search.expansions < max_expansions and not bar.stopped:
            bar.update(search.step(max_expansions - search.expansions))
    ranked = sorted(search.found, key=lambda circuit: -abs(circuit.value))
    listed = [circuit for circuit in ranked if not circuit.through][:top_k]
    by_score = [circuit for circuit in ranked if circuit.through][:top_k]
    explained = sum((circuit.value for circuit in listed), 0.0)
    found = sum((circuit.value for circuit in search.found if not circuit.through), 0.0)
    unopened = search.unopened()
    share = f"{explained / goal.total:.3f}" if goal.total else "undefined"
    left = f"{unopened / goal.total:.3f}" if goal.total else "undefined"
    notes = {"share explained": share, "share not looked at": left, **frozen.receipt.notes, **bar.notes}
    error = abs(found + unopened - goal.total)
    tolerance = sum_tolerance(frozen)
    checks = [Check("circuits, opened or not, sum to the target", error, tolerance)]
    if scores:
        name = "circuits through a score sum to what its queries or keys bring"
        checks.append(Check(name, search.score_error(), tolerance))
    return TopCircuits(
        frame=_frame(frozen, goal, sorted([*listed, *by_score], key=lambda one: -abs(one.value))),
        receipt=Receipt(tuple(checks), notes),
        **Explanation.of(goal),
        explained=explained,
        others=found - explained,
        unopened=unopened,
        expansions=search.expansions,
    )


class _Step(NamedTuple):
    """A head on a circuit, how it is entered, and which score that is, in words."""

    place: Place
    mode: Literal["V", "Q", "K"]
    score: str | None = None


class _Circuit(NamedTuple):
    """A chain of heads, earliest first, and where it starts (None: at biases).

    Attributes:
        through: the number of the last score on its way back from the target; 0 without any.
    """

    value: float
    start: int | None
    steps: tuple[_Step, ...]
    through: int


class _Chain(NamedTuple):
    """The end of a chain: a head to enter (None: the target), and the field on its sublayer's sum."""

    field: Float[Tensor, "pos d_model"]
    head: Place | None
    mode: Literal["V", "Q", "K"]
    tail: tuple[_Step, ...]
    carried: float
    through: int


class _Row(NamedTuple):
    """A chain that is being opened: its steps, and the number of its last score."""

    steps: tuple[_Step, ...]
    through: int


class _Search:
    """Best-first search over the ends of chains, a few opened at once."""

    def __init__(self, frozen: Frozen, goal: Goal, scores: bool):
        self.frozen, self.offset, self.expansions = frozen, goal.offset, 0
        self.found: list[_Circuit] = []
        self.brought = [goal.total]  # by the target, then by every score that was opened
        self._with_scores, self._scores = scores, dict[tuple[int, int], Scores]()
        self._count = itertools.count()
        root = _Chain(goal.field(frozen), None, "V", (), goal.total, 0)
        self.queue: list[tuple[float, int, _Chain]] = [(-float("inf"), next(self._count), root)]

    def unopened(self) -> float:
        """The exact sum of all circuits through values alone that pass through what still waits."""
        return sum(
            (chain.carried for _, _, chain in self.queue if chain.mode == "V" and not chain.through), 0.0
        )

    def score_error(self) -> float:
        """The largest difference between what a score brings and its circuits, found or waiting."""
        left = torch.tensor(self.brought, dtype=torch.float64)
        for circuit in self.found:
            left[circuit.through] -= circuit.value
        for _, _, chain in self.queue:
            if chain.mode == "V":
                left[chain.through] -= chain.carried
        return float(left[1:].abs().max()) if len(left) > 1 else 0.0

    def step(self, most: int) -> int:
        """Open the chains through which most passes, at ``most`` so many; how many they were."""
        chains = [heapq.heappop(self.queue)[2] for _ in range(min(most, AT_ONCE, len(self.queue)))]
        self.expansions += len(chains)
        self._open(sorted(chains, key=lambda chain: -self._depth(chain)))
        return len(chains)

    def _depth(self, chain: _Chain) -> int:
        """The sublayer whose stream the chain reads."""
        return len(self.frozen.sublayers) if chain.head is None else chain.head.depth

    def _open(self, chains: list[_Chain]) -> None:
        """Walk back from the ends of chains through the MLPs, past all earlier attention heads."""
        rows: list[_Row] = []
        fields = chains[0].field.new_zeros(0, *chains[0].field.shape)
        biases = fields.new_zeros(0, dtype=torch.float64)
        for depth in range(self._depth(chains[0]), -1, -1):
            for chain in (chain for chain in chains if self._depth(chain) == depth):
                field, bias, row = self._entered(chain)
                rows.append(row)
                fields, biases = (
                    torch.cat([fields, field[None]]),
                    torch.cat([biases, biases.new_tensor([bias])]),
                )
            if depth:
                fields, biases = self._past(depth - 1, fields, biases, rows)
        values = (fields * self.frozen.start).sum(-1).double().tolist()
        for row, bias, own in zip(rows, biases.tolist(), values, strict=True):
            starts = [*enumerate(own), (None, bias)]
            self.found += [
                _Circuit(value, start, row.steps, row.through) for start, value in starts if value
            ]

    def _entered(self, chain: _Chain) -> tuple[Tensor, float, _Row]:
        """The field in front of a chain's first head, and what the head's own bias adds there (the target:
        the bias of the unembedding).
        """
        if chain.head is None:
            return chain.field, self.offset, _Row((), 0)
        bank, head = self.frozen.bank_at(chain.head), chain.head.head
        held = bank.unwrite(chain.field)
        if chain.mode == "V":
            alone = torch.zeros_like(held)
            alone[:, head] = held[:, head]
            bias = float((bank.z_bias[:, head] * held[:, head]).sum())
            row = _Row((_Step(chain.head, "V"), *chain.tail), chain.through)
            return bank.unread(alone), bias, row
        entered = self._scores_of(chain.head.depth, chain.head.bank).entered(head, chain.mode, held)
        query, key = entered.pair
        step = _Step(chain.head, chain.mode, f"{bank.bank.label(head)}@{query}<-{key}")
        self.brought.append(chain.carried)
        return entered.field, entered.bias, _Row((step, *chain.tail), len(self.brought) - 1)

    def _scores_of(self, depth: int, number: int) -> Scores:
        """The scores of a bank, made once."""
        if (depth, number) not in self._scores:
            sublayer = self.frozen.sublayers[depth]
            bank = sublayer.banks[number]
            assert isinstance(bank, FrozenAttention)
            self._scores[depth, number] = Scores(bank, sublayer.stream)
        return self._scores[depth, number]

    def _past(
        self,
        depth: int,
        fields: Float[Tensor, "row pos d_model"],
        biases: Float[Tensor, " row"],
        rows: list[_Row],
    ) -> tuple[Tensor, Tensor]:
        """Carry fields back past a sublayer: its attention heads wait in front of them, its neurons are
        part of the wires, its biases are added up.
        """
        sublayer = self.frozen.sublayers[depth]
        biases = biases + (fields * sublayer.beside).sum((1, 2))
        at_sum = sublayer.carry_back(fields)
        fields = sublayer.kept(at_sum)
        for i, (bank, held) in enumerate(zip(sublayer.banks, sublayer.held, strict=True)):
            if not counted(bank, "attention"):
                fields = fields + bank.adjoint(at_sum)
                biases = biases + (at_sum * bank.constant).sum((1, 2))
                continue
            along = bank.unwrite(at_sum)
            self._wait(depth, i, "V", at_sum, (along * held).sum((1, 3)), rows)
            if self._with_scores:
                carried = self._scores_of(depth, i).carried(along)
                self._wait(depth, i, "Q", at_sum, carried, rows)
                self._wait(depth, i, "K", at_sum, carried, rows)
        return fields, biases

    def _wait(
        self,
        depth: int,
        number: int,
        mode: Literal["V", "Q", "K"],
        fields: Float[Tensor, "row pos d_model"],
        carried: Float[Tensor, "row head"],
        rows: list[_Row],
    ) -> None:
        """All heads of a bank, in front of some chains."""
        for field, row, values in zip(fields, rows, carried.double().tolist(), strict=True):
            for head, value in enumerate(values):
                if value:
                    place = Place(depth, number, head)
                    chain = _Chain(field, place, mode, row.steps, value, row.through)
                    heapq.heappush(self.queue, (-abs(value), next(self._count), chain))


def _frame(frozen: Frozen, goal: Goal, listed: list[_Circuit]) -> pd.DataFrame:
    tokens = frozen.str_tokens
    rows = []
    for value, start, steps, _ in listed:
        token = None if start is None else tokens[start]
        name = "biases" if start is None else f"{token!r}@{start}"
        for place, mode, _ in steps:
            name += f" -{mode}-> {frozen.bank_at(place).bank.label(place.head)}"
        share = value / goal.total if goal.total else float("nan")
        scores = ", ".join(step.score for step in steps if step.score) or None
        rows.append((f"{name} -> logit", len(steps), value, share, start, token, scores))
    columns = ["circuit", "heads", "contribution", "share", "token_position", "token", "score"]
    return pd.DataFrame(rows, columns=columns).astype({"token_position": "Int64"})
