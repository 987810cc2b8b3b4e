"""Runs with heads cut out: what each cut does to every token's loss and logit."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch, look
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.frozen.freezing import freeze
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.given import named
from mechinterp_attn.model.heads import Head, HeadBank
from mechinterp_attn.model.index import Heads, One
from mechinterp_attn.model.select import resolve_head, virtual_head

Target = One  # a head of any kind, or an edge such as "L0H1 -K-> L1H2"
Replace = Literal["zero", "mean"]
ByPath = Mapping[str, Tensor]
EDGE = re.compile(r"\s*(\S+)\s*-([QKV])->\s*(\S+)\s*")


@dataclass(frozen=True, eq=False)
class Cut:
    """What is cut in one run.

    Attributes:
        name: as a table shows it.
        kind: "attention", "mlp", "virtual", "edge", "several".
        layer, index: of the head, or of the last one of a chain or edge.
        whole: heads whose output is replaced, by the path of their bank.
        parts: what is taken out of a head's ``z`` and nothing else, ``[batch, pos, d_head]``, by
            path and index: what a virtual head brings there.
        positions: the only position where whole heads are replaced; None: everywhere.
        targets: what was asked for.
    """

    name: str
    kind: str = "several"
    layer: int | None = None
    index: int | None = None
    whole: Mapping[str, list[int]] = field(default_factory=dict)
    parts: Mapping[tuple[str, int], Float[Tensor, "batch pos d_head"]] = field(default_factory=dict)
    positions: slice | None = None
    targets: Sequence[Target] = ()

    def at(self, path: str) -> bool:
        return path in self.whole or any(own == path for own, _ in self.parts)


def targets_of(model: AttentionOnlyModel, heads: Heads | Iterable[Target]) -> list[Target]:
    """What to cut, one by one: edges as they are, heads by their labels, kinds and patterns spelt out.

    Raises:
        MechInterpError: no such heads.
    """
    found: list[Target] = []
    if not isinstance(heads, str | Head | Iterable):
        raise MechInterpError(f"heads={named(heads)}; expected labels of heads, or edges")
    for item in [heads] if isinstance(heads, str | Head) else heads:
        if isinstance(item, str) and EDGE.fullmatch(item):
            found.append(item)
        else:
            found += model.heads.labels([item])
    return list(dict.fromkeys(found))


def cut_of(model: AttentionOnlyModel, target: Target, batch: Batch) -> Cut:
    """The cut that a head, a chain of heads (a virtual head) or an edge stands for.

    Args:
        batch: where it is made. Without a row (``no_rows``) it is checked and named, and nothing is run.

    Raises:
        MechInterpError: unknown labels, or a chain or edge in which a head cannot read the one before.
    """
    edge = EDGE.fullmatch(target) if isinstance(target, str) else None
    if edge is not None:
        src, side, dst = edge.groups()
        ends = virtual_head(model, src, dst).heads  # checks them
        (first, i), (last, index) = (model.heads.find(head.label) for head in ends)
        if side not in last.sides:
            raise MechInterpError(f"{dst} has a constant key, which nothing can change; give Q or V")
        part = through(model, (first, i), side, (last, index), batch)
        name, kind = f"{src} -{side}-> {dst}", "edge"
    else:
        head = resolve_head(model, target)
        chain = [model.heads.find(one.label) for one in head.chain]
        last, index = chain[-1]
        if len(chain) == 1:
            whole = {last.path: [index]}
            return Cut(head.label, last.kind, last.layer, index, whole=whole, targets=(target,))
        part = brought(model, chain, batch)
        name, kind = head.label, "virtual"
    return Cut(name, kind, last.layer, index, parts={(last.path, index): part}, targets=(target,))


def remade(model: AttentionOnlyModel, cut: Cut, batch: Batch) -> Cut:
    """A cut for other sequences, where what its chains and edges bring is another thing."""
    return replace(cut, parts=cut_of_all(model, cut.targets, batch).parts) if cut.parts else cut


def no_rows(batch: Batch) -> Batch:
    """A batch of the same length with nothing in it."""
    return Batch(batch.tokens[:0], batch.real[:0])


def cut_of_all(model: AttentionOnlyModel, targets: Sequence[Target], batch: Batch) -> Cut:
    """One cut of many heads, chains and edges.

    Raises:
        MechInterpError: as for ``cut_of``.
    """
    names: list[str] = []
    whole: dict[str, list[int]] = {}
    parts: dict[tuple[str, int], Tensor] = {}
    for target in targets:
        label = target.label if isinstance(target, Head) else target
        if isinstance(label, str) and ">" not in label:  # neither a chain nor an edge
            bank, index = model.heads.find(label)
            names.append(bank.label(index))
            whole.setdefault(bank.path, []).append(index)
            continue
        cut = cut_of(model, target, batch)
        names.append(cut.name)
        for path, indices in cut.whole.items():
            whole.setdefault(path, []).extend(indices)
        for key, part in cut.parts.items():
            parts[key] = parts[key] + part if key in parts else part
    return Cut(" + ".join(names), whole=whole, parts=parts, targets=tuple(targets))


@torch.no_grad()
def through(
    model: AttentionOnlyModel,
    src: tuple[HeadBank, int],
    side: str,
    dst: tuple[HeadBank, int],
    batch: Batch,
) -> Float[Tensor, "batch pos d_head"]:
    """What changes in a head's ``z`` when its queries, keys or values are those of a run without an
    earlier head, and all else is as it was (Wang et al. 2022, "path patching"). What the earlier head
    does through heads in between is part of it.
    """
    (bank, index), (first, i) = dst, src
    point, z = bank.hook(side.lower()), bank.hook("z")
    seen: dict[str, Tensor] = {}

    def keep(name: str) -> Callable[..., None]:
        return lambda x, hook: seen.__setitem__(name, x)

    runs: list[list[tuple[str, Callable[..., Any]]]] = [
        [(z, keep("whole"))],
        [*cutting(model, [Cut("src", whole={first.path: [i]})]), (point, keep("side"))],
        [(point, lambda x, hook: seen["side"]), (z, keep("cut"))],
    ]
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    for hooks in runs if len(batch) else []:
        with model.hooks(fwd_hooks=hooks):
            model(batch.tokens, return_type=None, **padded)
    if not seen:
        return torch.zeros(*batch.tokens.shape, bank.d_head)
    return bank.by_head(seen["whole"] - seen["cut"])[:, :, index]


def brought(
    model: AttentionOnlyModel, chain: Sequence[tuple[HeadBank, int]], batch: Batch
) -> Float[Tensor, "batch pos d_head"]:
    """What the last head of a chain holds (``z``) that came through the heads before it, with the
    patterns and norms of the plain run (Elhage et al. 2021, "virtual attention heads").
    """
    last, _ = chain[-1]
    out = torch.zeros(*batch.tokens.shape, last.d_head, dtype=model.W_E.dtype, device=model.W_E.device)
    for row, (tokens, real) in enumerate(zip(batch.tokens, batch.real, strict=True)):
        frozen = freeze(model, tokens[real])
        places = [frozen.locate(bank.label(index)) for bank, index in chain]
        z = frozen.held_at(places[0])
        for place, reader in pairwise(places):
            z = frozen.read_at(reader, frozen.write_at(place, z), place.depth)
        out[row, real] = z
    return out


@torch.no_grad()
def cut_logits(
    model: AttentionOnlyModel,
    many: Batch,
    cuts: Sequence[Cut],
    *,
    replacement: ByPath | None,
    patterns: ByPath | None,
) -> Float[Tensor, "cut_batch pos d_vocab_out"]:
    """Logits with each of the cuts made in a run of its own.

    Args:
        many: the sequences, once for every cut.
        replacement: what heads that are cut whole hold instead, ``[head, ...]`` by path; None: zero.
        patterns: patterns to hold all heads to, by path; None: patterns follow the cut.
    """
    hooks = cutting(model, cuts, replacement)
    if patterns is not None:
        held = [(bank, patterns[bank.path]) for bank in model.banks if bank.path in patterns]
        hooks += [(bank.hook("pattern"), _holding(pattern, len(cuts))) for bank, pattern in held]
    padded: dict[str, Any] = {} if many.mask is None else {"attention_mask": many.mask}
    with model.hooks(fwd_hooks=hooks):
        return model(many.tokens, **padded)


def run_cuts(
    model: AttentionOnlyModel,
    batch: Batch,
    cuts: Sequence[Cut],
    *,
    replacement: ByPath | None,
    patterns: ByPath | None,
) -> tuple[Float[Tensor, "cut batch pos_minus_1"], Float[Tensor, "cut batch pos_minus_1"]]:
    """Loss and logit of every next token, with each of the cuts made; arguments as for ``cut_logits``."""
    many = batch.repeat(len(cuts))
    logits = cut_logits(model, many, cuts, replacement=replacement, patterns=patterns)
    loss, logit = next_token(logits, many)
    return loss.unflatten(0, (len(cuts), -1)), logit.unflatten(0, (len(cuts), -1))


def next_token(
    logits: Float[Tensor, "batch pos d_vocab"], batch: Batch
) -> tuple[Float[Tensor, "batch pos_minus_1"], Float[Tensor, "batch pos_minus_1"]]:
    """Loss (nats) of every next token and its logit against the average logit, of which softmax sees
    nothing; zero on padding. In ``loss_dtype``.

    Raises:
        MechInterpError: fewer than two tokens.
    """
    if batch.tokens.shape[1] < 2:
        raise MechInterpError("a loss needs at least 2 tokens, got 1: there is no next token")
    logits = logits[:, :-1].to(loss_dtype(logits.dtype))
    logit = logits.gather(-1, batch.tokens[:, 1:, None])[..., 0]
    loss, logit = logits.logsumexp(-1) - logit, logit - logits.mean(-1)
    return loss * batch.predicts, logit * batch.predicts


def loss_dtype(dtype: torch.dtype) -> torch.dtype:
    """In which losses of a model of some dtype are taken and kept: its own, float32 for narrower ones."""
    return torch.promote_types(dtype, torch.float32)


def saved_patterns(model: AttentionOnlyModel, batch: Batch) -> dict[str, Tensor]:
    """The pattern of every bank, by path."""
    cache = look(model, batch, roles=("pattern",))
    return {bank.path: cache[bank.hook("pattern")] for bank in model.banks}


@torch.no_grad()
def mean_z(model: AttentionOnlyModel, parts: Iterator[Batch]) -> dict[str, Tensor]:
    """What every head holds on average over real tokens, ``[head, ...]`` by path."""
    sums: dict[str, Tensor] = {}
    count = 0
    for part in parts:
        cache = look(model, part, roles=("z",))
        count += int(part.real.sum())
        for bank in model.banks:
            z = cache[bank.hook("z")][part.real].double().sum(0)
            sums[bank.path] = sums.get(bank.path, 0) + z
    return {path: total / count for path, total in sums.items()}


def cutting(
    model: AttentionOnlyModel, cuts: Sequence[Cut], replacement: ByPath | None = None
) -> list[tuple[str, Callable[..., Tensor]]]:
    """Hooks that make each cut in its own share of a batch, one share after the other.

    Args:
        replacement: what heads that are cut whole hold instead, by path: ``[head, ...]``, or
            ``[batch, pos, head, ...]`` of one share; None: zero.
    """
    return [
        (bank.hook("z"), _cutting(bank, cuts, replacement))
        for bank in model.banks
        if any(cut.at(bank.path) for cut in cuts)
    ]


def _cutting(bank: HeadBank, cuts: Sequence[Cut], replacement: ByPath | None) -> Callable[..., Tensor]:
    def hook(z: Tensor, hook: Any) -> Tensor:
        z = z.clone()
        runs = bank.by_head(z).unflatten(0, (len(cuts), -1))  # a view of z
        other = torch.zeros_like(z[0, 0]) if replacement is None else replacement[bank.path]
        given = bank.by_head(other[None])[0].to(z.dtype).expand_as(runs[0])
        for run, cut in zip(runs, cuts, strict=True):
            heads = cut.whole.get(bank.path)
            if heads:
                at = slice(None) if cut.positions is None else cut.positions
                run[:, at, heads] = given[:, at, heads]
            for (own, index), part in cut.parts.items():
                if own == bank.path:
                    run[:, :, index] -= part
        return z

    return hook


def _holding(pattern: Tensor, n: int) -> Callable[..., Tensor]:
    return lambda own, hook: torch.cat([pattern] * n)
