"""Edges of a model: from what writes to the residual stream to the queries, keys or values that read it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import HeadBank

Edge = tuple[str, str, str]  # from, to, what of it reads: "Q", "K", "V"; "" for the logits
EMBED, LOGITS = "embed", "logits"
ENDS = (EMBED, LOGITS)
POOL = "*"  # ends the name of a whole MLP: L3N*
ARROW = re.compile(r"\s*-+\s*([QKV]?)\s*-*>\s*", re.IGNORECASE)
SHOWN = 5  # edges that an error names

By = dict[
    int, Int[Tensor, " _source"]
]  # heads that are read, by the number of their bank; -1: the embedding


def edge_name(src: str, dst: str, mode: str) -> str:
    """``L0H2 -K-> L1H3``; ``L1H3 -> logits``."""
    return f"{src} -{mode}-> {dst}" if mode else f"{src} -> {dst}"


def steps_of(text: str) -> tuple[list[str], list[str]]:
    """The stations of a path and the modes between them: ``L0H2 -K-> L1H3 -> logits``.

    Raises:
        MechInterpError: the text is no path.
    """
    parts = ARROW.split(text.strip())
    stations, modes = parts[::2], [mode.upper() for mode in parts[1::2]]
    if len(stations) < 2 or not all(stations):
        raise MechInterpError(
            f"{text!r} is not a path; write heads with arrows between them, such as "
            "'L0H2 -K-> L1H3 -> logits'"
        )
    return stations, modes


def edge_of(given: str | Sequence[str]) -> Edge:
    """An edge from its name or its three parts.

    Raises:
        MechInterpError: it is neither.
    """
    if isinstance(given, str):
        stations, modes = steps_of(given)
        if len(stations) != 2:
            raise MechInterpError(f"{given!r} is a path of {len(modes)} edges; give them one by one")
        return stations[0], stations[1], modes[0]
    if len(given) != 3 or not all(isinstance(part, str) for part in given):
        raise MechInterpError(f"{given!r} is not an edge; expected (from, to, mode) or 'L0H2 -K-> L1H3'")
    src, dst, mode = given
    return src, dst, mode


@dataclass(frozen=True)
class Block:
    """The edges from one bank into one side of another: ``id = start + source * n_dst + reader``."""

    src: int
    dst: int
    mode: str
    n_src: int
    n_dst: int
    start: int


@dataclass(frozen=True, eq=False)
class Edges:
    """All edges of a model, numbered.

    Attributes:
        banks: of the model, in order.
        blocks: pairs of banks with a mode; -1 is the embedding as a source and the logits as a reader.
        pools: whether the neurons of an MLP are one end, ``L3N*``, which reads as a whole (mode "").
    """

    banks: tuple[HeadBank, ...]
    blocks: tuple[Block, ...]
    known: dict[tuple[int, int, str], Block] = field(repr=False)
    pools: bool = False

    @classmethod
    def of(cls, model: AttentionOnlyModel, *, pools: bool = False) -> Edges:
        banks = model.banks
        empty = cls(banks, (), {}, pools)
        pairs = [(i, j, mode) for j, bank in enumerate(banks) for mode in empty.modes(j)
                 for i in (-1, *(i for i, b in enumerate(banks) if b.step < bank.step))]  # fmt: skip
        pairs += [(i, -1, "") for i in range(-1, len(banks))]
        blocks, start = [], 0
        for i, j, mode in pairs:
            n_src, n_dst = (1 if at < 0 else len(empty.ends(at)) for at in (i, j))
            blocks.append(Block(i, j, mode, n_src, n_dst, start))
            start += n_src * n_dst
        return cls(banks, tuple(blocks), {(b.src, b.dst, b.mode): b for b in blocks}, pools)

    def pooled(self, bank: int) -> bool:
        """Whether a bank is one end of edges as a whole."""
        return self.pools and not self.banks[bank].mixes_positions

    def modes(self, bank: int) -> tuple[str, ...]:
        """What of a bank's ends reads."""
        return ("",) if self.pooled(bank) else tuple(self.banks[bank].reads)

    def ends(self, bank: int) -> list[str]:
        """The ends of edges in a bank, by name."""
        own = self.banks[bank]
        return [f"L{own.layer}N{POOL}"] if self.pooled(bank) else own.labels()

    def __len__(self) -> int:
        last = self.blocks[-1]
        return last.start + last.n_src * last.n_dst

    def ids(self, edges: Iterable[Edge]) -> Int[Tensor, " edge"]:
        """Numbers of edges by name.

        Raises:
            MechInterpError: edges that the model has not; all of them.
        """
        place = {label: (i, k) for i in range(len(self.banks)) for k, label in enumerate(self.ends(i))}
        sources, readers = place | {EMBED: (-1, 0)}, place | {LOGITS: (-1, 0)}
        found, wrong = [], []
        for edge in edges:
            src, dst, mode = edge
            block = None
            if src in sources and dst in readers:
                (i, s), (j, d) = sources[src], readers[dst]
                block = self.known.get((i, j, mode))
            if block is None:
                wrong.append(edge_name(*edge))
            else:
                found.append(block.start + s * block.n_dst + d)
        if wrong:
            more = [f"and {len(wrong) - SHOWN} more"] if len(wrong) > SHOWN else []
            what = (
                "this model has no such edges (a head reads what earlier ones write, an attention head by "
                "Q, K or V, a neuron by Q or V, the logits and whole MLPs, L3N*, without a mode)"
            )
            raise MechInterpError(listing(what, [*wrong[:SHOWN], *more]))
        return torch.tensor(found, dtype=torch.long)

    def names(self, ids: Int[Tensor, " edge"]) -> list[str]:
        """Names of edges by number."""
        starts = torch.tensor([block.start for block in self.blocks])
        owners = (torch.searchsorted(starts, ids, right=True) - 1).tolist()
        found = []
        for owner, own in zip(owners, ids.tolist(), strict=True):
            block = self.blocks[owner]
            s, d = divmod(own - block.start, block.n_dst)
            src = EMBED if block.src < 0 else self.ends(block.src)[s]
            dst = LOGITS if block.dst < 0 else self.ends(block.dst)[d]
            found.append(edge_name(src, dst, block.mode))
        return found

    def drawn(self, n: int, generator: torch.Generator) -> Int[Tensor, " n"]:
        """``n`` different edges at random."""
        if 2 * n > len(self):
            return torch.randperm(len(self), generator=generator)[:n]
        found = torch.zeros(0, dtype=torch.long)
        while len(found) < n:
            more = torch.randint(len(self), (2 * n,), generator=generator)
            found = torch.cat([found, more]).unique()
        return found[torch.randperm(len(found), generator=generator)[:n]]


