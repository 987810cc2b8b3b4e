"""Random tokens repeated, and which (query, key) pairs each kind of head attends to.

Random tokens carry no statistics of text, so a head that attends to the token after an earlier
occurrence of its own can only have found it by matching (Olsson et al. 2022, "prefix matching").
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from mechinterp_attn.causal.batches import Batch
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel

PERIOD, REPEATS = 25, 4  # Olsson et al. 2022: 25 random tokens, 4 times
ROLES = ("previous_token", "current_token", "first_token", "duplicate_token", "induction")


@dataclass(frozen=True)
class Probe:
    """Random tokens repeated: ``[BOS] t1 .. tp t1 .. tp ...``, the t all different, none of them special.

    Attributes:
        tokens: ``[draw, pos]``.
        period: how many tokens until they repeat.
        repeats: how often they stand there.
        front: how many special tokens stand in front: a BOS where the model's texts have one.
        seed: of the draws.
    """

    tokens: Int[Tensor, "draw pos"]
    period: int
    repeats: int
    front: int
    seed: int

    @property
    def bos(self) -> bool:
        """Whether a BOS (or another special token) stands in front."""
        return self.front > 0

    @property
    def batch(self) -> Batch:
        """How many sequences."""
        return Batch(self.tokens, torch.ones_like(self.tokens, dtype=torch.bool))

    @property
    def repeated(self) -> Bool[Tensor, "draw pos_minus_1"]:
        """Of the tokens after the first, those that induction predicts: all after the first pass but
        the first of the second, of which nobody can know that it starts over.
        """
        later = torch.arange(1, self.tokens.shape[1]) > self.front + self.period
        return later.to(self.tokens.device).expand(len(self.tokens), -1)

    def __str__(self) -> str:
        return f"{'BOS + ' if self.bos else ''}{self.period} random tokens x {self.repeats}"


def random_repeats(model: AttentionOnlyModel, *, draws: int, seed: int) -> Probe:
    """Draw repeated random tokens from the model's own vocabulary.

    25 tokens 4 times after a BOS, as in Olsson et al. 2022; fewer where the context or the
    vocabulary is small, at least 2 tokens twice.

    Args:
        model: the converted model.
        draws: how many random sequences.
        seed: of the random draws.

    Raises:
        MechInterpError: the context or vocabulary is too small; says the least that would do.
    """
    if draws < 1:
        raise MechInterpError(f"draws={draws}; expected at least 1")
    front = torch.tensor(model.added_tokens[0], dtype=torch.long)
    choices = model.text_ids
    room = model.spec.n_ctx - len(front)
    period = min(PERIOD, room // 2, len(choices))
    if period < 2:
        raise MechInterpError(
            f"induction needs 2 different tokens said twice: a context of at least "
            f"{4 + len(front)} and 2 tokens in the vocabulary; this model has {model.spec.n_ctx} and "
            f"{len(choices)} (special tokens left out)"
        )
    repeats = min(REPEATS, room // period)
    generator = torch.Generator().manual_seed(seed)
    rows = []
    for _ in range(draws):
        chosen = choices[torch.randperm(len(choices), generator=generator)[:period]]
        rows.append(torch.cat([front, chosen.repeat(repeats)]))
    tokens = torch.stack(rows).to(model.W_E.device)
    return Probe(tokens, period, repeats, len(front), seed)


def random_probe(model: AttentionOnlyModel, *, draws: int, seed: int) -> Probe:
    """``random_repeats`` or, where the context is too short to repeat anything, random tokens once.

    Raises:
        MechInterpError: not even one token has room, or ``draws`` is below 1.
    """
    front, choices = torch.tensor(model.added_tokens[0], dtype=torch.long), model.text_ids
    room = model.spec.n_ctx - len(front)
    if draws < 1 or (room >= 4 and len(choices) > 1):
        return random_repeats(model, draws=draws, seed=seed)
    period = min(PERIOD, room, len(choices))
    if period < 1:
        raise MechInterpError(
            f"a context of {model.spec.n_ctx} tokens and {len(choices)} tokens to draw leave no room for a "
            "random one; give tokens"
        )
    generator = torch.Generator().manual_seed(seed)
    drawn = [choices[torch.randperm(len(choices), generator=generator)[:period]] for _ in range(draws)]
    tokens = torch.stack([torch.cat([front, row]) for row in drawn]).to(model.W_E.device)
    return Probe(tokens, period, 1, len(front), seed)


def pairs_by_role(batch: Batch) -> dict[str, Bool[Tensor, "batch query key"]]:
    """For each kind of head, which keys it attends to from which queries.

    - previous_token: the token just before.
    - current_token: the token itself.
    - first_token: the first token of the sequence (BOS, where there is one).
    - duplicate_token: earlier occurrences of the same token.
    - induction: the tokens after earlier occurrences of the same token (row sums: all of them).

    The first token is no query: it has only itself to look at.
    """
    tokens, n = batch.tokens, batch.tokens.shape[1]
    query = torch.arange(n, device=tokens.device)[:, None]
    key = torch.arange(n, device=tokens.device)[None, :]
    real = batch.real[:, :, None] & batch.real[:, None, :]
    same = real & (tokens[:, :, None] == tokens[:, None, :]) & (key < query)
    after_same = torch.zeros_like(same)
    after_same[:, :, 1:] = same[:, :, :-1]
    return {
        "previous_token": real & (key == query - 1),
        "current_token": real & (key == query) & (query > 0),
        "first_token": real & (key == 0) & (query > 0),
        "duplicate_token": same,
        "induction": after_same,
    }
