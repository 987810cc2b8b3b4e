"""The text of a tokenizer's ids: one that tells each apart, and one that reads well in a sequence."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")  # how sentencepiece names the tokens of single bytes
_ID = re.compile(r"⟨id (\d+)⟩")
_SPACE = "▁"  # how sentencepiece writes a space
_END = "</w>"  # how GPT-1's byte pairs write the end of a word


class Vocabulary:
    """What the ids of a tokenizer stand for.

    The text of a token is what it adds to a text, read off the tokenizer's own table of pieces: a
    piece decoded on its own would lose its leading space (sentencepiece) or turn into "�" (part of a
    character's bytes). Two ids never have the same text:

    - spaces stay: ``" is"`` and ``"is"`` are two tokens of Llama;
    - bytes that are no whole character read ``⟨F0⟩``, as do byte tokens that would read like another
      token;
    - WordPiece's continuations keep their mark: ``##ing``; the end of a word in GPT-1's pieces is a space;
    - ids that no text stands for read ``⟨id 50300⟩``.

    Args:
        tokenizer: Hugging Face's. One with no more than ``decode`` gives its texts one by one.
    """

    def __init__(self, tokenizer: Any):
        self.tokenizer = tokenizer
        self.size = len(self._pieces)

    def of(self, tokenizer: Any) -> bool:
        """Whether this is the vocabulary of a tokenizer as it is now (tokens can be added to one)."""
        if tokenizer is not self.tokenizer:
            return False
        return not self.size or len(tokenizer) == self._counted

    def texts(self, ids: Sequence[int]) -> list[str]:
        """The text of each id on its own."""
        if not self._pieces:
            return [str(self.tokenizer.decode([i], clean_up_tokenization_spaces=False)) for i in ids]
        return [self._texts[i] if 0 <= i < self.size else f"⟨id {i}⟩" for i in ids]

    def readable(self, ids: Sequence[int]) -> list[str]:
        """The texts of a sequence, in which tokens that share a character all show it.

        ``😀`` in four byte tokens reads ``😀⟨1/4⟩``, ``😀⟨2/4⟩``, ``😀⟨3/4⟩``, ``😀⟨4/4⟩``.
        """
        texts = self.texts(ids)
        known = [self._bytes[i] if 0 <= i < self.size else b"" for i in ids] if self._pieces else []
        if all(_whole(part) for part in known):
            return texts
        spans = list(_characters(b"".join(known)))
        start = first = 0
        for place, part in enumerate(known):
            stop = start + len(part)
            if not _whole(part):
                while spans[first][1] <= start:
                    first += 1
                texts[place] = "".join(_shares(spans, first, start, stop))
            start = stop
        return texts

    def find(self, text: str) -> int | None:
        """The id whose text this is, or None."""
        if (named := _ID.fullmatch(text)) is not None:
            return int(named[1])
        return self._ids.get(text)

    @cached_property
    def plain_ids(self) -> Int[Tensor, " id"]:
        """The ids that a text is made of: no special tokens, none without a text."""
        special = set(getattr(self.tokenizer, "all_special_ids", ()))
        special |= {i for i, token in self._added.items() if getattr(token, "special", False)}
        return torch.tensor([i for i in range(self.size) if self._bytes[i] and i not in special])

    @cached_property
    def added(self) -> tuple[list[int], list[int]]:
        """What the tokenizer puts in front of a text and behind it, such as [CLS] and [SEP]."""
        bare = self.tokenizer("a", add_special_tokens=False)["input_ids"]
        full = self.tokenizer("a", add_special_tokens=True)["input_ids"]
        for at in range(len(full) - len(bare) + 1):
            if full[at : at + len(bare)] == bare:
                return full[:at], full[at + len(bare) :]
        return [], []

    @cached_property
    def _added(self) -> dict[int, Any]:
        return dict(getattr(self.tokenizer, "added_tokens_decoder", {}))

    @cached_property
    def _pieces(self) -> list[str | None]:
        """The tokenizer's own name of every id; empty where it does not tell."""
        if not hasattr(self.tokenizer, "get_vocab"):
            return []
        table = self.tokenizer.get_vocab()
        self._counted = len(self.tokenizer)
        pieces: list[str | None] = [None] * (max(table.values(), default=-1) + 1)
        for piece, i in table.items():
            pieces[i] = piece
        return pieces

    @cached_property
    def _bytes(self) -> list[bytes]:
        """What every id adds to a text, in UTF-8; nothing where there is none."""
        alphabet = self._alphabet
        byte_level = alphabet is not None
        spaced = not byte_level and (_SPACE in self._rules or any(map(_starts_word, self._pieces)))
        out = []
        for i, piece in enumerate(self._pieces):
            added = self._added.get(i)
            if piece is None:
                out.append(b"")
            elif added is not None and (byte_level or getattr(added, "special", False)):
                out.append(_utf8(piece))
            elif alphabet is not None:
                out.append(_from_alphabet(piece, alphabet))
            elif (byte := _BYTE.fullmatch(piece)) is not None:
                out.append(bytes.fromhex(byte[1]))
            else:
                piece = piece.replace(_SPACE, " ") if spaced else piece
                out.append(_utf8(f"{piece.removesuffix(_END)} " if piece.endswith(_END) else piece))
        return out

    @cached_property
    def _alphabet(self) -> Mapping[str, int] | None:
        """Which letter of the pieces stands for which byte; None where they are texts."""
        if self._rules:
            return _LETTERS if "ByteLevel" in self._rules else None
        if not hasattr(self.tokenizer, "tokenize"):
            return None
        tried = "".join(self.tokenizer.tokenize("\U0001f600"))  # of four bytes, that print or do not
        for letters in (_LETTERS, _LATIN):
            names = {byte: letter for letter, byte in letters.items()}
            if "".join(names[byte] for byte in "\U0001f600".encode()) in tried:
                return letters
        return None

    @cached_property
    def _rules(self) -> str:
        """How a fast tokenizer reads and writes texts, as JSON; empty for the others."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        parts = (getattr(backend, name, None) for name in ("normalizer", "pre_tokenizer", "decoder"))
        return "".join(part.__getstate__().decode("utf-8") for part in parts if part is not None)

    @cached_property
    def _texts(self) -> list[str]:
        texts = [""] * self.size
        taken: set[str] = set()
        lone = [i for i in range(self.size) if self._is_byte(i)]
        for i in sorted(range(self.size), key=set(lone).__contains__):  # byte tokens give way
            text = _legible(self._bytes[i])
            if text in taken and self._is_byte(i):
                text = _hex(self._bytes[i])
            if not text or text in taken:
                text = f"{text}⟨id {i}⟩"
            taken.add(text)
            texts[i] = text
        return texts

    def _is_byte(self, i: int) -> bool:
        return len(self._bytes[i]) == 1 and _BYTE.fullmatch(self._pieces[i] or "") is not None

    @cached_property
    def _ids(self) -> dict[str, int]:
        return {text: i for i, text in enumerate(self._texts)}


def _starts_word(piece: str | None) -> bool:
    return piece is not None and piece.startswith(_SPACE)


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", errors="surrogatepass")


def _alphabet() -> dict[str, int]:
    """GPT-2's letters for the 256 bytes: those that print stand for themselves."""
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printing]
    letters = {chr(byte): byte for byte in printing}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}