class Wires:
    """Some edges by who reads them.

    Attributes:
        rest: all edges but these are meant.
    """

    def __init__(self, edges: Edges, ids: Int[Tensor, " edge"], *, rest: bool = False):
        self.rest = rest
        self._into: dict[tuple[int, str], dict[int, By]] = {}
        ids = ids.sort().values
        starts = torch.tensor([block.start for block in edges.blocks])
        owners, counts = (torch.searchsorted(starts, ids, right=True) - 1).unique_consecutive(
            return_counts=True
        )
        for owner, own in zip(owners.tolist(), ids.split(counts.tolist()), strict=True):
            block = edges.blocks[owner]
            source, reader = (own - block.start) // block.n_dst, (own - block.start) % block.n_dst
            order = reader.sort(stable=True).indices
            heads, sizes = reader[order].unique_consecutive(return_counts=True)
            into = self._into.setdefault((block.dst, block.mode), {})
            for head, sources in zip(heads.tolist(), source[order].split(sizes.tolist()), strict=True):
                into.setdefault(head, {})[block.src] = sources

    def into(self, bank: int, mode: str) -> dict[int, By]:
        """By head of a bank, which sources are named."""
        return self._into.get((bank, mode), {})

    def reaches(self, bank: int) -> bool:
        """Whether any edge goes into a bank (-1: the logits)."""
        return self.rest or any(own == bank for own, _ in self._into)
