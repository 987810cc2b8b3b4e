"""Which heads a model needs on given tokens: cut them out, one by one or together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace as replace_fields
from typing import Any, ClassVar, cast, overload

import pandas as pd
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_attn.causal.batches import (
    Batch,
    Input,
    as_batch,
    plan_sequences,
    rows_within,
)
from mechinterp_attn.causal.cuts import (
    Cut,
    Replace,
    Target,
    cut_of,
    cut_of_all,
    loss_dtype,
    mean_z,
    next_token,
    no_rows,
    remade,
    run_cuts,
    saved_patterns,
    targets_of,
)
from mechinterp_attn.causal.head_effects import Effects, effects
from mechinterp_attn.causal.task import Task
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plan, plans, within
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.detect.estimates import estimated_changes, rank_correlation
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.index import Heads


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Ablations(Result):
    """What cutting heads out does to the model's predictions.

    Attributes:
        frame: one row per head, virtual head or edge: ``head, layer, index, kind, loss_change``
            (nats a token: above zero where the model needs the head), ``logit_change`` (of the
            right next token, against the average logit), both exact, NaN where only estimated; and
            ``estimate``, the loss change from one backward pass (``estimates.py``; NaN for what is not a
            single head).
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


def _plan(
    model: AttentionOnlyModel,
    tokens: Input,
    heads: Heads | None,
    together: bool,
    exact: int,
    max_bytes: int,
) -> Plan:
    """A run for every cut and one without; a forward and a backward pass for the estimates. Losses and
    logits of all of them are kept, and again while their means are taken.
    """
    batch = as_batch(model, tokens)
    cuts = max(exact, 0) if heads is None else 1 if together else len(targets_of(model, heads))
    kept = 4 * 5 * (cuts + 1) * batch.tokens.numel() + 3 * CELL * TABLE * (model.n_heads + cuts)
    return plan_sequences(
        model, f"{cuts:,} cuts", batch, max_bytes, runs=cuts + 4, result=kept, together=cuts + 1
    )


def _plan_of_either(
    model: AttentionOnlyModel,
    prompts: Input | Task | None,
    heads: Heads | None,
    task: Task | None,
    target: Any,
    position: int | None,
    together: bool,
    exact: int,
    max_bytes: int,
) -> Plan:
    """On tokens, or on a behaviour, where ``causal.effects`` has it."""
    if isinstance(prompts, Task) or task is not None or target is not None:
        behaviour = _behaviour(prompts, task, target, position)
        groups: Any = [list(targets_of(model, heads))] if together and heads is not None else heads
        options: dict[str, Any] = {"exact": exact if heads is None else None, "max_bytes": max_bytes}
        return plan(effects, model, behaviour, groups, **options)
    if prompts is None:
        raise MechInterpError("there is nothing to ablate heads on; give prompts or task=")
    return _plan(model, prompts, heads, together, exact, max_bytes)


@overload
def ablate(
    model: AttentionOnlyModel,
    prompts: Input,
    heads: Heads | None = ...,
    *,
    task: None = ...,
    target: None = ...,
    **options: Any,
) -> Ablations: ...


@overload
def ablate(
    model: AttentionOnlyModel,
    prompts: Input | Task | None = ...,
    heads: Heads | None = ...,
    *,
    task: Task | None = ...,
    target: Any = ...,
    **options: Any,
) -> Effects: ...


