"""Text from a model, token by token, with a key-value cache."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.model.given import is_text
from mechinterp_attn.model.step import KeyValueCache

if TYPE_CHECKING:
    from mechinterp_attn.model.spec import Spec

Texts = str | list[str]
Given = Literal["input", "str", "tokens"]


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen from its logits.

    Attributes:
        temperature: 0 takes the most likely token every time.
        top_k, top_p: draw from the k most likely tokens, or from the fewest that hold a share p.
        freq_penalty: taken off a token's logit for every time it has occurred.
        repetition_penalty: logits of tokens that have occurred are divided by it where positive and
            multiplied where negative, as Hugging Face does.
        generator: of the draws.
    """

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    freq_penalty: float = 0.0
    repetition_penalty: float = 1.0
    generator: torch.Generator | None = None

    def problems(self) -> list[str]:
        """All that is out of range."""
        found = []
        if self.temperature < 0:
            found.append(f"temperature={self.temperature}; expected at least 0")
        if self.top_k is not None and self.top_k < 1:
            found.append(f"top_k={self.top_k}; expected at least 1")
        if self.top_p is not None and not 0 < self.top_p <= 1:
            found.append(f"top_p={self.top_p}; expected a number in (0, 1]")
        if self.repetition_penalty <= 0:
            found.append(f"repetition_penalty={self.repetition_penalty}; expected a number above 0")
        return found

    def choose(
        self, logits: Float[Tensor, "batch d_vocab"], seen: Int[Tensor, "batch pos"]
    ) -> Int[Tensor, " batch"]:
        """The next token of every sequence, given all of it so far."""
        logits = self._penalised(logits.float(), seen)
        if self.temperature == 0:
            return logits.argmax(-1)
        logits = logits / self.temperature
        if self.top_k is not None:
            floor = logits.topk(min(self.top_k, logits.shape[-1]), -1).values[:, -1:]
            logits = logits.masked_fill(logits < floor, -torch.inf)
        if self.top_p is not None:
            ordered, index = logits.sort(-1, descending=True)
            before = ordered.softmax(-1).cumsum(-1) - ordered.softmax(-1)
            cut = torch.zeros_like(logits, dtype=torch.bool).scatter(-1, index, before >= self.top_p)
            logits = logits.masked_fill(cut, -torch.inf)
        return torch.multinomial(logits.softmax(-1), 1, generator=self.generator)[:, 0]

    def _penalised(self, logits: Tensor, seen: Tensor) -> Tensor:
        if self.repetition_penalty != 1.0:
            own = logits.gather(-1, seen)
            own = torch.where(own > 0, own / self.repetition_penalty, own * self.repetition_penalty)
            logits = logits.scatter(-1, seen, own)
        if self.freq_penalty:
            counts = torch.zeros_like(logits).scatter_add(
                -1, seen, torch.ones_like(seen, dtype=logits.dtype)
            )
            logits = logits - self.freq_penalty * counts
        return logits


