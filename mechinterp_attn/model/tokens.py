"""Text in and out of a model: what TransformerLens calls to_tokens, to_str_tokens, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.batch import Batch, Side, padded
from mechinterp_attn.model.given import integers, is_list, is_text, named, sound
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.model.vocabulary import Vocabulary

Text = str | list[str]


class TokenDoor:
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
    def added_text(self) -> str:
        """``added_tokens`` in words, for receipts: ``'<s>' in front``."""
        sides = zip(self.added_tokens, ("in front", "behind"), strict=True)
        said = [
            f"{' '.join(repr(text) for text in self.to_str_tokens(ids))} {where}"
            for ids, where in sides
            if ids
        ]
        return " and ".join(said) or "nothing"

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
        return torch.tensor([i for i in self.vocabulary.plain if i < len(every)], dtype=torch.long)

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
                raise MechInterpError("a row of tokens is empty or no row; expected [pos], at least one id")
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

    def to_str_tokens(self, input: Any, prepend_bos: bool | None = None) -> Any:
        """The text of every token, one by one; a list of such lists for several texts or rows of tokens.

        Each text tells its token apart from all others (see ``Vocabulary``): spaces stay, bytes that
        are no character read ⟨F0⟩, ids without a text ⟨id 50300⟩. Ids in brackets where there is no
        tokenizer.

        Args:
            input: a text or texts, or token ids: a tensor, an array or a list, ``[pos]`` or ``[batch,
                pos]``, or a list of rows of any lengths.
            prepend_bos: for texts; as for ``to_tokens``.

        Raises:
            MechInterpError: neither texts nor ids.
        """
        if is_list(input):
            return [self.to_str_tokens(cast(Any, one), prepend_bos) for one in input]
        if not isinstance(input, str) and (rows := integers(input)).ndim == 2 and len(rows) > 1:
            return [self.to_str_tokens(row) for row in rows]
        flat = self._flat(input, prepend_bos)
        if self.tokenizer is None:
            return [f"<{i}>" for i in flat]
        return self.vocabulary.texts(flat)

    def output_texts(self, ids: Tensor | Sequence[int]) -> list[str]:
        """What each output stands for: the text of a token, or ``<8>`` where outputs are no tokens."""
        if self.spec.d_vocab_out != self.spec.d_vocab:
            return [f"<{i}>" for i in integers(ids).reshape(-1).tolist()]
        return cast(list[str], self.to_str_tokens(ids))

    def to_readable_tokens(
        self, input: str | Tensor | Sequence[int], prepend_bos: bool | None = None
    ) -> list[str]:
        """As ``to_str_tokens``, for tokens in a row: those that are parts of one character show it.

        ``😀`` in four tokens reads ``😀⟨1/4⟩`` to ``😀⟨4/4⟩``.
        """
        flat = self._flat(input, prepend_bos)
        return self.to_str_tokens(flat) if self.tokenizer is None else self.vocabulary.readable(flat)

    def to_string(self, tokens: Any) -> Any:
        """The text of tokens ``[pos]``, special ones included; a list of texts for ``[batch, pos]`` or a
        list of rows of any lengths.

        It is the tokenizer's own, save where only another way to write the special tokens in front
        reads back as the same tokens; ids beyond the tokenizer read ⟨id 50300⟩.

        Args:
            tokens: ids as a tensor, an array, a list, or a list of rows.

        Raises:
            MechInterpError: no ids, or no tokenizer.
        """
        if is_list(tokens):
            return [self.to_string(row) for row in tokens]
        ids = integers(tokens)
        if ids.ndim > 1:
            return [self.to_string(row) for row in ids]
        self._needed_tokenizer("to_string")
        flat = ids.reshape(-1).tolist()
        text = self._decoded(flat)
        front = len(self.added_tokens[0])
        if front and flat[:front] == self.added_tokens[0] and self._reads(text) != flat:
            other = "".join(self.to_str_tokens(flat[:front])) + self._decoded(flat[front:])
            return other if self._reads(other) == flat else text
        return text

    def typed(self, tokens: Int[Tensor, " pos"]) -> str:
        """The text as somebody would type it: without what ``to_tokens`` adds on its own."""
        flat = torch.as_tensor(tokens).reshape(-1).tolist()
        if self.tokenizer is None:
            return "".join(self.to_str_tokens(flat))
        front, behind = self.added_tokens
        if front and flat[: len(front)] == front:
            flat = flat[len(front) :]
        if behind and flat[-len(behind) :] == behind:
            flat = flat[: -len(behind)]
        return self._decoded(flat)

    def to_single_token(self, string: str) -> int:
        """The id of a text that is exactly one token.

        The text is taken literally, as ``to_str_tokens`` writes it: ``" is"`` and ``"is"`` are two
        tokens where the vocabulary has both; ``"⟨F0⟩"`` and ``"⟨id 50300⟩"`` are understood. A text
        that no token has is put through the tokenizer.

        Raises:
            MechInterpError: it is several tokens; the message shows how it splits.
        """
        self._needed_tokenizer("to_single_token")
        found = self.vocabulary.find(sound(string, "the token"))
        if found is not None:
            return found
        ids = self._rows(string, False, False)[0].tolist()
        if len(ids) != 1:
            raise MechInterpError(
                f"{string!r} is {len(ids)} tokens, not one: {self.to_str_tokens(ids)}; "
                "choose one of them (a leading space often matters)"
            )
        return int(ids[0])

    def to_single_str_token(self, int_token: int) -> str:
        """The text of one id, as ``to_str_tokens`` writes it.

        Args:
            int_token: the id.

        Raises:
            MechInterpError: it is no integer.
        """
        ids = integers(int_token)
        if ids.numel() != 1:
            raise MechInterpError(f"{named(int_token)} is {ids.numel()} ids; expected one")
        return cast(str, self.to_str_tokens(ids.reshape(1))[0])

    def get_token_position(
        self,
        single_token: str | int | Tensor,
        input: str | Tensor | Sequence[int],
        mode: Literal["first", "last"] = "first",
        prepend_bos: bool | None = None,
    ) -> int:
        """Where a token stands in a text, counted with what ``to_tokens`` puts in front.

        Args:
            single_token: an id, or the text of one token.
            input: a text, or token ids ``[pos]`` or ``[1, pos]``.
            mode: which of several occurrences: the "first" or the "last".
            prepend_bos: for a text; as for ``to_tokens``.

        Raises:
            MechInterpError: the token is not there; the message shows the tokens that are.
        """
        if mode not in ("first", "last"):
            raise MechInterpError(f"mode={mode!r}; expected 'first' or 'last'")
        tokens = integers(self.to_tokens(input, prepend_bos) if isinstance(input, str) else input)
        if tokens.ndim == 2 and len(tokens) > 1:
            raise MechInterpError(f"tokens of shape {tuple(tokens.shape)}; expected one row")
        text = isinstance(single_token, str)
        wanted = self.to_single_token(cast(str, single_token)) if text else int(integers(single_token))
        found = (tokens.reshape(-1) == wanted).nonzero()[:, 0].tolist()
        if not found:
            raise MechInterpError(
                f"token {self.to_single_str_token(wanted)!r} (id {wanted}) does not occur in "
                f"{self.to_str_tokens(tokens.reshape(-1))}"
            )
        return int(found[0 if mode == "first" else -1])

    # -- inside -------------------------------------------------------------------------------

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

    def _flat(self, input: Any, prepend_bos: bool | None) -> list[int]:
        ids = self._rows(input, prepend_bos, False)[0] if isinstance(input, str) else integers(input)
        return cast(list[int], ids.reshape(-1).tolist())

    def _decoded(self, ids: list[int]) -> str:
        if not self.vocabulary.size or all(i < self.vocabulary.size for i in ids):
            return cast(str, self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))
        texts: list[str] = []
        start = 0
        for at, i in enumerate([*ids, self.vocabulary.size]):
            if i >= self.vocabulary.size:
                texts += [self._decoded(ids[start:at])] if at > start else []
                texts += self.vocabulary.texts([i]) if at < len(ids) else []
                start = at + 1
        return "".join(texts)

    def _reads(self, text: str) -> list[int]:
        """The ids that ``to_tokens`` makes of a text; none of an empty one."""
        try:
            return cast(list[int], self._rows(text, None, False)[0].tolist())
        except MechInterpError:
            return []

    def _needed_tokenizer(self, what: str) -> Any:
        if self.tokenizer is None:
            raise MechInterpError(
                f"{what} needs a tokenizer and this model has none; pass token ids [batch, pos], "
                "or set model.tokenizer to a Hugging Face tokenizer"
            )
        return self.tokenizer
