"""Weights under the names that TransformerLens's users know: of the whole model, and of all layers at once.

``model.W_Q`` is ``[layer, head, d_model, d_head]``, ``model.QK`` and ``model.OV`` are TransformerLens's
``FactoredMatrix``. The norm in front is folded into every weight that reads the stream, as it is after
``enable_compatibility_mode`` on a bridge.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal, cast

import torch
from jaxtyping import Float
from torch import Tensor
from transformer_lens import FactoredMatrix

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.block import Embed, PosEmbed, Unembed

if TYPE_CHECKING:
    from torch import nn
    from transformer_lens.model_bridge.composition_scores import CompositionScores

    from mechinterp_attn.model.spec import Spec


class NamedWeights:
    """Mixin for a model with ``spec``, ``blocks``, their ``banks``, and a vocabulary in and out.

    A stack is a copy, made when it is asked for; ``model.blocks[0].attn.W_Q`` is the parameter itself.
    A model whose layers differ in shape, or that lacks the part, raises ``AttributeError``.
    """

    spec: Spec
    embed: Embed
    pos_embed: PosEmbed
    blocks: nn.ModuleList
    unembed: Unembed
    banks: Any
    to_single_token: Any

    @property
    def W_E(self) -> Float[Tensor, "d_vocab d_model"]:
        """The embedding, ``[d_vocab, d_model]``."""
        return self.embed.W_E

    @property
    def W_pos(self) -> Float[Tensor, "n_ctx d_model"]:
        """The embedding of positions, ``[n_ctx, d_model]``.

        Raises:
            AttributeError: the model has none, as ``hasattr`` asks.
        """
        if self.spec.positions not in ("standard", "shortformer"):
            raise AttributeError(f"W_pos: this model has {self.spec.positions or 'no'} positions")
        return self.pos_embed.W_pos

    @property
    def W_U(self) -> Float[Tensor, "d_model d_vocab"]:
        """The unembedding, ``[d_model, d_vocab_out]``."""
        return self.unembed.W_U

    @property
    def b_U(self) -> Float[Tensor, " d_vocab"]:
        """The bias of the logits, ``[d_vocab_out]``."""
        return self.unembed.b_U

    def accumulated_bias(
        self, layer: int, mlp_input: bool = False, include_mlp_biases: bool = True
    ) -> Float[Tensor, " d_model"]:
        """Sum of the sublayers' own biases before a layer, as ActivationCache asks for it.

        Args:
            layer: up to which layer.
            mlp_input: with the attention of that layer too.
            include_mlp_biases: False for attention's alone.
        """
        total = torch.zeros_like(self.W_U[:, 0])
        for bank in self.banks:
            before = bank.layer < layer or (bank.layer == layer and mlp_input and bank.part == "attn")
            if before and (include_mlp_biases or bank.part == "attn"):
                total = total + bank.b_O
        return total

    def tokens_to_residual_directions(self, tokens: Any) -> Tensor:
        """Columns of W_U for tokens: a string, an id, or a tensor of ids ``[...]``.

        Args:
            tokens: a text of one token, an id, or a tensor of ids.
        """
        ids = self.to_single_token(tokens) if isinstance(tokens, str) else tokens
        return self.W_U.T[ids]

    def _stack(self, part: str, name: str) -> Tensor:
        layers = [getattr(getattr(block, part, None), name, None) for block in self.blocks]
        if not layers or any(layer is None for layer in layers):
            raise AttributeError(f"{name}: not every layer of this model has one")
        return torch.stack([cast(Tensor, layer).detach() for layer in layers])

    @property
    def W_Q(self) -> Float[Tensor, "layer head d_model d_head"]:
        """Query weights."""
        return self._stack("attn", "W_Q")

    @property
    def W_K(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Key weights; grouped keys are stored once."""
        return self._stack("attn", "W_K")

    @property
    def W_V(self) -> Float[Tensor, "layer kv_head d_model d_head"]:
        """Value weights; grouped values are stored once."""
        return self._stack("attn", "W_V")

    @property
    def W_O(self) -> Float[Tensor, "layer head d_head d_model"]:
        """Output weights of the attention heads."""
        return self._stack("attn", "W_O")

    @property
    def b_Q(self) -> Float[Tensor, "layer head d_head"]:
        """Query biases."""
        return self._stack("attn", "b_Q")

    @property
    def b_K(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Key biases."""
        return self._stack("attn", "b_K")

    @property
    def b_V(self) -> Float[Tensor, "layer kv_head d_head"]:
        """Value biases."""
        return self._stack("attn", "b_V")

    @property
    def b_O(self) -> Float[Tensor, "layer d_model"]:
        """What every attention layer adds beside its heads."""
        return self._stack("attn", "b_O")

    @property
    def W_in(self) -> Float[Tensor, "layer d_model d_mlp"]:
        """Input weights of the MLPs."""
        return self._stack("mlp", "W_in")

    @property
    def W_gate(self) -> Float[Tensor, "layer d_model d_mlp"] | None:
        """Gate weights of gated MLPs; None where the MLPs have no gate."""
        return self._stack("mlp", "W_gate") if self.spec.gated else None

    @property
    def W_out(self) -> Float[Tensor, "layer d_mlp d_model"]:
        """Output weights of the MLPs."""
        return self._stack("mlp", "W_out")

    @property
    def b_in(self) -> Float[Tensor, "layer d_mlp"]:
        """Input biases of the MLPs."""
        return self._stack("mlp", "b_in")

    @property
    def b_out(self) -> Float[Tensor, "layer d_model"]:
        """What every MLP adds beside its neurons."""
        return self._stack("mlp", "b_out")

    @property
    def W_E_pos(self) -> Float[Tensor, "d_vocab_plus_n_ctx d_model"]:
        """``W_E`` above ``W_pos``: everything that the stream can start from."""
        return torch.cat([self.W_E, self.W_pos]).detach()

    @property
    def QK(self) -> FactoredMatrix:
        """``W_Q @ W_K.T`` of every attention head, ``[layer, head, d_model, d_model]``, factored."""
        return FactoredMatrix(self.W_Q, self._per_head(self.W_K).transpose(-1, -2))

    @property
    def OV(self) -> FactoredMatrix:
        """``W_V @ W_O`` of every attention head, ``[layer, head, d_model, d_model]``, factored."""
        return FactoredMatrix(self._per_head(self.W_V), self.W_O)

    def _per_head(self, W: Tensor) -> Tensor:
        return W.repeat_interleave(self.spec.n_heads // self.spec.n_kv_heads, 1)

    @property
    def all_head_labels(self) -> list[str]:
        """``L0H0``, ``L0H1``, ...: the attention heads (``model.heads`` has the neurons as well)."""
        return [
            f"L{layer}H{head}" for layer in range(self.spec.n_layers) for head in range(self.spec.n_heads)
        ]

    @property
    def attn_head_labels(self) -> list[str]:
        """The same: every layer of such a model has attention."""
        return self.all_head_labels

    @torch.no_grad()
    def all_composition_scores(self, mode: Literal["Q", "K", "V"]) -> CompositionScores:
        """Composition of every pair of attention heads, as TransformerLens gives it.

        The Frobenius norm of the product over the product of the norms, for a source in an earlier layer
        than the destination, 0 elsewhere (Elhage et al. 2021, "Composition"). It is taken from Gram
        matrices, ``d_head`` wide, so that nothing as large as all pairs of weights is ever held.
        ``mia.circuits.composition`` has neurons, a null and z-scores as well.

        Args:
            mode: which side of the destination reads the source: "Q", "K" or "V".

        Returns:
            TransformerLens's ``CompositionScores``: a tensor ``[src_layer, src_head, dst_layer,
            dst_head]``.

        Raises:
            MechInterpError: no such mode.
        """
        if mode not in ("Q", "K", "V"):
            raise MechInterpError(f"mode={mode!r}; expected 'Q', 'K' or 'V'")
        W_O, W_V = self.W_O.double().flatten(0, 1), self._per_head(self.W_V).double().flatten(0, 1)
        W_Q, W_K = self.W_Q.double().flatten(0, 1), self._per_head(self.W_K).double().flatten(0, 1)
        # |A B C D|^2 for a source A B and a destination C D is <A'A, (B C) (D D') (B C)'>.
        read, rest = {"Q": (W_Q, W_K.mT), "K": (W_K, W_Q.mT), "V": (W_V, W_O)}[mode]
        source, behind = W_V.mT @ W_V, rest @ rest.mT
        own = (source * (W_O @ W_O.mT)).sum((-1, -2)).sqrt()
        other = (behind * (read.mT @ read)).sum((-1, -2)).sqrt()
        scores = torch.zeros(len(own), len(other), dtype=torch.float64, device=own.device)
        for i in range(len(own)):
            met = W_O[i] @ read  # [dst, d_head, d_head]
            scores[i] = (source[i] * (met @ behind @ met.mT)).sum((-1, -2)).clamp_min(0).sqrt()
        L, H = self.spec.n_layers, self.spec.n_heads
        scores = (scores / (own[:, None] * other)).to(self.W_E.dtype).reshape(L, H, L, H)
        layer = torch.arange(L, device=scores.device)
        earlier = layer[:, None, None, None] < layer[None, None, :, None]
        # The bridge it stands in imports every adapter and torch.distributed: seconds.
        from transformer_lens.model_bridge.composition_scores import CompositionScores

        return CompositionScores(scores.where(earlier, 0.0), list(range(L)), self.all_head_labels)
