"""Text in and out of a model: what TransformerLens calls to_tokens, to_str_tokens, ..."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, cast

from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.given import integers, is_list, single_id, sound
from mechinterp_attn.model.tokenizing import Tokenizing


class TokenDoor(Tokenizing):
    """Mixin that reads tokens as text as well."""

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
        flat = integers(tokens).reshape(-1).tolist()
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
        return cast(str, self.to_str_tokens([single_id(int_token)])[0])

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
        wanted = self.to_single_token(cast(str, single_token)) if text else single_id(single_token)
        found = (tokens.reshape(-1) == wanted).nonzero()[:, 0].tolist()
        if not found:
            raise MechInterpError(
                f"token {self.to_single_str_token(wanted)!r} (id {wanted}) does not occur in "
                f"{self.to_str_tokens(tokens.reshape(-1))}"
            )
        return int(found[0 if mode == "first" else -1])

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