_LETTERS = _alphabet()
_LATIN = {chr(byte): byte for byte in range(256)}  # ByT5's: each byte the character of its number


def _from_alphabet(piece: str, letters: Mapping[str, int]) -> bytes:
    try:
        return bytes(letters[letter] for letter in piece)
    except KeyError:  # a piece that was put in as a text
        return _utf8(piece)


def _whole(part: bytes) -> bool:
    try:
        part.decode("utf-8")
    except UnicodeDecodeError:
        return False
    return True


def _hex(part: bytes) -> str:
    return "".join(f"⟨{byte:02X}⟩" for byte in part)


def _legible(part: bytes) -> str:
    """Bytes as text, those that are no character one by one as ⟨F0⟩."""
    return "".join(text for _, _, text in _characters(part))


def _characters(text: bytes) -> Iterator[tuple[int, int, str]]:
    """Start, end and text of each character; a byte that belongs to none is one of its own."""
    at = 0
    for character in text.decode("utf-8", errors="surrogateescape"):
        if "\udc80" <= character <= "\udcff":
            yield at, at + 1, _hex(text[at : at + 1])
            at += 1
        else:
            width = len(character.encode("utf-8"))
            yield at, at + width, character
            at += width


def _shares(spans: Sequence[tuple[int, int, str]], first: int, start: int, stop: int) -> Iterator[str]:
    """The characters that bytes ``start`` to ``stop`` belong to, each with which of its bytes they are."""
    for a, b, character in spans[first:]:
        if a >= stop:
            return
        low, high = max(a, start) - a + 1, min(b, stop) - a
        part = f"{low}" if low == high else f"{low}–{high}"
        yield character if high - low + 1 == b - a else f"{character}⟨{part}/{b - a}⟩"
