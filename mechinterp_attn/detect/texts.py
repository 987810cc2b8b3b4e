"""Documents and windows of tokens out of files and data sets, streamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.fingerprint import fingerprint
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.given import integers, named

Texts = str | os.PathLike[str] | Iterable[Any]
Document = str | Int[Tensor, " pos"]
PIECE = 1 << 16  # characters of a text file that make one document


@dataclass(frozen=True, eq=False)
class Window:
    """A piece of a document, no longer than a model's context.

    Attributes:
        document: its number.
        start: of the piece, in tokens of the document.
        tokens: ``[pos]``, between the special tokens that the model's texts have (``added_tokens``).
        mark: the fingerprint of this window and all windows before it.
        so_far: how many next tokens there are in this window and all windows before it.
    """

    document: int
    start: int
    tokens: Int[Tensor, " pos"]
    mark: str
    so_far: int


def windows(
    model: AttentionOnlyModel,
    texts: Texts,
    length: int,
    *,
    field: str = "text",
    limit: int | None = None,
) -> Iterator[Window]:
    """The windows of all documents in order, each of at most ``length`` tokens, BOS and other
    special tokens included.

    The last window of a document may be short, and is left out if it has no next token.

    Args:
        field, texts: as for ``documents``.
        limit: leave out documents from this number on.

    Raises:
        MechInterpError: as for ``documents``; tokens outside the vocabulary.
    """
    front, behind = map(torch.tensor, model.added_tokens)
    step = length - len(front) - len(behind)
    mark, so_far = "", 0
    for number, document in enumerate(documents(texts, field=field)):
        if number == limit:
            return
        ids = _ids(model, document, f"document {number}")
        for start in range(0, len(ids), step):
            window = torch.cat([front.long(), ids[start : start + step], behind.long()])
            if len(window) > 1:
                mark = fingerprint(mark, number, start, window)
                so_far += len(window) - 1
                yield Window(number, start, window, mark, so_far)


def documents(texts: Texts, *, field: str = "text") -> Iterator[Document]:
    """One document at a time.

    Args:
        texts: a text file (cut at line ends into documents of about 64 thousand characters), a
            JSONL file (one document a line), or anything that gives documents, such as one split of
            a Hugging Face dataset. A document is a text, a sequence of token ids, or a mapping
            that has one of them under ``field``.

    Raises:
        MechInterpError: a file that cannot be read, a line that is no JSON, a document without
            ``field``, a mapping of several splits; says which.
    """
    if isinstance(texts, Mapping):
        names = ", ".join(repr(name) for name in list(texts)[:5])
        raise MechInterpError(
            f"texts is a mapping with {names}; give one of them, such as texts[{names.split(',')[0]}]"
        )
    if not isinstance(texts, (str, os.PathLike)):
        if not isinstance(texts, Iterable):
            raise MechInterpError(f"texts is {named(texts)}; expected a file, or an iterable of documents")
        for i, one in enumerate(texts):
            yield _document(one, field, f"document {i}")
        return
    path = Path(texts)
    if not path.is_file():
        raise MechInterpError(f"no text file {path}; give a .txt or .jsonl file, or an iterable of texts")
    try:
        with path.open(encoding="utf-8-sig") as lines:
            if path.suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(path, lines, field)
            else:
                yield from _pieces(lines)
    except UnicodeDecodeError as error:
        raise MechInterpError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path, lines: Iterable[str], field: str) -> Iterator[Document]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise MechInterpError(f"{path}, line {number}: not JSON: {error}") from error
        yield _document(one, field, f"{path}, line {number}")


def _pieces(lines: Iterable[str]) -> Iterator[str]:
    piece: list[str] = []
    length = 0
    for line in lines:
        piece.append(line)
        length += len(line)
        if length >= PIECE:
            yield "".join(piece)
            piece, length = [], 0
    if piece:
        yield "".join(piece)


def _document(one: Any, field: str, where: str) -> Document:
    if isinstance(one, Mapping):
        if field not in one:
            known = ", ".join(repr(str(key)) for key in one)
            raise MechInterpError(
                f"{where} has no {field!r}, only {known}; name the field of the text with field="
            )
        one = one[field]
    if isinstance(one, str):
        return one
    listed = isinstance(one, Sequence) and not isinstance(one, bytes | bytearray)
    if isinstance(one, (Tensor, np.ndarray)) or (listed and all(isinstance(i, int) for i in one)):
        try:
            return integers(one).cpu()
        except MechInterpError as error:
            raise MechInterpError(f"{where}: {error}") from error
    raise MechInterpError(
        f"{where} is a {type(one).__name__}; expected a text, token ids, or a mapping with one of them "
        f"under {field!r} (name another field with field=)"
    )


def _ids(model: AttentionOnlyModel, document: Document, where: str) -> Int[Tensor, " ids"]:
    """A document's tokens, on the CPU, without the special tokens in front."""
    if isinstance(document, str):
        if not document.strip():
            return torch.zeros(0, dtype=torch.long)
        return model.to_tokens(document, prepend_bos=False)[0].cpu()
    outside = document[(document < 0) | (document >= model.spec.d_vocab)]
    if len(outside) or document.ndim != 1:
        what = f"token id {int(outside[0])}" if len(outside) else f"shape {tuple(document.shape)}"
        raise MechInterpError(f"{where} has {what}; expected [pos], ids 0..{model.spec.d_vocab - 1}")
    front, _ = model.added_tokens
    return document[len(front) :] if front and document[: len(front)].tolist() == front else document
