"""Which heads a model needs on given tokens: cut them out, one by one or together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp_attn.detect.batches import Batch, Input, as_batch, rows_within
from mechinterp_attn.detect.cuts import (
    Cut,
    Replace,
    Target,
    cut_of,
    mean_z,
    next_token,
    run_cuts,
    saved_patterns,
)
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Check, Receipt, Result

MAX_BYTES = 2**30


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Ablations(Result):
    """What cutting heads out does to the model's predictions.

    Attributes:
        frame: one row per head or virtual head: ``head, layer, index, kind, loss_change`` (nats a
            token: above zero where the model needs the head), ``logit_change`` (of the right next
            token), both exact, NaN where only estimated; and ``estimate``, the loss change to first
            order from one backward pass (NaN for what is not a single head).
        loss: of the whole model on the counted tokens (nats).
        loss_changes, logit_changes: every token's, ``[row, batch, pos - 1]``, for the rows of the
            frame that are exact, which come first; zero on padding.
        counted: which tokens after the first were counted, ``[batch, pos - 1]``.
    """

    title: ClassVar[str] = "Loss when a head is cut out"
    sort_by: ClassVar[str | None] = "loss_change"
    loss: float
    loss_changes: Float[Tensor, "row batch pos_minus_1"]
    logit_changes: Float[Tensor, "row batch pos_minus_1"]
    counted: Bool[Tensor, "batch pos_minus_1"]


def ablate(
    model: AttentionOnlyModel,
    tokens: Input,
    heads: Sequence[Target] | None = None,
    *,
    together: bool = False,
    replace: Replace = "zero",
    reference: Input | None = None,
    keep_patterns: bool = False,
    where: Bool[Tensor, "batch pos_minus_1"] | None = None,
    exact: int = 32,
    max_bytes: int = MAX_BYTES,
) -> Ablations:
    """Cut heads of any kind out of the model and measure every next token's loss and logit.

    A neuron cut to zero is the source's neuron set to zero. A virtual head is a chain such as
    ``("L0H1", "L1H2")``: the last head loses what came to it through the ones before, and nothing
    else, its own pattern and the norm in front of it as in the whole model.

    Args:
        tokens: tokens ``[pos]`` or ``[batch, pos]``, a text, or texts of any lengths.
        heads: labels and chains of labels, each cut in a run of its own. None: all heads by the
            estimate, and the ``exact`` ones with the largest estimates by cutting.
        together: cut all of ``heads`` in one run.
        replace: ``"zero"``, or ``"mean"``: what the head holds on average over ``reference``.
        reference: tokens or texts for the mean; the same tokens by default.
        keep_patterns: hold the patterns of all heads, gates of neurons included, to those of the
            whole model (Olsson et al. 2022, "pattern-preserving ablation"). Norms still follow.
        where: count only these next tokens, ``[batch, pos - 1]``.
        exact: how many heads to cut where ``heads`` is None.
        max_bytes: of what is held at a time.

    Raises:
        MechInterpError: unknown heads, nothing to count, a ``where`` of another shape.
    """
    batch = as_batch(model, tokens)
    counted = _counted(batch, where)
    if replace not in ("zero", "mean"):
        raise MechInterpError(f"replace={replace!r}; expected 'zero' or 'mean'")
    rows = min(rows_within(model, batch.tokens.shape[1], max_bytes), len(batch))
    replacement = None
    if replace == "mean":
        other = batch if reference is None else as_batch(model, reference)
        replacement = mean_z(model, other.split(rows_within(model, other.tokens.shape[1], max_bytes)))
    estimates = _estimates(model, batch, counted, rows, replacement, keep_patterns)
    if heads is None:
        ranked = estimates.abs().sort_values(ascending=False, kind="stable").index
        chosen: list[Target] = list(ranked[: max(exact, 0)])
    else:
        chosen = [heads] if isinstance(heads, str) else list(dict.fromkeys(heads))
    cuts = [cut_of(model, target, batch) for target in chosen]
    if together and len(cuts) > 1:
        cuts = [reduce(add, cuts)]
    losses, logits = _exact(model, batch, cuts, rows, max_bytes, replacement, keep_patterns)
    changes, logit_changes = losses[1:] - losses[0], logits[1:] - logits[0]
    n = counted.sum()
    frame = _frame(model, cuts, estimates, every=heads is None)
    for column, change in (("logit_change", logit_changes), ("loss_change", changes)):
        means = ((change * counted).sum((1, 2)) / n).tolist()
        names = [cut.name for cut in cuts]
        frame.insert(4, column, frame["head"].map(dict(zip(names, means, strict=True))).astype(float))
    loss = float((losses[0] * counted).sum() / n)
    notes: dict[str, Any] = {
        "loss": round(loss, 6), "replace": replace, "keep_patterns": keep_patterns,
        "tokens counted": int(n), "dtype": str(model.W_E.dtype).removeprefix("torch."),
    }  # fmt: skip
    both = frame.dropna(subset=["loss_change", "estimate"])
    if len(both) > 2:
        rank = both["loss_change"].rank().corr(both["estimate"].rank())
        notes["rank correlation of estimate and exact"] = round(float(rank), 4)
    plain = float(((_plain(model, batch, rows) - losses[0]) * counted).abs().max())
    check = Check("a run with nothing cut is the plain run", plain, 1e-4 * max(1.0, abs(loss)))
    return Ablations(
        frame=frame,
        receipt=Receipt((check,), notes),
        loss=loss,
        loss_changes=changes,
        logit_changes=logit_changes,
        counted=counted.cpu(),
    )


def _counted(batch: Batch, where: Tensor | None) -> Bool[Tensor, "batch pos_minus_1"]:
    counted = batch.predicts.cpu()
    if where is not None:
        if tuple(where.shape) != tuple(counted.shape):
            raise MechInterpError(
                f"where has shape {tuple(where.shape)}; expected {tuple(counted.shape)}: which tokens "
                "after the first to count"
            )
        counted = counted & where.bool().cpu()
    if not bool(counted.any()):
        raise MechInterpError("no next token to count; give at least 2 tokens and a where with True in it")
    return counted


def _exact(
    model: AttentionOnlyModel,
    batch: Batch,
    cuts: list[Cut],
    rows: int,
    max_bytes: int,
    replacement: dict[str, Tensor] | None,
    keep_patterns: bool,
) -> tuple[Tensor, Tensor]:
    """Losses and logits ``[1 + cut, batch, pos - 1]``, the first with nothing cut."""
    runs = [Cut("nothing"), *cuts]
    at_a_time = max(1, rows_within(model, batch.tokens.shape[1], max_bytes) // rows)
    losses = torch.zeros(len(runs), len(batch), batch.tokens.shape[1] - 1)
    logits = torch.zeros_like(losses)
    with tqdm(total=len(runs) * len(batch), desc="cutting heads", disable=len(runs) < 200) as progress:
        for at, part in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
            patterns = saved_patterns(model, part) if keep_patterns else None
            end, width = at + len(part), part.tokens.shape[1]
            for start in range(0, len(runs), at_a_time):
                some = [_rows(cut, at, end, width) for cut in runs[start : start + at_a_time]]
                loss, logit = run_cuts(model, part, some, replacement=replacement, patterns=patterns)
                losses[start : start + len(some), at:end, : width - 1] = loss.cpu()
                logits[start : start + len(some), at:end, : width - 1] = logit.cpu()
                progress.update(len(some) * len(part))
    return losses, logits


def _rows(cut: Cut, start: int, end: int, width: int) -> Cut:
    return Cut(cut.name, cut.whole, {key: part[start:end, :width] for key, part in cut.parts.items()})


def _estimates(
    model: AttentionOnlyModel,
    batch: Batch,
    counted: Bool[Tensor, "batch pos_minus_1"],
    rows: int,
    replacement: dict[str, Tensor] | None,
    keep_patterns: bool,
) -> pd.Series:
    """The change of the loss to first order in every head's output: ``(replacement - z) . dL/dz``."""
    held: dict[str, Tensor] = {}

    def hooks_of(path: str) -> list[tuple[str, Any]]:
        def keep(z: Tensor, hook: Any) -> None:
            held[path] = z

        fixed = [(f"{path}.hook_pattern", lambda p, hook: p.detach())] if keep_patterns else []
        return [(f"{path}.hook_z", keep), *fixed]

    hooks = [pair for bank in model.banks for pair in hooks_of(bank.path)]
    hooks.append(("hook_embed", lambda x, hook: x if x.requires_grad else x.requires_grad_()))
    totals = {bank.path: torch.zeros(bank.n_heads, dtype=torch.float64) for bank in model.banks}
    for at, part in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
        some = counted[at : at + len(part), : part.tokens.shape[1] - 1].to(part.tokens.device)
        padded: dict[str, Any] = {} if part.mask is None else {"attention_mask": part.mask}
        with torch.enable_grad(), model.hooks(fwd_hooks=hooks):
            loss, _ = next_token(model(part.tokens, **padded), part)
            total = (loss * some).sum() / counted.sum()
        paths = list(held)
        gradients = torch.autograd.grad(total, [held[path] for path in paths])
        for path, gradient in zip(paths, gradients, strict=True):
            z = held[path].detach()
            change = -z if replacement is None else replacement[path].to(z.dtype) - z
            effect = (change * gradient).double()
            totals[path] += effect.sum([i for i in range(effect.ndim) if i != 2]).cpu()
        held.clear()
    return pd.Series(torch.cat(list(totals.values())).numpy(), index=list(model.heads))


