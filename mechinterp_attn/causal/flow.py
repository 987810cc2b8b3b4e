"""What changes in a run when a change flows along given edges, and along no others.

Every head keeps what it holds in the base run, but for what reaches it: its queries, keys and values read
the base run's stream and, on top of it, what the sources of its own edges write differently, through the
norm in front, whose scale follows. So every reader has a stream of its own (Wang et al. 2022 and
Goldowsky-Dill et al. 2023, "path patching"; Conmy et al. 2023). All of it is exact.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch
from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.rules import Hook
from mechinterp_attn.causal.runs import run, wide
from mechinterp_attn.causal.wires import By, Edges, Wires
from mechinterp_attn.causal.written import Written
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank

CHUNK = 2**26  # bytes of readers' streams that are held at a time
FIRST = "blocks.0.hook_resid_pre"


def splits(model: AttentionOnlyModel) -> None:
    """Raises:
    MechInterpError: what heads write is no sum in front of the next reader, or ends in front of it.
    """
    anew = [one.layer for one in model.spec.dictionaries if one.at == "resid_post"]
    if anew:
        raise MechInterpError(
            f"features describe the residual stream behind layers {anew}: what is written before reaches "
            "what is behind through features and errors only; edges and paths are patched in models "
            "without them; use units='heads' or whole heads"
        )
    if model.spec.post_norm is not None or model.spec.stream_norm is not None:
        raise MechInterpError(
            "this model has norms behind its sublayers, through which what heads write is no sum; edges "
            "and paths are patched in models with norms in front only; use units='heads' or whole heads"
        )


class Flow:
    """One run of some prompts with a change flowing along edges.

    Args:
        base: the prompts that are run; ``held`` is what every head holds there (``z``), by path.
        wires: along which edges the change flows.
        embed: what is different in the stream in front of the first head, ``[n, pos, d_model]``.
        sources: what is different in ``z`` of the heads where the change starts, by path.

    Attributes:
        logits: as the model gives them, at the position alone where the metric reads no more.
        changes: what came of every bank's ``z`` on the way, by path, ``[n, pos, head, d_head]``.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: AttentionOnlyModel,
        part: Bound,
        base: Batch,
        held: Mapping[str, Tensor],
        edges: Edges,
        wires: Wires,
        *,
        embed: Float[Tensor, "n pos d_model"] | None = None,
        sources: Mapping[str, Tensor] = {},
    ):
        self.model, self.edges, self.wires, self.held = model, edges, wires, held
        self.n = len(part)
        self.embed = None if embed is None else embed.flatten(0, 1)
        self.sources = sources
        self.written: dict[int, Tensor] = {}  # what is different, by bank, [token, head * d_head]
        self.all: Any = 0.0 if self.embed is None else self.embed
        self.pools = None if not edges.pools or self.embed is None else Written(edges, self.embed)
        self.changes: dict[str, Tensor] = {}
        self.stream: dict[str, Tensor] = {}
        # Heads that share keys and values get copies of the run, in each of which another one owns them.
        self.copies = max((getattr(bank, "group", 1) for bank in model.banks), default=1)
        hooks: list[Hook] = [(name, self._keep(name)) for name in {model.stream_of(b) for b in model.banks}]
        for number, bank in enumerate(model.banks):
            if wires.reaches(number) or bank.path in sources:
                hooks += [(bank.hook(m.lower()), self._reading(number, m)) for m in bank.reads]
                hooks.append((bank.hook("z"), self._holding(number)))
        last = f"blocks.{model.spec.n_layers - 1}.hook_resid_post"
        hooks.append((last, self._end))
        many = part.repeat(self.copies)
        self.logits = run(model, many, base.repeat(self.copies), hooks)[: self.n]

    def _keep(self, name: str) -> Any:
        def hook(x: Tensor, hook: Any) -> None:
            self.stream[name] = x[: self.n].flatten(0, 1)

        return hook

    def _reading(self, number: int, mode: str) -> Any:
        """Queries, keys or values with what came to them."""
        bank = self.edges.banks[number]

        def hook(x: Tensor, hook: Any) -> Tensor | None:
            moved = self._moved(bank, number, mode)
            if moved is None:
                return None
            moved = moved.unflatten(0, (self.n, -1))
            if x.ndim == 3:
                return x + moved[..., 0].repeat(self.copies, 1, 1)
            group = bank.n_heads // x.shape[2]  # of heads that share one key and value
            own = [moved[:, :, copy % group :: group] for copy in range(self.copies)]
            return x + torch.cat(own)

        return hook

    def _moved(self, bank: HeadBank, number: int, mode: str) -> Float[Tensor, "token head d_head"] | None:
        pooled = self.edges.pooled(number)
        named = self.wires.into(number, "" if pooled else mode)
        if not named and not self.wires.rest:
            return None
        x = self.stream[self.model.stream_of(bank)]
        norm, _ = self.model.norm_of(bank)
        plain, W = norm.plain(x), bank.reads[mode]
        if pooled:
            moved = norm.plain(x + self._change(named.get(0, {}))) - plain
            return torch.einsum("td,hdk->thk", moved, W)
        out = x.new_zeros(len(x), bank.n_heads, bank.d_head)
        if self.wires.rest:
            out += torch.einsum("td,hdk->thk", norm.plain(x + self.all) - plain, W)
        heads = list(named)
        at_a_time = max(1, CHUNK // (x.element_size() * x.numel()))
        for start in range(0, len(heads), at_a_time):
            some = heads[start : start + at_a_time]
            streams = x + self._changes([named[head] for head in some])
            out[:, some] = torch.einsum("htd,hdk->thk", norm.plain(streams) - plain, W[some])
        return out

    def _changes(self, several: list[By]) -> Float[Tensor, "reader token d_model"]:
        if self.pools is None:
            return torch.stack([self._change(by) for by in several])
        total = self.pools.sums(several)
        return self.all - total if self.wires.rest else total

    def _change(self, by: By) -> Tensor:
        """What is different in a reader's stream, for the sources that are named for it."""
        if self.pools is not None:
            return self._changes([by])[0]
        total = torch.zeros_like(next(iter(self.stream.values())))
        for source, heads in by.items():
            if source < 0:
                total = total if self.embed is None else total + self.embed
            elif source in self.written:
                bank = self.edges.banks[source]
                z = self.written[source].unflatten(1, (bank.n_heads, -1))[:, heads].flatten(1)
                total = total + z @ bank.stacked("O", heads).flatten(0, 1)
        return self.all - total if self.wires.rest else total

    def _holding(self, number: int) -> Any:
        """Keeps what is different in ``z``, and lets the base run go on as it was."""
        bank = self.edges.banks[number]
        before = self.held[bank.path]

        def hook(z: Tensor, hook: Any) -> Tensor:
            change = self._own(bank, wide(z).unflatten(0, (self.copies, -1))) - wide(before)
            reached = [head for m in self.edges.modes(number) for head in self.wires.into(number, m)]
            if not self.wires.rest and not self.edges.pooled(number):
                change = _only(change, reached)
            if bank.path in self.sources:
                change = change + wide(self.sources[bank.path])
            self.changes[bank.path] = change
            self.written[number] = change.flatten(2).flatten(0, 1)
            if self.pools is not None:
                self.pools.add(number, change.flatten(0, 1))
            if self.wires.rest:
                self.all = self.all + self.written[number] @ bank.stacked("O").flatten(0, 1)
            return before.repeat(self.copies, *[1] * (before.ndim - 1))

        return hook

    def _own(self, bank: HeadBank, z: Float[Tensor, "copy n pos head d_head"]) -> Tensor:
        """Every head's ``z`` from the copy of the run in which keys and values are its own."""
        if not bank.mixes_positions or self.copies == 1:
            return z[0]
        return torch.stack([z[head % self.copies, :, :, head] for head in range(bank.n_heads)], 2)

    def _end(self, x: Tensor, hook: Any) -> Tensor:
        change = self._change(self.wires.into(-1, "").get(0, {}))
        return x + change.unflatten(0, (self.n, -1)).repeat(self.copies, 1, 1)


def _only(change: Tensor, heads: list[int]) -> Tensor:
    """Zero but for some heads, which alone were reached; the others differ by rounding at most."""
    out = torch.zeros_like(change)
    out[:, :, heads] = change[:, :, heads]
    return out
