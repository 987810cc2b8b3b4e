"""Detectors over a corpus: streamed, bounded, resumable, on one process or many."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import add
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.causal.batches import Batch, pad, rows_within
from mechinterp_attn.causal.cuts import Cut, Target, cut_of, next_token, run_cuts
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draw
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.results import Receipt, Result
from mechinterp_attn.detect.estimates import estimated_changes, rank_correlation
from mechinterp_attn.detect.measures import HOOKS, sums_of
from mechinterp_attn.detect.tally import Best, Place, Tally
from mechinterp_attn.detect.texts import Texts, Window, windows
from mechinterp_attn.model.attention_only import AttentionOnlyModel

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

MAX_BYTES = 2**30
PIECE = 2**15  # tokens that are counted between two writes of the file, and sent to a worker at once


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CorpusScores(Result):
    """What every head does on a corpus.

    Attributes:
        frame: one row per head: the columns of ``score_heads``; ``written``, the mean norm of what
            the head writes; ``loss_change`` and ``logit_change`` (nats a token, logit of the right
            token) for the heads that were cut; ``estimate`` of the loss change, if asked for.
        ablations: one row per head, virtual head or edge that was cut: ``head, loss_change,
            logit_change``.
        loss: of the model (nats a token);  tokens: how many next tokens were counted.
    """

    title: ClassVar[str] = "Heads over a corpus"
    sort_by: ClassVar[str | None] = "induction"
    ablations: pd.DataFrame
    loss: float
    tokens: int
    tally: Tally
    model: AttentionOnlyModel

    def plot(self, score: str = "induction") -> Figure:
        """A heatmap of one score over attention heads by layer."""
        return draw(self, score)

    def passages(self, head: str) -> pd.DataFrame:
        """Where a head of any kind writes most.

        Returns:
            one row per passage, largest first: ``rank, norm, document, position`` (of the token in
            its document), ``before, token, after``; for viewers that colour tokens, ``tokens`` (the
            passage token by token) and ``norms`` (of what the head writes at each).

        Raises:
            MechInterpError: no such head.
        """
        self.model.heads.find(head)
        best, row = self.tally.best, list(self.model.heads).index(head)
        bos = self.model.bos_token_id is not None
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
            place = document, start + position - bos
            rows.append((rank + 1, value, *place, *texts, self._texts(ids), inside))
        names = ["rank", "norm", "document", "position", "before", "token", "after", "tokens", "norms"]
        return pd.DataFrame(rows, columns=names)

    def _texts(self, ids: Tensor) -> list[str]:
        return self.model.to_str_tokens(ids[ids >= 0])


@torch.no_grad()
def over_corpus(
    model: AttentionOnlyModel,
    texts: Texts,
    *,
    heads: Sequence[Target] = (),
    estimate: bool = False,
    length: int | None = None,
    batch: int = 8,
    top: int = 10,
    context: int = 16,
    limit: int | None = None,
    field: str = "text",
    save: str | os.PathLike[str] | None = None,
    workers: int | None = None,
    max_bytes: int = MAX_BYTES,
) -> CorpusScores:
    """Score every head on a corpus, and keep the passages where each writes most.

    Documents are read one at a time and cut into windows; what is held does not grow with the
    corpus. Sums are taken in float64 and added up in the order of the corpus: a pass that was
    interrupted, or shared among workers, gives the very same numbers, and batch size and the order
    of documents change no more than their last digits.

    Args:
        texts: a text file, a JSONL file, or anything that gives documents, such as one split of a
            Hugging Face dataset (streaming ones too): texts, token ids, or mappings with ``field``.
        heads: what to cut to zero on every window, as for ``ablate``; each costs a run.
        estimate: also estimate the loss change of every head from a backward pass per window.
        length: tokens of a window, BOS included; the model's context by default.
        batch: windows at a time, fewer where ``max_bytes`` says so.
        top: how many passages to keep for every head;  context: tokens on each side.
        limit: stop after so many documents.
        save: a file that takes what was counted, after every 32 thousand tokens; a later call with
            the same arguments goes on from there. Nothing is lost or counted twice.
        workers: let so many Ray workers count, while this process reads (extra ``ray``; a running
            cluster is used). None: count in this process.
        max_bytes: of patterns, values and logits held at a time.

    Raises:
        MechInterpError: unreadable texts, settings out of range, a ``save`` file of another pass or
            of a corpus that has changed.
    """
    model.heads.required()
    settings = Settings(
        heads=(heads,) if isinstance(heads, str) else tuple(heads),
        estimate=estimate,
        length=length or model.spec.n_ctx,
        batch=batch,
        top=top,
        context=context,
        max_bytes=max_bytes,
    )
    settings.check(model, workers)
    path = None if save is None else Path(save)
    about = settings.about(model, field) if path is not None else {}
    tally = Tally.load(path, about) if path is not None and path.exists() else None
    pieces = _pieces(model, texts, settings, field, limit, None if tally is None else tally.place)
    counted: Iterator[Tally]
    if workers is None:
        counted = (count(model, piece, settings) for piece in pieces)
    else:
        from mechinterp_attn.detect.cluster import count_on_ray

        counted = count_on_ray(model, pieces, settings, workers)
    done = 0 if tally is None else tally.windows
    with Progress(desc="corpus", unit=" windows", initial=done, stops=True) as bar:
        for part in counted:
            tally = part if tally is None else tally + part
            bar.update(part.windows)
            if path is not None:
                tally.save(path, about)
            if bar.stopped:
                break
        notes = bar.notes
    if tally is None:
        raise MechInterpError("the corpus has no window of at least 2 tokens; give more text")
    return _result(model, tally, settings, notes)


@dataclass(frozen=True)
class Settings:
    """What to count on a window."""

    heads: tuple[Target, ...]
    estimate: bool
    length: int
    batch: int
    top: int
    context: int
    max_bytes: int

    def check(self, model: AttentionOnlyModel, workers: int | None) -> None:
        wrong = []
        if not 2 <= self.length <= model.spec.n_ctx:
            wrong.append(f"length={self.length}; expected 2 to {model.spec.n_ctx}, the model's context")
        for name in ("batch", "top"):
            if getattr(self, name) < 1:
                wrong.append(f"{name}={getattr(self, name)}; expected at least 1")
        if self.context < 0:
            wrong.append(f"context={self.context}; expected 0 or more")
        if workers is not None and workers < 1:
            wrong.append(f"workers={workers}; expected at least 1, or None for this process")
        if wrong:
            raise MechInterpError("; ".join(wrong))
        rows_within(model, self.length, self.max_bytes)
        self.cuts(model, Batch(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool)))

    def cuts(self, model: AttentionOnlyModel, batch: Batch) -> list[Cut]:
        return [cut_of(model, head, batch) for head in self.heads]

    def names(self, model: AttentionOnlyModel) -> list[str]:
        empty = Batch(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool))
        return [cut.name for cut in self.cuts(model, empty)]

    def about(self, model: AttentionOnlyModel, field: str) -> dict[str, Any]:
        """What makes a pass what it is; batch size, memory and workers do not."""
        return {
            "model": fingerprint(model), "heads": self.names(model), "estimate": self.estimate,
            "length": self.length, "top": self.top, "context": self.context, "field": field,
        }  # fmt: skip


def fingerprint(model: AttentionOnlyModel) -> str:
    """A hash of the model's weights and rules."""
    digest = hashlib.sha256(repr(model.spec).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().double().sum().cpu().numpy().tobytes())
        digest.update(tensor.detach().double().square().sum().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


def _pieces(
    model: AttentionOnlyModel,
    texts: Texts,
    settings: Settings,
    field: str,
    limit: int | None,
    last: Place | None,
) -> Iterator[list[Window]]:
    """The windows behind ``last``, about ``PIECE`` tokens at a time.

    Raises:
        MechInterpError: ``last`` is not where it was.
    """
    n = max(1, PIECE // settings.length)
    piece: list[Window] = []
    first = 0 if last is None else last.document
    for window in windows(model, texts, settings.length, field=field, limit=limit, first=first):
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
    if last is not None:
        raise MechInterpError(
            f"document {last.document} is not the one that was counted up to token {last.start}: the "
            "texts have changed, or limit is smaller than it was; give another file to save to"
        )
    if piece:
        yield piece


def count(model: AttentionOnlyModel, piece: Sequence[Window], settings: Settings) -> Tally:
    """The tally of some windows, a batch at a time."""
    fit = rows_within(model, settings.length, settings.max_bytes)
    rows = max(1, min(settings.batch, fit // 3 if settings.estimate else fit))
    parts = (piece[i : i + rows] for i in range(0, len(piece), rows))
    return reduce(add, (_tally(model, part, settings, at_a_time=max(1, fit // rows)) for part in parts))


def _tally(
    model: AttentionOnlyModel, some: Sequence[Window], settings: Settings, *, at_a_time: int
) -> Tally:
    batch = pad(model, [window.tokens.to(model.W_E.device) for window in some])
    places = torch.tensor([(window.document, window.start) for window in some])
    names = {f"{bank.path}.{hook}" for bank in model.banks for hook in (*HOOKS, "hook_z")}
    padded: dict[str, Any] = {} if batch.mask is None else {"attention_mask": batch.mask}
    logits, cache = model.run_with_cache(
        batch.tokens, names_filter=lambda name: name in names, return_cache_object=False, **padded
    )
    loss, _ = next_token(logits, batch)
    del logits
    # The first token has no context, and heads often rest on it: no passage is about it.
    counted = batch.real.clone()
    counted[:, 0] = False
    written = [bank.written(cache) for bank in model.banks]
    best = [_best(w, counted, batch, places, settings) for w in written]
    sums = sums_of(model, batch, cache)
    del cache
    means = [(w.double() * counted[..., None]).sum((0, 1)).cpu() for w in written]
    nothing = torch.zeros(0, dtype=torch.float64)
    return Tally(
        sums=type(sums)(*(tensor.cpu() for tensor in vars(sums).values())),
        loss=loss.double().sum()[None].cpu(),
        tokens=batch.predicts.sum().double()[None].cpu(),
        cut=_cut(model, batch, settings, at_a_time),
        estimate=estimated_changes(model, batch, batch.predicts) if settings.estimate else nothing,
        written=torch.cat(means),
        positions=counted.sum().double()[None].cpu(),
        best=Best(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in best), strict=True))),
        windows=len(batch),
        place=Place.of(some[-1]),
    )


def _cut(
    model: AttentionOnlyModel, batch: Batch, settings: Settings, at_a_time: int
) -> Float[Tensor, "2 cut"]:
    """Sums of what every cut changes: losses, logits."""
    cuts = settings.cuts(model, batch)
    if not cuts:
        return torch.zeros(2, 0, dtype=torch.float64)
    runs = [Cut("nothing"), *cuts]
    totals = []
    for start in range(0, len(runs), at_a_time):
        part = run_cuts(model, batch, runs[start : start + at_a_time], replacement=None, patterns=None)
        totals.append(torch.stack([x.double().sum((1, 2)).cpu() for x in part]))
    total = torch.cat(totals, 1)
    return total[:, 1:] - total[:, :1]


def _best(written: Tensor, counted: Tensor, batch: Batch, places: Tensor, settings: Settings) -> Best:
    """The passages of one batch where each head of a bank writes most."""
    width, context = batch.tokens.shape[1], settings.context
    values = written.masked_fill(~counted[..., None], -torch.inf).flatten(0, 1).T.float()  # [head, b * p]
    value, flat = values.topk(min(settings.top, values.shape[1]), dim=1)
    value, flat = value.cpu(), flat.cpu()
    row, position = flat // width, flat % width
    around = position[..., None] + torch.arange(-context, context + 1)
    inside = (around >= 0) & (around < batch.real.sum(1).cpu()[row][..., None])
    at = row[..., None], around.clamp(0, width - 1)
    head = torch.arange(len(value))[:, None, None]
    found = Best(
        value,
        torch.cat([places[row], position[..., None]], -1),
        torch.where(inside, batch.tokens.cpu()[at], -1).to(torch.int32),
        torch.where(inside, written.cpu()[(*at, head)], 0).float(),
    )
    found.place[value == -torch.inf] = -1
    found.tokens[value == -torch.inf] = -1
    return Best.empty(len(value), settings.top, context) + found


def _result(
    model: AttentionOnlyModel, tally: Tally, settings: Settings, more: Mapping[str, str]
) -> CorpusScores:
    n, positions = float(tally.tokens), float(tally.positions)
    frame = model.heads.frame[["head", "layer", "index", "kind"]]
    columns: Mapping[str, Any] = tally.sums.columns()
    frame = frame.assign(**columns, written=(tally.written / positions).numpy())
    names = settings.names(model)
    loss, logit = (tally.cut / n).numpy()
    ablations = pd.DataFrame({"head": names, "loss_change": loss, "logit_change": logit})
    notes = {"windows": tally.windows, "tokens": int(n), "loss": round(float(tally.loss) / n, 6)}
    if names:
        frame = frame.merge(ablations, on="head", how="left")
    if settings.estimate:
        frame["estimate"] = (tally.estimate / n).numpy()
        if names:
            notes |= rank_correlation(frame)
    return CorpusScores(
        frame=frame,
        receipt=Receipt((), {**notes, **more}),
        ablations=ablations,
        loss=float(tally.loss) / n,
        tokens=int(n),
        tally=tally,
        model=model,
    )
