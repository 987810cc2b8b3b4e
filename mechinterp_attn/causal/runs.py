"""Runs of a model on a behaviour: plain, watched and with patches."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from math import comb
from typing import Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch
from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.cuts import ByPath, Cut, cutting
from mechinterp_attn.causal.rules import Hook
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import MAX_BYTES as MAX_BYTES, Plan
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.cost import plan_runs


def plan_prompts(
    model: AttentionOnlyModel,
    bound: Bound,
    what: str,
    max_bytes: int,
    *,
    runs: float | int,
    result: int = 0,
    kept: int = 0,
    flops: int = 0,
    backward: bool = False,
    together: int = 1,
    times: int = 1,
) -> Plan:
    """The plan of work on a behaviour, as many prompts at a time as the memory beside the result allows.

    Args:
        model: the converted model.
        bound: the behaviour.
        what: what is computed.
        max_bytes: what may be used.
        runs: how often every prompt goes through the model; a backward pass counts as two.
        result: bytes that are kept from the first run to the end.
        kept: bytes that are kept for a while.
        flops: beside the runs.
        backward: whether there are backward passes.
        together: how many runs of all prompts are made at once where the memory allows.
        times: how many runs each prompt is given at once in any case.
    """
    n, width = bound.clean.tokens.shape
    need, room = times * prompt_bytes(model, bound, backward=backward), max_bytes - result - kept
    rows = min(n, max(1, room // need))
    one = prompt_bytes(model, bound)  # a run forward, many of them at once
    at_once = one * min(n * together, max(1, room // one))
    return plan_runs(
        model,
        f"{what} on {n:,} prompts of {width:,} tokens",
        runs=runs,
        rows=n,
        positions=width,
        bytes=result + kept + max(rows * need, at_once),
        result=result,
        flops=flops,
        chunks=-(-n // rows),
    )


def prompt_bytes(model: AttentionOnlyModel, bound: Bound, *, backward: bool = False) -> int:
    """What running one prompt takes; found by counting (``tests/core/test_memory``)."""
    spec, width = model.spec, bound.clean.tokens.shape[1]
    heads = [bank.n_heads for bank in model.banks if bank.mixes_positions]
    held = sum(bank.n_heads * bank.d_head for bank in model.banks)
    logits = spec.d_vocab_out if bound.at_position else spec.d_vocab_out * width
    floats = width * (held + 8 * spec.d_model + max(heads, default=0) * width) + 3 * logits
    if backward:  # what autograd keeps of every layer
        layers = 16 * spec.d_model * spec.n_layers
        floats = width * (8 * held + layers + 4 * sum(heads) * width) + 6 * logits
    return model.W_E.element_size() * floats


def rows_at_once(model: AttentionOnlyModel, bound: Bound, max_bytes: int, *, backward: bool = False) -> int:
    """How many prompts may run together.

    Raises:
        MechInterpError: not even one; says what one needs.
    """
    width = bound.clean.tokens.shape[1]
    need = prompt_bytes(model, bound, backward=backward)
    if need > max_bytes:
        raise MechInterpError(
            f"one prompt of {width} tokens needs about {need / 2**20:.0f} MiB; raise max_bytes (now "
            f"{max_bytes / 2**20:.0f} MiB) or shorten the prompts"
        )
    return max(1, max_bytes // need)


@contextmanager
def reading(model: AttentionOnlyModel, bound: Bound) -> Iterator[None]:
    """Only the logits that the metric reads are computed: those at the position."""
    if not bound.at_position:
        yield
        return
    rows = torch.arange(len(bound), device=bound.position.device)

    def only(module: Any, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][rows, bound.position][:, None],)

    handle = model.unembed.register_forward_pre_hook(only)
    try:
        yield
    finally:
        handle.remove()


def run(model: AttentionOnlyModel, bound: Bound, batch: Batch, hooks: Sequence[Hook] = ()) -> Tensor:
    """Logits of a batch of prompts that stand where the task's do: all, or those that are read."""
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    with reading(model, bound), model.hooks(fwd_hooks=list(hooks)):
        return model(batch.tokens, **padded)


