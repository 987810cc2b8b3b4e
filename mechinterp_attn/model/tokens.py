"""Text in and out of a model: what TransformerLens calls to_tokens, to_str_tokens, ..."""

from __future__ import annotations

from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.spec import Spec


class TokenDoor:
    """Mixin for a model with ``spec``, ``tokenizer`` (Hugging Face's, or None) and ``W_E``."""

    spec: Spec
    tokenizer: Any
    W_E: Any

    @property
    def bos_token_id(self) -> int | None:
        return getattr(self.tokenizer, "bos_token_id", None)

    def to_tokens(
        self, input: str | list[str], prepend_bos: bool | None = None, **_: Any
    ) -> Int[Tensor, "batch pos"]:
        """Token ids of one text or several (padded on the right with the last text's end or BOS).

        Args:
            prepend_bos: None puts a BOS in front where the tokenizer has one.

        Raises:
            MechInterpError: no tokenizer, an empty text, or a BOS asked for that does not exist.
        """
        tokenizer = self._needed_tokenizer("to_tokens")
        texts = [input] if isinstance(input, str) else list(input)
        bos = self.bos_token_id
        if prepend_bos and bos is None:
            raise MechInterpError("prepend_bos=True, but this model's tokenizer has no BOS token")
        rows = []
        for i, text in enumerate(texts):
            row = tokenizer(text, add_special_tokens=False)["input_ids"]
            if not row:
                raise MechInterpError(f"text {i} is empty ({text!r}); give at least one token")
            rows.append(([bos] if bos is not None and prepend_bos is not False else []) + row)
        pad = next((i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, bos) if i is not None), 0)
        width = max(len(row) for row in rows)
        ids = [row + [pad] * (width - len(row)) for row in rows]
        return torch.tensor(ids, device=self.W_E.device)

    def to_str_tokens(self, input: str | Tensor | list[int], prepend_bos: bool | None = None) -> list[str]:
        """The text of every token, one by one; ids in brackets where there is no tokenizer."""
        ids = self.to_tokens(input, prepend_bos)[0] if isinstance(input, str) else torch.as_tensor(input)
        flat = ids.reshape(-1).tolist()
        if self.tokenizer is None:
            return [f"<{i}>" for i in flat]
        return [self.tokenizer.decode([i], clean_up_tokenization_spaces=False) for i in flat]

    def to_string(self, tokens: Tensor | list[int]) -> str:
        """The text of a sequence of tokens ``[pos]``."""
        ids = torch.as_tensor(tokens).reshape(-1).tolist()
        tokenizer = self._needed_tokenizer("to_string")
        return cast(str, tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def to_single_token(self, string: str) -> int:
        """The id of a text that is exactly one token.

        Raises:
            MechInterpError: it is several tokens; the message shows how it splits.
        """
        ids = self.to_tokens(string, prepend_bos=False)[0]
        if len(ids) != 1:
            raise MechInterpError(
                f"{string!r} is {len(ids)} tokens, not one: {self.to_str_tokens(ids)}; "
                "choose one of them (a leading space often matters)"
            )
        return int(ids[0])

    def as_tokens(
        self, input: str | list[str] | Tensor, prepend_bos: bool | None = None
    ) -> Int[Tensor, "batch pos"]:
        """Validated token ids ``[batch, pos]`` on the model's device from text or tokens.

        Raises:
            MechInterpError: empty, longer than the context, not integers, or out of range.
        """
        if isinstance(input, str) or (isinstance(input, list) and input and isinstance(input[0], str)):
            tokens = self.to_tokens(cast(Any, input), prepend_bos)
        else:
            tokens = torch.as_tensor(input)
        if tokens.dtype.is_floating_point or tokens.dtype in (torch.bool, torch.complex64):
            raise MechInterpError(f"tokens must be integers, got dtype {tokens.dtype}")
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
