"""Counting windows of a corpus: one batch, one piece, here or on the workers of a cluster."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch, pad, rows_within
from mechinterp_attn.causal.cuts import Cut, Target, cut_logits, cut_of, next_token
from mechinterp_attn.causal.metrics import Metric, own
from mechinterp_attn.core.cluster import run_on_ray
from mechinterp_attn.core.errors import MechInterpError, below_one
from mechinterp_attn.detect.estimates import estimated_changes
from mechinterp_attn.detect.measures import SEEN, sums_of
from mechinterp_attn.detect.tally import Best, Place, Tally
from mechinterp_attn.detect.texts import Window
from mechinterp_attn.model.attention_only import AttentionOnlyModel


@dataclass(frozen=True)
class Settings:
    """What to count on a window."""

    heads: tuple[Target, ...]
    estimate: bool
    length: int
    batch: int
    top_k: int
    context: int
    max_bytes: int
    metric: Metric | None = None

    def measured(self, model: AttentionOnlyModel) -> tuple[str, ...]:
        """What is found of every head that is cut, as columns of a table."""
        losses = ("loss_change", "logit_change") if model.spec.no_next_token is None else ()
        return losses if self.metric is None else (*losses, "metric_change")

    def check(self, model: AttentionOnlyModel, workers: int | None) -> None:
        wrong = []
        if not 2 <= self.length <= model.spec.n_ctx:
            wrong.append(f"length={self.length}; expected 2 to {model.spec.n_ctx}, the model's context")
        wrong += below_one(batch=self.batch, top_k=self.top_k)
        if self.context < 0:
            wrong.append(f"context={self.context}; expected 0 or more")
        losses = [f"heads={list(self.heads)}"] if self.heads and self.metric is None else []
        losses += ["estimate=True"] if self.estimate else []
        if losses and model.spec.no_next_token is not None:
            wrong.append(
                f"{', '.join(losses)}: next-token losses, but {model.spec.no_next_token}; give metric= for "
                "the heads that are cut, and no estimate"
            )
        if self.metric is not None and not self.heads:
            wrong.append("metric= is what is measured when heads are cut; name some with heads=")
        if self.metric is not None and not callable(self.metric):
            wrong.append(
                f"metric={self.metric!r}; expected a function of the logits [n, pos, d_vocab_out] that "
                "gives [n] (losses are measured in any case)"
            )
        if workers is not None and workers < 1:
            wrong.append(f"workers={workers}; expected at least 1, or None for this process")
        if wrong:
            raise MechInterpError("; ".join(wrong))
        rows_within(model, self.length, self.max_bytes)
        self.cuts(model, Batch(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool)))

    def cuts(self, model: AttentionOnlyModel, batch: Batch) -> list[Cut]:
        return [cut_of(model, head, batch) for head in self.heads]

    def names(self, model: AttentionOnlyModel) -> list[str]:
        empty = Batch(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool))
        return [cut.name for cut in self.cuts(model, empty)]


def count(model: AttentionOnlyModel, piece: Sequence[Window], settings: Settings) -> Tally:
    """The tally of some windows, a batch at a time."""
    fit = rows_within(model, settings.length, settings.max_bytes)
    rows = max(1, min(settings.batch, fit // 3 if settings.estimate else fit))
    parts = (piece[i : i + rows] for i in range(0, len(piece), rows))
    return reduce(add, (_tally(model, part, settings, at_a_time=max(1, fit // rows)) for part in parts))


def count_on_ray(
    model: AttentionOnlyModel, pieces: Iterator[list[Window]], settings: Settings, workers: int
) -> Iterator[Tally]:
    """The tallies of the pieces, in order: this process reads and tokenises, the workers count. Pieces,
    and the order in which they are added up, are those of a pass in one process; so is the result.

    Raises:
        MechInterpError: Ray is not installed, or the model has hooks, which workers would not have.
    """
    refuse_hooks(model, "workers")
    weights = {name: tensor.detach().cpu() for name, tensor in model.state_dict().items()}
    device = model.W_E.device.type
    shared = model.spec, weights, device, settings
    return run_on_ray(_counter, shared, pieces, workers=workers, gpu=device == "cuda")


def _counter(shared: tuple[Any, dict[str, Tensor], str, Settings]) -> Callable[[list[Window]], Tally]:
    """The model in a worker process, ready to count pieces."""
    spec, weights, device, settings = shared
    model = AttentionOnlyModel(spec, {name: t.clone().to(device) for name, t in weights.items()})
    return torch.no_grad()(lambda piece: count(model, piece, settings))


def refuse_hooks(model: AttentionOnlyModel, option: str) -> None:
    """Hooks stay in this process, and no fingerprint can tell what they do.

    Raises:
        MechInterpError: the model has some.
    """
    hooked = [name for name, point in model.hook_dict.items() if point.has_hooks()]
    if hooked:
        raise MechInterpError(
            f"{option}= does not go with a model that has hooks (at {', '.join(hooked[:5])}), which stay "
            f"in this process; remove them with model.reset_hooks(), or leave {option} out"
        )


def _tally(
    model: AttentionOnlyModel, some: Sequence[Window], settings: Settings, *, at_a_time: int
) -> Tally:
    batch = pad(model, [window.tokens.to(model.W_E.device) for window in some])
    places = torch.tensor([(window.document, window.start) for window in some])
    names = {bank.hook(role) for bank in model.banks for role in (*SEEN, "z")}
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    logits, cache = model.run_with_cache(
        batch.tokens, names_filter=lambda name: name in names, return_cache_object=False, **padded
    )
    loss = torch.zeros(()) if model.spec.no_next_token else next_token(logits, batch)[0]
    del logits
    # The first token has no context, and heads often rest on it: no passage is about it.
    counted = batch.real.clone()
    counted[:, 0] = False
    written = [bank.written(cache) for bank in model.banks]
    best = [_best(w, counted, batch, places, settings) for w in written]
    sums = sums_of(model, batch, cache)
    del cache
    means = [(w.double() * counted[..., None]).sum((0, 1)).cpu() for w in written]
    nothing = torch.zeros(0, dtype=torch.float64)
    return Tally(
        sums=type(sums)(*(tensor.cpu() for tensor in vars(sums).values())),
        loss=loss.double().sum()[None].cpu(),
        tokens=batch.predicts.sum().double()[None].cpu(),
        cut=_cut(model, batch, settings, at_a_time),
        estimate=estimated_changes(model, batch, batch.predicts) if settings.estimate else nothing,
        written=torch.cat(means),
        positions=counted.sum().double()[None].cpu(),
        best=Best(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in best), strict=True))),
        windows=len(batch),
        place=Place.of(some[-1]),
    )


def _cut(
    model: AttentionOnlyModel, batch: Batch, settings: Settings, at_a_time: int
) -> Float[Tensor, "measured cut"]:
    """Sums of what every cut changes: losses, logits, an own metric."""
    measured, cuts = settings.measured(model), settings.cuts(model, batch)
    if not cuts:
        return torch.zeros(len(measured), 0, dtype=torch.float64)
    runs = [Cut("nothing"), *cuts]
    totals = []
    for start in range(0, len(runs), at_a_time):
        some = runs[start : start + at_a_time]
        many = batch.repeat(len(some))
        logits = cut_logits(model, many, some, replacement=None, patterns=None)
        sums = [] if model.spec.no_next_token else [x.double().sum(1) for x in next_token(logits, many)]
        sums += [] if settings.metric is None else [own(settings.metric, logits).double()]
        totals.append(torch.stack(sums).unflatten(1, (len(some), -1)).sum(2).cpu())
    total = torch.cat(totals, 1)
    return total[:, 1:] - total[:, :1]


def _best(written: Tensor, counted: Tensor, batch: Batch, places: Tensor, settings: Settings) -> Best:
    """The passages of one batch where each head of a bank writes most."""
    width, context = batch.tokens.shape[1], settings.context
    values = written.masked_fill(~counted[..., None], -torch.inf).flatten(0, 1).T.float()  # [head, b * p]
    value, flat = values.topk(min(settings.top_k, values.shape[1]), dim=1)
    value, flat = value.cpu(), flat.cpu()
    row, position = flat // width, flat % width
    around = position[..., None] + torch.arange(-context, context + 1)
    inside = (around >= 0) & (around < batch.real.sum(1).cpu()[row][..., None])
    at = row[..., None], around.clamp(0, width - 1)
    head = torch.arange(len(value))[:, None, None]
    found = Best(
        value,
        torch.cat([places[row], position[..., None]], -1),
        torch.where(inside, batch.tokens.cpu()[at], -1).to(torch.int32),
        torch.where(inside, written.cpu()[(*at, head)], 0).float(),
    )
    found.place[value == -torch.inf] = -1
    found.tokens[value == -torch.inf] = -1
    return Best.empty(len(value), settings.top_k, context) + found
