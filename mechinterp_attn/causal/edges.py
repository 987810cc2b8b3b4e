"""Scores of the edges between heads: what one writes along the gradient at what another one reads.

The gradient at the queries, keys or values of a head, pulled back through its weights and the norm in
front, is a direction in the residual stream at every position; the score of an edge is what the earlier
head's change writes along it (edge attribution patching, Syed et al. 2023). The norm's derivative is
``a C - b w w'`` under every rule (C centres), so that for a neuron, which reads along one vector, the
scores with all heads of a bank are two matrix products, and no head's output is ever written out.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.flow import FIRST, splits
from mechinterp_attn.causal.gradients import graph
from mechinterp_attn.causal.patches import Fill, some
from mechinterp_attn.causal.rules import Hook, Rules
from mechinterp_attn.causal.runs import rows_at_once, watched, wide
from mechinterp_attn.causal.wires import EMBED, LOGITS, Edges, edge_name
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.norm import Norm


@dataclass(frozen=True, eq=False)
class Pull:
    """The derivative of a norm at every token: ``x -> scale C x - tilt (along . x) along``."""

    centred: bool
    scale: Tensor  # [token, 1]
    tilt: Tensor  # [token, 1]
    along: Tensor  # [token, d_model]

    def __call__(self, x: Tensor) -> Tensor:
        """Of fields ``[..., token, d_model]``; its own transpose."""
        tilted = self.tilt * (self.along * x).sum(-1, keepdim=True) * self.along
        return self.scale * self.centre(x) - tilted

    def centre(self, x: Tensor) -> Tensor:
        return x - x.mean(-1, keepdim=True) if self.centred else x


@dataclass(frozen=True, eq=False)
class Collected:
    """Everything that the scores are made of, one row per real token of every prompt (and step).

    Attributes:
        change: by path, what every head holds less its patch, ``[token, head, d_head]``.
        reads: by path and mode, the gradient there, ``[token, head, d_head]``.
        norms: by path, the derivative of the norm in front.
        start: change of the stream before the first bank, ``[token, d_model]``.
        end: gradient at the stream behind the last one, ``[token, d_model]``.
    """

    change: dict[str, Tensor]
    reads: dict[tuple[str, str], Tensor]
    norms: dict[str, Pull]
    start: Tensor
    end: Tensor


def edge_cost(model: AttentionOnlyModel, bound: Bound, steps: int) -> tuple[int, int]:
    """Bytes of what is kept of all prompts, since scores are sums over all of them, with the scores of two
    banks; and operations of the products.
    """
    tokens, d_model = steps * int(bound.clean.real.sum()), model.spec.d_model
    banks = list(model.banks)
    heads = sum(bank.n_heads * bank.d_head for bank in banks)
    flops, widest = 0, 0
    for bank in banks:
        earlier = sum(b.n_heads * b.d_head for b in banks if b.step < bank.step)
        flops += 2 * len(bank.reads) * tokens * (earlier * bank.n_heads + earlier * d_model)
        widest = max([widest, *(b.n_heads * bank.n_heads for b in banks if b.step < bank.step)])
    floats = tokens * (4 * heads + 4 * len(banks) * d_model) + 3 * widest
    return model.W_E.element_size() * floats, flops


def edge_scores(
    model: AttentionOnlyModel,
    bound: Bound,
    rules: Rules,
    *,
    steps: int,
    fill: Fill,
    top_k: int,
    heads: Collection[str] | None = None,
    max_bytes: int,
) -> tuple[pd.DataFrame, int, float]:
    """The edges with the largest scores, ``src, dst, mode, edge, score``; how many there are; and the sum
    of the scores of all edges out of the embedding.

    Args:
        heads: labels of the only heads between which edges are wanted, beside the embedding and the logits.

    Raises:
        MechInterpError: a model with norms behind its sublayers.
    """
    splits(model)
    got = collect(model, bound, rules, steps, fill, max_bytes - edge_cost(model, bound, steps)[0])
    count = len(bound) * steps
    edges = Edges.of(model)
    best, banks = Best(top_k, chosen_ends(edges, heads)), list(model.banks)
    with Progress(desc="scoring edges", total=len(banks) + 1) as progress:
        for number, bank in enumerate(banks):
            earlier = [i for i, other in enumerate(banks) if other.step < bank.step]
            for mode in bank.reads:
                best.add(_from_embed(got, bank, mode) / count, None, number, mode)
                for i in earlier:
                    best.add(_between(got, banks[i], bank, mode) / count, i, number, mode)
            progress.update()
        best.add((got.start * got.end).sum()[None, None] / count, None, None, "")
        for i, bank in enumerate(banks):
            change = got.change[bank.path]
            along = (got.end @ _writes(bank).flatten(0, 1).T).unflatten(-1, change.shape[1:])
            best.add((change * along).sum((0, 2))[:, None] / count, i, None, "")
        progress.update()
    return best.frame(edges), best.total, best.inputs


def _between(got: Collected, src: HeadBank, dst: HeadBank, mode: str) -> Tensor:
    """Scores ``[src head, dst head]``."""
    change, gradient = got.change[src.path], got.reads[dst.path, mode]
    writes, pull = _writes(src).flatten(0, 1), got.norms[dst.path]  # [head * d_head, d_model]
    flat = change.flatten(1)
    if dst.d_head > 1:
        out = []
        for head in range(dst.n_heads):
            field = pull(gradient[:, head] @ dst.reads[mode][head].T)  # [token, d_model]
            out.append((flat * (field @ writes.T)).sum(0).unflatten(0, change.shape[1:]).sum(-1))
        return torch.stack(out, 1)
    g, W = gradient[..., 0], dst.reads[mode][..., 0].T  # [token, dst], [d_model, dst]
    plain = (flat.T @ (pull.scale * g)) * (writes @ pull.centre(W.T).T)
    plain = plain.unflatten(0, change.shape[1:]).sum(1)
    if not bool(pull.tilt.any()):
        return plain
    along = (flat * (pull.along @ writes.T)).unflatten(1, change.shape[1:]).sum(-1)  # [token, src]
    return plain - along.T @ (pull.tilt * g * (pull.along @ W))


def _from_embed(got: Collected, dst: HeadBank, mode: str) -> Tensor:
    moved = got.norms[dst.path](got.start)  # [token, d_model]
    read = torch.einsum("td,hdk->thk", moved, dst.reads[mode])
    return (read * got.reads[dst.path, mode]).sum((0, 2))[None]


def _writes(bank: HeadBank) -> Tensor:
    return bank.stacked("O")


def chosen_ends(edges: Edges, heads: Collection[str] | None) -> list[Tensor] | None:
    """Of every bank, the numbers of the ends that some heads are, or that they are all of; None: all ends.

    Raises:
        MechInterpError: some, but not all neurons of an MLP that is one end.
    """
    if heads is None:
        return None
    own, found = set(heads), []
    for number, bank in enumerate(edges.banks):
        labels = bank.labels()
        inside = [i for i, label in enumerate(labels) if label in own]
        if edges.pooled(number) and inside:
            if len(inside) < len(labels):
                raise MechInterpError(
                    f"heads has {len(inside):,} of the {len(labels):,} neurons of layer {bank.layer}, and "
                    f"with pools=True they are one end, L{bank.layer}N*: give all of them, or pools=False"
                )
            inside = [0]
        found.append(torch.tensor(inside, dtype=torch.long))
    return found


class Best:
    """The edges with the largest scores seen so far."""

    def __init__(self, k: int, chosen: list[Tensor] | None = None):
        self.k, self.total = k, 0
        self.chosen = chosen  # of every bank, the ends that are wanted
        self.inputs = 0.0  # scores of the edges out of the embedding
        self.rows = torch.zeros(0, 5, dtype=torch.long)  # src bank, src head, dst bank, dst head, mode
        self.scores = torch.zeros(0)

    def add(self, scores: Tensor, src: int | None, dst: int | None, mode: str) -> None:
        self.inputs += float(scores.double().sum()) if src is None else 0.0
        own = [
            torch.arange(n) if self.chosen is None or bank is None else self.chosen[bank]
            for n, bank in zip(scores.shape, (src, dst), strict=True)
        ]
        scores = scores[own[0]][:, own[1]]
        self.total += scores.numel()
        if not scores.numel():
            return
        flat = scores.flatten()
        at = flat.abs().topk(min(self.k, len(flat))).indices
        rows = torch.zeros(len(at), 5, dtype=torch.long)
        rows[:, 0], rows[:, 2] = (-1 if i is None else i for i in (src, dst))
        rows[:, 1], rows[:, 3] = own[0][(at // scores.shape[1]).cpu()], own[1][(at % scores.shape[1]).cpu()]
        rows[:, 4] = " QKV".index(mode or " ")
        self.rows = torch.cat([self.rows, rows])
        self.scores = torch.cat([self.scores, flat[at].float().cpu()])
        if len(self.rows) > self.k:
            keep = self.scores.abs().topk(self.k).indices
            self.rows, self.scores = self.rows[keep], self.scores[keep]

    def frame(self, edges: Edges) -> pd.DataFrame:
        ends = [edges.ends(number) for number in range(len(edges.banks))]
        order = self.scores.abs().argsort(descending=True, stable=True)
        rows = []
        for (i, src, j, dst, mode), score in zip(
            self.rows[order].tolist(), self.scores[order].tolist(), strict=True
        ):
            names = EMBED if i < 0 else ends[i][src], LOGITS if j < 0 else ends[j][dst]
            edge = (*names, " QKV"[mode].strip())
            rows.append((*edge, edge_name(*edge), score))
        return pd.DataFrame(rows, columns=["src", "dst", "mode", "edge", "score"])


def collect(
    model: AttentionOnlyModel, bound: Bound, rules: Rules, steps: int, fill: Fill, max_bytes: int
) -> Collected:
    """The pieces of some prompts, a few at a time.

    Args:
        steps: inputs between the counterfactual and the clean ones at which gradients are taken.
    """
    rows = max(1, rows_at_once(model, bound, max_bytes, backward=True) // (3 if rules.paired else 2))
    parts = []
    for at, part in bound.split(rows):
        base = some(fill.base, at, part)
        other = None if fill.other is None else some(fill.other, at, part)
        patch = fill.of(model, at, part)
        if steps == 1 or other is None:
            parts.append(_of_part(model, part, base, other, patch, rules, None))
            continue
        (seen, z), (far, _) = (watched(model, part, batch, {FIRST}) for batch in (base, other))
        one, two = seen[FIRST], far[FIRST]
        for step in range(steps):
            middle = two + (step + 0.5) / steps * (one - two)
            parts.append(_of_part(model, part, base, other, patch, rules, Between(one - two, z, middle)))
    first = parts[0]

    def joined(pick: Callable[[Collected], Tensor]) -> Tensor:
        return torch.cat([pick(part) for part in parts])

    def pull(path: str) -> Pull:
        sides = (
            joined(lambda p, side=side: getattr(p.norms[path], side)) for side in ("scale", "tilt", "along")
        )
        return Pull(first.norms[path].centred, *sides)

    return Collected(
        {path: joined(lambda p, path=path: p.change[path]) for path in first.change},
        {key: joined(lambda p, key=key: p.reads[key]) for key in first.reads},
        {path: pull(path) for path in first.norms},
        joined(lambda p: p.start),
        joined(lambda p: p.end),
    )


class Between(NamedTuple):
    """Inputs between the counterfactual and the clean ones.

    Attributes:
        change: of the stream before the first bank, from the one to the other, ``[n, pos, d_model]``.
        z: what every head holds in the clean run, by path.
        middle: that stream between them.
    """

    change: Tensor
    z: dict[str, Tensor]
    middle: Tensor


def _of_part(
    model: AttentionOnlyModel,
    part: Bound,
    base: Any,
    other: Any,
    patch: dict[str, Tensor],
    rules: Rules,
    between: Between | None,
) -> Collected:
    """The pieces from one pass over some prompts; with ``between``, at other inputs than theirs."""
    seen: dict[str, Tensor] = {}

    def viewed(name: str) -> Hook:
        def hook(x: Tensor, hook: Any) -> Tensor:
            seen[name] = x.view_as(x)
            return seen[name]

        return name, hook

    def kept(name: str) -> Hook:
        return name, lambda x, hook: seen.__setitem__(name, x)

    last = f"blocks.{model.spec.n_layers - 1}.hook_resid_post"
    streams = {model.stream_of(bank) for bank in model.banks} | {FIRST}
    hooks = [viewed(bank.hook(mode.lower())) for bank in model.banks for mode in bank.reads]
    hooks += [kept(bank.hook("attn_scores")) for bank in model.banks if bank.mixes_positions]
    hooks += [viewed(last), *(kept(name) for name in streams)]
    if between is not None:
        middle = between.middle
        hooks = [(FIRST, lambda x, hook: middle + 0 * x), *hooks]
    run = graph(model, part, base, rules, hooks=hooks, other=other)
    n = len(part)
    wanted: dict[str, Tensor] = {last: seen[last]}
    for bank in model.banks:
        wanted[bank.hook("z")] = run.held[bank.path]
        names = ["q", "attn_scores"] if bank.mixes_positions else [mode.lower() for mode in bank.reads]
        wanted |= {bank.hook(name): seen[bank.hook(name)] for name in names}
    gradients = dict(zip(wanted, run.gradients(list(wanted.values())), strict=True))

    def one(x: Tensor) -> Tensor:
        """Both runs' mean, where there are two."""
        x = x.detach()
        return x.unflatten(0, (2, -1)).mean(0) if rules.paired else x

    real = base.real

    def tokens(x: Tensor) -> Tensor:
        return x[real]

    change, reads, norms = {}, {}, {}
    for bank in model.banks:
        at = bank.path
        own = run.held[at].detach()[:n] if between is None else between.z[at]
        less = run.held[at].detach()[n:] if rules.paired else patch[at].to(own.dtype)
        change[at] = tokens(wide(own - less))
        if bank.mixes_positions:
            reads[at, "Q"] = tokens(one(gradients[bank.hook("q")]))
            for mode, behind in (("K", "attn_scores"), ("V", "z")):
                source, axis = (seen[bank.hook("attn_scores")], 1) if mode == "K" else (run.held[at], 2)
                side = seen[bank.hook(mode.lower())]
                found_grad = _per_head(source, gradients[bank.hook(behind)], side, axis, bank.n_heads)
                reads[at, mode] = tokens(one(found_grad))
        else:
            for mode in bank.reads:
                reads[at, mode] = tokens(wide(one(gradients[bank.hook(mode.lower())])))
        norm, _ = model.norm_of(bank)
        norms[at] = _pull(norm, seen[model.stream_of(bank)].detach(), rules, real)
    if between is None:
        x = seen[FIRST].detach()
        start = x[:n] - (x[n:] if rules.paired else _other_start(model, part, other, x))
    else:
        start = between.change
    end = one(gradients[last])
    return Collected(change, reads, norms, tokens(start), tokens(end))


