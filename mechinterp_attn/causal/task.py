"""The second noun: a behaviour, as prompts, counterfactuals, answers and a metric."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from pathlib import Path
from typing import Any, cast

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.bound import Bound, bind
from mechinterp_attn.causal.metrics import NAMES, NEEDS_AGAINST, NEEDS_ANSWER, Metric
from mechinterp_attn.causal.runs import plan_prompts, ready, scores
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.fields import short
from mechinterp_attn.core.files import write_text
from mechinterp_attn.core.plan import CELL, MAX_BYTES, Plan, plans
from mechinterp_attn.core.reading import parse_json, read_text
from mechinterp_attn.frozen.behaviour import OnPrompt
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.given import named, single_id

Prompts = str | Sequence[str] | Sequence[Sequence[int]] | Tensor
Answers = (
    str | int | Sequence[Any] | Tensor
)  # of every prompt: a text of one token, an id, or several of them


def _plan(self: Task, model: AttentionOnlyModel, max_bytes: int) -> Plan:
    return plan_prompts(model, self.bind(model), "a metric", max_bytes, runs=1, result=2 * CELL * len(self))


@dataclass(frozen=True, eq=False, repr=False)
class Task:
    """A behaviour: prompts, counterfactual prompts, answers, and a metric.

    It knows no model: texts stay texts, and every analysis puts them into its model's own tokens.
    Prompts may have different lengths; they are padded under an attention mask. A counterfactual
    must have as many tokens as its prompt, so that every position has its partner.

    Attributes:
        clean: the prompts: texts, or token ids (lists of any lengths, or ``[n, pos]``).
        corrupt: the counterfactuals, one per prompt, where the behaviour should be absent or another.
        answer: the right output of every prompt: a text of one token, an id, or several of either, any
            of which is right. A single text or id stands for all prompts.
        against: what the answer is compared with, likewise. For "logit_diff" without it, the mean logit.
        position: where the output is read: one position for all prompts or one per prompt; negative ones
            count from the last real token.
        metric: "logit" (of the answer; the mean over several), "logit_diff", "prob" (of the answers
            together), "prob_diff", "loss" (of the answer; without answers, the mean next-token loss of
            the prompt), "kl" (nats, from the whole model's output on the same prompt), "accuracy" (1
            where the answer beats ``against``, or everything else), or a function of the logits
            ``[n, pos, d_vocab_out]`` (on the right, padding) that gives ``[n]``, each from its own row.
        labels: of a classifier: the names of its classes in order, by which answers may be given; or,
            without ``answer``, the right class of every prompt.
        attention_mask: for ids ``[n, pos]``: 0 on padding.
        name: for tables.

    Raises:
        MechInterpError: all that can be seen without a model: numbers of prompts, counterfactuals and
            answers that differ, an unknown metric, a metric without what it needs.
    """

    clean: Prompts
    _: KW_ONLY
    corrupt: Prompts | None = None
    answer: Answers | None = None
    against: Answers | None = None
    position: int | Sequence[int] = -1
    metric: str | Metric = "logit_diff"
    labels: Sequence[str] | Sequence[int] | None = None
    attention_mask: Any = None
    name: str | None = None

    def __post_init__(self) -> None:
        wrong: list[str] = []
        clean = _prompts(self.clean, self.attention_mask, "clean", wrong)
        n = len(clean)
        corrupt = None
        if self.corrupt is not None:
            corrupt = _prompts(self.corrupt, self.attention_mask, "corrupt", wrong)
            if len(corrupt) != n and not wrong:
                wrong.append(
                    f"{n} prompts and {len(corrupt)} counterfactuals; expected one for each prompt"
                )
        labels = None if self.labels is None else list(self.labels)
        answer, named = self.answer, labels
        if answer is None and labels and not isinstance(labels[0], str):
            answer, named = labels, None  # the right class of every prompt
        fields = {"answer": _per_prompt(answer, n), "against": _per_prompt(self.against, n)}
        for field, given in fields.items():
            if given is not None and len(given) != n:
                wrong.append(f"{n} prompts but {len(given)} in {field}; expected one for each prompt")
        position = self.position
        position = position.tolist() if hasattr(position, "tolist") else position
        if not isinstance(position, Sequence) or isinstance(position, str | bytes):
            position = single_id(position, "position")
        else:
            position = [single_id(p, "position") for p in position]
            if len(position) != n:
                wrong.append(
                    f"{n} prompts but {len(position)} positions; expected one, or one for each prompt"
                )
        wrong += _metric_errors(self.metric, fields)
        if wrong:
            raise MechInterpError(listing("this task cannot be used", wrong))
        for field, value in {
            "clean": clean, "corrupt": corrupt, "position": position, "labels": named,
            "attention_mask": None, **fields,
        }.items():  # fmt: skip
            object.__setattr__(self, field, value)

    def __len__(self) -> int:
        return len(self.clean)

    @property
    def about(self) -> str:
        """The metric in a few words."""
        if not isinstance(self.metric, str):
            return getattr(self.metric, "__name__", "own metric")
        if self.metric == "logit_diff" and self.against is None:
            return "logit_diff (against the mean logit)"
        if self.metric == "loss" and self.answer is None:
            return "loss (all next tokens)"
        return self.metric

    @plans(_plan)
    def score(self, model: AttentionOnlyModel, *, max_bytes: int = MAX_BYTES) -> Float[Tensor, " n"]:
        """The metric of every prompt, on the CPU.

        Args:
            model: the converted model.
            max_bytes: memory beyond the model's that may be used, the result included.

        Raises:
            MechInterpError: everything in which the task does not fit the model.
        """
        return scores(model, self.bind(model), max_bytes=max_bytes)

    def bind(self, model: AttentionOnlyModel) -> Bound:
        """The task in a model's own tokens, for those who write an analysis.

        Args:
            model: the converted model.

        Raises:
            MechInterpError: everything in which the task does not fit the model: prompts that are too
                long or misaligned with their counterfactuals, answers of several tokens (with the
                pieces) or outside the outputs, positions outside their prompt.
        """
        return bind(
            model,
            clean=cast(Any, self.clean),
            corrupt=cast(Any, self.corrupt),
            answer=cast(Any, self.answer),
            against=cast(Any, self.against),
            position=self.position,
            metric=self.metric,
            labels=self.labels,
            about=self.about,
        )

    def on(self, model: AttentionOnlyModel) -> list[OnPrompt]:
        """The metric on every prompt alone, which is what analyses of one frozen prompt read.

        Args:
            model: the converted model.

        Raises:
            MechInterpError: everything in which the task does not fit the model.
        """
        return ready(model, self.bind(model)).on_prompts()

    def take(self, rows: Iterable[int]) -> Task:
        """The task of some prompts.

        Args:
            rows: their numbers.
        """
        rows = list(rows)

        def some(values: Any) -> Any:
            return [values[i] for i in rows] if isinstance(values, list) else values

        parts = {field: some(getattr(self, field)) for field in ("clean", "corrupt", "answer", "against")}
        return replace(self, position=some(self.position), **parts)

    def split(self, share: float = 0.5, seed: int = 0) -> tuple[Task, Task]:
        """Two tasks at random: one to discover on, one held out.

        Args:
            seed: of the random draws.
            share: of the prompts in the first; at least one prompt is in each.

        Raises:
            MechInterpError: fewer than two prompts, or a share outside 0 to 1.
        """
        n = len(self)
        if n < 2 or not 0 < share < 1:
            raise MechInterpError(
                f"a split of {n} prompts with share={share}; expected at least 2 prompts and 0 < share < 1"
            )
        order = torch.randperm(n, generator=torch.Generator().manual_seed(seed)).tolist()
        first = min(max(round(share * n), 1), n - 1)
        return self.take(sorted(order[:first])), self.take(sorted(order[first:]))

    def save(self, path: str | Path) -> Path:
        """Write JSONL: one line about the task, then one per prompt.

        Args:
            path: of the file.

        Raises:
            MechInterpError: a metric that is a function, which no file can hold.
        """
        if not isinstance(self.metric, str):
            raise MechInterpError(
                f"the metric is a function ({self.about}), which a file cannot hold; save the task with a "
                "named one, replace(task, metric='logit_diff'), and give the function again after loading"
            )
        head = {"task": self.name, "metric": self.metric}
        if self.labels is not None:
            head["labels"] = list(self.labels)  # type: ignore[assignment]
        lines = [json.dumps(head), *(json.dumps(row) for row in self._rows())]
        path = Path(path)
        write_text(path, "\n".join(lines) + "\n")
        return path

    @classmethod
    def load(cls, path: str | Path) -> Task:
        """Read what ``save`` wrote; a JSONL file of prompts alone (``clean``, ``corrupt``, ``answer``,
        ``against``, ``position``) is read too.

        Args:
            path: of the file.

        Raises:
            MechInterpError: what cannot be read, with the line.
        """
        rows: list[dict[str, Any]] = []
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            try:
                row = parse_json(line)
            except ValueError as error:
                raise MechInterpError(f"{path}, line {number} is not JSON: {error}") from None
            if not isinstance(row, dict):
                raise MechInterpError(f"{path}, line {number} is {short(row)}; expected an object")
            rows.append(row)
        head = rows.pop(0) if rows and "clean" not in rows[0] else {}
        options: dict[str, Any] = {"name": head.get("task") or Path(path).stem}
        options |= {key: head[key] for key in ("metric", "labels") if key in head}
        return cls.from_frame(pd.DataFrame(rows), **options)

    @classmethod
    def from_frame(cls, frame: pd.DataFrame, **options: Any) -> Task:
        """A task from a table with a column ``clean`` and any of ``corrupt, answer, against, position``.

        Args:
            frame: one row per prompt.
            options: the other arguments of ``Task``.

        Raises:
            MechInterpError: no column ``clean``, unknown columns, or what ``Task`` finds.
        """
        known = ("clean", "corrupt", "answer", "against", "position")
        wrong = [
            f"unknown column {name!r} (known: {', '.join(known)})" for name in frame if name not in known
        ]
        if "clean" not in frame or not len(frame):
            wrong.append("no prompts: expected rows with a column 'clean'")
        if wrong:
            raise MechInterpError(listing("this table is not a task", wrong))
        columns: dict[str, Any] = {str(name): frame[name].tolist() for name in frame}
        return cls(columns.pop("clean"), **columns, **options)

    def _rows(self) -> Iterable[dict[str, Any]]:
        for i in range(len(self)):
            row: dict[str, Any] = {}
            for field in ("clean", "corrupt", "answer", "against", "position"):
                values = getattr(self, field)
                if values is not None:
                    row[field] = values[i] if isinstance(values, list) else values
            yield row

    def __repr__(self) -> str:
        pairs = "" if self.corrupt is None else " with counterfactuals"
        return f"Task({self.name or 'unnamed'}: {len(self)} prompts{pairs}, metric {self.about})"


def bound_to(model: AttentionOnlyModel, task: Task) -> Bound:
    """A task in a model's tokens, and a word for whoever gave something else.

    Raises:
        MechInterpError: it is no task, or everything in which it does not fit the model.
    """
    if not isinstance(task, Task):
        raise MechInterpError(
            f"{named(task)} is no task; give mia.Task(prompts, answer=...) or one of mia.tasks, such as "
            "mia.tasks.induction(model)"
        )
    return task.bind(model)


def _prompts(given: Any, mask: Any, what: str, wrong: list[str]) -> list[Any]:
    """Texts, or lists of ids without padding."""
    if isinstance(given, str):
        given = [given]
    if isinstance(given, Tensor):
        if given.dtype.is_floating_point or given.ndim not in (1, 2):
            wrong.append(f"{what} is a tensor {tuple(given.shape)} of {given.dtype}; expected ids [n, pos]")
            return []
        given = (given[None] if given.ndim == 1 else given).tolist()
    given = given.tolist() if hasattr(given, "tolist") else given  # an array, a column of a table
    if not isinstance(given, Sequence) or isinstance(given, bytes | bytearray):
        wrong.append(f"{what} is {named(given)}; expected texts, or token ids [n, pos]")
        return []
    rows = list(given)
    if rows and _is_id(rows[0]):  # one prompt
        rows = [rows]
    rows = [row.tolist() if isinstance(row, Tensor) else row for row in rows]
    if not rows:
        wrong.append(f"{what} is empty; give at least one prompt")
        return []
    if not all(isinstance(row, str) for row in rows) and not all(_is_ids(row) for row in rows):
        wrong.append(f"{what} must be texts, or lists of token ids with at least one id each")
        return []
    if mask is None:
        return [row if isinstance(row, str) else list(row) for row in rows]
    try:
        keep = torch.as_tensor(mask).bool()
    except (TypeError, ValueError, RuntimeError):
        wrong.append(f"attention_mask is {named(mask)}; expected 0 or 1 for every token of ids [n, pos]")
        return []
    if (
        isinstance(rows[0], str)
        or keep.ndim != 2
        or [len(row) for row in rows] != [len(row) for row in keep]
    ):
        wrong.append(
            f"attention_mask {tuple(keep.shape)} does not fit {what}; expected 0 or 1 for every token of "
            "ids [n, pos] (texts need none)"
        )
        return []
    return [
        [i for i, own in zip(row, real, strict=True) if own] for row, real in zip(rows, keep, strict=True)
    ]


def _is_ids(row: Any) -> bool:
    return isinstance(row, list | tuple) and len(row) > 0 and all(map(_is_id, row))


def _is_id(one: Any) -> bool:
    return isinstance(one, int) and not isinstance(one, bool)


def _per_prompt(given: Any, n: int) -> list[Any] | None:
    """One answer per prompt, each a text, an id or a list of them."""
    if given is None:
        return None
    given = given.tolist() if hasattr(given, "tolist") else given
    if isinstance(given, str | bytes) or not isinstance(given, Iterable):
        return [given] * n
    return [list(one) if isinstance(one, tuple) else one for one in given]


def _metric_errors(metric: Any, fields: dict[str, Any]) -> list[str]:
    if callable(metric):
        return []
    if metric not in NAMES:
        names = ", ".join(NAMES)
        return [f"metric={metric!r}; expected {names}, or a function of the logits [n, pos, d_vocab_out]"]
    wrong = []
    if metric in NEEDS_ANSWER and fields["answer"] is None:
        wrong.append(f"the metric {metric!r} needs answer=, the right output of every prompt")
    if metric in NEEDS_AGAINST and fields["against"] is None:
        wrong.append(f"the metric {metric!r} needs against=, what the answers are compared with")
    return wrong
