"""Detectors over a corpus: streamed, bounded, resumable, on one process or many."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from pathlib import Path
from typing import Any, ClassVar

import pandas as pd
import torch
from jaxtyping import Int
from torch import Tensor
from tqdm.auto import tqdm

from mechinterp_attn.detect.batches import Batch, pad, rows_within
from mechinterp_attn.detect.cuts import Cut, Target, cut_of, next_token, run_cuts
from mechinterp_attn.detect.measures import HOOKS, sums_of
from mechinterp_attn.detect.tally import Best, Tally
from mechinterp_attn.detect.texts import Texts, documents, windows
from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.results import Receipt, Result

MAX_BYTES = 2**30
SAVE_EVERY = 50  # batches


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class CorpusScores(Result):
    """What every head does on a corpus.

    Attributes:
        frame: one row per head: the columns of ``score_heads``; ``written``, the mean norm of what
            the head writes; and ``loss_change`` (nats a token) for the heads that were cut.
        ablations: one row per head or virtual head that was cut: ``head, loss_change``.
        loss: of the model (nats a token);  tokens: how many next tokens were counted.
    """

    title: ClassVar[str] = "Heads over a corpus"
    sort_by: ClassVar[str | None] = "induction"
    ablations: pd.DataFrame
    loss: float
    tokens: int
    tally: Tally
    model: AttentionOnlyModel

    def passages(self, head: str) -> pd.DataFrame:
        """Where a head of any kind writes most.

        Returns:
            one row per passage, largest first: ``rank, norm, document, position`` (of the token in
            its document), ``before, token, after``.

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
            ids = best.tokens[row, rank].tolist()
            middle = len(ids) // 2
            document, start, position = best.place[row, rank].tolist()
            text = [
                self._text(part) for part in (ids[:middle], ids[middle : middle + 1], ids[middle + 1 :])
            ]
            rows.append((rank + 1, value, document, start + position - bos, *text))
        names = ["rank", "norm", "document", "position", "before", "token", "after"]
        return pd.DataFrame(rows, columns=names)

    def _text(self, ids: list[int]) -> str:
        real = [i for i in ids if i >= 0]
        if self.model.tokenizer is None:
            return " ".join(str(i) for i in real)
        return self.model.to_string(real) if real else ""


@torch.no_grad()
def over_corpus(
    model: AttentionOnlyModel,
    texts: Texts,
    *,
    heads: Sequence[Target] = (),
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
    corpus. Sums are taken in float64, so batch size, order and number of workers change no more
    than their last digits.

    Args:
        texts: a text file, a JSONL file, or anything that gives texts or mappings with ``field``,
            such as a Hugging Face dataset.
        heads: heads, or chains of heads, to cut to zero on every window; each costs a run.
        length: tokens of a window, BOS included; the model's context by default.
        batch: windows at a time, fewer where ``max_bytes`` says so.
        top: how many passages to keep for every head;  context: tokens on each side.
        limit: stop after so many documents.
        save: a file that takes what was counted, every 50 batches and at the end; a later call with
            the same arguments goes on from there. Nothing is lost or counted twice.
        workers: this many Ray workers, each with every n-th document (extra ``ray``; a running
            cluster is used). With ``save`` each has its own file beside it.
        max_bytes: of patterns, values and logits held at a time.

    Raises:
        MechInterpError: unreadable texts, settings out of range, a ``save`` file of another pass.
    """
    settings = _Settings(
        heads=tuple(heads) if not isinstance(heads, str) else (heads,),
        length=length or model.spec.n_ctx,
        batch=batch,
        top=top,
        context=context,
        limit=limit,
        field=field,
        max_bytes=max_bytes,
    )
    settings.check(model)
    path = None if save is None else Path(save)
    if workers is None:
        tally = count(model, texts, settings, path)
    else:
        from mechinterp_attn.detect.cluster import count_on_ray

        tally = reduce(add, count_on_ray(model, texts, settings, path, workers))
    return _result(model, tally, settings)


@dataclass(frozen=True)
class _Settings:
    heads: tuple[Target, ...]
    length: int
    batch: int
    top: int
    context: int
    limit: int | None
    field: str
    max_bytes: int
    shard: int = 0
    shards: int = 1

    def check(self, model: AttentionOnlyModel) -> None:
        wrong = []
        if not 2 <= self.length <= model.spec.n_ctx:
            wrong.append(f"length={self.length}; expected 2 to {model.spec.n_ctx}, the model's context")
        for name in ("batch", "top"):
            if getattr(self, name) < 1:
                wrong.append(f"{name}={getattr(self, name)}; expected at least 1")
        if self.context < 0:
            wrong.append(f"context={self.context}; expected 0 or more")
        if wrong:
            raise MechInterpError("; ".join(wrong))
        empty = Batch(torch.zeros(0, 2, dtype=torch.long), torch.zeros(0, 2, dtype=torch.bool))
        for head in self.heads:
            cut_of(model, head, empty)

    def about(self, model: AttentionOnlyModel) -> dict[str, Any]:
        """What makes a pass what it is; batch size and memory do not."""
        heads = [head if isinstance(head, str) else list(head) for head in self.heads]
        return {
            "model": fingerprint(model), "heads": heads,
            "length": self.length, "top": self.top, "context": self.context, "limit": self.limit,
            "field": self.field, "shard": f"{self.shard} of {self.shards}",
        }  # fmt: skip

    def of_shard(self, shard: int, shards: int) -> _Settings:
        return replace(self, shard=shard, shards=shards)


def fingerprint(model: AttentionOnlyModel) -> str:
    """A hash of the model's weights and rules."""
    digest = hashlib.sha256(repr(model.spec).encode())
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.detach().double().sum().cpu().numpy().tobytes())
        digest.update(tensor.detach().double().square().sum().cpu().numpy().tobytes())
    return digest.hexdigest()[:16]


