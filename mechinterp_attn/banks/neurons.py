"""The bank of heads made of a block's MLP neurons (Huben & Morris 2023).

Neuron i with input direction v1, bias b1 and output direction v2 is the head whose query and value
are ``z = x . v1 + b1``, whose key is 1 on every real token and 0 on the bias token, and which sees
only its own token and the bias token. Its pattern is one number per (position, neuron), the weight
on itself; the T x T picture is made for one head on demand and never held for the bank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.banks.gates import Gate
from mechinterp_attn.banks.norm import FrozenNorm
from mechinterp_attn.heads import Cache, FrozenBank, HeadBank, Kind, ScoreSides
from mechinterp_attn.spec import Spec


class NeuronBank(HeadBank):
    """All neurons of one MLP as heads of inner dimension 1.

    Parameters (the norm in front is folded into W_in and b_in):
        W_in ``[d_model, neuron]``, b_in ``[neuron]``, W_out ``[neuron, d_model]``,
        b_out ``[d_model]``.
    ``hook_pre`` and ``hook_post`` are TransformerLens's ``mlp.hook_pre`` and ``mlp.hook_post``.
    """

    kind: ClassVar[Kind] = "mlp"
    letter: ClassVar[str] = "N"
    part: ClassVar[str] = "neurons"

    W_in: Tensor
    b_in: Tensor
    W_out: Tensor
    b_out: Tensor

    def __init__(self, spec: Spec, layer: int, gate: Gate, weights: Mapping[str, Tensor]):
        super().__init__()
        self.layer = layer
        self.n_heads = spec.d_mlp
        self.d_head = 1
        self.d_model = spec.d_model
        self.gate = gate
        for name in ("W_in", "b_in", "W_out", "b_out"):
            self.register_parameter(name, nn.Parameter(weights[name]))
        self.hook_q = HookPoint()  # [batch, pos, neuron]
        self.hook_v = HookPoint()  # [batch, pos, neuron]
        self.hook_pattern = HookPoint()  # [batch, pos, neuron]: weight on the own token
        self.hook_z = HookPoint()  # [batch, pos, neuron]

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], hook_pre: HookPoint, hook_post: HookPoint
    ) -> Float[Tensor, "batch pos d_model"]:
        """The sum of the heads' outputs plus b_out for a normalised residual stream ``x``."""
        pre = hook_pre(torch.addmm(self.b_in, x.flatten(0, 1), self.W_in).unflatten(0, x.shape[:2]))
        if any(h.has_hooks() for h in (self.hook_q, self.hook_v, self.hook_pattern)):
            pattern = self.hook_pattern(self.gate.weight(self.hook_q(pre)))
            z = pattern * self.hook_v(pre)
        else:  # the same number in one step
            z = self.gate.act(pre)
        z = hook_post(self.hook_z(z))
        return torch.addmm(self.b_out, z.flatten(0, 1), self.W_out).unflatten(0, x.shape[:2])

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return self.b_out

    def weights(self, index: int) -> dict[str, Tensor]:
        v1, b1 = self.W_in[:, index, None], self.b_in[index, None]
        return {
            "W_Q": v1,
            "W_K": torch.zeros_like(v1),
            "W_V": v1,
            "W_O": self.W_out[index, None],
            "b_Q": b1,
            "b_K": torch.ones_like(b1),
            "b_V": b1,
        }

    def cached_pattern(self, cache: Cache, batch: int) -> Float[Tensor, "pos neuron"]:
        pattern = cache[f"{self.path}.hook_pattern"]
        return pattern[batch] if pattern.ndim == 3 else pattern

    def dense_pattern(self, pattern: Tensor, index: int) -> Float[Tensor, "query key_plus_bias"]:
        own = pattern[:, index]
        return torch.cat([own.diag(), (1 - own)[:, None]], dim=1)

    def attention_on(
        self, pattern: Float[Tensor, "batch pos neuron"], pairs: Float[Tensor, "query key"]
    ) -> Float[Tensor, " head"]:
        own = pairs.diagonal().to(pattern.dtype)  # a neuron sees no other token
        return torch.einsum("bpn,p->n", pattern, own) / pattern.shape[0]

    def query_read(self, index: int, x: Tensor) -> Tensor:
        v1, b1 = (t.detach().to(x.dtype) for t in (self.W_in[:, index, None], self.b_in[index]))
        return x @ v1 + b1

    def key_read(self, index: int, x: Tensor) -> Tensor:
        return torch.ones_like(x[:, :1])

    def freeze(self, pattern: Tensor, norm: FrozenNorm) -> FrozenNeurons:
        return FrozenNeurons(self, pattern, norm)


class FrozenNeurons(FrozenBank):
    """``x -> (pattern * (norm(x) @ W_in)) @ W_out`` with the pattern of one run."""

    bank: NeuronBank

    def __init__(self, bank: NeuronBank, pattern: Float[Tensor, "pos neuron"], norm: FrozenNorm):
        self.bank = bank
        self.pattern = pattern
        self._norm = norm
        self.z_bias = (pattern * bank.b_in.detach())[..., None]

    def read(self, x: Tensor) -> Tensor:
        return (self.pattern * (self._norm.apply(x) @ self.bank.W_in.detach()))[..., None]

    def unread(self, z: Tensor) -> Tensor:
        return self._norm.apply((self.pattern * z[..., 0]) @ self.bank.W_in.detach().T)

    def write(self, z: Tensor) -> Tensor:
        return z[..., 0] @ self.bank.W_out.detach()

    def unwrite(self, y: Tensor) -> Tensor:
        return (y @ self.bank.W_out.detach().T)[..., None]

    def write_at(self, z: Tensor, index: Tensor, position: Tensor) -> Tensor:
        return z * self.bank.W_out.detach()[index]

    def pull(self, v: Tensor, index: Tensor) -> Tensor:
        held = (v * self.bank.W_out.detach()[index]).sum(-1, keepdim=True)
        return self._norm.turn_back(held * self.bank.W_in.detach().T[index])

    def spread(self, w: Tensor, index: Tensor) -> Tensor:
        return self._norm.weigh(w * self.pattern.T[index])

    def reach(self, m: Tensor, *, summed: bool) -> Tensor:
        return self.pattern.abs() * self._norm.weigh(m)[:, None]

    def gains(self, v: Tensor) -> Tensor:
        return (self.bank.W_out.detach() @ v).abs() * self.bank.W_in.detach().norm(dim=0)

    def norms(self) -> Tensor:
        return self.bank.W_out.detach().norm(dim=1) * self.bank.W_in.detach().norm(dim=0)

    def score_sides(self, index: int, x: Tensor) -> ScoreSides:
        bank = self.bank
        one = torch.ones(len(x), 1, dtype=x.dtype, device=x.device)
        return ScoreSides(
            query=lambda x: self._norm.apply(x) @ bank.W_in.detach()[:, index, None],
            key=lambda x: torch.zeros_like(x[..., :1]),
            query_bias=bank.b_in[index].detach() * one,
            key_bias=one,
            allowed=torch.eye(len(x), dtype=torch.bool, device=x.device),
        )
