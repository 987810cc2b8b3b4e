"""Documents and windows of tokens out of files and data sets, streamed."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.errors import MechInterpError
from mechinterp_attn.model import AttentionOnlyModel

Texts = str | os.PathLike[str] | Iterable[Any]
PIECE = 1 << 16  # characters of a text file that make one document


def documents(texts: Texts, *, field: str = "text") -> Iterator[str]:
    """One document at a time.

    Args:
        texts: a text file (cut at line ends into documents of about 64 thousand characters), a
            JSONL file (one document a line, under ``field``), or anything that gives texts or
            mappings with ``field``, such as a Hugging Face dataset.

    Raises:
        MechInterpError: a file that cannot be read, a line that is no JSON, a document without
            ``field``; says which.
    """
    if not isinstance(texts, (str, os.PathLike)):
        for i, one in enumerate(texts):
            yield _text_of(one, field, f"document {i}")
        return
    path = Path(texts)
    if not path.is_file():
        raise MechInterpError(f"no text file {path}; give a .txt or .jsonl file, or an iterable of texts")
    try:
        with path.open(encoding="utf-8") as lines:
            if path.suffix in (".jsonl", ".ndjson"):
                yield from _json_lines(path, lines, field)
            else:
                yield from _pieces(lines)
    except UnicodeDecodeError as error:
        raise MechInterpError(f"{path} is not UTF-8 text: {error}") from error


def _json_lines(path: Path, lines: Iterable[str], field: str) -> Iterator[str]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            one = json.loads(line)
        except json.JSONDecodeError as error:
            raise MechInterpError(f"{path}, line {number}: not JSON: {error}") from error
        yield _text_of(one, field, f"{path}, line {number}")


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


def _text_of(one: Any, field: str, where: str) -> str:
    if isinstance(one, str):
        return one
    try:
        text = one[field]
    except (KeyError, TypeError, IndexError):
        text = None
    if not isinstance(text, str):
        raise MechInterpError(f"{where} has no text under {field!r}; name its field with field=")
    return text


def windows(model: AttentionOnlyModel, text: str, length: int) -> Iterator[tuple[int, Int[Tensor, " pos"]]]:
    """A document as windows of at most ``length`` tokens, BOS in front of each where there is one.

    Yields:
        where the window begins in the document, in tokens, and its tokens; the last one may be short,
        and is left out if it has no next token.
    """
    if not text.strip():
        return
    bos = model.bos_token_id
    ids = model.to_tokens(text, prepend_bos=False)[0].cpu()
    step = length if bos is None else length - 1
    for start in range(0, len(ids), step):
        window = ids[start : start + step]
        if bos is not None:
            window = torch.cat([torch.tensor([bos]), window])
        if len(window) > 1:
            yield start, window
