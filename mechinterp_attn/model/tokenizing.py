"""Text to tokens: what TransformerLens calls to_tokens, and batches of texts of any lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.batch import Batch, Side, padded
from mechinterp_attn.model.given import integers, is_text, named, sound
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.model.vocabulary import Vocabulary

Text = str | list[str]


class Tokenizing:
    """Mixin for a model with ``spec``, ``tokenizer`` (Hugging Face's, or None), ``cfg`` and ``W_E``.

    A text becomes the ids that the model's own library makes of it: those of ``tokenizer(text)``, the
    special tokens of the tokenizer included, and with a BOS in front where ``cfg.default_prepend_bos``
    says so and the tokenizer has one.
    """

    spec: Spec
    tokenizer: Any
    cfg: Any
    W_E: Any
    _vocabulary: Vocabulary | None = None

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self.tokenizer, "bos_token_id", None)

    @property
    def vocabulary(self) -> Vocabulary:
        """The texts of the tokenizer's ids."""
        tokenizer = self._needed_tokenizer("the text of tokens")
        if self._vocabulary is None or not self._vocabulary.of(tokenizer):
            self._vocabulary = Vocabulary(tokenizer)
        return self._vocabulary

    @property
    def added_tokens(self) -> tuple[list[int], list[int]]:
        """The special tokens that ``to_tokens`` puts in front of a text and behind it, by default."""
        if self.tokenizer is None:
            return [], []
        front, behind = self.vocabulary.added
        bos = self.bos_token_id
        if bos is None:
            return front, behind
        begins = front[:1] == [bos]
        if self.cfg.default_prepend_bos:
            return (front if begins else [bos, *front]), behind
        return (front[1:] if begins else front), behind

    @property
    def text_ids(self) -> Int[Tensor, " id"]:
        """The ids that texts are made of: no special tokens, no rows of ``W_E`` beyond the tokenizer,
        none without a text. All ids where there is no tokenizer to ask.
        """
        every = torch.arange(self.spec.d_vocab)
        if self.tokenizer is None:
            return every
        if not self.vocabulary.size:  # it does not tell
            return every[every != self.bos_token_id] if self.bos_token_id is not None else every
        plain = self.vocabulary.plain_ids
        return plain[plain < len(every)]

    def to_tokens(
        self,
        input: Text,
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        move_to_device: bool = True,
        truncate: bool = False,
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of one text, or of several padded to one length (``to_batch`` has the mask too).

        A text that begins with the BOS already, such as a chat template's, gets no second one:
        ``to_tokens(to_string(ids))`` gives ``ids`` again.

        Args:
            prepend_bos: True puts a BOS in front; False leaves out every special token that is not
                written in the text, as for a piece of a longer one; None does as the model's own
                library does (see ``cfg.default_prepend_bos``).
            padding_side: by default the tokenizer's own; right in bidirectional models, whose positions
                count the padding.
            move_to_device: whether the ids are put on the model's device.
            truncate: cut texts that are longer than the context at its end. Without it they stay
                whole, and the model itself refuses them.

        Raises:
            MechInterpError: no tokenizer, no text, an empty one, or a BOS asked for that does not exist.
        """
        batch = self._padded(self._rows(input, prepend_bos, truncate), padding_side)
        return batch.tokens.to(self.W_E.device) if move_to_device else batch.tokens

    def to_batch(
        self,
        input: Text | Tensor | Sequence[Any],
        prepend_bos: bool | None = None,
        padding_side: Side | None = None,
        truncate: bool = False,
    ) -> Batch:
        """Validated tokens on the model's device, and which of them are no padding.

        ``model(batch.tokens, attention_mask=batch.mask)`` is what ``model(texts)`` computes.

        Args:
            input: one text or several, tokens ``[pos]`` or ``[batch, pos]``, or a list of tensors ``[pos]``
                of any lengths.
            prepend_bos, padding_side, truncate: as for ``to_tokens``.

        Raises:
            MechInterpError: what ``to_tokens`` and ``as_tokens`` raise.
        """
        if is_text(input):
            batch = self._padded(self._rows(cast(Text, input), prepend_bos, truncate), padding_side)
        elif (
            isinstance(input, list) and input and all(isinstance(row, Tensor) and row.ndim for row in input)
        ):
            rows = [integers(row) for row in input]
            if any(row.ndim != 1 or not len(row) for row in rows):
                raise MechInterpError("a row of tokens is empty or not a row; expected [pos] with an id")
            batch = self._padded(rows, padding_side)
        else:
            tokens = self._checked(integers(input))
            return Batch(tokens, torch.ones_like(tokens, dtype=torch.bool))
        tokens = self._checked(batch.tokens)
        return Batch(tokens, batch.real.to(tokens.device))

    def as_tokens(
        self, input: Text | Tensor | Sequence[Any], prepend_bos: bool | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Validated token ids ``[batch, pos]`` on the model's device from text or tokens.

        Raises:
            MechInterpError: empty, longer than the context, not integers, or out of range.
        """
        if is_text(input):
            return self._checked(self.to_tokens(cast(Text, input), prepend_bos))
        return self._checked(integers(input))

    def _rows(self, input: Text, prepend_bos: bool | None, truncate: bool) -> list[Tensor]:
        """The ids of every text."""
        tokenizer = self._needed_tokenizer("to_tokens")
        if not is_text(input):
            raise MechInterpError(
                f"{named(input)}; expected a text or a list of texts, at least one token in each"
            )
        texts = [input] if isinstance(input, str) else list(input)
        if prepend_bos and self.bos_token_id is None:
            raise MechInterpError("prepend_bos=True, but this model's tokenizer has no BOS token")
        rows = []
        for i, text in enumerate(texts):
            bare = tokenizer(sound(text, f"text {i}"), add_special_tokens=False)["input_ids"]
            if not bare:
                raise MechInterpError(f"text {i} is empty ({text!r}); give at least one token")
            row = bare if prepend_bos is False else self._with_special(text, bare, prepend_bos)
            if truncate and len(row) > self.spec.n_ctx:
                behind = [] if prepend_bos is False else self.vocabulary.added[1]
                row = row[: self.spec.n_ctx - len(behind)] + behind
            rows.append(torch.tensor(row))
        return rows

    def _with_special(self, text: str, bare: list[int], prepend_bos: bool | None) -> list[int]:
        """The tokenizer's own ids of a text, and a BOS in front where it is wanted.

        Args:
            bare: its ids without special tokens, but for those that it writes out itself.
        """
        ids = list(self.tokenizer(text, add_special_tokens=True)["input_ids"])
        front, behind = self.vocabulary.added
        if behind and bare[-len(behind) :] == behind and ids[-2 * len(behind) :] == 2 * behind:
            ids = ids[: -len(behind)]
        own = bool(front) and bare[: len(front)] == front
        if own and ids[: 2 * len(front)] == 2 * front:
            ids = ids[len(front) :]
        bos = self.bos_token_id
        if bos is None:
            return ids
        begins = ids[:1] == [bos]
        if prepend_bos or (prepend_bos is None and self.cfg.default_prepend_bos):
            return ids if begins else [bos, *ids]
        return ids[1:] if begins and not own and front[:1] == [bos] else ids

    def _padded(self, rows: list[Tensor], side: Side | None) -> Batch:
        if side not in (None, "left", "right"):
            raise MechInterpError(f"padding_side={side!r}; expected 'left' or 'right'")
        names = ("pad_token_id", "eos_token_id", "bos_token_id")
        known = (getattr(self.tokenizer, name, None) for name in names)
        fill = next((i for i in known if i is not None and i < self.spec.d_vocab), 0)
        own = getattr(self.tokenizer, "padding_side", None) if self.spec.causal else "right"
        return padded(rows, fill=fill, side=side or ("left" if own == "left" else "right"))

    def _checked(self, tokens: Tensor) -> Int[Tensor, "batch pos"]:
        tokens = tokens.to(self.W_E.device, torch.long)
        tokens = tokens[None] if tokens.ndim == 1 else tokens
        if tokens.ndim != 2 or tokens.numel() == 0:
            raise MechInterpError(
                f"tokens of shape {tuple(tokens.shape)}; expected [pos] or [batch, pos] with at "
                "least one token"
            )
        if tokens.shape[1] > self.spec.n_ctx:
            raise MechInterpError(
                f"{tokens.shape[1]} tokens are more than this model's context of "
                f"{self.spec.n_ctx}; shorten the prompt by {tokens.shape[1] - self.spec.n_ctx}"
            )
        if torch.compiler.is_compiling():  # reading a value would break the graph
            return tokens
        low, high = int(tokens.min()), int(tokens.max())
        if low < 0 or high >= self.spec.d_vocab:
            raise MechInterpError(
                f"token id {low if low < 0 else high} is outside the vocabulary 0..{self.spec.d_vocab - 1}"
            )
        return tokens

    def _needed_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise MechInterpError(
                f"{what} needs a tokenizer and this model has none; pass token ids [batch, pos], "
                "or set model.tokenizer to a Hugging Face tokenizer"
            )
        return self.tokenizer
