"""The attention-only model: an embedding, banks of heads in order, an unembedding.

It is a TransformerLens model: hook names, ``run_with_cache`` (an ActivationCache), ``run_with_hooks``
and the runtime protocols ``TransformerLensModel`` and ``TransformerLensModelWithWeights``.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, cast

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens import TransformerBridgeConfig
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.block import Block, Embed, PosEmbed, PredictionHead, Sublayer, Unembed, nested
from mechinterp_attn.model.config import transformer_lens_config
from mechinterp_attn.model.gates import GATES, rule_for
from mechinterp_attn.model.generation import Generates
from mechinterp_attn.model.half import through
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.hooks import Hooked
from mechinterp_attn.model.index import KINDS, HeadIndex
from mechinterp_attn.model.loss import labelled_loss, next_token_loss
from mechinterp_attn.model.norm import Norm
from mechinterp_attn.model.renamed import Renamed
from mechinterp_attn.model.rotary import rotaries_of
from mechinterp_attn.model.saved import save as write_model
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.model.step import KeyValueCache, Step, real_tokens
from mechinterp_attn.model.tokens import TokenDoor
from mechinterp_attn.model.weights import NamedWeights

ReturnType = Literal["logits", "loss", "both"] | None


class AttentionOnlyModel(TokenDoor, Generates, NamedWeights, Hooked):
    """A transformer in which every MLP neuron is an attention head.

    Made by ``mia.load`` or ``mia.convert``. Tokens ``[batch, pos]`` (or text, where there is a
    tokenizer) go in, logits ``[batch, pos, d_vocab_out]`` come out, equal to the source model's.

    Attributes:
        banks: the banks of heads, in the order in which they write to the residual stream.
        heads: labels and a table of all heads.
        spec: shapes and rules, as plain data.
        provenance: where the model came from: source, mode, versions, fidelity of the conversion.
    """

    def __init__(
        self,
        spec: Spec,
        weights: Mapping[str, Tensor],
        *,
        tokenizer: Any = None,
        provenance: Mapping[str, Any] | None = None,
        shared: bool = False,
        default_prepend_bos: bool = True,
    ):
        """Takes the tensors over as they are (no copy); names as ``state_dict()`` gives them.

        Args:
            spec: what the model is.
            weights: tensors by name, as ``state_dict()`` gives them.
            tokenizer: a Hugging Face tokenizer, or none.
            provenance: where the model came from, as JSON can hold it.
            shared: somebody else holds some of the weights as well, so that training must copy them first.
            default_prepend_bos: whether texts begin with a BOS, where the tokenizer has one.
        """
        super().__init__()
        self._shared = False  # set at the end: ``eval`` below calls ``train``
        self.spec = spec
        self.tokenizer = tokenizer
        self.provenance = dict(provenance or {})
        self.embed = Embed(weights["embed.W_E"])
        self.hook_embed = HookPoint()  # [batch, pos, d_model]
        if spec.positions in ("standard", "shortformer"):
            self.pos_embed = PosEmbed(weights["pos_embed.W_pos"])
            self.hook_pos_embed = HookPoint()  # [batch, pos, d_model]
        if spec.embed_norm is not None:
            self.embed_norm = Norm(
                spec.embed_norm, spec.eps, weights["embed_norm.w"], weights.get("embed_norm.b")
            )
        self.blocks = nn.ModuleList(
            Block(spec, layer, rule_for(spec, layer), nested(weights, f"blocks.{layer}."))
            for layer in range(spec.n_layers)
        )
        if spec.positions == "shortformer":
            for block in self.blocks:
                cast(Block, block).attn.give_positions(self.pos_embed)
        if spec.prediction_head:
            act = GATES[cast(str, spec.act_fn)].act
            self.prediction = PredictionHead(weights["prediction.W"], weights["prediction.b"], act)
        self.ln_final = Norm(spec.final_norm, spec.eps)
        self.unembed = Unembed(weights["unembed.W_U"], weights["unembed.b_U"])
        self._rotaries = rotaries_of(spec)
        self._cfg = transformer_lens_config(spec, self.provenance, default_prepend_bos)
        self.eval()
        self.setup()
        for names in ("mod_dict", "hook_dict"):
            setattr(self, names, Renamed(getattr(self, names)))
        self._shared = shared

    def train(self, mode: bool = True) -> AttentionOnlyModel:
        """Training mode. Weights that are shared with the source are copied before they can change.

        Args:
            mode: False for evaluation.
        """
        if mode and self._shared:
            for parameter in self.parameters():
                parameter.data = parameter.data.clone()
            self._shared = False
        return cast(AttentionOnlyModel, super().train(mode))

    def forward(
        self,
        input: str | list[str] | Tensor | Sequence[Any] | None = None,
        return_type: ReturnType = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        attention_mask: Tensor | None = None,
        start_at_layer: int | None = None,
        stop_at_layer: int | None = None,
        past_kv_cache: KeyValueCache | None = None,
        input_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
        labels: Tensor | None = None,
    ) -> Any:
        """Logits, the mean next-token loss (nats), both, or nothing (to fill a cache).

        Args:
            input: tokens ``[pos]`` or ``[batch, pos]``, a text, or texts (or a list of tensors ``[pos]``)
                of any lengths, which are padded and masked; with ``start_at_layer`` a residual stream.
            return_type: "logits", "loss", "both" or None.
            loss_per_token: give the losses ``[batch, pos - 1]`` instead of their mean.
            prepend_bos: for text only; as for ``to_tokens``.
            attention_mask: ``[batch, pos]``, 0 on padding, left or right; positions of a causal model
                count the real tokens, and losses leave the padding out. With ``past_kv_cache``, ``[batch,
                past + pos]`` or the new tokens' part.
            start_at_layer: take ``input`` as the stream ``[batch, pos, d_model]`` that this block reads,
                and run from there. A loss needs tokens, so ``return_type`` is then "logits" or None.
            stop_at_layer: return the stream ``[batch, pos, d_model]`` in front of this block (negative:
                counted from the last). Blocks behind it do not run.
            past_kv_cache: a key-value cache; ``input`` follows the tokens in it, and is added to it.
            input_ids: the tokens, so that ``model(**tokenizer(text, return_tensors="pt"))`` works.
            token_type_ids: taken where all are 0, the type that conversion folds into the embedding.
            labels: targets as Hugging Face gives them, ``[batch, pos]``, -100 where nothing is asked. The
                output is then Hugging Face's, with ``.loss`` and ``.logits``, as its Trainer expects.

        Raises:
            MechInterpError: tokens that are empty, too long, out of range or not integers, no such layer,
                or arguments that exclude each other.
        """
        if return_type not in ("logits", "loss", "both", None):
            raise MechInterpError(f"return_type={return_type!r}; expected 'logits', 'loss', 'both' or None")
        if (input is None) == (input_ids is None):
            raise MechInterpError("give tokens or text once: as the first argument, or as input_ids=")
        if token_type_ids is not None and bool(torch.as_tensor(token_type_ids).any()):
            raise MechInterpError("token_type_ids other than 0 are not converted; leave them out")
        layers = self._layers(start_at_layer, stop_at_layer)
        tokens = None
        if start_at_layer is None:
            given = cast(Any, input if input_ids is None else input_ids)
            if isinstance(given, list):
                batch = self.to_batch(given, prepend_bos=prepend_bos)
                tokens, attention_mask = (
                    batch.tokens,
                    batch.mask if attention_mask is None else attention_mask,
                )
            else:
                tokens = self.as_tokens(given, prepend_bos=prepend_bos)
            step, positions = self._step(tokens, attention_mask, past_kv_cache)
            x = self._embedded(tokens, positions)
        else:
            if return_type in ("loss", "both") or labels is not None:
                raise MechInterpError("a loss needs tokens, and start_at_layer takes a stream")
            x = self._as_stream(input)
            step, _ = self._step(x[..., 0].long(), attention_mask, past_kv_cache, x.dtype)
        for layer in layers:
            x = through(self.blocks[layer], x, step)
        if stop_at_layer is not None:
            return x
        if self.spec.prediction_head:
            x = through(self.prediction, x)
        x = self.ln_final(x)
        if return_type is None and labels is None:
            return None
        logits = self.unembed(x)
        if self.spec.logit_cap is not None:
            logits = self.spec.logit_cap * torch.tanh(logits / self.spec.logit_cap)
        if labels is not None:
            from transformers.modeling_outputs import CausalLMOutput

            loss = labelled_loss(logits, torch.as_tensor(labels), causal=self.spec.causal)
            return CausalLMOutput(loss=loss, logits=logits)
        if return_type == "logits":
            return logits
        assert tokens is not None
        loss = self.loss_fn(logits, tokens, per_token=loss_per_token, attention_mask=attention_mask)
        return loss if return_type == "loss" else (logits, loss)

    def _embedded(
        self, tokens: Int[Tensor, "batch pos"], positions: Int[Tensor, "#batch pos"]
    ) -> Float[Tensor, "batch pos d_model"]:
        """The residual stream in front of the first block."""
        x = self.hook_embed(self.embed(tokens))
        if self.spec.positions == "standard":
            x = x + self.hook_pos_embed(self.pos_embed(positions).expand_as(x))
        return x if self.spec.embed_norm is None else self.embed_norm(x)

    def _layers(self, start: int | None, stop: int | None) -> range:
        """Which blocks run."""
        n = self.spec.n_layers
        for name, layer in (("start_at_layer", start), ("stop_at_layer", stop)):
            if layer is not None and not -n <= layer <= n:
                raise MechInterpError(f"{name}={layer}; this model has {n} layers, so expected {-n} to {n}")
        first, last = (0 if start is None else start), (n if stop is None else stop)
        return range(first % n if first < 0 else first, last % n if last < 0 else last)

    def _as_stream(self, x: Any) -> Float[Tensor, "batch pos d_model"]:
        if not isinstance(x, Tensor) or x.ndim != 3 or x.shape[-1] != self.spec.d_model:
            given = f"shape {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
            raise MechInterpError(
                f"start_at_layer takes a residual stream [batch, pos, {self.spec.d_model}], got {given}"
            )
        return x

    def _step(
        self,
        tokens: Int[Tensor, "batch pos"],
        mask: Tensor | None,
        past: KeyValueCache | None,
        dtype: torch.dtype | None = None,
    ) -> tuple[Step, Int[Tensor, "#batch pos"]]:
        """What all banks share in this pass, and the position of every token.

        Args:
            dtype: of the stream; the embedding's by default.
        """
        dtype = self.W_E.dtype if dtype is None else dtype
        n_past, n_new = 0 if past is None else len(past), tokens.shape[1]
        if n_past + n_new > self.spec.n_ctx:
            raise MechInterpError(
                f"{n_past} cached and {n_new} new tokens are more than this model's context of "
                f"{self.spec.n_ctx}"
            )
        real = real_tokens(tokens, mask, past)
        every = torch.arange(n_past + n_new, device=tokens.device)[None]
        length = n_past + n_new
        if real is not None and self.spec.causal:  # positions count the real tokens
            every = (real.long().cumsum(-1) - 1).clamp_min(0)
            length = int(every.max()) + 1
        positions = every[:, n_past:]
        rotations = tuple(rotary.tables(positions, dtype, length) for rotary in self._rotaries)
        step = Step(n_new, tokens.device, positions=every, real=real, rotations=rotations, cache=past)
        return step, positions

    def loss_fn(
        self,
        logits: Float[Tensor, "batch pos d_vocab"],
        tokens: Int[Tensor, "batch pos"],
        per_token: bool = False,
        attention_mask: Tensor | None = None,
    ) -> Tensor:
        """Cross-entropy (nats) of every next token: the mean over real tokens, or all
        ``[batch, pos - 1]``.

        Args:
            logits: ``[batch, pos, d_vocab]``.
            tokens: ``[batch, pos]``.
            per_token: every token's loss ``[batch, pos - 1]``, not the mean.
            attention_mask: ``[batch, pos]``, 0 on padding.

        Raises:
            MechInterpError: there is no next token, or the model does not predict next tokens.
        """
        self.spec.need_next_tokens("a loss")
        return next_token_loss(logits, tokens, per_token=per_token, attention_mask=attention_mask)

    @property
    def cfg(self) -> TransformerBridgeConfig:
        """The config as TransformerLens's tools read it, with the present dtype and device."""
        self._cfg.dtype = self.W_E.dtype
        self._cfg.device = str(self.W_E.device)
        return self._cfg

    def sublayers(self) -> tuple[Sublayer, ...]:
        """The banks grouped by the stream they read, in order, with the norms around them."""
        return tuple(sub for block in self.blocks for sub in cast(Block, block).sublayers())

    @property
    def banks(self) -> tuple[HeadBank, ...]:
        """Every bank of heads, in the order in which the model runs them."""
        return tuple(bank for block in self.blocks for bank in cast(Block, block).banks)

    @property
    def inside(self) -> tuple[Any, ...]:
        """Banks that are parts of an error: the neurons that a dictionary stands in for, and its features
        once more. They have the gates and hooks of heads; what they write is the error's.
        """
        blocks = [cast(Block, block) for block in self.blocks]
        neurons = [b.neurons for b in blocks if b.stand_ins]
        return (*neurons, *(b.error.features for b in blocks if b.stand_ins or b.describing))

    def sublayer_of(self, bank: HeadBank) -> Sublayer:
        """The sublayer that a bank belongs to.

        Args:
            bank: one of the model's banks.
        """
        own = cast(Block, self.blocks[bank.layer]).sublayers()
        return next(sub for sub in own if any(other is bank for other in sub.banks))

    def norm_of(self, bank: HeadBank) -> tuple[Norm, str]:
        """The norm in front of a bank, and its path in caches.

        Args:
            bank: one of the model's banks.
        """
        return self.sublayer_of(bank).norm

    def stream_of(self, bank: HeadBank) -> str:
        """The hook of the residual stream that a bank reads; banks that share it run side by side.

        Args:
            bank: one of the model's banks.
        """
        return self.sublayer_of(bank).stream

    @property
    def heads(self) -> HeadIndex:
        """The table of all heads; ``model["L0H3"]`` is one of them."""
        return HeadIndex(self.banks, self)

    @property
    def n_heads(self) -> int:
        """Heads of every kind, MLP-derived ones included."""
        return len(self.heads)

    def __getitem__(self, which: str | tuple[int, int]) -> Any:
        """A head: ``model["L0H3"]``, ``model["L0N152"]``, ``model["L0H1 > L1H4"]`` or, by layer and number
        of an attention head, ``model[0, 3]``. A pattern or a kind gives a list: ``model["L1H*"]``.

        Raises:
            MechInterpError: no such head; the message names near ones.
        """
        if isinstance(which, tuple):
            return self.heads.at(*which)
        many = isinstance(which, str) and self.heads.is_many(which)
        return self.heads.select(which) if many else self.heads.one(which)

    def _ipython_key_completions_(self) -> list[str]:
        """What Jupyter offers after ``model["``."""
        return [*KINDS, *self.heads]

    @property
    def mode(self) -> str:
        """How MLP neurons were made heads, the ``mlp`` argument of the conversion."""
        return str(self.provenance.get("mlp", "exact"))

    def save(self, folder: Any) -> None:
        """Write the model to a folder (safetensors + JSON); ``mia.load(folder)`` reads it back.

        Args:
            folder: where to.
        """
        write_model(
            folder,
            self.state_dict(),
            self.tokenizer,
            spec=self.spec,
            provenance=self.provenance,
            default_prepend_bos=bool(self.cfg.default_prepend_bos),
        )

    def __repr__(self) -> str:
        s = self.spec
        counts: dict[str, int] = {}
        for bank in self.banks:
            name = {"mlp": "MLP-derived"}.get(bank.kind, bank.kind)
            counts[name] = counts.get(name, 0) + bank.n_heads
        kinds = " + ".join(f"{n} {name}" for name, n in counts.items())
        return (
            f"AttentionOnlyModel({self.provenance.get('name', 'unnamed')}: {self.n_heads} heads = "
            f"{kinds}, {s.n_layers} layers, "
            f"d_model {s.d_model}, vocabulary {s.d_vocab}, context {s.n_ctx}, mode {self.mode})"
        )