class Generates:
    """Mixin for a model that continues texts; ``AttentionOnlyModel`` is one."""

    spec: Spec
    tokenizer: Any

    @torch.no_grad()
    def generate(self, input: Texts | Tensor, max_new_tokens: int = 10, **options: Any) -> Any:
        """Continue a text or tokens: text in, text out; tokens in, tokens ``[batch, pos + new]`` out.

        Args:
            input: a text, texts (continued side by side, padded on the left), or tokens ``[pos]`` or
                ``[batch, pos]``.
            max_new_tokens: at most so many.
            options: those of ``generate_stream``, and ``return_type``: "input" (as what was given), "str"
                or "tokens".

        Returns:
            the input and what follows it.

        Raises:
            MechInterpError: no room in the context, a bidirectional model or a classifier, or options
                out of range.
        """
        return_type: Given = options.pop("return_type", "input")
        chunks = list(self.generate_stream(input, max_new_tokens, return_type="tokens", **options))
        _, mask = self._prompt(input, options.get("prepend_bos"), options.get("attention_mask"))
        return self._as_given(torch.cat(chunks, 1), input, return_type, _padding(mask, len(chunks[0])))

    @torch.no_grad()
    def generate_stream(
        self,
        input: Texts | Tensor,
        max_new_tokens: int = 10,
        *,
        max_tokens_per_yield: int = 1,
        temperature: float | None = None,
        do_sample: bool | None = None,
        top_k: int | None = None,
        top_p: float | None = None,
        freq_penalty: float = 0.0,
        repetition_penalty: float = 1.0,
        stop_at_eos: bool = True,
        eos_token_id: int | Sequence[int] | None = None,
        stop_strings: str | list[str] | None = None,
        stopping_criteria: Any = None,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        use_past_kv_cache: bool = True,
        return_type: Given = "input",
        generator: torch.Generator | None = None,
        verbose: bool = False,
    ) -> Iterator[Any]:
        """Continue a text or tokens, and give what there is while it is made.

        Args:
            input, max_new_tokens: as for ``generate``.
            max_tokens_per_yield: how many new tokens come at a time; the first time the input comes too.
            temperature: 0 takes the most likely token every time. By default 0, and 1 with ``do_sample``.
            do_sample: whether to draw; by default where the temperature is above 0.
            top_k, top_p: draw from the k most likely tokens, or from the fewest that hold a share p.
            freq_penalty: taken off a token's logit for every time it has occurred.
            repetition_penalty: divides the (positive) logits of what has occurred, as Hugging Face's.
            stop_at_eos: sequences that said EOS say nothing else; where all have, it ends.
            eos_token_id: what counts as EOS; by default the tokenizer's.
            stop_strings: a sequence also ends once its text ends with one of these.
            stopping_criteria: Hugging Face's, one or several, called as ``criterion(tokens, logits)``.
            prepend_bos: for texts; by default as ``to_tokens``.
            attention_mask: ``[batch, pos]``, 0 on padding, which must be on the left.
            use_past_kv_cache: False computes every sequence anew for every token.
            return_type: "input" (as what was given), "str" or "tokens".
            generator: of the draws.
            verbose: show a bar.

        Yields:
            the tokens ``[batch, n]`` since the last time, or their text.

        Raises:
            MechInterpError: as for ``generate``.
        """
        if do_sample is False or (do_sample is None and temperature is None):
            temperature = 0.0
        sampling = Sampling(
            1.0 if temperature is None else temperature,
            top_k,
            top_p,
            freq_penalty,
            repetition_penalty,
            generator,
        )
        tokens, mask = self._prompt(input, prepend_bos, attention_mask)
        self._check_generation(tokens, max_new_tokens, max_tokens_per_yield, sampling, return_type)
        stops = _Stops(self.tokenizer, stop_at_eos, eos_token_id, stop_strings, stopping_criteria)
        cache = KeyValueCache() if use_past_kv_cache else None
        pending, pads = [tokens], _padding(mask, len(tokens))
        steps = self._new_tokens(tokens, mask, sampling, stops, cache)
        bar = Progress(range(max_new_tokens), desc="tokens", show=verbose)
        for n, new in zip(bar, steps, strict=False):
            pending.append(new)
            if (n + 1) % max_tokens_per_yield == 0:
                yield self._as_given(torch.cat(pending, 1), input, return_type, pads)
                pending, pads = [], [0] * len(tokens)
        if pending:
            yield self._as_given(torch.cat(pending, 1), input, return_type, pads)

    def _new_tokens(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Bool[Tensor, "batch pos"] | None,
        sampling: Sampling,
        stops: _Stops,
        cache: KeyValueCache | None,
    ) -> Iterator[Int[Tensor, "batch 1"]]:
        """One token of every sequence after the other, until all have ended."""
        done = torch.zeros(len(tokens), dtype=torch.bool, device=tokens.device)
        unread = tokens
        while not bool(done.all()):
            logits = cast(Any, self)(unread, attention_mask=mask, past_kv_cache=cache)[:, -1]
            new = sampling.choose(logits, tokens)
            if stops.filler is not None:
                new = torch.where(done, stops.filler, new)
            tokens = torch.cat([tokens, new[:, None]], 1)
            mask = None if mask is None else torch.cat([mask, torch.ones_like(mask[:, :1])], 1)
            done = done | stops(tokens, logits)
            unread = tokens if cache is None else new[:, None]
            yield new[:, None]

    def _prompt(
        self, input: Texts | Tensor, prepend_bos: bool | None, mask: Tensor | None
    ) -> tuple[Int[Tensor, "batch pos"], Bool[Tensor, "batch pos"] | None]:
        """Tokens, and which of them are real; several texts are padded on the left."""
        door = cast(Any, self)
        if isinstance(input, str) or not is_text(input):
            tokens = door.as_tokens(input, prepend_bos=prepend_bos)
            return tokens, None if mask is None else torch.as_tensor(mask, device=tokens.device).bool()
        batch = door.to_batch(input, prepend_bos=prepend_bos, padding_side="left")
        return batch.tokens, batch.mask

    def _as_given(
        self, tokens: Int[Tensor, "batch pos"], input: Any, return_type: Given, pads: Sequence[int]
    ) -> Any:
        """Tokens, or the text of every row without its padding."""
        said = is_text(input)
        if return_type == "tokens" or (return_type == "input" and not said):
            return tokens
        rows = zip(tokens, pads, strict=True)
        lines = [cast(str, cast(Any, self).to_string(row[pad:])) for row, pad in rows]
        return lines[0] if len(lines) == 1 and not isinstance(input, list) else lines

    def _check_generation(
        self, tokens: Tensor, n_new: int, at_once: int, sampling: Sampling, return_type: str
    ) -> None:
        spec, found = self.spec, sampling.problems()
        if not spec.causal:
            found.append("a bidirectional model cannot continue a text")
        if spec.d_vocab_out != spec.d_vocab:
            found.append(
                f"this model reads {spec.d_vocab} tokens and predicts {spec.d_vocab_out} classes: "
                "it cannot continue a text"
            )
        if n_new < 0 or at_once < 1:
            found.append(
                f"max_new_tokens={n_new}, max_tokens_per_yield={at_once}; expected at least 0 and 1"
            )
        if return_type not in ("input", "str", "tokens"):
            found.append(f"return_type={return_type!r}; expected 'input', 'str' or 'tokens'")
        room = spec.n_ctx - tokens.shape[1]
        if n_new > room:
            found.append(
                f"{tokens.shape[1]} tokens and {n_new} new ones are more than this model's context of "
                f"{spec.n_ctx}; ask for at most {room}"
            )
        if found:
            raise MechInterpError("; ".join(found))


