"""What the bundled models read: a tokenizer, novels, and documents that repeat themselves.

The novels are litbank's (100 English novels; texts in the public domain, collection CC-BY 4.0,
https://github.com/dbamman/litbank), one file with the novels separated by `<|endoftext|>`.

Plain novels alone did not give models this small an induction circuit within 25 M tokens, so a
share of the documents repeats a span at a random period. The period and the phase change with
every document: a fixed period could be solved by position alone, without looking at the tokens.
"""

from __future__ import annotations

import lzma
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Generator, Tensor
from tqdm.auto import tqdm

BOS_TOKEN = "<|endoftext|>"
BOS = 0
"""Id of `BOS_TOKEN`: it starts every document and separates the novels."""
D_VOCAB = 1024
N_HELD_OUT = 5
"""The last novels of the file: neither the tokenizer nor a model is trained on them."""
PERIODS = (8, 63)
"""Shortest and longest repeated span, in tokens: at context 128 each is seen at least twice."""


def read_novels(path: Path) -> list[str]:
    """The novels of an xz-compressed UTF-8 file in which `<|endoftext|>` separates them."""
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        novels = file.read().split(BOS_TOKEN)
    if len(novels) <= N_HELD_OUT:
        raise ValueError(
            f"{path.name} holds {len(novels)} texts; expected more than the {N_HELD_OUT} that are "
            f"kept out of the training, separated by {BOS_TOKEN}: give the whole corpus."
        )
    return novels


def train_tokenizer(novels: list[str]) -> Tokenizer:
    """Byte-level BPE of `D_VOCAB` tokens, trained on all novels but the held-out ones.

    All 256 bytes are in the vocabulary and no space is added in front, so decode(encode(text))
    gives back any text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=D_VOCAB,
        special_tokens=[BOS_TOKEN],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(novels[:-N_HELD_OUT], trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, novels: list[str]) -> Int[Tensor, " token"]:
    """All novels as one stream of tokens, each after a BOS."""
    parts = []
    for novel in tqdm(novels, desc="encode", unit="novel"):
        parts.append(np.array([BOS, *tokenizer.encode(novel).ids], dtype=np.int64))
    return torch.from_numpy(np.concatenate(parts))


def bigram_counts(stream: Int[Tensor, " token"]) -> Int[Tensor, "first second"]:
    """How often each token follows each other one in the stream."""
    pairs = stream[:-1] * D_VOCAB + stream[1:]
    return pairs.bincount(minlength=D_VOCAB**2).view(D_VOCAB, D_VOCAB)


def windows(stream: Int[Tensor, " token"], length: int) -> Int[Tensor, "document length"]:
    """The stream cut, without overlap, into documents of a BOS and length - 1 tokens."""
    n_documents = len(stream) // (length - 1)
    return _with_bos(stream[: n_documents * (length - 1)].view(n_documents, length - 1))


def sample_documents(
    stream: Int[Tensor, " token"],
    *,
    n_natural: int,
    n_repeated: int,
    length: int,
    generator: Generator,
) -> Int[Tensor, "document length"]:
    """Random windows of the stream, then documents that repeat one span to fill the length.

    Half of the repeated spans are random tokens of the whole vocabulary (BOS aside), half are
    passages of the stream.
    """
    position = torch.arange(length - 1)
    n_random = n_repeated // 2
    n_read = n_natural + n_repeated - n_random
    start = torch.randint(len(stream) - length, (n_read, 1), generator=generator)
    shortest, longest = PERIODS
    period = torch.randint(shortest, longest + 1, (n_repeated, 1), generator=generator)
    phase = (torch.rand(n_repeated, 1, generator=generator) * period).long()
    within_span = (position + phase) % period
    spans = torch.randint(BOS + 1, D_VOCAB, (n_random, longest), generator=generator)
    return _with_bos(
        torch.cat(
            [
                stream[start[:n_natural] + position],
                spans.gather(1, within_span[:n_random]),
                stream[start[n_natural:] + within_span[n_random:]],
            ]
        )
    )


def random_repeats(
    n_documents: int, period: int, n_repeats: int, generator: Generator
) -> Int[Tensor, "document pos"]:
    """BOS, then `period` distinct random tokens, the same `n_repeats` times over."""
    shuffled = torch.rand(n_documents, D_VOCAB - 1, generator=generator).argsort(dim=1) + 1
    return _with_bos(shuffled[:, :period].repeat(1, n_repeats))


def _with_bos(documents: Int[Tensor, "document pos"]) -> Int[Tensor, "document pos_and_bos"]:
    return torch.cat([torch.full((len(documents), 1), BOS), documents], dim=1)