@renamed_arguments(tokens="prompts")
@plans(_plan_of_either)
def ablate(
    model: AttentionOnlyModel,
    prompts: Input | Task | None = None,
    heads: Heads | None = None,
    *,
    task: Task | None = None,
    target: Any = None,
    position: int | None = None,
    together: bool = False,
    replace: Replace = "zero",
    reference: Input | None = None,
    keep_patterns: bool = False,
    where: Bool[Tensor, "batch pos_minus_1"] | Sequence[Any] | None = None,
    exact: int = 32,
    max_bytes: int = MAX_BYTES,
) -> Ablations | Effects:
    """Cut heads of any kind out of the model and measure every next token's loss and logit; or, with a task
    or a target, what that behaviour loses.

    A neuron cut to zero is the source's neuron set to zero. A virtual head, ``"L0H1 > L1H2"`` or
    ``("L0H1", "L1H2")``: the last head loses what came to it through the ones before, and nothing
    else, its own pattern and the norm in front of it as in the whole model. An edge, ``"L0H1 -K->
    L1H2"``: the second head's keys (queries, values) are those of a run without the first one.

    Args:
        model: the converted model.
        prompts: tokens ``[pos]`` or ``[batch, pos]``, a text, or texts or rows of tokens of any lengths.
        heads: heads or labels, chains of them, and edges, each cut in a run of its own. None: all
            heads by the estimate, and the ``exact`` ones with the largest estimates by cutting.
        task: a behaviour, in place of ``prompts`` (or on them, instead of its own prompts): its metric is
            measured instead of every token's loss, by ``causal.effects``, of which the result is.
        target: the same for the logit of one token (text or id) behind ``prompts``: one for all prompts
            or one for each.
        position: where the target is read; negative counts from the end. The last token by default.
        together: cut all of ``heads`` in one run.
        replace: ``"zero"``, or ``"mean"``: what the head holds on average over ``reference``.
        reference: tokens or texts for the mean; the same tokens by default.
        keep_patterns: hold the patterns of all heads, gates of neurons included, to those of the
            whole model (Olsson et al. 2022, "pattern-preserving ablation"). Norms still follow.
        where: count only these next tokens, ``[batch, pos - 1]`` truth values, a tensor or lists.
        exact: how many heads to cut where ``heads`` is None.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: unknown heads, nothing to count, a ``where`` of another shape, a model that does
            not predict next tokens and no task or target, options that say nothing about a task or
            target.
    """
    if isinstance(prompts, Task) or task is not None or target is not None:
        without = {"reference": reference, "where": where, "keep_patterns": keep_patterns or None}
        _only_tokens(without)
        behaviour = _behaviour(prompts, task, target, position)
        groups = [list(targets_of(model, heads))] if together and heads is not None else heads
        return effects(
            model, behaviour, cast(Any, groups), replace, max_bytes=max_bytes,
            exact=exact if heads is None else None,
        )  # fmt: skip
    if prompts is None:
        raise MechInterpError("there is nothing to ablate heads on; give prompts or task=")
    if position is not None:
        raise MechInterpError(f"position={position} is where a target is read; give target= too")
    model.heads.required()
    model.spec.need_next_tokens("ablation")
    batch = as_batch(model, prompts)
    counted = _counted(batch, where)
    if replace not in ("zero", "mean"):
        raise MechInterpError(f"replace={replace!r}; expected 'zero' or 'mean'")
    made = within(_plan(model, prompts, heads, together, exact, max_bytes), max_bytes, "fewer heads")
    max_bytes -= made.result
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
        chosen = targets_of(model, heads)
    if together and len(chosen) > 1:
        cuts = [cut_of_all(model, chosen, no_rows(batch))]
    else:
        cuts = [cut_of(model, target, no_rows(batch)) for target in chosen]
    losses, logits = _exact(model, batch, cuts, rows, max_bytes, replacement, keep_patterns)
    changes, logit_changes = losses[1:] - losses[0], logits[1:] - logits[0]
    n = counted.sum()
    frame = _frame(model, cuts, estimates, every=heads is None)
    for column, change in (("logit_change", logit_changes), ("loss_change", changes)):
        means = ((change.double() * counted).sum((1, 2)) / n).tolist()
        names = [cut.name for cut in cuts]
        frame.insert(4, column, frame["head"].map(dict(zip(names, means, strict=True))).astype(float))
    loss = float((losses[0].double() * counted).sum() / n)
    notes: dict[str, Any] = {
        "loss": round(loss, 6), "replace": replace, "keep_patterns": keep_patterns,
        "tokens counted": int(n), "dtype": str(model.W_E.dtype).removeprefix("torch."),
        "losses kept in": str(losses.dtype).removeprefix("torch."),
    }  # fmt: skip
    notes |= rank_correlation(frame)
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


def _only_tokens(given: dict[str, Any]) -> None:
    """Raises:
    MechInterpError: options about the losses of tokens, where a task is measured.
    """
    names = [f"{name}=" for name, value in given.items() if value is not None]
    if names:
        raise MechInterpError(
            f"{', '.join(names)} is about the losses of all tokens; leave it out where a task or "
            "target is given"
        )


def _behaviour(tokens: Input | Task | None, task: Task | None, target: Any, position: int | None) -> Task:
    """The task that was given, in whatever way.

    Raises:
        MechInterpError: two of them, or a target without prompts.
    """
    at = -1 if position is None else position
    if isinstance(tokens, Task):
        task, tokens, twice = tokens, None, task is not None
    else:
        twice = False
    if task is None and tokens is not None:
        return Task(cast(Any, tokens), answer=target, position=at, metric="logit")
    if twice or task is None or target is not None or position is not None:
        raise MechInterpError(
            "give one task, which has an answer and a position of its own, or tokens and target="
        )
    return task if tokens is None else replace_fields(task, clean=tokens, corrupt=None)