def hold(model: AttentionOnlyModel, bound: Bound, batch: Batch) -> tuple[dict[str, Tensor], Tensor]:
    """What every head holds (``z``), by path of its bank, and the logits."""
    held: dict[str, Tensor] = {}
    logits = run(model, bound, batch, keeping(model, held))
    return held, logits


def keeping(model: AttentionOnlyModel, held: dict[str, Tensor]) -> list[Hook]:
    """Hooks that keep every ``z``."""

    def keep(path: str) -> Callable[..., None]:
        def hook(z: Tensor, hook: Any) -> None:
            held[path] = z

        return hook

    return [(bank.hook("z"), keep(bank.path)) for bank in model.banks]


def wide(z: Tensor) -> Float[Tensor, "batch pos head d_head"]:
    """``z`` with its last axis, also for banks of vectors, which hold numbers."""
    return z if z.ndim == 4 else z[..., None]


@torch.no_grad()
def ready(model: AttentionOnlyModel, bound: Bound, max_bytes: int = MAX_BYTES) -> Bound:
    """The task with what its metric compares with: for "kl", the whole model's output."""
    model.heads.required()
    if bound.metric != "kl" or bound.reference is not None:
        return bound
    rows = rows_at_once(model, bound, max_bytes)
    parts = [run(model, part, part.clean)[:, 0] for _, part in bound.split(rows)]
    return replace(bound, reference=torch.cat(parts))


@torch.no_grad()
def scores(
    model: AttentionOnlyModel, bound: Bound, *, corrupt: bool = False, max_bytes: int = MAX_BYTES
) -> Float[Tensor, " n"]:
    """The metric of every prompt, or of every counterfactual, on the CPU."""
    if bound.metric == "kl":
        bound = ready(model, bound, max_bytes)
    rows = rows_at_once(model, bound, max_bytes)
    out = []
    for _, part in bound.split(rows):
        batch = part.counterfactual("this") if corrupt else part.clean
        out.append(part.measure(run(model, part, batch)).detach().cpu())
    return torch.cat(out)


@dataclass(frozen=True, eq=False)
class Standing:
    """How the whole model does on a behaviour.

    Attributes:
        clean, corrupt: the metric of every prompt and counterfactual, ``[n]``; None without.
        accuracy: share of prompts whose answer wins; None without answers.
        chance: what that share would be of a model that knows nothing.
    """

    clean: Float[Tensor, " n"]
    corrupt: Float[Tensor, " n"] | None
    accuracy: float | None
    chance: float | None

    @property
    def absent(self) -> str | None:
        """Why the model hardly has the behaviour; None where it has."""
        if self.accuracy is None or self.chance is None:
            return None
        n = len(self.clean)
        hits = round(self.accuracy * n)
        p = sum(comb(n, k) * self.chance**k * (1 - self.chance) ** (n - k) for k in range(hits, n + 1))
        if self.accuracy > self.chance and (p <= 0.05 or n < 5):
            return None
        return (
            f"the model hardly has this behaviour: its answer wins on {self.accuracy:.0%} of the prompts, "
            f"chance is {self.chance:.0%} (mean clean score {float(self.clean.mean()):.3g})"
        )

    @property
    def notes(self) -> dict[str, Any]:
        """For a receipt."""
        notes: dict[str, Any] = {"prompts": len(self.clean), "clean": round(float(self.clean.mean()), 4)}
        if self.corrupt is not None:
            notes["counterfactual"] = round(float(self.corrupt.mean()), 4)
        if self.accuracy is not None and self.chance is not None:
            notes["accuracy"] = f"{self.accuracy:.0%} (chance {self.chance:.0%})"
        if self.absent is not None:
            notes["warning"] = self.absent
        return notes