def _padding(mask: Tensor | None, n: int) -> list[int]:
    """How many tokens on the left of every row are padding."""
    return [0] * n if mask is None else (~torch.as_tensor(mask).bool()).sum(1).tolist()


class _Stops:
    """When a sequence has ended: at an EOS, at a text, or where somebody's own criterion says so."""

    def __init__(self, tokenizer: Any, at_eos: bool, eos: Any, texts: Any, criteria: Any):
        own = getattr(tokenizer, "eos_token_id", None) if eos is None else eos
        self.eos = [own] if isinstance(own, int) else list(own or ())
        if not at_eos:
            self.eos = []
        self.texts = (texts,) if isinstance(texts, str) else tuple(texts or ())
        self.criteria = criteria if isinstance(criteria, list) else [] if criteria is None else [criteria]
        self.tokenizer = tokenizer
        if self.texts and tokenizer is None:
            raise MechInterpError("stop_strings needs a tokenizer, and this model has none")
        # What a sequence says after its end.
        self.filler = None if not self.eos else torch.tensor(self.eos[0])

    def __call__(
        self, tokens: Int[Tensor, "batch pos"], logits: Float[Tensor, "batch d_vocab"]
    ) -> Bool[Tensor, " batch"]:
        ended = torch.isin(tokens[:, -1], tokens.new_tensor(self.eos))
        if self.texts:
            lines = [self.tokenizer.decode(row.tolist()) for row in tokens]
            said = [any(line.endswith(text) for text in self.texts) for line in lines]
            ended = ended | torch.tensor(said, device=ended.device)
        for criterion in self.criteria:
            ended = ended | torch.as_tensor(criterion(tokens, logits), device=ended.device).bool()
        return ended
