"""Path expansion by brute force: every head as a dense map, every path multiplied out.

Written on the public ``Head`` (weights, dense pattern) and a cached run, not on the frozen banks.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
from torch import Tensor

import mechinterp_attn as mia
from tests.conversion.families import FAMILIES, boot

Key = tuple[str, int | None, tuple[str, ...]]  # source, its position, heads (with positions where apart)


@functools.cache
def tiny_family(family: str, **smaller: Any) -> mia.AttentionOnlyModel:
    """A model of a family with few enough heads to enumerate every path, float64."""
    import transformers

    from tests.conftest import jitter

    model, config, options = FAMILIES[family]
    torch.manual_seed(0)
    small = copy.deepcopy(options) | smaller
    cfg = getattr(transformers, config)(
        **dict(bos_token_id=1, eos_token_id=2, pad_token_id=0) | small, attn_implementation="eager"
    )
    hf = getattr(transformers, model)(cfg).double().eval()
    jitter(hf, seed=1, noise=0.3)
    return mia.convert(boot(hf, torch.float64), check=False)


class Brute:
    """All paths of a model on a prompt.

    Attributes:
        terms: what every path adds to the last residual stream, ``[pos, d_model]``, keyed by source,
            source position and heads. With ``apart`` every head is told apart by position.
    """

    @torch.no_grad()
    def __init__(self, model: mia.AttentionOnlyModel, tokens: Tensor, *, apart: bool = False):
        self.model, self.apart = model, apart
        self.logits, cache = model.run_with_cache(tokens[None], remove_batch_dim=True)
        self.logits, self.cache = self.logits[0], dict(cache.items())
        self.pos = len(tokens)
        start, embed = self.cache["blocks.0.hook_resid_pre"], self.cache["hook_embed"]
        parts = {"embed": embed, "position": start - embed}
        terms: dict[Key, Tensor] = {}
        for name, part in parts.items():
            if part.any():
                terms |= self._by_position(name, part)
        for sub in model.sublayers():
            new: dict[Key, Tensor] = {}
            for bank, (post, post_path) in zip(sub.banks, sub.posts, strict=True):
                after = functools.partial(self._norm, post, post_path)
                new |= self._by_position(
                    f"L{bank.layer} {bank.part} bias", after(bank.b_O.expand(self.pos, -1))
                )
                for index in range(bank.n_heads):
                    head = bank.head(index)
                    pattern = head.pattern(self.cache)[:, :-1]
                    own = after(pattern.sum(1)[:, None] * (head.b_V @ head.W_O))
                    for label, mask in self._places(head.label):
                        new["value bias", None, (label,)] = own * mask
                        for (source, at, heads), x in terms.items():
                            z = pattern @ (self._norm(*sub.norm, x) @ head.W_V)
                            new[source, at, (*heads, label)] = after(z @ head.W_O) * mask
            terms |= new
        self.terms = terms

    def _by_position(self, name: str, part: Tensor) -> dict[Key, Tensor]:
        out = {}
        for p in range(self.pos):
            alone = torch.zeros_like(part)
            alone[p] = part[p]
            out[name, p, ()] = alone
        return out

    def _places(self, label: str):
        ones = torch.ones(self.pos, 1, dtype=torch.float64)
        if not self.apart:
            return [(label, ones)]
        return [
            (f"{label}@{p}", torch.eye(self.pos, dtype=torch.float64)[p][:, None]) for p in range(self.pos)
        ]

    def _norm(self, norm, path: str, x: Tensor) -> Tensor:
        if norm.kind is None:
            return x
        x = x - x.mean(-1, keepdim=True) if norm.kind == "LN" else x
        x = x / self.cache[f"{path}.hook_scale"]
        return x if norm.w is None else x * norm.w.detach()

    def read_out(self, x: Tensor) -> Tensor:
        """A part of the last stream as logits; a soft cap keeps the ratio of the run."""
        logits = self._norm(self.model.ln_final, "ln_final", x) @ self.model.W_U.detach()
        return logits * self.cap()

    @functools.cache  # noqa: B019
    def cap(self) -> Tensor:
        whole = sum(self.terms.values())
        raw = self._norm(self.model.ln_final, "ln_final", whole) @ self.model.W_U.detach()
        return self.logits / (raw + self.model.b_U.detach())

    def order(self, n: int, counts=lambda label: True) -> Tensor:
        """Logits of all paths through ``n`` counted heads."""
        total = sum(x for (_, _, heads), x in self.terms.items() if sum(map(counts, heads)) == n)
        logits = self.read_out(total) if isinstance(total, Tensor) else torch.zeros_like(self.logits)
        return logits + self.model.b_U.detach() * self.cap() if n == 0 else logits

    def values(self, target: int, position: int, *, summed: bool = False) -> dict[str, float]:
        """Contribution of every path to a logit, by the name that ``top_paths`` gives it."""
        names = self.model.to_str_tokens(torch.tensor(self.tokens_ids()))
        found: dict[str, float] = {}
        for (source, at, heads), x in self.terms.items():
            value = float(self.read_out(x)[position, target])
            start = source if summed or at is None else f"{source}@{at}"
            if source == "embed" and not summed:
                start = f"{names[at]!r}@{at}"
            name = " > ".join([start, *heads, "logit"])
            found[name] = found.get(name, 0.0) + value
        offset = float((self.model.b_U.detach() * self.cap())[position, target])
        return found | ({"unembedding bias > logit": offset} if offset else {})

    def tokens_ids(self) -> list[int]:
        W_E = self.model.W_E.detach()
        embed = self.cache["hook_embed"]
        return [int((W_E - x).abs().sum(-1).argmin()) for x in embed]
