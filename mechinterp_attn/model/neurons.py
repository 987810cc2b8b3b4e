"""The bank of heads made of a block's MLP neurons (Huben & Morris 2023).

Neuron i with input direction v1, bias b1 and output direction v2 is the head whose query and value
are ``z = x . v1 + b1``, whose key is 1 on every real token and 0 on the bias token, and which sees
only its own token and the bias token. A neuron of a gated MLP has its gate as query and its input
as value. Its pattern is one number per (position, neuron), the weight on itself; the T x T picture
is made for one head on demand and never held for the bank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.model.gates import Rule
from mechinterp_attn.model.heads import Kind, Side
from mechinterp_attn.model.on_a_run import Cache
from mechinterp_attn.model.own_token import OwnTokenBank
from mechinterp_attn.model.spec import Spec


class NeuronBank(OwnTokenBank):
    """All neurons of one MLP as heads of inner dimension 1, ``rule.n`` heads each.

    Parameters (the norm in front is folded into W_in, W_gate and their biases):
        W_in ``[d_model, neuron]``, b_in ``[neuron]``, W_out ``[neuron, d_model]``,
        b_out ``[d_model]``; in a gated MLP W_gate and b_gate as W_in and b_in.
    ``TransformerLens``'s ``mlp.hook_pre``, ``hook_pre_linear`` and ``hook_post`` are passed in.
    """

    kind: ClassVar[Kind] = "mlp"
    letter: ClassVar[str] = "N"
    part: ClassVar[str] = "neurons"
    place: ClassVar[int] = 1
    has_gate: ClassVar[bool] = True
    # No filter of TransformerLens's ("endswith q", "pattern", ...) takes a neuron for an attention head.
    points: ClassVar[Mapping[str, str]] = {
        "q": "hook_score", "v": "hook_read", "pattern": "hook_weight", "z": "hook_act"
    }  # fmt: skip

    W_in: Tensor
    b_in: Tensor
    W_out: Tensor
    b_out: Tensor
    W_gate: Tensor
    b_gate: Tensor

    def __init__(self, spec: Spec, layer: int, rule: Rule, weights: Mapping[str, Tensor]):
        super().__init__()
        self.layer = layer
        self.rule = rule
        self.parts = rule.n
        self.gated = "W_gate" in weights
        self.n_neurons = weights["W_in"].shape[1]
        self.n_heads = self.n_neurons * rule.n
        self.d_head = 1
        self.d_model = spec.d_model
        self.parallel = spec.parallel
        self.over_others = bool(spec.experts) or (str(spec.act_fn).startswith("solu") and not spec.mixtures)
        names = ("W_in", "b_in", "W_out", "b_out", *(("W_gate", "b_gate") if self.gated else ()))
        for name in names:
            self.register_parameter(name, nn.Parameter(weights[name]))
        self.hook_score = HookPoint()  # [batch, pos, head]: the query, which is the score on the own token
        self.hook_read = HookPoint()  # [batch, pos, head]: the value
        self.hook_weight = HookPoint()  # [batch, pos, head]: the pattern, on the own token
        self.hook_act = HookPoint()  # [batch, pos, head]: z, weight times value

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], names: MLPNames
    ) -> Float[Tensor, "batch pos d_model"]:
        """The sum of the heads' outputs plus b_out for a normalised residual stream ``x``."""
        value = _affine(x, self.W_in, self.b_in)
        if self.gated:
            query = names.hook_pre(_affine(x, self.W_gate, self.b_gate))
            value = names.hook_pre_linear(value)
        else:
            query = value = names.hook_pre(value)
        watched = (self.hook_score, self.hook_read, self.hook_weight, self.hook_act)
        if any(h.has_hooks() for h in watched):
            pattern = self.hook_weight(
                self.rule.weight(self.hook_score(self._per_head(query, queries=True)))
            )
            z = self.hook_act(pattern * self.hook_read(self._per_head(value)))
            post = z if self.rule.n == 1 else z.unflatten(-1, (-1, self.rule.n)).sum(-1)
        elif self.rule.act is not None and not self.gated:  # the same number in one step
            post = self.rule.act(query)
        else:
            post = self.rule.total(query) * value
        return _affine(names.hook_post(post), self.W_out, self.b_out)

    def _per_head(self, z: Float[Tensor, "batch pos neuron"], *, queries: bool = False) -> Tensor:
        """``[batch, pos, neuron]`` to ``[batch, pos, head]``: the heads' scores, or their values."""
        rule = self.rule
        if rule.n == 1 and (rule.slopes, rule.offsets, rule.values) == ((1.0,), (0.0,), (1.0,)):
            return z
        if queries:
            return (z[..., None] * z.new_tensor(rule.slopes) + z.new_tensor(rule.offsets)).flatten(-2)
        return (z[..., None] * z.new_tensor(rule.values)).flatten(-2)

    @property
    def b_O(self) -> Float[Tensor, " d_model"]:
        return self.b_out

    @property
    def z_constant(self) -> Float[Tensor, " head"]:
        """Nothing: on the bias token a neuron's value is zero."""
        return self.b_in.new_zeros(self.n_heads)

    def label(self, index: int) -> str:
        """``L1N7``; where a neuron is several heads, ``L1N7.0``, ``L1N7.1``, ..."""
        n = self.rule.n
        return super().label(index) if n == 1 else f"{super().label(index // n)}.{index % n}"

    def weights(self, index: int) -> dict[str, Tensor]:
        i, k = divmod(index, self.rule.n)
        slope, offset, value = (p[k] for p in (self.rule.slopes, self.rule.offsets, self.rule.values))
        v1, b1 = self.W_in[:, i, None], self.b_in[i, None]
        q, b_q = (self.W_gate[:, i, None], self.b_gate[i, None]) if self.gated else (v1, b1)
        plain = (slope, offset) == (1.0, 0.0)
        return {
            "W_Q": q if plain else slope * q,
            "W_K": torch.zeros_like(v1),
            "W_V": v1 if value == 1.0 else value * v1,
            "W_O": self.W_out[i, None],
            "b_Q": b_q if plain else slope * b_q + offset,
            "b_K": torch.ones_like(b1),
            "b_V": b1 if value == 1.0 else value * b1,
        }

    def _stacked(self, side: Side, heads: slice | Tensor) -> Tensor:
        index = torch.arange(self.n_heads, device=self.W_in.device)[heads]
        neuron, k = (heads, 0) if self.rule.n == 1 else (index // self.rule.n, index % self.rule.n)
        if side == "O":
            return self.W_out.detach()[neuron, None]
        W = self.W_gate if self.gated and side == "Q" else self.W_in
        read = W.detach()[:, neuron].T[..., None]
        if side == "K":
            return torch.zeros_like(read)
        factors = read.new_tensor(self.rule.slopes if side == "Q" else self.rule.values)
        return read if bool((factors == 1).all()) else read * factors[k][..., None, None]

    def gram(
        self, side: Side, heads: slice | Tensor = slice(None), dtype: torch.dtype = torch.float64
    ) -> Tensor:
        if side == "K":
            n = len(heads if isinstance(heads, Tensor) else range(self.n_heads)[heads])
            return torch.ones(n, 1, 1, dtype=torch.float64, device=self.W_in.device)
        return super().gram(side, heads, dtype)

    def by_head(self, z: Tensor) -> Float[Tensor, "*batch pos head d_head"]:
        return z[..., None]

    def entropy(self, pattern: Float[Tensor, "batch pos head"]) -> Tensor:
        entropy = torch.special.entr(pattern) + torch.special.entr(1 - pattern)
        return entropy.where((pattern >= 0) & (pattern <= 1), torch.nan)

    def moved(self, cache: Cache) -> Tensor:
        return self._norms(cache[self.hook("v")])

    def written(self, cache: Cache) -> Tensor:
        return self._norms(cache[self.hook("z")])

    def _norms(self, z: Float[Tensor, "batch pos head"]) -> Float[Tensor, "batch pos head"]:
        """Norms of ``z @ W_O``."""
        return z.abs() * self.stacked("O")[:, 0].norm(dim=-1).to(z.dtype)

    def after(self, index: int, moved: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """A neuron's key is a constant: it reads what was moved to its token with its query, beside what
        stands there. Its pre-activation ``x . w + b + y . moved(w)`` is the product of the query side
        ``(x . w + b, 1)`` and the key side ``(1, y . moved(w))``, a head of inner dimension 2.
        """
        w = {name: t.detach() for name, t in self.weights(index).items()}
        read, one = moved(w["W_Q"]), torch.ones_like(w["b_Q"])
        return {
            "W_Q": torch.cat([w["W_Q"], torch.zeros_like(read)], 1),
            "W_K": torch.cat([torch.zeros_like(read), read], 1),
            "b_Q": torch.cat([w["b_Q"], one]),
            "b_K": torch.cat([one, torch.zeros_like(one)]),
        }


class MLPNames(nn.Module):
    """A neuron bank under TransformerLens's names: ``blocks.{l}.mlp.hook_pre``, ``W_in``, ..."""

    def __init__(self, bank: NeuronBank):
        super().__init__()
        self.hook_pre = HookPoint()  # [batch, pos, neuron]; in a gated MLP the gate's reading
        if bank.gated:
            self.hook_pre_linear = HookPoint()  # [batch, pos, neuron]
        self.hook_post = HookPoint()  # [batch, pos, neuron]
        self._bank = (bank,)  # in a tuple: the block registers the bank, once

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the neurons and ``b_out`` write for a normalised residual stream ``x``."""
        return self._bank[0](x, self)

    W_in = property(lambda self: self._bank[0].W_in)
    b_in = property(lambda self: self._bank[0].b_in)
    W_out = property(lambda self: self._bank[0].W_out)
    b_out = property(lambda self: self._bank[0].b_out)
    W_gate = property(lambda self: getattr(self._bank[0], "W_gate", None))


def _affine(x: Float[Tensor, "batch pos d"], W: Tensor, b: Tensor) -> Float[Tensor, "batch pos out"]:
    return torch.addmm(b, x.flatten(0, 1), W).unflatten(0, x.shape[:2])
