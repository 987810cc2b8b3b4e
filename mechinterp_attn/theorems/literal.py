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

from mechinterp_attn.banks.attention import AttentionBank
from mechinterp_attn.banks.block import Block
from mechinterp_attn.banks.gates import Rule
from mechinterp_attn.banks.neurons import NeuronBank
from mechinterp_attn.errors import MechInterpError, UnsupportedModelError
from mechinterp_attn.heads import HeadBank
from mechinterp_attn.model import AttentionOnlyModel
from mechinterp_attn.theorems import masks
from mechinterp_attn.theorems.activations import SoftmaxActivation, softmax_activation
from mechinterp_attn.theorems.heads import (
    PATTERN_BYTES,
    SoftmaxHeads,
    Sublayer,
    check_precision,
    project,
)
from mechinterp_attn.theorems.masks import MaskRule
from mechinterp_attn.theorems.neurons import bias_head, neuron_heads
from mechinterp_attn.theorems.norms import PartialNorm, RotaryTurn
from mechinterp_attn.theorems.stream import Layout

if TYPE_CHECKING:
    from mechinterp_attn.theorems.whole import Steps


class LiteralModel(AttentionOnlyModel):
    """Made by ``theorems.attention_only``.

    Attributes:
        layout: where everything stands in the augmented stream.
        omega: of the masks written into the weights, or None where masks are masks.
        activation: what the neuron heads compute instead of the source's activation function; None
            without neurons.
        exact: whether that is the source's activation function itself.
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
            model.spec, model.state_dict(), tokenizer=model.tokenizer, provenance=model.provenance
        )
        rows = 1 + model.spec.n_ctx
        self.layout = Layout(model.spec.d_model, positions=0 if omega is None else rows)
        self.omega = omega
        self.constant = 1.0
        self.activation = _activation(model, activation)
        self.exact = self.activation is None or _is_exact(model, self.activation)
        for bank in self.banks:
            if isinstance(bank, NeuronBank):
                bank.rule = _rule(cast(SoftmaxActivation, self.activation))
                bank.parts = bank.rule.n
                bank.n_heads = bank.n_neurons * bank.parts

    # -- the construction ---------------------------------------------------------------------

    def heads_of(self, bank: HeadBank) -> SoftmaxHeads:
        """The literal heads of a bank, in its order; its output bias is another head."""
        if isinstance(bank, NeuronBank):
            stack = neuron_heads(
                self.layout,
                bank.W_in.detach(),
                bank.W_out.detach(),
                bank.b_in.detach(),
                activation=cast(SoftmaxActivation, self.activation),
            )
        else:
            stack = self._attention(cast(AttentionBank, bank))
        return self._in_weights(stack)

    def bias_of(self, bank: HeadBank) -> SoftmaxHeads:
        """The bank's output bias as a head."""
        return self._in_weights(bias_head(self.layout, bank.b_O.detach()))

    def _in_weights(self, stack: SoftmaxHeads) -> SoftmaxHeads:
        """The masks as this model has them."""
        return stack if self.omega is None else stack.with_mask_in_weights(self.omega, bias_row=2.0)

    def literal_sublayers(self) -> list[tuple[str, Sublayer]]:
        """The whole model as the paper's sublayers, each with the hook of the stream it makes."""
        pieces = []
        for block in self.blocks:
            subs = list(cast(Block, block).sublayers())
            after = [sub.stream for sub in subs[1:]]
            after.append(f"blocks.{cast(Block, block).layer}.hook_resid_post")
            for sub, name in zip(subs, after, strict=True):
                stacks = [make(bank) for bank in sub.banks for make in (self.heads_of, self.bias_of)]
                pieces.append((name, Sublayer(tuple(stacks), PartialNorm(sub.norm[0], self.layout))))
        return pieces

    def start(self, input: Any) -> Float[Tensor, "batch row width"]:
        """The augmented stream before the first sublayer."""
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
        """The augmented stream after every sublayer, computed by the bare construction."""
        X = self.start(input)
        for name, sublayer in self.literal_sublayers():
            X = sublayer(X)
            yield name, X

    def _attention(self, bank: AttentionBank) -> SoftmaxHeads:
        layout = self.layout

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
            turn=RotaryTurn(self.spec) if self.spec.positions == "rotary" else None,
        )

    # -- the forward pass, with hooks ---------------------------------------------------------

    def forward(
        self,
        input: Any,
        return_type: Any = "logits",
        *,
        loss_per_token: bool = False,
        prepend_bos: bool | None = None,
        **unsupported: Any,
    ) -> Any:
        """As ``AttentionOnlyModel``'s, without attention masks and key-value caches."""
        given = [name for name, value in unsupported.items() if value is not None]
        if given:
            raise MechInterpError(
                f"the literal model takes no {', '.join(given)}; it runs whole unpadded sequences"
            )
        if return_type not in ("logits", "loss", "both", None):
            raise MechInterpError(f"return_type={return_type!r}; expected 'logits', 'loss', 'both' or None")
        tokens = self.as_tokens(input, prepend_bos=prepend_bos)
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
        stack, bias = self.heads_of(bank), self.bias_of(bank)
        if isinstance(bank, NeuronBank):
            points = [*_hooks(bank), *_hooks(block.mlp)]
            watched = any(hook.has_hooks() for hook in points)
            out = self._neurons(block, bank, stack, read) if watched else stack(read)
            return self._hooked(block.hook_mlp_out, out + bias(read))
        watched = any(hook.has_hooks() for hook in _hooks(bank))
        out = self._heads(cast(AttentionBank, bank), stack, read) if watched else stack(read)
        return self._hooked(block.hook_attn_out, out + bias(read))

    def _heads(self, bank: AttentionBank, stack: SoftmaxHeads, read: Tensor) -> Tensor:
        """``stack(read)`` through the bank's hooks: real rows, [batch, pos, head, d_head]."""
        scale = bank.scale
        q = _real(bank.hook_q, project(read, stack.W_Q) * scale) / scale
        k = _real(bank.hook_k, project(read, stack.W_K), bank.group)
        v = _real(bank.hook_v, project(read, stack.W_V), bank.group)
        if stack.turn is not None:
            q = _real(bank.hook_rot_q, stack.turn(q) * scale) / scale
            k = _real(bank.hook_rot_k, stack.turn(k), bank.group)
        scores = q @ k.mT
        if stack.penalty is not None:
            P = read[..., self.layout.positions_at.start :]
            scores = scores + (P @ stack.penalty @ P.mT).unsqueeze(-3)
        scores = stack.masked(scores)
        pattern = _corner(bank.hook_attn_scores, scores).softmax(-1)
        pattern = _corner(bank.hook_pattern, pattern)
        z = _real(bank.hook_z, pattern @ v)
        return torch.einsum("bhnr,hrd->bnd", z, stack.W_O)

    def _neurons(self, block: Block, bank: NeuronBank, stack: SoftmaxHeads, read: Tensor) -> Tensor:
        """``stack(read)`` through the bank's hooks: real rows, [batch, pos, head]."""
        act = cast(SoftmaxActivation, self.activation)
        q, v = project(read, stack.W_Q), project(read, stack.W_V)
        if block.mlp.hook_pre.has_hooks():
            scale, slope, shift = (q.new_tensor(column) for column in zip(*act.terms, strict=True))
            n = len(act.terms)
            pre = v[:, ::n, 1:, 0].transpose(1, 2) / scale[0]
            pre = block.mlp.hook_pre(pre).transpose(1, 2)[:, :, None]  # [batch, neuron, 1, pos]
            q[:, :, 1:, 0] = (slope[:, None] * pre + shift[:, None]).flatten(1, 2)
            v[:, :, 1:, 0] = (scale[:, None] * pre).flatten(1, 2)
        q, v = _real(bank.hook_q, q, flat=True), _real(bank.hook_v, v, flat=True)
        k = project(read, stack.W_K)
        size = read[..., 0].numel() * read.shape[-2] * read.element_size()
        own, z = [], []
        for heads in torch.arange(len(stack)).split(max(1, PATTERN_BYTES // size)):
            scores = q[:, heads] @ k.mT
            if stack.penalty is not None:
                P = read[..., self.layout.positions_at.start :]
                scores = scores + (P @ stack.penalty @ P.mT).unsqueeze(-3)
            pattern = stack.masked(scores).softmax(-1)
            own.append(pattern.diagonal(dim1=-2, dim2=-1))
            z.append((pattern @ v[:, heads])[..., 0])
        weight, moved = torch.cat(own, 1), torch.cat(z, 1)  # [batch, head, row]
        if bank.hook_pattern.has_hooks():  # what an edit takes from the token, the bias token gets
            seen = weight[..., 1:].transpose(1, 2)
            change = (bank.hook_pattern(seen) - seen).transpose(1, 2)
            moved[..., 1:] += change * (v[:, :, 1:, 0] - v[:, :, :1, 0])
        moved = _real(bank.hook_z, moved[..., None], flat=True)[..., 0]
        n = len(act.terms)
        if block.mlp.hook_post.has_hooks():
            post = moved.unflatten(1, (-1, n)).sum(2)
            post[..., 1:] = block.mlp.hook_post(post[..., 1:].transpose(1, 2)).transpose(1, 2)
            return torch.einsum("bhn,hd->bnd", post, stack.W_O[::n, 0])
        return torch.einsum("bhn,hd->bnd", moved, stack.W_O[:, 0])

    def save(self, folder: Any) -> None:
        """Not for this form.

        Raises:
            MechInterpError: always; save the practical form it was made from.
        """
        raise MechInterpError(
            "the literal form is not saved: save the model it was made from, and make it again with "
            "theorems.attention_only"
        )

    def __repr__(self) -> str:
        masks = "as masks" if self.omega is None else f"in the weights, omega {self.omega:g}"
        n = sum(sublayer.n_heads for _, sublayer in self.literal_sublayers())
        return (
            f"LiteralModel({self.provenance.get('name', 'unnamed')}: {n} softmax heads in "
            f"{len(self.sublayers())} sublayers and nothing else, stream of width "
            f"{self.layout.width}, masks {masks})"
        )


def _hooks(module: torch.nn.Module) -> Iterator[HookPoint]:
    return (child for child in module.children() if isinstance(child, HookPoint))


def _real(hook: HookPoint, x: Tensor, group: int = 1, *, flat: bool = False) -> Tensor:
    """``[batch, head, row, rank]`` through a hook that sees ``[batch, pos, head, rank]`` of the real
    rows (one of every ``group`` heads that share keys; ``flat``: without the rank of 1)."""
    if not hook.has_hooks():
        return x
    seen = x[:, ::group, 1:].transpose(1, 2)
    seen = hook(seen[..., 0])[..., None] if flat else hook(seen)
    x = x.clone()
    x[:, :, 1:] = seen.transpose(1, 2).repeat_interleave(group, 1)
    return x


def _corner(hook: HookPoint, x: Tensor) -> Tensor:
    """``[batch, head, row, row]`` through a hook that sees the real rows and columns."""
    if not hook.has_hooks():
        return x
    x = x.clone()
    x[..., 1:, 1:] = hook(x[..., 1:, 1:])
    return x


def _activation(
    model: AttentionOnlyModel, given: str | SoftmaxActivation | None
) -> SoftmaxActivation | None:
    """The softmax terms of the model's neurons: as asked for, as the model already has them, or the
    paper's."""
    banks = [bank for bank in model.banks if isinstance(bank, NeuronBank)]
    if not banks:
        return None
    if given is not None:
        return softmax_activation(given)
    rule, name = banks[0].rule, str(model.spec.act_fn)
    if rule.is_softmax and rule.weight is torch.sigmoid:
        terms = tuple(zip(rule.values, rule.slopes, rule.offsets, strict=True))
        return SoftmaxActivation(terms, f"{name}, {len(terms)} heads a neuron")
    return softmax_activation(name)


def _is_exact(model: AttentionOnlyModel, act: SoftmaxActivation) -> bool:
    """Whether the neurons of the model compute just these terms."""
    rule = next(bank.rule for bank in model.banks if isinstance(bank, NeuronBank))
    z = torch.linspace(-10, 10, 201, dtype=torch.float64)
    return bool(torch.allclose(act(z), rule.total(z) * z, rtol=0, atol=1e-12))


def _rule(act: SoftmaxActivation) -> Rule:
    scales, slopes, shifts = zip(*act.terms, strict=True)
    return Rule(torch.sigmoid, slopes, shifts, scales, is_softmax=True)


def _refuse_unsupported(model: AttentionOnlyModel) -> None:
    """All that the construction of a whole model leaves out, at once.

    Raises:
        UnsupportedModelError: with every reason.
    """
    spec = model.spec
    parts = {
        "a gated MLP (theorems.gated_mlp builds its sublayers)": spec.gated,
        "norms on what sublayers write": spec.post_norm is not None,
        "norms over the stream behind sublayers": spec.stream_norm is not None,
        "norms on queries and keys": spec.qk_norm is not None,
        "a prediction head": spec.prediction_head,
        "soft-capped attention scores": spec.score_cap is not None,
    }
    reasons = [what for what, present in parts.items() if present]
    if reasons:
        name = model.provenance.get("name", "the model")
        raise UnsupportedModelError(f"{name}, as literal softmax heads,", reasons)
