"""The results a report is made of, each computed once and only if some section asks for it."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from mechinterp_attn import circuits, detect, paths
from mechinterp_attn.core.plan import Call
from mechinterp_attn.core.text import signed
from mechinterp_attn.view.report.causes import Causes
from mechinterp_attn.view.report.story import SOME, Story, find_story
from mechinterp_attn.view.report.telling import Claim, claims, through_patterns

if TYPE_CHECKING:
    from mechinterp_attn.frozen.prompt import Frozen
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

LOGIT_BYTES = 2**30  # of the logits by order: long prompts keep fewer orders apart
MOST_ORDERS = 12  # kept apart: deep models spend most of their paths on orders in the middle
LONG = 256  # tokens; on longer prompts the importance of single heads would take minutes
PATTERN_CELLS = 2**22  # of all the patterns in a page: prompts of 1,024 tokens show four heads

DIRECT = 4  # direct effects of each kind of head that are tested by cutting
WAYS = 24  # heads that are asked how they act
SEARCH, LEAST_SEARCH = 200, 32  # partial paths to open: seconds, and the section says what is not proven
OPENED = 2 * 10**6  # heads that they may pass together: deep models with many neurons open fewer
CLEAR = 0.3  # a score from here on makes a head one of that kind
CIRCUITS_OF = ("induction", "previous_token")  # scores whose best head's OV and QK circuits are shown

# Kinds of head, as a sentence calls them; those of dictionaries (``mia.attach``) are kinds of their own.
KIND_NAMES = {
    "attention": "attention heads",
    "mlp": "MLP-derived heads",
    "feature": "features",
    "error": "errors of dictionaries",
    "skip": "skips of transcoders",
}

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
        chosen: labels of heads whose patterns and circuits the reader asked for.
        left_out: why there are fewer sections than usual, where the report decided so by itself.
    """

    model: AttentionOnlyModel
    frozen: Frozen
    target: str | int | None
    position: int
    seed: int
    chosen: tuple[str, ...] = ()
    left_out: str = ""

    @cached_property
    def calls(self) -> dict[str, Call]:
        """The analyses, by the name under which this study keeps their results: made here, planned in
        ``cost.py``.
        """
        model, frozen = self.model, self.frozen
        goal = {"target": self.target, "position": self.position}
        quiet = {"progress": False}
        per_order = frozen.logits.numel() * frozen.logits.element_size()
        orders = max(2, min(MOST_ORDERS, LOGIT_BYTES // per_order - 2))
        terms = {"heads": 16 if len(self.names) <= LONG else 0, "layers": False}
        between = {"src": "attention", "dst": "attention"}
        search = {"max_expansions": self._search}
        found: dict[str, Call] = {
            "scores": (detect.score_heads, (model,), {"seed": self.seed}),
            "orders": (paths.orders, (frozen,), {"max_order": orders}),
            "attribution": (paths.logit_attribution, (frozen,), goal),
            "importance": (paths.term_importance, (frozen.model, frozen.tokens), quiet | terms),
            "top_paths": (paths.top_paths, (frozen,), goal | {"top_k": 30} | search | quiet),
            "top_circuits": (paths.top_circuits, (frozen,), goal | {"top_k": 20} | search | quiet),
            "graph": (paths.attribution_graph, (frozen,), goal | {"scores": True}),
        }
        for kind in self.sides_read:
            found[f"composition_{kind}"] = circuits.composition, (model, kind), between
        return found

    def _made(self, name: str) -> Any:
        function, args, options = self.calls[name]
        return function(*args, **options)

    @cached_property
    def scores(self) -> detect.HeadScores:
        return self._made("scores")

    @cached_property
    def orders(self) -> paths.Orders:
        return self._made("orders")

    @cached_property
    def attribution(self) -> paths.LogitAttribution:
        return self._made("attribution")

    @cached_property
    def importance(self) -> paths.TermImportance:
        return self._made("importance")

    @cached_property
    def top_paths(self) -> paths.TopPaths:
        return self._made("top_paths")

    @property
    def _search(self) -> int:
        return max(LEAST_SEARCH, min(SEARCH, OPENED // max(1, self.model.n_heads)))

    @cached_property
    def top_circuits(self) -> paths.TopCircuits:
        """Chains of attention heads, neurons pooled."""
        return self._made("top_circuits")

    @cached_property
    def graph(self) -> paths.AttributionGraph:
        return self._made("graph")

    @property
    def sides_read(self) -> str:
        """The sides on which attention heads compose here, "K", "Q", "V"; none where no head can."""
        return "KQV" if self.model.spec.n_layers > 1 and self.n_attention else ""

    @cached_property
    def compositions(self) -> dict[str, circuits.CompositionScores]:
        """Of attention heads with later ones, by the side that reads."""
        return {kind: self._made(f"composition_{kind}") for kind in self.sides_read}

    @cached_property
    def causes(self) -> Causes:
        return Causes(self.frozen, self.attribution.target, self.attribution.position)

    @cached_property
    def direct(self) -> dict[str, float]:
        """What every head writes straight to the explained logit."""
        frame = self.attribution.frame
        frame = frame[~frame["kind"].isin(("embed", "bias"))]
        return dict(zip(frame["head"], frame["value"], strict=True))

    @property
    def near_zero(self) -> bool:
        """The logit is so small beside its terms that shares of it say nothing."""
        return abs(self.attribution.total) < SOME * float(self.attribution.frame["value"].abs().sum())

    @cached_property
    def story(self) -> Story:
        if not self.model.n_heads:
            return Story(self.causes.probability)
        return find_story(self.causes, self.direct)

    @cached_property
    def claims(self) -> list[Claim]:
        """What was tested by cutting: the story, and the largest direct effects of every kind of head."""
        if not self.model.n_heads:
            return []
        measured = self.causes.frame.dropna(subset=["cut"])
        largest: dict[str, float] = {}
        for kind in KIND_NAMES:
            own = {label: self.direct[label] for label in measured.index[measured["kind"] == kind]}
            top = sorted(own, key=lambda label: -abs(own[label]))[:DIRECT]
            least = SOME * sum(value for value in own.values() if value > 0)
            largest |= {label: own[label] for label in top if abs(own[label]) >= least}
        cut = {label: (float(measured["cut"][label]), float(measured["p"][label])) for label in largest}
        return claims(self.story, largest, cut)

    @cached_property
    def ways(self) -> dict[str, str]:
        """Heads whose direct effect does not show what cutting does, each with what it acts through."""
        frame = self.causes.frame.dropna(subset=["cut"])
        frame = frame.loc[frame["cut"].abs().sort_values(ascending=False, kind="stable").index[:WAYS]]
        hidden = []
        for label, cut in frame["cut"].items():
            direct = self.direct[str(label)]
            if abs(cut) >= SOME and (direct * cut <= 0 or abs(direct) < abs(cut) / 4):
                hidden.append(str(label))
        held = self.causes.without([[label] for label in hidden], hold=True)
        p = self.causes.probability
        return {
            label: "patterns" if through_patterns(p, frame["p"][label], outcome.p) else "later heads"
            for label, outcome in zip(hidden, held, strict=True)
        }

    @property
    def names(self) -> list[str]:
        """The prompt's tokens, one by one."""
        return self.frozen.str_tokens

    @property
    def own_tokens(self) -> list[int]:
        """The different ids of the prompt that texts are made of, as they come."""
        plain = set(self.model.text_ids.tolist())
        return [i for i in dict.fromkeys(self.frozen.tokens.tolist()) if i in plain]

    def token(self, id: int) -> str:
        return self.model.output_texts([id])[0]

    @property
    def predictions(self) -> pd.DataFrame:
        """The model's likeliest outputs at the position: ``token, token_id, probability, logit``."""
        logits = self.frozen.logits[self.attribution.position].double()
        top = logits.topk(min(10, len(logits)))
        ids = top.indices.tolist()
        return pd.DataFrame(
            {
                "token": self.model.output_texts(ids),
                "token_id": ids,
                "probability": logits.softmax(-1)[top.indices].tolist(),
                "logit": top.values.tolist(),
            }
        )

    @property
    def has_loss(self) -> bool:
        """Whether the prompt has a next-token loss."""
        return self.model.spec.no_next_token is None and len(self.names) > 1

    @property
    def no_loss(self) -> str:
        """Why it has none."""
        why = self.model.spec.no_next_token
        return why or "a prompt of one token has no next token to be wrong about, so there is no loss"

    @property
    def output(self) -> str:
        """What the model's outputs are."""
        return "output" if self.model.spec.no_next_token else "next token"

    def best(self, score: str) -> pd.Series[Any] | None:
        """The attention head with the largest score; None where no head has one."""
        if not self.n_attention:
            return None
        frame = self.scores.frame
        ranked = frame[(frame["kind"] == "attention") & frame[score].notna()].nlargest(1, score)
        return None if ranked.empty else ranked.iloc[0]

    @cached_property
    def own_weights(self) -> pd.DataFrame:
        """Weight on the own token of every MLP-derived head: ``head``, ``here`` (where the prediction is
        made), ``mean`` (over the prompt).
        """
        here = self.attribution.position
        parts = [
            pd.DataFrame(
                {
                    "head": f.bank.labels(),
                    "here": f.pattern[here].double().tolist(),
                    "mean": f.pattern.double().mean(0).tolist(),
                }
            )
            for f in self.frozen.banks
            if f.bank.kind == "mlp"
        ]
        return (
            pd.concat(parts, ignore_index=True)
            if parts
            else pd.DataFrame({"head": [], "here": [], "mean": []})
        )

    def pattern(self, label: str) -> np.ndarray:
        """``[query, key + bias]`` of one head on this prompt."""
        bank, index = self.model.heads.find(label)
        frozen = next(f for f in self.frozen.banks if f.bank.path == bank.path)
        return bank.dense_pattern(frozen.pattern, index).double().cpu().numpy()

    def pictures(self, kind: str, k: int = 8) -> dict[str, tuple[str, np.ndarray]]:
        """The heads of one kind whose patterns are worth a look: the reason and ``[query, key + bias]``."""
        return {label: (why, self.pattern(label)) for label, why in self.picked(kind, k).items()}

    def picked(self, kind: str, k: int = 8) -> dict[str, str]:
        """Those heads, each with the reason; fewer of them on long prompts."""
        k = min(k, max(2, PATTERN_CELLS // 2 // len(self.names) ** 2))
        reasons: dict[str, str] = {}
        for label, reason in self._candidates(kind, k):
            if label not in reasons and len(reasons) < k:
                reasons[label] = reason
        return reasons

    @property
    def shown_patterns(self) -> str:
        """What of all the patterns is shown, in words."""
        n = sum(len(self.picked(kind)) for kind in ("attention", "mlp"))
        which = "those asked for, then " if self.chosen else ""
        return (
            f"{n} of {self.model.n_heads:,} heads are shown: {which}those with the largest effect, the "
            "clearest of each kind, and the neurons that are on the most."
        )

    def _candidates(self, kind: str, k: int) -> Iterator[tuple[str, str]]:
        yield from ((label, "asked for") for label in self.chosen if self.model[label].kind == kind)
        effect = self.attribution.frame
        effect = effect[effect["kind"] == kind].nlargest(k, "value", keep="first")
        strongest = [
            (label, f"{signed(value)} to the logit")
            for label, value in zip(effect["head"], effect["value"], strict=True)
        ]
        if kind == "attention" and self.n_attention:
            yield from strongest[:1]
            for score, words in SCORES.items():
                best = self.best(score)
                if best is not None and best[score] >= CLEAR:
                    yield best["head"], f"{words} {best[score]:.2f}"
        else:
            yield from strongest[: max(1, k - 3)]
            for row in self.own_weights.nlargest(3, "mean").itertuples():
                yield str(row.head), f"mean weight {row.mean:.2f}"
        yield from strongest

    @property
    def circuit_heads(self) -> dict[str, str]:
        """The heads whose OV and QK circuits are shown, each with the reason."""
        if self.chosen or not self.n_attention:
            return dict.fromkeys(self.chosen, "asked for")
        reasons: dict[str, str] = {}
        for score in CIRCUITS_OF:
            best = self.best(score)
            if best is None:
                continue
            reasons.setdefault(
                best["head"], f"best {SCORES[score].replace(' ', '-')} head, {best[score]:.2f}"
            )
        return reasons

    @property
    def n_attention(self) -> int:
        return len(self.model.heads.of("attention"))
