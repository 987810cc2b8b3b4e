"""What a model is, as plain data: everything the forward pass needs besides the weights."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.fields import wrong_fields

NormKind = Literal["LN", "RMS"] | None
At = Literal["mlp", "resid_post"]
# What the norm on queries and keys is taken over: one head with one gain for all heads, one head with a
# gain of its own, or all heads together.
NormOver = Literal["head", "each", "all"]
Positions = Literal["standard", "rotary", "alibi", "shortformer"] | None
Mixture = tuple[tuple[float, ...], tuple[float, ...], tuple[float, ...]]  # slopes, offsets, values

# What no model comes near: numbers beyond are mistakes, and are refused before anything is made of them.
LARGEST = dict.fromkeys(("n_layers", "n_heads", "n_kv_heads"), 2**16)
LARGEST |= dict.fromkeys(("d_head", "rotary_dim"), 2**20)
LARGEST |= dict.fromkeys(("d_model", "d_mlp", "d_vocab", "d_vocab_out"), 2**31)
LARGEST |= {"n_ctx": 2**40}


@dataclass(frozen=True)
class RotaryTable:
    """How far rotary pairs turn from one token to the next.

    Attributes:
        frequencies: radians per token of every pair.
        factor: what cosines and sines are multiplied by.
        until: the longest sequence that these frequencies hold for; None for any.
        beyond: the frequencies of all its positions in a longer sequence (Phi-3's "longrope").
        stretch: instead of ``beyond``, a base and a factor s: a sequence of L tokens is turned as with the
            base times ``(s L / until - s + 1) ** (d / (d - 2))`` ("dynamic" NTK scaling).
    """

    frequencies: tuple[float, ...]
    factor: float = 1.0
    until: int | None = None
    beyond: tuple[float, ...] = ()
    stretch: tuple[float, float] | None = None


@dataclass(frozen=True)
class Attached:
    """A dictionary whose features stand in for a part of the model.

    Attributes:
        layer: the block.
        at: what it describes: "mlp", from what the block's MLP reads to what it writes, or "resid_post",
            the residual stream behind the block.
        n: features.
        k: how many are active at a token (TopK); 0 where each has its own threshold.
        skip: whether it has a linear part.
    """

    layer: int
    n: int
    k: int = 0
    skip: bool = False
    at: At = "mlp"


@dataclass(frozen=True)
class Spec:
    """Shapes and rules of a transformer; ``n`` counts, ``d`` dimensions.

    Attributes:
        d_mlp: 0 for an attention-only model.
        d_vocab_out: width of the logits; differs from d_vocab in classifiers.
        act_fn: TransformerLens's name of the activation; None for an attention-only model.
        experts: how many experts the router chooses from; 0 for an ordinary MLP. Their neurons come first
            among the ``d_mlp``, those of experts that every token is sent to behind them.
        experts_used: how many of them a token is sent to.
        d_expert: neurons of each.
        router_renormed: the chosen experts' weights are divided by their sum.
        shared_gate: the experts that every token is sent to have a gate, a sigmoid.
        gated: the MLP is act(x W_gate) * (x W_in) instead of act(x W_in).
        parallel: attention and MLP of a block read the same stream.
        norm: the norm in front of every sublayer.
        post_norm: a norm on what every sublayer writes (Gemma 2).
        stream_norm: a norm over the whole stream after every sublayer (BERT), with gain and bias.
        embed_norm: a norm on the embedding, with gain and bias.
        qk_norm: a norm on queries and keys, with gain and bias.
        qk_norm_over: what it is taken over: "head" (each head alone, one gain for all), "each" (each head
            alone, with its own gain) or "all" (the queries of all heads together, OLMo 2).
        qk_norm_last: queries and keys are normed after they are turned (NanoChat, HunYuan).
        qkv_clip: queries, keys and values are clamped to ``[-qkv_clip, qkv_clip]`` (OLMo, MPT).
        final_norm: the norm before the unembedding.
        prediction_head: a dense layer with the model's activation in front of the final norm (BERT).
        positions: learned and added ("standard"), learned and added to what queries and keys are read from
            only ("shortformer"), rotary, a score that falls with the distance ("alibi"), or none.
        alibi: how fast the score of each head falls, per token.
        alibi_bfloat16: the source rounds that score, counted from the first token, to bfloat16 (Falcon).
        sinks: a learned score per head for the bias token, which has no value (gpt-oss).
        query_growth: beta and n: queries are multiplied by ``1 + beta log(1 + floor(pos / n))``
            (Ministral 3).
        attn_scale: what attention scores are divided by.
        scale_by_layer: scores of block l are divided by l + 1 as well.
        windows: how many tokens back each layer sees, itself included; None for all. Empty: all.
        score_cap, logit_cap: scores and logits pass through ``cap * tanh(x / cap)``.
        rotary_adjacent: rotary pairs are (0, 1), (2, 3), ... instead of (0, d/2), (1, d/2+1), ...
        rotaries: how far rotary pairs turn, where it does not follow from the base: a table, or several.
        rotary_of: which of the tables each layer uses, None where it does not turn; empty: all the first.
        mixtures: the softmax heads that stand in for every neuron of each layer; empty: one head
            with the activation's own gate.
        dictionaries: the transcoders whose features are heads, with an error, in place of neurons.
        float32_inside: the source computes parts of itself in float32 even when it runs in float64.
    """

    __pydantic_config__ = {"extra": "forbid"}  # noqa: RUF012  (for ``from_json``; no field)

    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_model: int
    d_head: int
    d_mlp: int
    n_ctx: int
    d_vocab: int
    d_vocab_out: int
    act_fn: str | None
    norm: NormKind
    final_norm: NormKind
    eps: float
    positions: Positions
    causal: bool
    attn_scale: float
    rotary_dim: int = 0
    rotary_base: float = 10000.0
    rotary_adjacent: bool = False
    float32_inside: bool = False
    gated: bool = False
    parallel: bool = False
    post_norm: NormKind = None
    stream_norm: NormKind = None
    embed_norm: NormKind = None
    qk_norm: NormKind = None
    qk_norm_over: NormOver = "head"
    qk_norm_last: bool = False
    qkv_clip: float | None = None
    prediction_head: bool = False
    scale_by_layer: bool = False
    windows: tuple[int | None, ...] = ()
    score_cap: float | None = None
    logit_cap: float | None = None
    rotaries: tuple[RotaryTable, ...] = ()
    rotary_of: tuple[int | None, ...] = ()
    alibi: tuple[float, ...] = ()
    alibi_bfloat16: bool = False
    sinks: bool = False
    query_growth: tuple[float, int] | None = None
    mixtures: tuple[Mixture, ...] = ()
    experts: int = 0
    experts_used: int = 0
    d_expert: int = 0
    router_renormed: bool = False
    shared_gate: bool = False
    dictionaries: tuple[Attached, ...] = ()

    def dictionary(self, layer: int) -> Attached | None:
        """What is attached at a layer."""
        return next((one for one in self.dictionaries if one.layer == layer), None)

    @property
    def mean_unseen(self) -> bool:
        """Whether nothing that reads the residual stream sees its mean over d_model: all norms centre, and
        no dictionary reads the stream itself.
        """
        centred = self.norm == self.final_norm == "LN" and self.stream_norm is None
        return centred and all(one.at == "mlp" for one in self.dictionaries)

    def rotary(self, layer: int) -> int | None:
        """Which rotary table a layer's queries and keys are turned by; None where they are not."""
        if self.positions != "rotary":
            return None
        return self.rotary_of[layer] if self.rotary_of else 0

    def window(self, layer: int) -> int | None:
        """How many tokens back a layer sees, itself included; None for all."""
        return self.windows[layer] if self.windows else None

    @property
    def no_next_token(self) -> str | None:
        """Why the model has no next-token loss, in a sentence; None where it has one."""
        if self.d_vocab_out != self.d_vocab:
            return (
                f"this model reads {self.d_vocab} tokens and gives {self.d_vocab_out} logits: its outputs "
                "are not next tokens, so there is no next-token loss"
            )
        if not self.causal:
            return (
                "this model reads what follows a token as well (bidirectional attention): it does not "
                "predict next tokens, so there is no next-token loss"
            )
        return None

    def need_next_tokens(self, what: str) -> None:
        """Refuse what is measured in next-token losses for a model that has none.

        Args:
            what: that measure, as the start of a sentence.

        Raises:
            MechInterpError: the model has no next-token loss; says why, and what measures it instead.
        """
        if self.no_next_token is not None:
            raise MechInterpError(
                f"{what} counts next-token losses, and {self.no_next_token}; mia.causal.effects(model, "
                "task) measures heads on a mia.Task with answers of your own"
            )

    @property
    def attn_only(self) -> bool:
        return self.d_mlp == 0

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: Mapping[str, Any]) -> Spec:
        """The inverse of ``to_json``.

        Raises:
            MechInterpError: names every missing and unknown field.
        """
        plain: dict[str, Any] = {name: _frozen(value) for name, value in data.items()}
        wrong = wrong_fields(cls, plain)
        if not wrong:
            tables = tuple(RotaryTable(**table) for table in plain.get("rotaries", ()))
            attached = tuple(Attached(**one) for one in plain.get("dictionaries", ()))
            read = cls(**plain | {"rotaries": tables, "dictionaries": attached})
            wrong = read.contradictions()
        if wrong:
            raise MechInterpError(listing("the model's spec cannot be read", wrong))
        return read

    def contradictions(self) -> list[str]:
        """Values that are out of range or do not go together."""
        least = {"n_layers": 0, "d_mlp": 0, "rotary_dim": 0}
        sizes = ("n_layers", "n_heads", "n_kv_heads", "d_model", "d_head", "d_mlp", "n_ctx", "d_vocab")
        wrong = [
            f"{name}={getattr(self, name)}, expected {least.get(name, 1)} to {LARGEST[name]:,}"
            for name in (*sizes, "d_vocab_out", "rotary_dim")
            if not least.get(name, 1) <= getattr(self, name) <= LARGEST[name]
        ]
        numbers = ("eps", "attn_scale", "rotary_base", "score_cap", "logit_cap", "qkv_clip")
        wrong += [
            f"{name}={value}, expected a positive number"
            for name in numbers
            if (value := getattr(self, name)) is not None and not 0 < value < math.inf
        ]
        if not wrong and self.n_heads % self.n_kv_heads:
            wrong.append(f"{self.n_heads} heads cannot share {self.n_kv_heads} key-value heads evenly")
        if self.rotary_dim > self.d_head or self.rotary_dim % 2:
            wrong.append(
                f"rotary_dim={self.rotary_dim}, expected an even number up to d_head={self.d_head}"
            )
        for table in self.rotaries:
            lengths = {len(table.frequencies)} | ({len(table.beyond)} if table.beyond else set())
            if lengths != {self.rotary_dim // 2}:
                wrong.append(f"rotaries of {sorted(lengths)} frequencies, expected rotary_dim / 2")
            if (table.until is None) != (not table.beyond and table.stretch is None):
                wrong.append("rotaries with a length they hold for, expected also what holds beyond it")
            if table.until is not None and table.until < 1:
                wrong.append(f"rotaries until {table.until} tokens, expected at least 1")
        known = range(max(1, len(self.rotaries)))
        wrong += [f"rotary_of={i}, expected a table" for i in self.rotary_of if i not in (None, *known)]
        if self.positions == "alibi" and len(self.alibi) != self.n_heads:
            wrong.append(f"{len(self.alibi)} slopes (alibi), expected one per head ({self.n_heads})")
        if self.query_growth is not None and self.query_growth[1] < 1:
            wrong.append(f"query_growth={self.query_growth}, expected a length of at least 1")
        for name in ("windows", "mixtures", "rotary_of"):
            if len(getattr(self, name)) not in (0, self.n_layers):
                wrong.append(f"{len(getattr(self, name))} {name}, expected one per layer ({self.n_layers})")
        wrong += [
            f"a window of {w} tokens, expected at least 1" for w in self.windows if w is not None and w < 1
        ]
        if self.experts and not (
            0 < self.experts_used <= self.experts and 0 < self.experts * self.d_expert <= self.d_mlp
        ):
            wrong.append(
                f"{self.experts} experts of {self.d_expert} neurons, {self.experts_used} used, among d_mlp="
                f"{self.d_mlp} neurons"
            )
        if self.experts and (not self.gated or self.mixtures):
            wrong.append("experts that are not gated, or in a mode other than 'exact'")
        layers = [one.layer for one in self.dictionaries]
        of_mlps = [one for one in self.dictionaries if one.at != "resid_post"]
        if (
            (self.attn_only and of_mlps)
            or len(set(layers)) != len(layers)
            or not all(0 <= layer < self.n_layers for layer in layers)
        ):
            wrong.append(
                f"dictionaries in layers {layers}, expected one per layer, and an MLP where it reads one"
            )
        wrong += [
            f"a dictionary at {one.at!r}, expected 'mlp' or 'resid_post'"
            for one in self.dictionaries
            if one.at not in ("mlp", "resid_post")
            or (one.at == "resid_post" and (one.skip or self.stream_norm))
        ]
        wrong += [
            f"a dictionary of {one.n} features, {one.k} of them active, expected at least 1"
            for one in self.dictionaries
            if not (0 < one.n <= LARGEST["d_mlp"] and 0 <= one.k <= one.n)
        ]
        if not self.attn_only and self.act_fn is None:
            wrong.append("neurons without an activation (act_fn)")
        return wrong


def _frozen(value: Any) -> Any:
    """JSON's lists as the tuples they were."""
    if isinstance(value, Mapping):
        return {name: _frozen(item) for name, item in value.items()}
    return tuple(map(_frozen, value)) if isinstance(value, list) else value