@torch.no_grad()
def count(model: AttentionOnlyModel, texts: Texts, settings: _Settings, path: Path | None) -> Tally:
    """The tally of a corpus or of a shard of it, gone on with where ``path`` holds a part of it."""
    about = settings.about(model) if path is not None else {}
    tally = Tally.load(path, about) if path is not None and path.exists() else None
    done = 0 if tally is None else tally.windows
    fit = rows_within(model, settings.length, settings.max_bytes) // (1 + len(settings.heads))
    rows = max(1, min(settings.batch, fit))
    with tqdm(desc="windows", unit="window", initial=done, disable=None, leave=False) as progress:
        for i, (places, some) in enumerate(_batches(model, texts, settings, rows, done), 1):
            part = _tally(model, some, places, settings)
            tally = part if tally is None else tally + part
            progress.update(len(some))
            if path is not None and i % SAVE_EVERY == 0:
                tally.save(path, about)
    if tally is None:
        raise MechInterpError("the corpus has no window of at least 2 tokens; give more text")
    if path is not None:
        tally.save(path, about)
    return tally


def _batches(
    model: AttentionOnlyModel, texts: Texts, settings: _Settings, rows: int, done: int
) -> Iterator[tuple[Int[Tensor, "batch 2"], Batch]]:
    """Windows in batches, after those that are done: document and start of each, and tokens."""
    waiting: list[tuple[int, int, Tensor]] = []
    seen = 0
    for number, text in enumerate(documents(texts, field=settings.field)):
        if settings.limit is not None and number >= settings.limit:
            break
        if number % settings.shards != settings.shard:
            continue
        for start, window in windows(model, text, settings.length):
            seen += 1
            if seen <= done:
                continue
            waiting.append((number, start, window))
            if len(waiting) == rows:
                yield _packed(model, waiting)
                waiting = []
    if waiting:
        yield _packed(model, waiting)


def _packed(
    model: AttentionOnlyModel, waiting: list[tuple[int, int, Tensor]]
) -> tuple[Int[Tensor, "batch 2"], Batch]:
    places = torch.tensor([(number, start) for number, start, _ in waiting])
    return places, pad(model, [window.to(model.W_E.device) for _, _, window in waiting])


def _tally(
    model: AttentionOnlyModel, batch: Batch, places: Int[Tensor, "batch 2"], settings: _Settings
) -> Tally:
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
    n = batch.predicts.sum().double()[None].cpu()
    sums = sums_of(model, batch, cache)
    cpu = type(sums)(*(tensor.cpu() for tensor in vars(sums).values()))
    del cache
    cuts = [cut_of(model, head, batch) for head in settings.heads]
    changes = torch.zeros(len(cuts), dtype=torch.float64)
    if cuts:
        runs, _ = run_cuts(model, batch, [Cut("nothing"), *cuts], replacement=None, patterns=None)
        totals = runs.double().sum((1, 2)).cpu()
        changes = totals[1:] - totals[0]
    means = [(w.double() * counted[..., None]).sum((0, 1)).cpu() for w in written]
    return Tally(
        sums=cpu,
        loss=loss.double().sum()[None].cpu(),
        tokens=n,
        cut=changes,
        written=torch.cat(means),
        positions=counted.sum().double()[None].cpu(),
        best=Best(*(torch.cat(parts) for parts in zip(*(vars(b).values() for b in best), strict=True))),
        windows=len(batch),
    )


def _best(written: Tensor, counted: Tensor, batch: Batch, places: Tensor, settings: _Settings) -> Best:
    """The passages of one batch where each head of a bank writes most."""
    width, context = batch.tokens.shape[1], settings.context
    values = written.masked_fill(~counted[..., None], -torch.inf).flatten(0, 1).T.float()  # [head, b * p]
    value, flat = values.topk(min(settings.top, values.shape[1]), dim=1)
    value, flat = value.cpu(), flat.cpu()
    row, position = flat // width, flat % width
    around = position[..., None] + torch.arange(-context, context + 1)
    inside = (around >= 0) & (around < batch.real.sum(1).cpu()[row][..., None])
    tokens = batch.tokens.cpu()[row[..., None], around.clamp(0, width - 1)]
    found = Best(
        value,
        torch.cat([places[row], position[..., None]], -1),
        torch.where(inside, tokens, -1).to(torch.int32),
    )
    found.place[value == -torch.inf] = -1
    found.tokens[value == -torch.inf] = -1
    return Best.empty(len(value), settings.top, context) + found


def _result(model: AttentionOnlyModel, tally: Tally, settings: _Settings) -> CorpusScores:
    n, positions = float(tally.tokens), float(tally.positions)
    frame = model.heads.frame[["head", "layer", "index", "kind"]]
    columns: Mapping[str, Any] = tally.sums.columns()
    frame = frame.assign(**columns, written=(tally.written / positions).numpy())
    names = [head if isinstance(head, str) else " > ".join(head) for head in settings.heads]
    ablations = pd.DataFrame({"head": names, "loss_change": (tally.cut / n).numpy()})
    if names:
        frame["loss_change"] = frame["head"].map(dict(zip(names, ablations["loss_change"], strict=True)))
    notes = {"windows": tally.windows, "tokens": int(n), "loss": round(float(tally.loss) / n, 6)}
    return CorpusScores(
        frame=frame,
        receipt=Receipt((), notes),
        ablations=ablations,
        loss=float(tally.loss) / n,
        tokens=int(n),
        tally=tally,
        model=model,
    )
