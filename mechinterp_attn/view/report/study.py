"""The results a report is made of, each computed once and only if some section asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch

from mechinterp_attn import detect, paths
from mechinterp_attn.view.text import signed

if TYPE_CHECKING:
    from torch import Tensor

    from mechinterp_attn.model import AttentionOnlyModel
    from mechinterp_attn.paths.frozen import Frozen

LOGIT_BYTES = 2**30  # of the logits by order: long prompts keep fewer orders apart

SEARCH = 200  # partial paths to open: seconds, and the section says what is not proven
CLEAR = 0.3  # a score from here on makes a head one of that kind

# What a head's name in the score table means in words.
SCORES = {
    "induction": "induction",
    "previous_token": "previous token",
    "duplicate_token": "duplicate token",
    "current_token": "current token",
    "first_token": "first token",
}


@dataclass(eq=False)
class Study:
    """One model on one prompt.

    Attributes:
        model: the model.
        frozen: the prompt with patterns frozen.
        target, position: which prediction is explained.
        seed: of the random tokens that heads are scored on.
    """

    model: AttentionOnlyModel
    frozen: Frozen
    target: str | int | None
    position: int
    seed: int

    @cached_property
    def scores(self) -> detect.HeadScores:
        return detect.score_heads(self.model, seed=self.seed)

    @cached_property
    def orders(self) -> paths.Orders:
        per_order = self.frozen.logits.numel() * self.frozen.logits.element_size()
        return paths.orders(self.frozen, max_order=max(3, LOGIT_BYTES // per_order - 2))

    @cached_property
    def attribution(self) -> paths.LogitAttribution:
        return paths.logit_attribution(self.frozen, target=self.target, position=self.position)

    @cached_property
    def importance(self) -> paths.TermImportance:
        return paths.term_importance(self.model, self.frozen.tokens, heads=16, progress=False)

    @cached_property
    def top_paths(self) -> paths.TopPaths:
        return paths.top_paths(
            self.frozen,
            target=self.target,
            position=self.position,
            k=30,
            max_expansions=SEARCH,
            progress=False,
        )

    @cached_property
    def graph(self) -> paths.AttributionGraph:
        return paths.attribution_graph(self.frozen, target=self.target, position=self.position)

    @property
    def names(self) -> list[str]:
        """The prompt's tokens, one by one."""
        return self.frozen.str_tokens

    def token(self, id: int) -> str:
        return self.model.to_str_tokens([id])[0]

    @property
    def predictions(self) -> pd.DataFrame:
        """The model's next tokens at the position: ``token, token_id, probability, logit``."""
        logits = self.frozen.logits[self.attribution.position].double()
        top = logits.topk(min(10, len(logits)))
        ids = top.indices.tolist()
        return pd.DataFrame(
            {
                "token": self.model.to_str_tokens(ids),
                "token_id": ids,
                "probability": logits.softmax(-1)[top.indices].tolist(),
                "logit": top.values.tolist(),
            }
        )

    def ranked(self, score: str, k: int = 1) -> pd.DataFrame:
        """The ``k`` attention heads with the largest score."""
        frame = self.scores.frame
        return frame[frame["kind"] == "attention"].nlargest(k, score)

    @property
    def own_weight(self) -> pd.DataFrame:
        """Mean weight on the own token over the prompt, of every MLP-derived head: ``head, weight``."""
        parts = [
            pd.DataFrame({"head": f.bank.labels(), "weight": f.pattern.double().mean(0).tolist()})
            for f in self.frozen.banks
            if f.bank.kind == "mlp"
        ]
        return pd.concat(parts, ignore_index=True) if parts else pd.DataFrame({"head": [], "weight": []})

    def pattern(self, label: str) -> np.ndarray:
        """``[query, key + bias]`` of one head on this prompt."""
        bank, index = self.model.heads.find(label)
        frozen = next(f for f in self.frozen.banks if f.bank is bank)
        return bank.dense_pattern(frozen.pattern, index).double().cpu().numpy()

    def picked(self, kind: str, k: int = 8) -> dict[str, str]:
        """The heads whose patterns are worth a look, each with the reason."""
        reasons: dict[str, str] = {}
        for label, reason in self._candidates(kind, k):
            if label not in reasons and len(reasons) < k:
                reasons[label] = reason
        return reasons

    def _candidates(self, kind: str, k: int) -> Iterator[tuple[str, str]]:
        effect = self.attribution.frame
        effect = effect[effect["kind"] == kind].nlargest(k, "value", keep="first")
        strongest = [
            (label, f"{signed(value)} to the logit")
            for label, value in zip(effect["head"], effect["value"], strict=True)
        ]
        if kind == "attention":
            yield from strongest[:1]
            for score, words in SCORES.items():
                best = self.ranked(score).iloc[0]
                if best[score] >= CLEAR:
                    yield best["head"], f"{words} {best[score]:.2f}"
        else:
            yield from strongest[: k - 3]
            for row in self.own_weight.nlargest(3, "weight").itertuples():
                yield row.head, f"mean weight {row.weight:.2f}"
        yield from strongest

    @property
    def n_attention(self) -> int:
        return sum(bank.n_heads for bank in self.model.banks if bank.kind == "attention")


def tokens_of(model: AttentionOnlyModel, prompt: str | list[int] | Tensor) -> Tensor:
    """Validated ids ``[1, pos]`` of a prompt given as text or ids."""
    return model.as_tokens(torch.as_tensor(prompt) if isinstance(prompt, list) else prompt)