def _counted(batch: Batch, where: Tensor | Sequence[Any] | None) -> Bool[Tensor, "batch pos_minus_1"]:
    counted = batch.predicts.cpu()
    if where is not None:
        try:
            chosen = torch.as_tensor(where).cpu()
        except (TypeError, ValueError, RuntimeError) as error:
            raise MechInterpError(
                f"where is a {type(where).__name__} that is not a table ({error}); expected a tensor or "
                f"lists of {tuple(counted.shape)} truth values: which tokens after the first to count"
            ) from error
        if chosen.shape != counted.shape or chosen.dtype.is_floating_point or chosen.dtype.is_complex:
            raise MechInterpError(
                f"where has shape {tuple(chosen.shape)} and dtype {chosen.dtype}; expected "
                f"{tuple(counted.shape)} truth values: which tokens after the first to count"
            )
        counted = counted & chosen.bool()
    if not bool(counted.any()):
        raise MechInterpError(
            "there is no next token to count; give at least 2 tokens, and a where that is True somewhere"
        )
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
    """Losses and logits ``[1 + cut, batch, pos - 1]``, the first with nothing cut. What chains and edges
    bring is found for each part of the batch.
    """
    runs = [Cut("nothing"), *cuts]
    at_a_time = max(1, rows_within(model, batch.tokens.shape[1], max_bytes) // rows)
    losses = torch.zeros(
        len(runs), len(batch), batch.tokens.shape[1] - 1, dtype=loss_dtype(model.W_E.dtype)
    )
    logits = torch.zeros_like(losses)
    with Progress(desc="cutting heads", total=len(runs) * len(batch)) as progress:
        for at, part in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
            patterns = saved_patterns(model, part) if keep_patterns else None
            end, width = at + len(part), part.tokens.shape[1]
            for start in range(0, len(runs), at_a_time):
                some = [remade(model, cut, part) for cut in runs[start : start + at_a_time]]
                loss, logit = run_cuts(model, part, some, replacement=replacement, patterns=patterns)
                losses[start : start + len(some), at:end, : width - 1] = loss.cpu()
                logits[start : start + len(some), at:end, : width - 1] = logit.cpu()
                progress.update(len(some) * len(part))
    return losses, logits


def _estimates(
    model: AttentionOnlyModel,
    batch: Batch,
    counted: Bool[Tensor, "batch pos_minus_1"],
    rows: int,
    replacement: dict[str, Tensor] | None,
    keep_patterns: bool,
) -> pd.Series:
    total = torch.zeros(len(model.heads), dtype=torch.float64)
    for at, part in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
        some = counted[at : at + len(part), : part.tokens.shape[1] - 1]
        total += estimated_changes(model, part, some, replacement=replacement, keep_patterns=keep_patterns)
    return pd.Series((total / counted.sum()).numpy(), index=list(model.heads))


@torch.no_grad()
def _plain(model: AttentionOnlyModel, batch: Batch, rows: int) -> Float[Tensor, "batch pos_minus_1"]:
    losses = torch.zeros(len(batch), batch.tokens.shape[1] - 1, dtype=loss_dtype(model.W_E.dtype))
    for at, part in zip(range(0, len(batch), rows), batch.split(rows), strict=True):
        padded: dict[str, Any] = {} if part.mask is None else {"attention_mask": part.mask}
        loss, _ = next_token(model(part.tokens, **padded), part)
        losses[at : at + len(part), : loss.shape[1]] = loss.cpu()
    return losses


def _frame(
    model: AttentionOnlyModel, cuts: Sequence[Cut], estimates: pd.Series, *, every: bool
) -> pd.DataFrame:
    """What was cut, in order; with ``every``, then all other heads by the size of their estimates."""
    known = model.heads.frame[["head", "layer", "index", "kind"]].set_index("head").to_dict("index")
    known |= {cut.name: {"layer": cut.layer, "index": cut.index, "kind": cut.kind} for cut in cuts}
    names = [cut.name for cut in cuts]
    if every:
        names = list(estimates.abs().sort_values(ascending=False, kind="stable").index)
    rows = [{"head": name} | known[name] for name in names]
    frame = pd.DataFrame(rows, columns=["head", "layer", "index", "kind"])
    frame = frame.astype({"layer": "Int64", "index": "Int64"})
    return frame.assign(estimate=frame["head"].map(estimates).astype(float))