@torch.no_grad()
def standing(model: AttentionOnlyModel, bound: Bound, max_bytes: int = MAX_BYTES) -> Standing:
    """Score prompts and counterfactuals once.

    Raises:
        MechInterpError: the metric is not a finite number, or the same whatever the model says.
    """
    rows = rows_at_once(model, bound, max_bytes)
    clean, corrupt, hits = [], [], []
    for _, part in bound.split(rows):
        logits = run(model, part, part.clean)
        clean.append(part.measure(logits).cpu())
        if len(clean) == 1:
            _refuse_constant(part, logits)
        hit = part.right(logits) if part.at_position else None
        hits += [] if hit is None else [hit.cpu()]
        if part.corrupt is not None:
            corrupt.append(part.measure(run(model, part, part.corrupt)).cpu())
    found = Standing(
        torch.cat(clean),
        torch.cat(corrupt) if corrupt else None,
        float(torch.cat(hits).double().mean()) if hits else None,
        bound.chance(model.spec.d_vocab_out) if hits else None,
    )
    bad = int((~found.clean.isfinite()).sum())
    if bad:
        raise MechInterpError(f"the metric {bound.about} is not finite on {bad} of {len(bound)} prompts")
    if found.corrupt is not None and torch.equal(found.clean, found.corrupt):
        raise MechInterpError(
            f"the metric {bound.about} is constant: it is the same on every prompt and its counterfactual "
            f"(mean {float(found.clean.mean()):.4g}); there is no difference to explain. Are the "
            "counterfactuals different at all, and does the metric read the logits?"
        )
    return found


def _refuse_constant(part: Bound, logits: Tensor) -> None:
    """Raises:
    MechInterpError: a function of the logits that gives the same for any of them.
    """
    if isinstance(part.metric, str):
        return
    own = part.measure(logits)
    if all(torch.equal(part.measure(other), own) for other in (-logits, logits.roll(1, -1))):
        raise MechInterpError(
            f"the metric {part.about} is constant: it is {float(own.mean()):.4g} whatever the logits are; "
            "there is nothing to explain. Give a function that reads the logits [n, pos, d_vocab_out]"
        )


@torch.no_grad()
def patched(
    model: AttentionOnlyModel, part: Bound, batch: Batch, cuts: Sequence[Cut], fill: ByPath | None
) -> Float[Tensor, "cut n"]:
    """The metric with each of the cuts made in a run of its own.

    Args:
        batch: the prompts to run: the task's own, or its counterfactuals.
        fill: what heads that are cut whole hold instead, by path: ``[head, ...]``, or ``[n, pos, head,
            ...]`` for every prompt; None: zero.
    """
    n = len(cuts)
    many = part.repeat(n)
    logits = run(model, many, batch.repeat(n), cutting(model, cuts, fill))
    return many.measure(logits).unflatten(0, (n, -1)).cpu()


@torch.no_grad()
def watched(
    model: AttentionOnlyModel, part: Bound, batch: Batch, names: Collection[str]
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """What some hooks see of a batch, by name, and every head's ``z``, by path."""
    seen: dict[str, Tensor] = {}
    held: dict[str, Tensor] = {}

    def keep(name: str) -> Hook:
        return name, lambda x, hook: seen.__setitem__(name, x)

    run(model, part, batch, [*(keep(name) for name in names), *keeping(model, held)])
    return seen, held


def head_rows(model: AttentionOnlyModel, by_position: Bound | None = None) -> pd.DataFrame:
    """``head, layer, index, kind`` of every head; given prompts, a row for each of their positions too."""
    frame = model.heads.frame[["head", "layer", "index", "kind"]]
    if by_position is None:
        return frame
    width = by_position.clean.tokens.shape[1]
    frame = frame.loc[frame.index.repeat(width)].reset_index(drop=True)
    return frame.assign(position=list(range(width)) * (len(frame) // width))
