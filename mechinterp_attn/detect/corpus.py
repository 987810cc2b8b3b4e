"""Detectors over a corpus: streamed, bounded, resumable, on one process or many."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.causal.batches import pad, sequence_bytes
from mechinterp_attn.causal.cuts import Target
from mechinterp_attn.causal.metrics import Metric
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.fingerprint import fingerprint
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.plan import CELL, MAX_BYTES, TABLE, Plan, plans
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.renamed import renamed_arguments
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.core.resume import SavedState
from mechinterp_attn.core.tolerance import TOLERANCE
from mechinterp_attn.detect.counting import Settings, count, count_on_ray, refuse_hooks
from mechinterp_attn.detect.estimates import rank_correlation
from mechinterp_attn.detect.scores import dense_check, table_bytes
from mechinterp_attn.detect.tally import Place, Tally
from mechinterp_attn.detect.texts import Texts, Window, windows
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.cost import plan_runs

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

PIECE = 2**15  # tokens that are counted between two writes of the file, and sent to a worker at once


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CorpusScores(Result):
    """What every head does on a corpus.

    Attributes:
        tally: the sums behind the scores.
        model: its name.
        frame: one row per head: the columns of ``score_heads``; ``written``, the mean norm of what
            the head writes; ``loss_change`` and ``logit_change`` (nats a token, logit of the right
            token against the average logit) for the heads that were cut, and ``metric_change`` (a window)
            where a metric was given; ``estimate`` of the loss change, if asked for.
        ablations: one row per head, virtual head or edge that was cut: ``head`` and the same changes.
        loss: of the model (nats a token); NaN where it does not predict next tokens.
        tokens: how many tokens after the first of their windows were counted.
    """

    title: ClassVar[str] = "Heads over a corpus"
    sort_by: ClassVar[str | None] = "induction"
    ablations: pd.DataFrame
    loss: float
    tokens: int
    tally: Tally
    model: AttentionOnlyModel

    def plot(self, score: str = "induction") -> Figure:
        """A heatmap of one score over attention heads by layer.

        Args:
            score: a column of the frame.
        """
        return draw(self, score)

    def passages(self, head: str) -> pd.DataFrame:
        """Where a head of any kind writes most.

        Args:
            head: its label.

        Returns:
            one row per passage, largest first: ``rank, norm, document, position`` (of the token in
            its document), ``before, token, after``; for viewers that colour tokens, ``tokens`` (the
            passage token by token) and ``norms`` (of what the head writes at each).

        Raises:
            MechInterpError: no such head.
        """
        self.model.heads.find(head)
        best, row = self.tally.best, list(self.model.heads).index(head)
        front = len(self.model.added_tokens[0])
        rows = []
        for rank, value in enumerate(best.value[row].tolist()):
            if value == -float("inf"):
                continue
            ids, norms = best.tokens[row, rank], best.norms[row, rank]
            middle = len(ids) // 2
            document, start, position = best.place[row, rank].tolist()
            parts = (ids[:middle], ids[middle : middle + 1], ids[middle + 1 :])
            texts = ["".join(self._texts(part)) for part in parts]
            inside = norms[ids >= 0].tolist()
            place = document, start + position - front
            rows.append((rank + 1, value, *place, *texts, self._texts(ids), inside))
        names = ["rank", "norm", "document", "position", "before", "token", "after", "tokens", "norms"]
        return pd.DataFrame(rows, columns=names)

    def _texts(self, ids: Tensor) -> list[str]:
        return self.model.to_str_tokens(ids[ids >= 0])


def _guessed(document: Any, size: int) -> int:
    """How many tokens a document may have; what is neither text nor ids is taken for a window."""
    if isinstance(document, str):
        return len(document) // 3
    return len(document) if isinstance(document, Sequence | Tensor) else size


def _plan(
    model: AttentionOnlyModel,
    texts: Texts,
    heads: Sequence[Target],
    estimate: bool,
    length: int | None,
    batch: int,
    top_k: int,
    context: int,
    max_bytes: int,
) -> Plan:
    """Windows as many at a time as fit, and what is kept for every head. How many tokens there are is
    guessed from the length of a file or list, at three bytes a token; of a stream, one window is planned.
    """
    size = length or model.spec.n_ctx
    tokens = size
    if isinstance(texts, str | os.PathLike):
        tokens = Path(texts).stat().st_size // 3 if Path(texts).is_file() else size
    elif isinstance(texts, Sequence):
        tokens = sum(_guessed(one, size) for one in texts)
    cuts = 1 if isinstance(heads, str) else len(heads)
    kept = 3 * model.n_heads * top_k * (8 * (2 * context + 1) + 4 * CELL) + table_bytes(model, 2 * TABLE)
    need = sequence_bytes(model, size)
    rows = max(1, min(batch, (max_bytes - kept) // need, -(-tokens // size)))
    at_once = max(1, min(cuts + 1 if cuts else 1, (max_bytes - kept) // (need * rows)))
    return plan_runs(
        model,
        f"a pass over about {tokens:,} tokens",
        runs=1 + (cuts + 1 if cuts else 0) + (3 if estimate else 0),
        rows=-(-tokens // size),
        positions=size,
        bytes=kept + need * max(rows * at_once, 4),  # the first window again, with all its hooks
        result=kept,
        chunks=-(-tokens // (rows * size)),
    )


@plans(_plan)
@torch.no_grad()
@renamed_arguments(top="top_k", save="resume")
def over_corpus(
    model: AttentionOnlyModel,
    texts: Texts,
    *,
    heads: Sequence[Target] = (),
    metric: Metric | None = None,
    estimate: bool = False,
    length: int | None = None,
    batch: int = 8,
    top_k: int = 10,
    context: int = 16,
    limit: int | None = None,
    field: str = "text",
    resume: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> CorpusScores:
    """Score every head on a corpus, and keep the passages where each writes most.

    Documents are read one at a time and cut into windows; what is held does not grow with the
    corpus. Sums are taken in float64 and added up in the order of the corpus: a pass that was
    interrupted, or shared among workers, gives the very same numbers, and batch size and the order
    of documents change no more than their last digits.

    Args:
        model: the converted model.
        field: of a JSONL line: the one that holds the text.
        texts: a text file, a JSONL file, or anything that gives documents, such as one split of a
            Hugging Face dataset (streaming ones too): texts, token ids, or mappings with ``field``.
        heads: what to cut to zero on every window, as for ``ablate``; each costs a run.
        metric: what else to measure when they are cut: a function of the logits ``[n, pos, d_vocab_out]``
            of ``n`` windows (on the right, padding) that gives ``[n]``, as for ``Task``.
        estimate: also estimate the loss change of every head from a backward pass per window.
        length: tokens of a window, BOS included; the model's context by default.
        batch: windows at a time, fewer where ``max_bytes`` says so.
        top_k: how many passages to keep for every head.
        context: tokens on each side.
        limit: stop after so many documents.
        resume: a file that takes what was counted, after every 32 thousand tokens; a later call with
            the same arguments goes on from there. Nothing is lost or counted twice.
        workers: let so many Ray workers count, while this process reads (extra ``ray``; a running
            cluster is used). None: count in this process.
        max_bytes: memory beyond the model's that may be used, the result included.

    Raises:
        MechInterpError: unreadable texts, settings out of range, a ``resume`` file of another pass or
            of a corpus that has changed, or together with a metric, which no file can tell from another.
    """
    model.heads.required()
    made = _plan(model, texts, heads, estimate, length, batch, top_k, context, max_bytes)
    settings = Settings(
        heads=(heads,) if isinstance(heads, str) else tuple(heads),
        estimate=estimate,
        length=length or model.spec.n_ctx,
        batch=batch,
        top_k=top_k,
        context=context,
        max_bytes=max_bytes - made.result,
        metric=metric,
    )
    settings.check(model, workers)
    state = None if resume is None else _state(resume, model, settings, field)
    tally = None if state is None else Tally.load(state)
    first: list[Window] = []
    pieces = _pieces(model, texts, settings, field, limit, state, tally, first)
    counted: Iterator[Tally]
    if workers is None:
        counted = (count(model, piece, settings) for piece in pieces)
    else:
        counted = count_on_ray(model, pieces, settings, workers)
    done = 0 if tally is None else tally.windows
    with Progress(desc="corpus", unit=" windows", initial=done, stops=True) as bar:
        for part in counted:
            tally = part if tally is None else tally + part
            bar.update(part.windows)
            if state is not None:
                tally.save(state)
            if bar.stopped:
                break
        notes = bar.notes
    if tally is None:
        raise MechInterpError("the corpus has no window of at least 2 tokens; give more text")
    return _result(model, tally, settings, _checks(model, tally, first[0], settings), notes)


def _state(
    path: str | os.PathLike[str], model: AttentionOnlyModel, settings: Settings, field: str
) -> SavedState:
    """The file of a pass. Batch size, memory and workers do not make it another one.

    Raises:
        MechInterpError: the model has hooks, or a metric is given, which a file cannot tell apart.
    """
    refuse_hooks(model, "resume")
    if settings.metric is not None:
        raise MechInterpError(
            "resume= does not go with metric=, a function, which a file cannot tell from another one; "
            "leave one of them out"
        )
    about = {
        "model": fingerprint(model.spec, model.state_dict()), "heads": settings.names(model),
        "estimate": settings.estimate, "length": settings.length, "top": settings.top_k,
        "context": settings.context, "field": field,
    }  # fmt: skip
    return SavedState(path, what="a pass over a corpus", option="resume", about=about)


def _pieces(
    model: AttentionOnlyModel,
    texts: Texts,
    settings: Settings,
    field: str,
    limit: int | None,
    state: SavedState | None,
    done: Tally | None,
    first: list[Window],
) -> Iterator[list[Window]]:
    """The windows that are not counted yet, about ``PIECE`` tokens at a time.

    Those that are counted are read again, which costs little beside counting them: only so can the
    pass know that they are still the same. The very first one is put into ``first`` as well.

    Raises:
        MechInterpError: the texts up to the last window that was counted are not what they were.
    """
    n = max(1, PIECE // settings.length)
    piece: list[Window] = []
    last = None if done is None else done.place
    for window in windows(model, texts, settings.length, field=field, limit=limit):
        if not first:
            first.append(window)
        if last is not None:
            here, there = (window.document, window.start), (last.document, last.start)
            if here > there or (here == there and Place.of(window) != last):
                break
            last = None if here == there else last
            continue
        piece.append(window)
        if len(piece) == n:
            yield piece
            piece = []
    if last is not None and state is not None:
        raise state.refusal(
            f"the texts up to document {last.document} are not the ones that were counted: they have "
            "changed, or limit is smaller than it was"
        )
    if piece:
        yield piece


def _checks(
    model: AttentionOnlyModel, tally: Tally, window: Window, settings: Settings
) -> tuple[Check, ...]:
    """Nothing is lost or counted twice; and the first window once more, in other ways."""
    lost = abs(float(tally.tokens) - tally.place.so_far)
    own = count(model, [window], settings)
    tokens = window.tokens[None].to(model.W_E.device)
    logits, cache = model.run_with_cache(tokens, return_cache_object=False)
    batch = pad(model, [tokens[0]])
    checks = (
        Check("next tokens counted, against those that were read", lost, 0.5),
        dense_check(model, batch, cache, own.sums),
    )
    if model.spec.no_next_token is not None:
        return checks
    right = logits[0, :-1].double().log_softmax(-1).gather(1, tokens[0, 1:, None])
    loss = -float(right.sum()) / len(right)
    error = abs(loss - float(own.loss) / len(right))
    tolerance = TOLERANCE[model.W_E.dtype] * max(1.0, loss)
    return (*checks, Check("loss of the first window, in float64", error, tolerance))


def _result(
    model: AttentionOnlyModel,
    tally: Tally,
    settings: Settings,
    checks: tuple[Check, ...],
    more: Mapping[str, str],
) -> CorpusScores:
    n, positions = float(tally.tokens), float(tally.positions)
    frame = model.heads.frame[["head", "layer", "index", "kind"]]
    columns: Mapping[str, Any] = tally.sums.columns()
    frame = frame.assign(**columns, written=(tally.written / positions).numpy())
    names = settings.names(model)
    ablations = pd.DataFrame({"head": names})
    for column, changes in zip(settings.measured(model), tally.cut, strict=True):
        ablations[column] = (changes / (tally.windows if column == "metric_change" else n)).numpy()
    none = model.spec.no_next_token
    loss_per_token = float("nan") if none else float(tally.loss) / n
    notes: dict[str, Any] = {"windows": tally.windows, "tokens": int(n)}
    notes["loss"] = none or round(loss_per_token, 6)
    if settings.metric is not None:
        notes["metric"] = getattr(settings.metric, "__name__", "own metric")
    if names:
        frame = frame.merge(ablations, on="head", how="left")
    if settings.estimate:
        frame["estimate"] = (tally.estimate / n).numpy()
        if names:
            notes |= rank_correlation(frame)
    return CorpusScores(
        frame=frame,
        receipt=Receipt(checks, {**notes, **more}),
        ablations=ablations,
        loss=loss_per_token,
        tokens=int(n),
        tally=tally,
        model=model,
    )
