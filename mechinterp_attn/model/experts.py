"""The bank of heads made of the neurons of all experts of one layer.

A neuron of expert e with gate reading g and value u is the head whose weight on its own token is
``r_e act(g)``, with ``r_e`` the weight that the router gives its expert there; it is 0, and the head
silent, where the token is not sent to the expert. Experts that every token is sent to come last.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.model.gates import Rule
from mechinterp_attn.model.neurons import MLPNames, NeuronBank
from mechinterp_attn.model.spec import Spec


class ExpertBank(NeuronBank):
    """All neurons of a mixture of experts, side by side: neuron 17 of expert 2 is ``L3N2.17``.

    Parameters beside those of ``NeuronBank`` (the norm in front is folded in):
        W_router ``[d_model, expert]``, b_router ``[expert]``; where a shared expert has a gate of its own
        W_shared ``[d_model, 1]``, b_shared ``[1]``.
    """

    points: ClassVar[Mapping[str, str]] = {**NeuronBank.points, "router": "hook_router"}

    W_router: Tensor
    b_router: Tensor
    W_shared: Tensor
    b_shared: Tensor

    def __init__(self, spec: Spec, layer: int, rule: Rule, weights: Mapping[str, Tensor]):
        super().__init__(spec, layer, rule, weights)
        self.parts = spec.d_expert  # heads that share a number in labels
        self.used = spec.experts_used
        self.renormed = spec.router_renormed
        self.n_routed = spec.experts * spec.d_expert
        self.shared_gate = spec.shared_gate
        names = ("W_router", "b_router", *(("W_shared", "b_shared") if spec.shared_gate else ()))
        for name in names:
            self.register_parameter(name, nn.Parameter(weights[name]))
        self.hook_router = HookPoint()  # [batch, pos, expert]: 0 where a token is not sent to an expert

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], names: MLPNames
    ) -> Float[Tensor, "batch pos d_model"]:
        """The sum of the heads' outputs plus b_out for a normalised residual stream ``x``.

        Experts run only on the tokens that are sent to them, unless a hook looks at their neurons.
        """
        router = self.hook_router(self.route(x))
        own = (self.hook_score, self.hook_read, self.hook_weight, self.hook_act)
        looked = (*own, names.hook_pre, names.hook_pre_linear, names.hook_post)
        if not any(h.has_hooks() for h in looked):
            return self._routed(x, router)
        query = names.hook_pre(x @ self.W_gate + self.b_gate)
        value = names.hook_pre_linear(x @ self.W_in + self.b_in)
        gate = self.rule.weight(self.hook_score(query))
        z = self.hook_act(self.hook_weight(self._per_neuron(x, router) * gate) * self.hook_read(value))
        return names.hook_post(z) @ self.W_out + self.b_out

    def route(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos expert"]:
        """The router's weight of every expert at every token, 0 for all but the chosen ones."""
        logits = x @ self.W_router + self.b_router
        share = (logits if logits.dtype == torch.float64 else logits.float()).softmax(-1)
        largest, chosen = share.topk(self.used, dim=-1)
        if self.renormed:
            largest = largest / largest.sum(-1, keepdim=True)
        return torch.zeros_like(share).scatter(-1, chosen, largest).to(x.dtype)

    def _shared(self, x: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n 1"]:
        """The weight of the experts that every token is sent to."""
        if not self.shared_gate:
            return torch.ones_like(x[..., :1])
        return torch.sigmoid(x @ self.W_shared + self.b_shared)

    def _per_neuron(self, x: Tensor, router: Tensor) -> Float[Tensor, "batch pos neuron"]:
        """The weight of its expert for every neuron."""
        n_shared = self.n_neurons - self.n_routed
        shared = self._shared(x).expand(*x.shape[:-1], n_shared)
        return torch.cat([router.repeat_interleave(self.parts, -1), shared], -1)

    def _routed(self, x: Tensor, router: Tensor) -> Float[Tensor, "batch pos d_model"]:
        flat, weight = x.flatten(0, 1), router.flatten(0, 1)
        out = self.b_out.expand_as(flat)
        for expert in range(weight.shape[1]):
            rows = weight[:, expert].nonzero()[:, 0]
            if len(rows):
                own = slice(expert * self.parts, (expert + 1) * self.parts)
                out = out.index_add(0, rows, self._expert(flat[rows], own) * weight[rows, expert, None])
        if self.n_neurons > self.n_routed:
            out = out + self._expert(flat, slice(self.n_routed, None)) * self._shared(flat)
        return out.unflatten(0, x.shape[:2])

    def _expert(self, x: Float[Tensor, "row d_model"], own: slice) -> Float[Tensor, "row d_model"]:
        gate = self.rule.weight(x @ self.W_gate[:, own] + self.b_gate[own])
        return (gate * (x @ self.W_in[:, own] + self.b_in[own])) @ self.W_out[own]

    def label(self, index: int) -> str:
        """``L3N2.17``: neuron 17 of expert 2."""
        return f"L{self.layer}{self.letter}{index // self.parts}.{index % self.parts}"
