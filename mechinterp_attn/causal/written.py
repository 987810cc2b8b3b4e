"""What the ends of edges write, where MLPs are whole: few enough ends to hold what each of them writes."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.wires import By, Edges
from mechinterp_attn.model.attention_only import AttentionOnlyModel


class Written:
    """What the embedding, every head and every whole MLP writes differently, the earliest first.

    Attributes:
        first: of every bank, the row where its ends start; of the number behind the last bank, how many
            rows there are; of -1, the embedding's.
        rows: ``[end, token, d_model]``.
    """

    def __init__(self, edges: Edges, embed: Float[Tensor, "token d_model"]):
        self.edges = edges
        sizes = [len(edges.ends(number)) for number in range(len(edges.banks))]
        self.first = {-1: 0} | {number: 1 + sum(sizes[:number]) for number in range(len(sizes) + 1)}
        self.rows = embed.new_zeros(1 + sum(sizes), *embed.shape)
        self.rows[0] = embed
        self.filled = 1

    def add(self, number: int, change: Float[Tensor, "token head d_head"]) -> None:
        W = self.edges.banks[number].stacked("O")
        start = self.first[number]
        self.filled = self.first[number + 1]
        if self.edges.pooled(number):
            self.rows[start] = change.flatten(1) @ W.flatten(0, 1)
        else:
            self.rows[start : start + len(W)] = torch.einsum("thk,hkd->htd", change, W)

    def sums(self, several: list[By]) -> Float[Tensor, "reader token d_model"]:
        """For every reader, the sum over its sources."""
        chosen = self.rows.new_zeros(len(several), self.filled)
        for row, by in enumerate(several):
            for source, heads in by.items():
                if self.first[source] < self.filled:
                    chosen[row, self.first[source] + heads] = 1
        return (chosen @ self.rows[: self.filled].flatten(1)).unflatten(1, self.rows.shape[1:])


def pool_bytes(model: AttentionOnlyModel, width: int) -> int:
    """What ``Written`` holds of one prompt of so many tokens."""
    ends = 1 + sum(bank.n_heads if bank.mixes_positions else 1 for bank in model.banks)
    return model.W_E.element_size() * ends * width * model.spec.d_model
