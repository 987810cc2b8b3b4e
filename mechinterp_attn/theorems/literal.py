"""A whole trained transformer as the paper writes it: sublayers of softmax heads, nothing else.

``LiteralModel`` is an ``AttentionOnlyModel`` whose forward pass is the construction itself: the
augmented stream with its bias token, and for every sublayer of the source one sublayer of dense
masked softmax heads, biases included. Around it stands the same surface (banks, ``Head``s, hooks,
caches), with streams de-augmented and patterns in the banks' own form, so that every analysis runs
on it as it does on the practical form.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.core.errors import MechInterpError, UnsupportedModelError
from mechinterp_attn.model.attention import AttentionBank
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.block import Block
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.neurons import NeuronBank
from mechinterp_attn.theorems.activations import SoftmaxActivation
from mechinterp_attn.theorems.built import Neurons, attention_heads
from mechinterp_attn.theorems.gated import default_eps
from mechinterp_attn.theorems.heads import SoftmaxHeads, Sublayer, check_precision
from mechinterp_attn.theorems.neurons import bias_head
from mechinterp_attn.theorems.norms import PartialNorm
from mechinterp_attn.theorems.stream import Layout
from mechinterp_attn.theorems.watched import through_attention, through_neurons

if TYPE_CHECKING:
    from mechinterp_attn.theorems.steps import Steps


class LiteralModel(AttentionOnlyModel):
    """Made by ``theorems.attention_only``.

    Args:
        model: the converted model.

    Attributes:
        layout: where everything stands in the augmented stream.
        omega: of the masks written into the weights, or None where masks are masks.
        activation: what the neuron heads compute instead of the source's activation function; None
            without neurons.
        exact: whether that is the source's activation function itself, apart from the rounding of
            products (gated neurons).
        constant: the value of the constant coordinate on real rows, 1 unless it decayed (see
            ``regularisation``).
        steps: the induction over sublayers, as measured when the model was made.
    """

    steps: Steps

    def __init__(
        self,
        model: AttentionOnlyModel,
        *,
        omega: float | None = None,
        activation: str | SoftmaxActivation | None = None,
    ):
        _refuse_unsupported(model)
        if omega is not None:
            check_precision(model.W_E.dtype)
        super().__init__(
            model.spec,
            model.state_dict(),
            tokenizer=model.tokenizer,
            provenance=model.provenance,
            default_prepend_bos=model.cfg.default_prepend_bos,
        )
        self._built = {
            bank.path: Neurons.of(bank, str(model.spec.act_fn), activation)
            for bank in self.banks
            if isinstance(bank, NeuronBank)
        }
        neurons = list(self._built.values())
        if any(built.product for built in neurons):
            default_eps(model.W_E.dtype)  # refuses half precision
        self.activation = neurons[0].activation if neurons else None
        self.exact = all(built.exact for built in neurons)
        self.layout = Layout(
            model.spec.d_model,
            scratch=max((built.bank.n_neurons for built in neurons if built.product), default=0),
            positions=0 if omega is None else 1 + model.spec.n_ctx,
        )
        self.omega = omega
        self.constant = 1.0
        for built in neurons:
            bank = built.bank
            bank.rule = built.rule
            bank.parts = bank.rule.n
            bank.n_heads = bank.n_neurons * bank.parts

    # -- the construction ---------------------------------------------------------------------

    def heads_of(self, bank: HeadBank) -> SoftmaxHeads:
        """The literal heads of a bank, in its order; its output bias is another head.

        Where neurons multiply two numbers (gated ones), these are the heads that weigh the products
        of ``products_of``; a neuron of the bank is then three softmax heads put together.

        Args:
            bank: one of the model's banks.
        """
        if isinstance(bank, NeuronBank):
            return self._in_weights(self._built[bank.path].heads(self.layout))
        return self._in_weights(attention_heads(self.layout, cast(AttentionBank, bank), self.spec))

    def products_of(self, bank: HeadBank) -> tuple[SoftmaxHeads, ...]:
        """The heads of the sublayer in front of a bank whose neurons multiply; none for others.

        Args:
            bank: one of the model's banks.
        """
        built = self._built.get(bank.path)
        return () if built is None else tuple(map(self._in_weights, built.products(self.layout)))

    def bias_of(self, bank: HeadBank) -> SoftmaxHeads:
        """The bank's output bias as a head.

        Args:
            bank: one of the model's banks.
        """
        return self._in_weights(bias_head(self.layout, bank.b_O.detach()))

    def _beside(self, bank: HeadBank) -> tuple[SoftmaxHeads, ...]:
        """What stands beside a bank's heads: its output bias, and what empties the scratch."""
        built = self._built.get(bank.path)
        clearing = () if built is None else map(self._in_weights, built.clearing(self.layout))
        return (self.bias_of(bank), *clearing)

    def _in_weights(self, stack: SoftmaxHeads) -> SoftmaxHeads:
        """The masks as this model has them."""
        return stack if self.omega is None else stack.with_mask_in_weights(self.omega, bias_row=2.0)

    def literal_sublayers(self) -> list[tuple[str, Sublayer]]:
        """The whole model as the paper's sublayers, each with the hook of the stream it makes. One that
        writes products to scratch and leaves the stream as it is has its bank's name instead, such as
        ``blocks.0.neurons products``.
        """
        pieces = []
        for block in self.blocks:
            subs = list(cast(Block, block).sublayers())
            after = [sub.stream for sub in subs[1:]]
            after.append(f"blocks.{cast(Block, block).layer}.hook_resid_post")
            for sub, name in zip(subs, after, strict=True):
                norm = PartialNorm(sub.norm[0], self.layout)
                for bank in sub.banks:
                    if products := self.products_of(bank):
                        pieces.append((f"{bank.path} products", Sublayer(products, norm)))
                stacks = [
                    stack for bank in sub.banks for stack in (self.heads_of(bank), *self._beside(bank))
                ]
                pieces.append((name, Sublayer(tuple(stacks), norm)))
        return pieces

    def start(self, input: Any) -> Float[Tensor, "batch row width"]:
        """The augmented stream before the first sublayer.

        Args:
            input: ids or a text.
        """
        tokens = self.as_tokens(input)
        x = self.hook_embed(self.embed(tokens))
        if self.spec.positions == "standard":
            x = x + self.hook_pos_embed(self.W_pos[: tokens.shape[1]].expand_as(x))
        if self.spec.embed_norm is not None:
            x = self.embed_norm(x)
        X = self.layout.augment(x)
        X[..., self.layout.constant] *= self.constant
        return X

    @torch.no_grad()
    def streams(self, input: Any) -> Iterator[tuple[str, Float[Tensor, "batch row width"]]]:
        """The augmented stream after every sublayer, computed by the bare construction.

        Args:
            input: ids or a text.
        """
        X = self.start(input)
        for name, sublayer in self.literal_sublayers():
            X = sublayer(X)
            yield name, X

    # -- the forward pass, with hooks ---------------------------------------------------------

    def forward(
        self,
        input: Any = None,
        return_type: Any = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        **unsupported: Any,
    ) -> Any:
        """As ``AttentionOnlyModel``'s, without attention masks and key-value caches.

        Args:
            input: ids or a text.
            return_type: "logits", "loss", "both" or None.
            loss_per_token: every token's loss, not the mean.
            prepend_bos: as for ``to_tokens``.
            unsupported: refused by name.

        Raises:
            MechInterpError: arguments that the literal model does not take, or an unknown return_type.
        """
        given = [name for name, value in unsupported.items() if value is not None]
        if given:
            raise MechInterpError(
                f"the literal model does not accept {', '.join(given)}; it runs whole unpadded sequences"
            )
        if return_type not in ("logits", "loss", "both", None):
            raise MechInterpError(f"return_type={return_type!r}; expected 'logits', 'loss', 'both' or None")
        batch = self.to_batch(input, prepend_bos=prepend_bos)
        if batch.mask is not None:
            raise MechInterpError(
                "the texts have different lengths, but the literal model runs whole unpadded sequences"
            )
        tokens = batch.tokens
        X = self.start(tokens)
        for module in self.blocks:
            block = cast(Block, module)
            X = self._hooked(block.hook_resid_pre, X)
            for place, sub in enumerate(block.sublayers()):
                if place:
                    X = self._hooked(block.hook_resid_mid, X)
                read = PartialNorm(sub.norm[0], self.layout)(X)
                for bank in sub.banks:
                    X = X + self._out(block, bank, read)
            X = self._hooked(block.hook_resid_post, X)
        x = self.ln_final(self.layout.deaugment(X))
        if return_type is None:
            return None
        logits = self.unembed(x)
        if self.spec.logit_cap is not None:
            logits = self.spec.logit_cap * torch.tanh(logits / self.spec.logit_cap)
        if return_type == "logits":
            return logits
        loss = self.loss_fn(logits, tokens, per_token=loss_per_token)
        return loss if return_type == "loss" else (logits, loss)

    def _hooked(self, hook: HookPoint, X: Tensor) -> Tensor:
        """A hook sees, and may change, the real rows and the original coordinates."""
        if not hook.has_hooks():
            return X
        X = X.clone()
        X[:, 1:, : self.layout.d_model] = hook(self.layout.deaugment(X))
        return X

    def _out(self, block: Block, bank: HeadBank, read: Tensor) -> Tensor:
        """What a bank's heads add to the stream, through its hooks where somebody watches."""
        products, stack = self.products_of(bank), self.heads_of(bank)
        X = read
        for product in products:  # the norm leaves scratch alone: it need not be taken again
            X = X + product(read)
        beside = (X - read) + sum(head(X) for head in self._beside(bank))
        if isinstance(bank, NeuronBank):
            if _watched(bank, block.mlp):
                built = self._built[bank.path]
                out = through_neurons(built, block.mlp, products, stack, read)
            else:
                out = stack(X)
            return self._hooked(block.hook_mlp_out, out + beside)
        watched = _watched(bank)
        out = through_attention(cast(AttentionBank, bank), stack, read) if watched else stack(X)
        return self._hooked(block.hook_attn_out, out + beside)

    def save(self, folder: Any) -> None:
        """Not for this form.

        Args:
            folder: not used.

        Raises:
            MechInterpError: always; save the practical form it was made from.
        """
        raise MechInterpError(
            "the literal form is not saved: save the model it was made from, and make it again with "
            "theorems.attention_only"
        )

    def __repr__(self) -> str:
        masks = "as masks" if self.omega is None else f"in the weights, omega {self.omega:g}"
        pieces = self.literal_sublayers()
        n = sum(sublayer.n_heads for _, sublayer in pieces)
        return (
            f"LiteralModel({self.provenance.get('name', 'unnamed')}: {n} softmax heads in "
            f"{len(pieces)} sublayers and nothing else, stream of width "
            f"{self.layout.width}, masks {masks})"
        )


