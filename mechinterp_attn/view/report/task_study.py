"""The results that the report of a behaviour is made of, each computed once and only if it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn import causal, paths
from mechinterp_attn.causal.metrics import LARGER_IS_WORSE
from mechinterp_attn.causal.runs import MAX_BYTES, rows_at_once, run
from mechinterp_attn.causal.task import bound_to
from mechinterp_attn.causal.wires import POOL
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import Call, plan
from mechinterp_attn.view.report.causes import FLOPS, LEAST, NEURONS
from mechinterp_attn.view.report.study import Study

if TYPE_CHECKING:
    from mechinterp_attn.causal.bound import Bound
    from mechinterp_attn.causal.task import Task
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

ENOUGH = 0.8  # share of a behaviour that a circuit must carry to be called enough
MOST = 0.5  # share of all heads up to which a set of them is worth a name
ALL_SIZES = 16  # heads of a model in which circuits of every size are run
FEW = 4  # prompts; below, none are held out
EDGES = 16  # drawn
PATHS = 6  # edges that are tested by a run of their own
CURVES = 4e12  # flops of circuits at every size; above, one random ranking instead of three
DRAWS = 3
UNITS = {
    "logit_diff": "logit difference",
    "logit": "logit of the answer",
    "prob": "probability of the answer",
    "prob_diff": "difference of probabilities",
    "loss": "loss",
    "kl": "KL divergence",
    "accuracy": "accuracy",
}


@dataclass(eq=False)
class TaskStudy:
    """One model on a behaviour.

    Attributes:
        model: the model.
        task: the behaviour.
        seed: of the split into two halves, of random rankings, and of the random tokens of head scores.
        chosen: labels of heads whose patterns and circuits the reader asked for.
    """

    model: AttentionOnlyModel
    task: Task
    seed: int
    chosen: tuple[str, ...] = ()

    @cached_property
    def halves(self) -> tuple[Task, Task]:
        """The prompts that heads are found on, and those that they are tested on."""
        return self.task.split(seed=self.seed) if self.held_out else (self.task, self.task)

    @property
    def held_out(self) -> bool:
        return len(self.task) >= FEW

    @cached_property
    def bound(self) -> Bound:
        """The prompts that claims are tested on, in the model's tokens."""
        return self.halves[1].bind(self.model)

    @property
    def patch(self) -> Literal["corrupt", "mean"]:
        return "mean" if self.task.corrupt is None else "corrupt"

    def given(self, heads: int = 1) -> str:
        """What heads that are patched hold, in words."""
        if self.patch == "corrupt":
            return f"what {'it holds' if heads == 1 else 'they hold'} in the counterfactual"
        return f"{'its average' if heads == 1 else 'their averages'} over the prompts"

    @property
    def unit(self) -> str:
        """What the metric is called in a sentence."""
        metric = self.task.metric
        return UNITS.get(metric, metric) if isinstance(metric, str) else self.task.about

    def calls(self) -> dict[str, Call]:
        """The analyses, for their plans; ``ranking`` and ``edges`` are made as they stand here."""
        model, (finding, testing) = self.model, self.halves
        how: dict[str, Any] = {"patch": self.patch, "seed": self.seed}
        found: dict[str, Call] = {
            "ranking": (causal.discover, (model, finding, self._method), how),
            "edges": (causal.discover, (model, finding, self._method, "edges"), how | {"pools": True}),
            "effects": (causal.effects, (model, testing), how | {"exact": sum(self._measured.values())}),
        }
        if self.patch == "corrupt":
            options = {"seed": self.seed, "draws": DRAWS}
            found["curve"] = causal.faithfulness, (model, testing, list(model.heads)), options
        return found

    def _made(self, name: str) -> Any:
        function, args, options = self.calls()[name]
        return function(*args, **options)

    @cached_property
    def ranking(self) -> causal.Discovery:
        """All heads, ranked on the prompts for finding."""
        return self._made("ranking")

    @cached_property
    def edges(self) -> causal.Discovery:
        """Edges between attention heads and whole MLPs, ranked on the prompts for finding."""
        return self._made("edges")

    @property
    def _measured(self) -> dict[str, int]:
        """How many heads of each kind are patched one by one: what takes seconds."""
        cost = 2 * sum(p.numel() for p in self.model.parameters()) * int(self.bound.clean.real.sum())
        affordable = max(LEAST, int(FLOPS / cost))
        most = {"attention": affordable, "mlp": min(NEURONS, affordable)}
        kinds = dict.fromkeys(bank.kind for bank in self.model.banks)
        return {kind: most.get(kind, most["mlp"]) for kind in kinds}  # features, errors: as neurons

    @property
    def _method(self) -> Literal["secant", "gradient"]:
        return "secant" if self.patch == "corrupt" else "gradient"

    @cached_property
    def effects(self) -> causal.Effects:
        """Of patching single heads, on the prompts for testing: exact for the ranking's first ones."""
        ranked = self.ranking.frame
        chosen = [
            label
            for kind, k in self._measured.items()
            for label in ranked["head"][ranked["kind"] == kind][:k]
        ]
        return causal.effects(self.model, self.halves[1], patch=self.patch, exact=chosen, seed=self.seed)

    @cached_property
    def needed(self) -> pd.DataFrame:
        """The heads that were patched alone, the most needed first: ``head, kind, effect`` (towards the
        counterfactual), ``low``, ``high`` (95 % over prompts), ``share`` of the whole difference.
        """
        found = self.effects
        frame = found.frame.dropna(subset=["effect"]).reset_index(drop=True)
        each = found.effects.double() * self.sign
        spread = 1.96 * each.std(1, correction=0) / max(1, each.shape[1] - 1) ** 0.5
        mean = each.mean(1)
        frame = frame[["head", "kind", "layer", "estimate"]].assign(
            effect=mean.numpy(), low=(mean - spread).numpy(), high=(mean + spread).numpy()
        )
        frame["share"] = frame["effect"] / abs(self.whole)
        return frame.sort_values("effect", ascending=False, kind="stable", ignore_index=True)

    @property
    def whole(self) -> float:
        """What there is to explain: the metric less that of counterfactuals, or the metric itself."""
        state = self.effects.standing
        clean = float(state.clean.double().mean())
        return clean if state.corrupt is None else clean - float(state.corrupt.double().mean())

    @property
    def sign(self) -> float:
        """Which way the metric goes when the behaviour is lost."""
        if self.patch == "corrupt":
            return 1.0 if self.whole >= 0 else -1.0
        return -1.0 if self.task.metric in LARGER_IS_WORSE else 1.0

    @property
    def sizes(self) -> list[int] | None:
        """Of circuits: every one in a model of few heads, else MIB's shares."""
        n = len(self.ranking.frame)
        return list(range(1, n + 1)) if n <= ALL_SIZES else None

    @cached_property
    def size(self) -> int | None:
        """How many heads of the ranking are enough on the prompts for finding; None where few are not."""
        rough = causal.faithfulness(
            self.model, self.halves[0], self.ranking, self.sizes, draws=0, seed=self.seed
        ).frame
        enough = rough[(rough["faithfulness"] >= ENOUGH) & (rough["share"] <= MOST)]
        return None if enough.empty else int(enough["size"].iloc[0])

    @cached_property
    def curve(self) -> causal.Faithfulness:
        """What circuits of growing size carry alone, on the prompts for testing."""
        options: dict[str, Any] = {"sizes": self.sizes, "seed": self.seed}
        cost = plan(causal.faithfulness, self.model, self.halves[1], self.ranking, **options)
        draws = DRAWS if cost.flops <= CURVES else 1
        return causal.faithfulness(self.model, self.halves[1], self.ranking, draws=draws, **options)

    @property
    def at_size(self) -> pd.Series[Any] | None:
        """The row of the curve for the circuit; None where there is none."""
        if self.patch != "corrupt" or self.size is None:
            return None
        frame = self.curve.frame
        return frame[frame["size"] == self.size].iloc[0]

    @property
    def circuit_heads(self) -> list[str]:
        """The heads of the circuit; without one, those that are needed most."""
        if self.patch == "corrupt" and self.size is not None:
            return list(self.ranking.circuit(self.size).heads)
        return self.needed["head"].head(8).tolist()

    @cached_property
    def paths(self) -> causal.PathEffects | str:
        """The strongest edges between single heads, each patched alone; or why they were not."""
        try:
            frame = self.edges.frame
            single = frame[~frame["src"].str.endswith(POOL) & ~frame["dst"].str.endswith(POOL)]
            if self.patch != "corrupt":
                single = single[single["src"] != "embed"]
            names = single["edge"].head(PATHS).tolist()
            if not names:
                return "No edge joins two single heads."
            return causal.path_patch(self.model, self.halves[1], names, patch=self.patch, seed=self.seed)
        except MechInterpError as error:  # norms behind sublayers: what heads write is no sum
            return f"Edges are not shown: {error}"

    @cached_property
    def example(self) -> Study:
        """The first prompt for testing, as the report of a prompt would look at it."""
        own = self.halves[1].take([0]).bind(self.model)
        tokens = own.clean.tokens[0][own.clean.real[0]]
        target = None if own.answer is None else int(own.answer[0, 0])
        frozen = paths.freeze(
            self.model, tokens, max_bytes=max(MAX_BYTES, plan(paths.freeze, self.model, tokens).bytes)
        )
        chosen = tuple(dict.fromkeys([*self.chosen, *self.circuit_heads]))
        return Study(
            self.model, frozen, target=target, position=int(own.position[0]), seed=self.seed, chosen=chosen
        )

    @cached_property
    def prompts(self) -> pd.DataFrame:
        """One row per prompt, those for testing first: its text, answer, metric, what the model says."""
        parts = [self._rows(*half) for half in self._halves]
        return pd.concat(parts, ignore_index=True)

    @property
    def _halves(self) -> list[tuple[str, Task, Any]]:
        test = ("testing", self.halves[1], self.effects.standing)
        return [test, ("finding", self.halves[0], self.ranking.standing)] if self.held_out else [test]

    @torch.no_grad()
    def _rows(self, half: str, task: Task, state: Any) -> pd.DataFrame:
        model, bound = self.model, bound_to(self.model, task)
        rows: list[dict[str, Any]] = []
        for _, part in bound.split(rows_at_once(model, bound, MAX_BYTES)):
            logits = run(model, part, part.clean)
            at = logits[:, 0] if part.at_position else logits[torch.arange(len(part)), part.position]
            won = part.right(at[:, None])
            for i, best in enumerate(at.argmax(-1).tolist()):
                tokens = part.clean.tokens[i][part.clean.real[i]]
                row = {"half": half, "prompt": "".join(model.to_readable_tokens(tokens))}
                for name, ids in (("answer", part.answer), ("against", part.against)):
                    row[name] = "" if ids is None else self._texts(ids[i])
                row["said"] = model.output_texts([best])[0]
                row["right"] = "" if won is None else "✓" if bool(won[i]) else "✗"
                rows.append(row)
        frame = pd.DataFrame(rows).assign(metric=state.clean.double().numpy())
        corrupt = None if state.corrupt is None else state.corrupt.double().numpy()
        return frame.assign(counterfactual=corrupt)

    def _texts(self, ids: Tensor) -> str:
        return " / ".join(self.model.output_texts([i for i in ids.tolist() if i >= 0]))
