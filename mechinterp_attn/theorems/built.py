"""From the banks of a trained model to the paper's heads: its attention heads, its neurons.

A neuron is one of three things, by what its bank computes:

- ``act(z)``, or a sum of softmax terms: heads with z as query and value (``neurons``);
- a gate that is a sum of sigmoids, times a value: the same heads, the query untied from the value
  (``gated.glu_heads``);
- a product, ``act(g) u`` or ``relu(z)^2``: ``g u`` through scratch coordinates in a sublayer of its
  own, then the head that weighs it (``gated.gated_mlp``).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.model.attention import AttentionBank
from mechinterp_attn.model.gates import Rule
from mechinterp_attn.model.neurons import NeuronBank
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.theorems import masks
from mechinterp_attn.theorems.activations import SoftmaxActivation, softmax_activation
from mechinterp_attn.theorems.gated import glu_heads, product_gate, product_heads, weighing_heads
from mechinterp_attn.theorems.heads import SoftmaxHeads
from mechinterp_attn.theorems.linear import clearing_head, scratch
from mechinterp_attn.theorems.masks import MaskRule
from mechinterp_attn.theorems.neurons import neuron_heads
from mechinterp_attn.theorems.norms import RotaryTurn
from mechinterp_attn.theorems.stream import Layout


@dataclass(frozen=True, eq=False)
class Neurons:
    """How the neurons of one bank become heads.

    Attributes:
        activation: the softmax terms that stand for the activation function.
        product: a neuron multiplies two numbers of its own, and needs scratch coordinates.
        exact: apart from the rounding of products, the heads compute what the bank does.
    """

    bank: NeuronBank
    activation: SoftmaxActivation
    product: bool
    exact: bool

    @classmethod
    def of(cls, bank: NeuronBank, act_fn: str, given: str | SoftmaxActivation | None) -> Neurons:
        """The construction for a bank of a model with this activation function.

        Args:
            bank: the neurons to build.
            act_fn: the activation of the model they come from.
            given: what shall stand for it; by default what the bank computes, where that is a sum of
                softmax terms, and else the paper's generalised SiLU.

        Raises:
            MechInterpError: an activation outside the class.
        """
        rule = bank.rule
        squared = act_fn in ("relu2", "relu_squared")
        if given is None and rule.is_softmax and rule.weight is torch.sigmoid:
            terms = tuple(zip(rule.values, rule.slopes, rule.offsets, strict=True))
            plural = "s" if len(terms) > 1 else ""
            own = SoftmaxActivation(terms, f"{act_fn}, {len(terms)} head{plural} a neuron")
            return cls(bank, own, product=False, exact=True)
        act = softmax_activation(given or ("relu" if squared else act_fn))
        z = torch.logspace(-6, 1, 401, dtype=torch.float64)  # sharp approximations err next to 0
        z = torch.cat([-z, z])
        product = bank.gated or squared
        computed, wanted = (act(z), rule.total(z)) if product else (act(z), rule.total(z) * z)
        return cls(bank, act, product, bool(torch.allclose(computed, wanted, rtol=0, atol=1e-12)))

    @property
    def rule(self) -> Rule:
        """What the heads of a neuron put together do, as the bank's rule."""
        scales, slopes, shifts = zip(*self.activation.terms, strict=True)
        if not self.product:
            return Rule(torch.sigmoid, slopes, shifts, scales, is_softmax=True)
        act = self.activation
        return Rule(lambda g: product_gate(g) * act.weight(g), (1.0,), (0.0,), (1.0,), is_softmax=False)

    def reads(self, layout: Layout) -> tuple[Float[Tensor, "width neuron"], Float[Tensor, "width neuron"]]:
        """What reads every neuron's query and its value from an augmented row."""
        bank = self.bank
        value = layout.affine(bank.W_in.detach(), bank.b_in.detach())
        if not bank.gated:
            return value, value
        return layout.affine(bank.W_gate.detach(), bank.b_gate.detach()), value

    def products(self, layout: Layout) -> tuple[SoftmaxHeads, ...]:
        """The heads of the sublayer in front, which write products to scratch; none for most banks."""
        if not self.product:
            return ()
        return product_heads(layout, *self.reads(layout), scratch(layout, self.bank.n_neurons))

    def heads(self, layout: Layout) -> SoftmaxHeads:
        """The heads that write to the stream, one for every neuron and term."""
        bank = self.bank
        W_in, b_in, W_out = bank.W_in.detach(), bank.b_in.detach(), bank.W_out.detach()
        if self.product:
            at = scratch(layout, bank.n_neurons)
            return weighing_heads(layout, self.reads(layout)[0], at, W_out, self.activation)
        if bank.gated:
            gate = bank.W_gate.detach(), bank.b_gate.detach()
            terms = self.activation.terms
            return glu_heads(layout, gate[0], W_in, W_out, gate[1], b_in, terms=terms)
        return neuron_heads(layout, W_in, W_out, b_in, activation=self.activation)

    def clearing(self, layout: Layout) -> tuple[SoftmaxHeads, ...]:
        """The head that empties the scratch coordinates again."""
        if not self.product:
            return ()
        return (clearing_head(layout, scratch(layout, self.bank.n_neurons), self.bank.W_out.detach()),)


def attention_heads(layout: Layout, bank: AttentionBank, spec: Spec) -> SoftmaxHeads:
    """The heads of an attention bank, zero-padded and blind to the bias token (paper, A4)."""

    def reads(W: Tensor, b: Tensor) -> Tensor:
        wide = layout.embed(W.detach(), layout.data, dim=1)
        wide[:, layout.constant] = b.detach()
        return wide.repeat_interleave(bank.n_heads // len(wide), 0)

    rule: MaskRule = masks.causal if bank.causal else masks.bidirectional
    if bank.window is not None:
        rule = masks.windowed(rule, bank.window)
    return SoftmaxHeads(
        layout=layout,
        W_Q=reads(bank.W_Q, bank.b_Q) / bank.scale,
        W_K=reads(bank.W_K, bank.b_K),
        W_V=reads(bank.W_V, bank.b_V),
        W_O=layout.embed(bank.W_O.detach(), layout.data, dim=2),
        mask=rule,
        turn=RotaryTurn(spec) if spec.positions == "rotary" else None,
    )