@torch.no_grad()
def _plain(model: AttentionOnlyModel, batch: Batch, rows: int) -> Float[Tensor, "batch pos_minus_1"]:
    losses = torch.zeros(len(batch), batch.tokens.shape[1] - 1)
    for at, part in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
        padded: dict[str, Any] = {} if part.mask is None else {"attention_mask": part.mask}
        loss, _ = next_token(model(part.tokens, **padded), part)
        losses[at : at + len(part), : loss.shape[1]] = loss.cpu()
    return losses


def _frame(
    model: AttentionOnlyModel, cuts: Sequence[Cut], estimates: pd.Series, *, every: bool
) -> pd.DataFrame:
    """What was cut, in order; with ``every``, then all other heads by the size of their estimates."""
    names = [cut.name for cut in cuts]
    if every:
        names = list(estimates.abs().sort_values(ascending=False, kind="stable").index)
    known = model.heads.frame[["head", "layer", "index", "kind"]].set_index("head").to_dict("index")
    several = {cut.name: {"kind": "several"} for cut in cuts}
    virtual = {
        cut.name: known[cut.name.split(" > ")[-1]] | {"kind": "virtual"}
        for cut in cuts
        if not cut.whole and len(cut.parts) == 1
    }
    rows = [{"head": name} | (several | virtual | known)[name] for name in names]
    frame = pd.DataFrame(rows, columns=["head", "layer", "index", "kind"])
    frame = frame.astype({"layer": "Int64", "index": "Int64"})
    return frame.assign(estimate=frame["head"].map(estimates).astype(float))