def _watched(*modules: torch.nn.Module) -> bool:
    children = (child for module in modules for child in module.children())
    return any(isinstance(child, HookPoint) and child.has_hooks() for child in children)


def _refuse_unsupported(model: AttentionOnlyModel) -> None:
    """All that the construction of a whole model leaves out, at once.

    Raises:
        UnsupportedModelError: with every reason.
    """
    spec = model.spec
    parts = {
        f"activation {spec.act_fn!r}, a softmax over neurons: it needs a persistent row for every neuron "
        "in every sublayer (theorems.solu_heads builds one sublayer)": str(spec.act_fn).startswith("solu"),
        "norms on what sublayers write": spec.post_norm is not None,
        "norms over the stream behind sublayers": spec.stream_norm is not None,
        "norms on queries and keys": spec.qk_norm is not None,
        "a prediction head": spec.prediction_head,
        "soft-capped attention scores": spec.score_cap is not None,
        "clamped queries, keys and values": spec.qkv_clip is not None,
        "a mixture of experts": bool(spec.experts),
        "the features of a dictionary": bool(spec.dictionaries),
        "attention sinks": spec.sinks,
        f"{spec.positions} positions": spec.positions in ("alibi", "shortformer"),
        "queries that grow with the position": spec.query_growth is not None,
        "rotary tables that depend on the layer or the length": bool(spec.rotary_of)
        or any(table.until is not None for table in spec.rotaries),
    }
    reasons = [what for what, present in parts.items() if present]
    if reasons:
        name = model.provenance.get("name", "the model")
        raise UnsupportedModelError(f"{name}, as literal softmax heads,", reasons)
