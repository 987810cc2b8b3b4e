"""What stands around the banks: embedding, blocks with their norms, unembedding."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention import AttentionBank, ForkedInput
from mechinterp_attn.model.experts import ExpertBank
from mechinterp_attn.model.features import FeatureBank, StreamFeatureBank
from mechinterp_attn.model.gates import Function, Rule
from mechinterp_attn.model.half import HALF
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.model.neurons import MLPNames, NeuronBank
from mechinterp_attn.model.norm import Norm
from mechinterp_attn.model.rest import ErrorBank, SkipBank, StreamErrorBank
from mechinterp_attn.model.spec import Spec
from mechinterp_attn.model.step import Step

Weights = Mapping[str, Mapping[str, Tensor]]
_AT_ONCE = 2**24  # numbers of an unembedding widened at a time: 64 MiB
Located = tuple[Norm, str]  # a norm and its path in caches


class Embed(nn.Module):
    """Token embedding ``W_E [d_vocab, d_model]``."""

    def __init__(self, W_E: Tensor):
        super().__init__()
        self.W_E = nn.Parameter(W_E)

    def forward(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.W_E[tokens]


class PosEmbed(nn.Module):
    """Learned positions ``W_pos [n_ctx, d_model]``, added to the embedding."""

    def __init__(self, W_pos: Tensor):
        super().__init__()
        self.W_pos = nn.Parameter(W_pos)

    def forward(self, positions: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        return self.W_pos[positions]


class Unembed(nn.Module):
    """``W_U [d_model, d_vocab_out]`` and ``b_U``, the final norm folded in."""

    def __init__(self, W_U: Tensor, b_U: Tensor):
        super().__init__()
        self.W_U = nn.Parameter(W_U)
        self.b_U = nn.Parameter(b_U)

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        # One tensor of logits, not a second one for the sum with the bias.
        rows = x.flatten(0, 1)
        if x.dtype == self.W_U.dtype or x.dtype in HALF:
            return torch.addmm(self.b_U, rows, self.W_U).unflatten(0, x.shape[:2])
        columns = max(1, _AT_ONCE // len(self.W_U))  # a half-precision matrix is never held wide as a whole
        parts = zip(self.b_U.split(columns), self.W_U.split(columns, 1), strict=True)
        logits = torch.cat([torch.addmm(b.to(x.dtype), rows, W.to(x.dtype)) for b, W in parts], -1)
        return logits.unflatten(0, x.shape[:2])


class PredictionHead(nn.Module):
    """A dense layer with the model's activation between the last block and the final norm (BERT)."""

    def __init__(self, W: Tensor, b: Tensor, act: Function):
        super().__init__()
        self.W = nn.Parameter(W)
        self.b = nn.Parameter(b)
        self._act = act

    def forward(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self._act(x @ self.W + self.b)


@dataclass(frozen=True, eq=False)
class Sublayer:
    """Banks that read one stream and write to it: ``x -> out(x + sum_i post_i(bank_i(norm(x))))``, without
    the first ``x`` where they write it anew.

    Attributes:
        banks: one, or attention and neurons where they run in parallel.
        stream: the hook of the stream they read.
        norm: the norm in front of them, with its path in caches.
        posts: the norm on what each bank writes, with its path; of kind None in most models.
        out: the norm over the whole stream behind them (BERT), with its path, or None.
        anew: nothing of the stream passes them by: they are features that describe it, and their error.
    """

    banks: tuple[HeadBank, ...]
    stream: str
    norm: Located
    posts: tuple[Located, ...]
    out: Located | None
    anew: bool = False


@dataclass
class Forks:
    """Which copies of the stream a block makes, so that a hook can edit what one reader sees.

    Off unless asked for, since they cost a stream per head (``model.set_use_split_qkv_input`` and its kin,
    as in TransformerLens). A norm in front is taken of every copy; its own hooks see the shared stream.
    """

    attn_in: bool = False
    qkv: bool = False
    mlp_in: bool = False


class Block(nn.Module):
    """One block of the source model: a sublayer of attention heads, then one of neuron heads, or both
    at once.
    """

    def __init__(self, spec: Spec, layer: int, rule: Rule | None, weights: Weights):
        super().__init__()
        self.layer = layer
        self.parallel = spec.parallel
        self.out_norms = spec.stream_norm is not None
        self.forks = Forks()
        self.hook_resid_pre = HookPoint()
        self.hook_attn_in = HookPoint()  # [batch, pos, head, d_model], like the next three: see Forks
        self.hook_q_input = HookPoint()
        self.hook_k_input = HookPoint()  # one per key-value head, as hook_v_input
        self.hook_v_input = HookPoint()

        def norm(name: str) -> Norm:
            kind = spec.stream_norm if self.out_norms else spec.norm
            own = weights.get(name, {})
            return Norm(kind, spec.eps, own.get("w"), own.get("b"))

        def post(name: str) -> Norm:
            return Norm(spec.post_norm, spec.eps, weights.get(name, {}).get("w"))

        self.ln1 = norm("ln1")
        self.attn = AttentionBank(spec, layer, weights["attn"])
        self.ln1_post = post("ln1_post")
        self.hook_attn_out = HookPoint()
        kind = ExpertBank if spec.experts else NeuronBank
        self.neurons = None if rule is None else kind(spec, layer, rule, weights["neurons"])
        if self.neurons is not None:
            if not self.parallel:
                self.hook_resid_mid = HookPoint()
                self.ln2 = norm("ln2")
            self.hook_mlp_in = HookPoint()  # [batch, pos, d_model]: see Forks
            self.mlp = MLPNames(self.neurons)
            self.ln2_post = post("ln2_post")
            self.hook_mlp_out = HookPoint()
        self.stand_ins: tuple[HeadBank, ...] = ()  # in place of the neurons, which are then in the error
        self.describing: tuple[HeadBank, ...] = ()  # the stream behind the block, by features and an error
        attached = spec.dictionary(layer)
        self.features: FeatureBank
        self.error: ErrorBank
        if attached is not None and attached.at == "resid_post":
            self.features = StreamFeatureBank(spec, attached, weights["features"])
            self.error = StreamErrorBank(spec, attached, (), self.features, None)
            self.describing = (self.features, self.error)
        elif attached is not None:
            self.features = FeatureBank(spec, attached, weights["features"])
            self.skip = SkipBank(spec, attached, weights["skip"]) if attached.skip else None
            whole = self.mlp, self.ln2_post
            self.error = ErrorBank(spec, attached, whole, self.features, self.skip)
            beside = () if self.skip is None else (self.skip,)
            self.stand_ins = (self.features, *beside, self.error)
        self.hook_resid_post = HookPoint()
        for sublayer in self.sublayers():
            for bank, (post, _) in zip(sublayer.banks, sublayer.posts, strict=True):
                behind = post if sublayer.out is None else sublayer.out[0]
                bank.norms_behind = () if behind.kind is None else (behind,)
                bank.mean_unseen = spec.mean_unseen

    def forward(
        self, x: Float[Tensor, "batch pos d_model"], step: Step
    ) -> Float[Tensor, "batch pos d_model"]:
        x = self.hook_resid_pre(x)
        if self.out_norms:
            x = self.ln1(x + self.hook_attn_out(self.attn(x, step, self._forked(x, None))))
            if self.neurons is not None:
                x = self.hook_resid_mid(x)
                x = self.ln2(x + self.hook_mlp_out(self._mlp(self._mlp_in(x))))
            return self.hook_resid_post(x)
        normed = self.ln1(x)
        attn = self.hook_attn_out(self.ln1_post(self.attn(normed, step, self._forked(x, self.ln1))))
        if self.neurons is None:
            return self._described(self.hook_resid_post(x + attn))
        if not self.parallel:
            x = self.hook_resid_mid(x + attn)
            normed, attn = self.ln2(self._mlp_in(x)), 0.0
        elif self.forks.mlp_in:
            normed = self.ln1.plain(self._mlp_in(x))
        mlp = self.hook_mlp_out(self._mlp(normed))
        return self._described(self.hook_resid_post(x + attn + mlp))

    def _mlp(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """What the neurons write, or those that stand in for them: the same unless a hook edits one."""
        if _looked_at(self.stand_ins):
            return sum((bank(x) for bank in self.stand_ins), torch.zeros_like(x))
        return self.ln2_post(self.mlp(x))

    def _described(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        """The stream behind the block as features and an error write it: itself unless a hook edits one."""
        if _looked_at(self.describing):
            return sum((bank(x) for bank in self.describing), torch.zeros_like(x))
        return x

    def _forked(self, x: Float[Tensor, "batch pos d_model"], norm: Norm | None) -> ForkedInput | None:
        """A copy of the stream for every head's query, key and value, normed; None where nobody asked."""
        if not (self.forks.qkv or self.forks.attn_in):
            return None
        n_heads, n_kv = self.attn.n_heads, self.attn.n_heads // self.attn.group
        if self.forks.attn_in:
            q = self.hook_attn_in(x[:, :, None].expand(-1, -1, n_heads, -1).clone())
            if n_kv != n_heads:
                raise MechInterpError(
                    "hook_attn_in has one stream per head, and here heads share keys and values; "
                    "use model.set_use_split_qkv_input(True) and its three hooks"
                )
            copies = q, q, q
        else:
            points = (self.hook_q_input, n_heads), (self.hook_k_input, n_kv), (self.hook_v_input, n_kv)
            copies = tuple(hook(x[:, :, None].expand(-1, -1, n, -1).clone()) for hook, n in points)
        q, k, v = copies if norm is None else tuple(norm.plain(copy) for copy in copies)
        return q, k, v

    def _mlp_in(self, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        return self.hook_mlp_in(x.clone()) if self.forks.mlp_in else x

    @property
    def banks(self) -> tuple[HeadBank, ...]:
        """In order."""
        mlp = () if self.neurons is None else self.stand_ins or (self.neurons,)
        return (self.attn, *mlp, *self.describing)

    def sublayers(self) -> Iterator[Sublayer]:
        """The block's banks in order, with the norms around them."""
        at = f"blocks.{self.layer}"
        ln1, post1 = (self.ln1, f"{at}.ln1"), (self.ln1_post, f"{at}.ln1_post")
        pre, mid = f"{at}.hook_resid_pre", f"{at}.hook_resid_mid"
        parts: list[tuple[tuple[HeadBank, ...], str, Located, tuple[Located, ...]]]
        if self.neurons is None:
            parts = [((self.attn,), pre, ln1, (post1,))]
        else:
            after = self.stand_ins or (self.neurons,)
            behind = (
                (Norm(None, 1.0), f"{at}.no_norm") if self.stand_ins else (self.ln2_post, f"{at}.ln2_post")
            )
            posts2 = (behind,) * len(after)
            if self.parallel:
                parts = [((self.attn, *after), pre, ln1, (post1, *posts2))]
            else:
                ln2 = (self.ln2, f"{at}.ln2")
                parts = [((self.attn,), pre, ln1, (post1,)), (after, mid, ln2, posts2)]
        for banks, stream, norm, posts in parts:
            if self.out_norms:
                yield Sublayer(banks, stream, (Norm(None, 1.0), f"{at}.no_norm"), posts, norm)
            else:
                yield Sublayer(banks, stream, norm, posts, None)
        if self.describing:
            plain = (Norm(None, 1.0), f"{at}.no_norm")
            yield Sublayer(self.describing, f"{at}.hook_resid_post", plain, (plain,) * 2, None, anew=True)


def _looked_at(banks: tuple[HeadBank, ...]) -> bool:
    """Whether a hook sees or edits any of them."""
    points = (point for bank in banks for point in bank.modules() if isinstance(point, HookPoint))
    return any(point.has_hooks() for point in points)


def nested(weights: Mapping[str, Tensor], prefix: str) -> dict[str, dict[str, Tensor]]:
    """The weights of one block, by part: ``{"attn": {"W_Q": ...}, "neurons": {...}}``.

    Args:
        weights: of the whole model, by name.
        prefix: of the block's names, ``blocks.0.``.
    """
    parts: dict[str, dict[str, Tensor]] = {}
    for key, tensor in weights.items():
        if key.startswith(prefix):
            part, name = key.removeprefix(prefix).split(".", 1)
            parts.setdefault(part, {})[name] = tensor
    return parts
