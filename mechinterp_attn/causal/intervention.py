"""Change what heads hold in one run, and see how the prediction moves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.batches import Input, look
from mechinterp_attn.causal.rules import Hook
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.batch import Batch
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.index import Heads


@dataclass(frozen=True)
class Edit:
    """What is done to some heads in a run.

    Attributes:
        heads: which ones, of any kind: a label, a pattern such as ``"L1H*"``, a list.
        scale: what they hold (``z``, value bias included) is multiplied by this: 0 cuts them, 1 leaves
            them as they are, -1 turns them round. By default 0, and 1 with a source.
        source: another prompt of the same number of tokens: they are given what they hold there,
            position by position, times ``scale``. None: their own.
        position: the only position where this is done; negative counts from the end. None: everywhere.
    """

    heads: Heads
    scale: float | int | None = None
    source: Input | None = None
    position: int | None = None

    @property
    def factor(self) -> float:
        """``scale``, or what stands for it."""
        return float(self.scale) if self.scale is not None else 0.0 if self.source is None else 1.0


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class Intervention(Result):
    """A model's prediction with heads as they are, and as edited.

    Attributes:
        frame: the likeliest outputs of either run, likeliest first: ``token, token_id, change`` (of the
            log-probability, nats), ``before`` and ``after`` (probabilities).
        logits_before, logits_after: at the position.
    """

    title: ClassVar[str] = "The prediction with heads edited"
    logits_before: Float[Tensor, " d_vocab_out"]
    logits_after: Float[Tensor, " d_vocab_out"]


@torch.no_grad()
def intervene(
    model: AttentionOnlyModel,
    prompt: Input,
    edits: Edit | Sequence[Edit],
    *,
    position: int = -1,
    top_k: int = 10,
) -> Intervention:
    """Run a prompt with heads cut, scaled, or given what they hold in another prompt.

    All edits are made in the same run, in the order given, and everything behind them follows: later
    patterns, norms and neurons (Meng et al. 2022, "activation patching"; with a scale, "steering").
    Later edits of a head stand on what earlier ones left of it.

    Args:
        model: the converted model.
        prompt: a text, or token ids ``[pos]``.
        edits: one ``Edit`` or several.
        position: where the prediction is read; negative counts from the end.
        top_k: how many outputs of each run are listed.

    Raises:
        MechInterpError: several prompts, an unknown head or a virtual one, a position outside the prompt,
            a scale that is not finite, a source of another length, no edits, top_k below 1.
    """
    edits = [edits] if isinstance(edits, Edit | str) else list(edits)
    batch = model.to_batch(prompt, padding_side="right")
    _refuse(batch, edits, position, top_k)
    changes = [_change(model, batch, edit) for edit in edits]
    plain = _logits(model, batch, [])[position]
    edited = _logits(model, batch, _hooks(model, changes))[position]
    idle = [(where, at, None, 1.0) for where, at, _, _ in changes]
    same = _logits(model, batch, _hooks(model, idle))[position]
    scale = max(1.0, float(plain.abs().max()))
    check = Check(
        "the same heads scaled by 1 leave the logits as they were",
        float((same - plain).abs().max()),
        TOLERANCE[plain.dtype] * scale,
    )
    return Intervention(
        frame=_frame(model, plain, edited, top_k),
        receipt=Receipt(
            (check,),
            {
                "edits": "; ".join(_said(model, edit) for edit in edits),
                "position": position % batch.tokens.shape[1],
                "dtype": str(plain.dtype).removeprefix("torch."),
            },
        ),
        logits_before=plain,
        logits_after=edited,
    )


Where = dict[HeadBank, list[int]]
Change = tuple[Where, slice, dict[str, Tensor] | None, float]


def _refuse(batch: Batch, edits: Sequence[Edit], position: int, top_k: int) -> None:
    """Everything that is wrong, in one error."""
    n_rows, n = batch.tokens.shape
    wrong = []
    if n_rows != 1:
        wrong.append(f"got {n_rows} prompts; give one")
    if not edits:
        wrong.append("there are no edits; give mia.causal.Edit('L0H1') or a list of them")
    if top_k < 1:
        wrong.append(f"top_k={top_k}; give at least 1")
    others = [edit for edit in edits if not isinstance(edit, Edit)]
    if others:
        wrong.append(f"{others[0]!r} is not an edit; give mia.causal.Edit({others[0]!r})")
    own = [edit for edit in edits if isinstance(edit, Edit)]
    for at in [position, *(edit.position for edit in own if edit.position is not None)]:
        if not -n <= at < n:
            wrong.append(f"position {at} is outside the prompt of {n} tokens")
    wrong += [
        f"scale={edit.factor} of {edit.heads!r} is not finite" for edit in own if not isfinite(edit.factor)
    ]
    if wrong:
        raise MechInterpError("; ".join(wrong))


def _change(model: AttentionOnlyModel, batch: Batch, edit: Edit) -> Change:
    """Which heads of which banks, where, and what they are given."""
    where: Where = {}
    for label in model.heads.labels(edit.heads):
        if ">" in label:
            raise MechInterpError(
                f"{label} is a virtual head, which holds nothing of its own; edit its heads"
            )
        bank, index = model.heads.find(label)
        where.setdefault(bank, []).append(index)
    n = batch.tokens.shape[1]
    at = slice(None) if edit.position is None else slice(edit.position % n, edit.position % n + 1)
    if edit.source is None:
        return where, at, None, edit.factor
    source = model.to_batch(edit.source, padding_side="right")
    if source.tokens.shape != batch.tokens.shape:
        rows, length = source.tokens.shape
        raise MechInterpError(
            f"heads are patched position by position: the source has {length} tokens"
            f"{f' in {rows} rows' if rows > 1 else ''}, the prompt {n}; give one source of the same length"
        )
    cache = look(model, source, roles=("z",))
    return where, at, {bank.path: cache[bank.hook("z")] for bank in where}, edit.factor


def _hooks(model: AttentionOnlyModel, changes: Sequence[Change]) -> list[Hook]:
    return [
        (bank.hook("z"), _editing(bank, changes))
        for bank in model.banks
        if any(bank in where for where, *_ in changes)
    ]


def _editing(bank: HeadBank, changes: Sequence[Change]) -> Callable[..., Tensor]:
    def hook(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        for where, at, given, scale in changes:
            if bank in where:
                heads = where[bank]
                own = z if given is None else given[bank.path]
                z[:, at, heads] = own[:, at, heads] * scale
        return z

    return hook


def _logits(
    model: AttentionOnlyModel, batch: Batch, hooks: Sequence[Hook]
) -> Float[Tensor, "pos d_vocab_out"]:
    with model.hooks(fwd_hooks=list(hooks)):
        logits: Tensor = model(batch.tokens)
    return logits[0]


def _frame(model: AttentionOnlyModel, plain: Tensor, edited: Tensor, top_k: int) -> pd.DataFrame:
    before, after = (logits.double().log_softmax(-1).cpu() for logits in (plain, edited))
    k = min(top_k, len(before))
    ids = torch.cat([before.topk(k).indices, after.topk(k).indices]).unique()
    ids = ids[torch.maximum(before[ids], after[ids]).argsort(descending=True, stable=True)]
    return pd.DataFrame(
        {
            "token": model.output_texts(ids),
            "token_id": ids.tolist(),
            "change": (after - before)[ids].numpy(),
            "before": before[ids].exp().numpy(),
            "after": after[ids].exp().numpy(),
        }
    )


def _said(model: AttentionOnlyModel, edit: Edit) -> str:
    heads = model.heads.labels(edit.heads)
    named = ", ".join(heads[:3]) + (f" and {len(heads) - 3} more" if len(heads) > 3 else "")
    done = "cut" if edit.factor == 0 else f"times {edit.factor:g}"
    if edit.source is not None:
        done = "as in another prompt" + (f", times {edit.factor:g}" if edit.factor != 1 else "")
    return f"{named} {done}" + ("" if edit.position is None else f" at {edit.position}")
