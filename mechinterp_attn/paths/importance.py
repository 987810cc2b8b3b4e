"""Term importance: what paths of each order, and the heads they end in, are worth in nats.

The algorithm of Elhage et al. 2021 ("term importance analysis"): patterns frozen, let through the
direct path only, then paths through single heads, then virtual heads of two, and so on; each step's
gain is the importance of its terms. The framework could not do this for models with MLPs. Here
every neuron is a head, so it can, and each order is told apart further into the paths through
attention heads only and those with at least one MLP-derived head.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.behaviour import Behaviour, OnPrompt, next_tokens, on_prompts
from mechinterp_attn.frozen.freezing import freeze
from mechinterp_attn.frozen.prompt import Frozen, sum_tolerance
from mechinterp_attn.frozen.sublayer import ROWS
from mechinterp_attn.model.cost import plan_runs
from mechinterp_attn.model.given import is_list
from mechinterp_attn.model.index import Heads
from mechinterp_attn.paths.by_order import counted, order_names

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

HEAD_ORDERS = 2  # single heads are told apart up to this order


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class TermImportance(Result):
    """How much each order, layer and head changes the mean next-token loss (nats), or the metric of a task.

    A negative change of a loss is a gain. ``alone`` adds the terms to all lower orders; ``given_others`` is
    what they add on top of the other terms of the same order as well.

    Attributes:
        frame: one row per order: ``order, loss`` (paths up to this order; with a task ``metric``),
            ``change`` (order 0: against the uniform prediction), ``attention_only`` (the part of the
            change from paths through attention heads only, added first), ``with_mlp`` (the rest: paths
            with at least one MLP-derived head).
        layers: one row per order and sublayer, for the paths whose last head is in that sublayer:
            ``order, layer, kind, alone, given_others``.
        heads: one row per order (up to 2) and head, for the paths that end in that head: ``order,
            head, layer, kind, index, estimate`` (first-order), and for the heads measured exactly
            ``alone, given_others`` (else missing).
        n_tokens: how many predictions were averaged; of a task, how many prompts.
    """

    title: ClassVar[str] = "Term importance"
    layers: pd.DataFrame = field(repr=False)
    heads: pd.DataFrame = field(repr=False)
    n_tokens: int


def _plan(
    model: AttentionOnlyModel,
    tokens: str | Sequence[Any] | Tensor | None,
    task: Behaviour | None,
    max_order: int,
    heads: int | Heads,
    layers: bool,
) -> Plan:
    """The longest prompt, frozen; the streams of all orders that every bank reads and writes, a few
    copies of the logits, and what the heads of one bank hold.
    """
    prompts = _prompts(model, tokens) if task is None else [on.tokens for on in on_prompts(model, task)]
    longest = max(prompts, key=len)
    pos, total, depth = len(longest), sum(map(len, prompts)), len(model.sublayers())
    n_orders = min(max_order + 2, depth + 1)
    streams = n_orders * model.spec.d_model * (depth + len(model.banks) + 12)
    held = max((bank.n_heads * bank.d_head for bank in model.banks), default=0)
    chosen = heads if isinstance(heads, int) else len(model.heads.labels(heads))
    at_once = max(pos, ROWS)
    floats = pos * streams + (4 * pos + 4 * at_once) * model.spec.d_vocab_out + 6 * at_once * held
    ends = 2 * n_orders * len(model.banks) if layers else 0  # sublayers' terms, read over the vocabulary
    return plan_runs(
        model,
        f"{n_orders} orders on {len(prompts):,} prompts of up to {pos:,} tokens",
        runs=(3 * n_orders + 1 + chosen * n_orders) * total / pos,
        rows=1,
        positions=pos,
        bytes=plan(freeze, model, longest).bytes + model.W_U.element_size() * floats,
        result=TABLE * CELL * n_orders * (chosen + len(model.banks) + 1),
        flops=2 * ends * total * model.spec.d_model * model.spec.d_vocab_out,
        chunks=len(prompts),
    )


@plans(_plan)
@torch.no_grad()
def term_importance(
    model: AttentionOnlyModel,
    tokens: str | Sequence[Any] | Tensor | None = None,
    *,
    task: Behaviour | None = None,
    max_order: int = 4,
    heads: int | Heads = 32,
    layers: bool = True,
    max_bytes: int = MAX_BYTES,
    progress: bool = True,
) -> TermImportance:
    """Measure how much each order of paths changes the loss: per order, per layer and per head.

    Args:
        model: the converted model.
        tokens: a prompt or several: text, texts, ids ``[pos]`` or ``[batch, pos]``, or rows of ids. Losses
            are averaged over all predictions.
        task: a behaviour (``mia.Task``), in place of tokens: its metric is measured on its prompts instead
            of the loss, each with the same weight.
        max_order: the highest order kept apart; the rest is one row, ``>max_order``.
        heads: labels of heads to measure exactly, or how many per order: those with the largest
            first-order estimate.
        layers: measure each sublayer too, which takes most of the time in deep models.
        max_bytes: memory beyond the model's that may be used, one frozen prompt and the result included.
        progress: show a progress bar when there are several prompts.

    Raises:
        MechInterpError: neither or both of tokens and task; without a task, a model that does not predict
            next tokens or a prompt without one; a task whose metric has no gradient; a negative max_order
            or number of heads, an unknown head label; the longest prompt needs more than max_bytes.
    """
    if (tokens is None) == (task is None):
        raise MechInterpError("give tokens, whose next tokens are measured, or task=, one of the two")
    if task is None:
        model.spec.need_next_tokens("term importance")
    if max_order < 0:
        raise MechInterpError(f"max_order={max_order}; expected 0 or more")
    if isinstance(heads, int) and heads < 0:
        raise MechInterpError(f"heads={heads}; expected 0 or more, or a list of labels")
    asked = [] if task is None else on_prompts(model, task)
    prompts = [on.tokens for on in asked] or _prompts(model, tokens)
    longest = len(model.sublayers())
    top = min(max_order, longest)
    n_orders = top + 1 if top == longest else top + 2
    within(
        _plan(model, prompts, None, max_order, heads, layers),
        max_bytes,
        "a smaller max_order, shorter prompts",
    )
    names = order_names(n_orders, top)
    sums = _Sums(names, model, layers)
    terms = None

    def terms_of(number: int) -> _Terms:
        frozen = freeze(model, prompts[number])
        return _Terms(frozen, asked[number] if asked else next_tokens(frozen), n_orders)

    for number in Progress(range(len(prompts)), desc="term importance", show=progress):
        terms = terms_of(number)
        sums.add(terms)
    if chosen := _chosen(model, heads, sums, min(HEAD_ORDERS, top)):
        for number in Progress(range(len(prompts)), desc="single heads", show=progress):
            if len(prompts) > 1 or terms is None:  # of many prompts, one at a time is held
                terms = terms_of(number)
            sums.add_heads(terms, chosen)
    return sums.result(model, None if task is None else asked[0].about)


class _Terms:
    """One prompt: the terms of every order by the bank that their last head is in, and their metric."""

    def __init__(self, frozen: Frozen, on: OnPrompt, n_orders: int):
        self.frozen, self.on = frozen, on
        self.n = on.weight
        streams = frozen.start.new_zeros(n_orders, *frozen.start.shape)
        streams[0] = frozen.start
        pure = streams.clone()  # paths through attention heads only
        self.read: list[tuple[int, FrozenBank, Tensor]] = []  # sublayer, bank, the orders it read
        self.ends: list[Tensor] = []  # [order, pos, d_model]: terms whose last head is in the bank
        n = len(frozen.sublayers)
        for depth, sublayer in enumerate(frozen.sublayers):
            self.read += [(depth, bank, streams) for bank in sublayer.banks]
            written, streams = sublayer.graded(streams, lambda bank: 1)
            self.ends += [frozen.carry(ends, depth, n) for ends in written]
            _, pure = sublayer.graded(pure, lambda bank: 1 if counted(bank, "attention") else None)
        self._upto, self._pure = streams.cumsum(0), pure
        self._recent: dict[int, Tensor] = {}  # logits are large, and asked for order by order
        self.values = [self.value(self.upto(order)) for order in range(n_orders)]
        self.uniform = self.value(torch.zeros_like(frozen.logits))

    def upto(self, order: int) -> Float[Tensor, "pos d_vocab"]:
        """Logits by the paths up to an order."""
        if order not in self._recent:
            self._recent = {k: v for k, v in self._recent.items() if k == order - 1}
            self._recent[order] = self.frozen.read_out(self._upto[order]) + self.frozen.offset()
        return self._recent[order]

    def value(self, logits: Tensor) -> float:
        return float(self.on.measure(logits))

    def sum_error(self) -> float:
        return float((self.upto(len(self.values) - 1) - self.frozen.logits).abs().max())

    def attention_only(self, order: int) -> float:
        """Change of the metric by the attention-only paths of an order, added to all lower orders."""
        if order == 0:
            return math.nan
        pure = self.frozen.read_out(self._pure[order])
        return self.value(self.upto(order - 1) + pure) - self.values[order - 1]

    def effects(self, order: int, terms: Float[Tensor, "n pos d_model"]) -> Float[Tensor, "n 2"]:
        """``alone`` and ``given_others`` of each of some terms of an order."""
        before, upto = self.upto(order - 1), self.upto(order)
        found = []
        for some in terms.split(max(1, ROWS // terms.shape[1])):  # the unembedding is read once for many
            logits = self.frozen.read_out(some)
            alone = self.on.measure(before + logits).double() - self.values[order - 1]
            found.append(torch.stack([alone, self.values[order] - self.on.measure(upto - logits)], 1))
        return torch.cat(found).cpu()

    def estimates(self, order: int) -> list[Float[Tensor, " head"]]:
        """First-order effect of the terms that end in each head, bank by bank, given all others."""
        frozen = self.frozen
        gradient = self.on.gradient(self.upto(order))
        if frozen.cap is not None:
            gradient = gradient * frozen.cap
        field_ = frozen.read_back(gradient @ frozen.model.W_U.detach().T)
        n = len(frozen.sublayers)
        return [
            (self.held(bank, before, order) * bank.unwrite(frozen.carry_back(field_, depth, n))).sum(
                (0, -1)
            )
            for depth, bank, before in self.read
        ]

    def held(self, bank: FrozenBank, before: Tensor, order: int) -> Float[Tensor, "pos head d_head"]:
        """What the heads hold of the paths that reach ``order`` by passing through them."""
        last = order == len(before) - 1
        z = bank.read(before[order - 1] + before[order] if last else before[order - 1])
        return z + bank.z_bias if order == 1 else z

    def head_terms(self, order: int, labels: Sequence[str]) -> Float[Tensor, "n pos d_model"]:
        """The terms of an order that end in each of some heads, at the end of the stream."""
        frozen = self.frozen
        found = []
        for label in labels:
            place = frozen.locate(label)
            bank = frozen.bank_at(place)
            before = next(before for _, own, before in self.read if own is bank)
            term = frozen.write_at(place, self.held(bank, before, order)[:, place.head])
            found.append(frozen.carry(term, place.depth, len(frozen.sublayers)))
        return torch.stack(found)


class _Sums:
    """Averages over prompts, weighted by their number of predictions."""

    def __init__(self, names: list[str], model: AttentionOnlyModel, layers: bool):
        self.names, self.banks = names, model.banks if layers else []  # the banks that are measured whole
        self.tokens = 0
        self.uniform = 0.0
        self.orders = torch.zeros(len(names), 2, dtype=torch.float64)
        self.layers = torch.zeros(len(names), len(self.banks), 2, dtype=torch.float64)
        self.estimates = [
            [torch.zeros(bank.n_heads, dtype=torch.float64) for bank in model.banks]
            for _ in range(min(HEAD_ORDERS, len(names) - 1))
        ]
        self.exact: dict[tuple[int, str], Tensor] = {}
        self.errors = (0.0, 1.0)  # the error and the tolerance of the worst prompt

    def add(self, terms: _Terms) -> None:
        self.tokens += terms.n
        self.uniform += terms.n * terms.uniform
        for order, value in enumerate(terms.values):
            self.orders[order] += terms.n * _float64(value, terms.attention_only(order))
            if order and self.banks:
                ends = torch.stack([end[order] for end in terms.ends])
                self.layers[order] += terms.n * terms.effects(order, ends)
        for order, banks in enumerate(self.estimates, start=1):
            for total, estimate in zip(banks, terms.estimates(order), strict=True):
                total += terms.n * estimate.double().cpu()
        error, tolerance = terms.sum_error(), sum_tolerance(terms.frozen)
        if error / tolerance >= self.errors[0] / self.errors[1]:
            self.errors = (error, tolerance)

    def add_heads(self, terms: _Terms, chosen: Mapping[int, Sequence[str]]) -> None:
        for order, labels in chosen.items():
            effects = terms.n * terms.effects(order, terms.head_terms(order, labels))
            for label, own in zip(labels, effects, strict=True):
                self.exact[order, label] = self.exact.get((order, label), 0) + own

    def result(self, model: AttentionOnlyModel, metric: str | None) -> TermImportance:
        n = self.tokens
        values = self.orders[:, 0] / n
        uniform = self.uniform / n
        change = torch.diff(values, prepend=torch.tensor([uniform], dtype=torch.float64))
        attention_only = self.orders[:, 1] / n
        frame = pd.DataFrame(
            {
                "order": self.names,
                "loss" if metric is None else "metric": values.numpy(),
                "change": change.numpy(),
                "attention_only": attention_only.numpy(),
                "with_mlp": (change - attention_only).numpy(),
            }
        )
        layers = [
            (name, bank.layer, bank.kind, *(self.layers[order, i] / n).tolist())
            for order, name in enumerate(self.names)
            if order
            for i, bank in enumerate(self.banks)
        ]
        heads = []
        for order, banks in enumerate(self.estimates, start=1):
            table = model.heads.frame
            table.insert(0, "order", self.names[order])
            table["estimate"] = torch.cat(banks).numpy() / n
            unknown = torch.full((2,), math.nan)
            exact = torch.stack([self.exact.get((order, h), unknown) for h in table["head"]]).numpy() / n
            heads.append(table.assign(alone=exact[:, 0], given_others=exact[:, 1]))
        check = Check("orders sum to the model's logits (worst prompt)", *self.errors)
        notes: dict[str, Any] = {"dtype": str(model.W_U.dtype).removeprefix("torch.")}
        if metric is None:
            notes |= {"tokens": n, "uniform loss": uniform}
        else:
            notes |= {"prompts": n, "metric": metric, "metric of equal logits": uniform}
        columns = ["order", "layer", "kind", "alone", "given_others"]
        return TermImportance(
            frame=frame,
            layers=pd.DataFrame(layers, columns=columns),
            heads=pd.concat(heads, ignore_index=True) if heads else pd.DataFrame(),
            receipt=Receipt((check,), notes),
            n_tokens=n,
        )


def _float64(*numbers: float) -> Float[Tensor, " n"]:
    return torch.tensor(numbers, dtype=torch.float64)


def _prompts(model: AttentionOnlyModel, tokens: Any) -> list[Tensor]:
    texts = list(tokens) if is_list(tokens) else [tokens]  # each alone: not padded
    prompts = [row for text in texts for row in model.as_tokens(text)]
    short = [i for i, prompt in enumerate(prompts) if len(prompt) < 2]
    if short or not prompts:
        raise MechInterpError(
            f"prompt {short[:3] or 'list'} has fewer than 2 tokens: there is no next token to predict"
        )
    return prompts


def _chosen(model: AttentionOnlyModel, heads: int | Heads, sums: _Sums, top: int) -> dict[int, list[str]]:
    """The heads to measure exactly, by order."""
    if not isinstance(heads, int):
        return dict.fromkeys(range(1, top + 1), model.heads.labels(heads))
    labels = list(model.heads)
    chosen = {}
    for order in range(1, top + 1):
        estimate = torch.cat(sums.estimates[order - 1]).abs()
        best = estimate.topk(min(heads, len(labels))).indices.tolist()
        chosen[order] = [labels[i] for i in best if float(estimate[i]) > 0]
    return {order: found for order, found in chosen.items() if found}