def _other_start(model: AttentionOnlyModel, part: Bound, other: Any, x: Tensor) -> Tensor:
    """The stream before the first bank in the patched-in run; where patches are constants, the same."""
    return x if other is None else watched(model, part, other, {FIRST})[0][FIRST]


def _per_head(source: Tensor, gradient: Tensor, side: Tensor, axis: int, n_heads: int) -> Tensor:
    """The gradient at keys or values for every head alone, also where several share them."""
    shared = side.shape[2]
    group = n_heads // shared
    if group == 1:
        return torch.autograd.grad(source, side, gradient, retain_graph=True)[0]
    members = torch.arange(n_heads, device=side.device) % group
    shape = [1] * source.ndim
    shape[axis] = n_heads
    out = []
    for member in range(group):
        mine = gradient * (members == member).view(shape)
        out.append(torch.autograd.grad(source, side, mine, retain_graph=True)[0])
    return torch.stack(out, 3).flatten(2, 3)


def _pull(norm: Norm, x: Tensor, rules: Rules, real: Tensor) -> Pull:
    if norm.kind is None:
        x = x[: len(real)][real]
        one = x.new_ones(len(x), 1)
        return Pull(False, one, torch.zeros_like(one), torch.zeros_like(x))
    centred = norm.kind == "LN"
    if centred:
        x = x - x.mean(-1, keepdim=True)
    halves = x.unflatten(0, (2, -1)) if rules.paired else x[None]
    halves = torch.stack([half[real] for half in halves])
    s = (halves.square().mean(-1, keepdim=True) + norm.eps).sqrt()
    if rules.norm == "secant":
        (a, b), along = s, halves.mean(0)
        scale, tilt = (1 / a + 1 / b) / 2, 2 / (x.shape[-1] * a * b * (a + b))
    else:
        along, own = halves[0], s[0]
        scale, tilt = 1 / own, 1 / (x.shape[-1] * own**3)
        if rules.norm == "fixed":
            tilt = torch.zeros_like(tilt)
    return Pull(centred, scale, tilt, along)
