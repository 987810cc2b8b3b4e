"""The one noun of the package: a bank of heads.

A ``HeadBank`` holds all heads of one sublayer that share a rule for their attention pattern. A
``Head`` is one of them. Attention heads (``L0H3``) and heads derived from MLP neurons (``L0N152``)
have the same attributes, so everything downstream treats them alike (Huben & Morris 2023).

Row vectors multiply from the left: a head reads ``x @ W_V`` and writes ``z @ W_O``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor, nn
from transformer_lens.hook_points import HookPoint

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import Page, draw
from mechinterp_attn.model.low_rank import LowRank
from mechinterp_attn.model.norm import Norm
from mechinterp_attn.model.on_a_run import Cache, OnARun

if TYPE_CHECKING:
    from plotly.graph_objects import Figure

Kind = Literal["attention", "mlp", "feature", "skip", "error", "virtual"]
Side = Literal["Q", "K", "V", "O"]


@dataclass(frozen=True, eq=False)
class Head:
    """One head of a bank: an attention head, or an MLP neuron seen as a head of dimension 1.

    The weights have the norm in front folded in (its gain and, for LayerNorm, its centring), so
    they act on the normalised residual stream. For a neuron the key is the constant 1 on every
    real token and 0 on the bias token: ``W_K`` is zero and ``b_K`` is one.

    Attributes:
        label: ``L0H3`` for attention, ``L0N152`` for a neuron.
        kind: "attention" or "mlp".
        layer: the block it comes from.
        index: its number among the heads of its bank.
        bank: the bank that holds it.
        W_Q, W_K, W_V: ``[d_model, d_head]``.
        b_Q, b_K, b_V: ``[d_head]``.
        W_O: ``[d_head, d_model]``. (Values and outputs of a virtual head may be narrower.)
        model: the model it was taken from with ``model["L0H3"]``; None where a bank gave it.
    """

    label: str
    kind: Kind
    layer: int
    index: int
    W_Q: Float[Tensor, "d_model d_head"] = field(repr=False)
    W_K: Float[Tensor, "d_model d_head"] = field(repr=False)
    W_V: Float[Tensor, "d_model d_value"] = field(repr=False)
    W_O: Float[Tensor, "d_value d_model"] = field(repr=False)
    b_Q: Float[Tensor, " d_head"] = field(repr=False)
    b_K: Float[Tensor, " d_head"] = field(repr=False)
    b_V: Float[Tensor, " d_value"] = field(repr=False)
    bank: HeadBank = field(repr=False)
    model: Any = field(default=None, repr=False, kw_only=True)

    @property
    def OV(self) -> LowRank:
        """``W_V @ W_O``: what moves from a source token to the residual stream it is read into. The gain of
        a norm behind the sublayer (Gemma 2) is in it, as those of norms in front are in ``W_V``.
        """
        return LowRank(self.W_V, self.bank.behind(self.W_O))

    @property
    def QK(self) -> LowRank:
        """``W_Q @ W_K.T`` (unscaled): which token attends to which, read on the residual stream."""
        return LowRank(self.W_Q, self.W_K.T)

    @property
    def chain(self) -> tuple[Head, ...]:
        """The heads that act one after the other: this one alone, or those of a virtual head."""
        return (self,)

    @property
    def reads_at(self) -> int:
        """The step (``HeadBank.step``) at which the head reads the residual stream."""
        return self.bank.step

    @property
    def writes_at(self) -> int:
        """The step at which the head writes; heads with a later ``reads_at`` see it."""
        return self.bank.step

    @property
    def mixes_positions(self) -> bool:
        """Whether the head can bring anything to a token from other tokens."""
        return self.bank.mixes_positions

    @property
    def compares_keys(self) -> bool:
        """Whether the head's pattern is a softmax over tokens, which sets keys against one another: what
        all keys share then makes no difference. A neuron's score is compared with 0 instead, and one of
        a head with a sink with the sink, so all of it counts.
        """
        return self.bank.compares_keys

    def query_read(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_head"]:
        """The query side of the QK circuit for residual vectors: ``x @ W_Q + b_Q``, whatever the head.

        Args:
            x: ``[token, d_model]``, normalised residual vectors.
        """
        return x @ self.W_Q.to(x.dtype) + self.b_Q.to(x.dtype)

    def key_read(self, x: Float[Tensor, "token d_model"]) -> Float[Tensor, "token d_head"]:
        """The key side of the QK circuit for residual vectors: ``x @ W_K``, and ``b_K`` where it makes a
        difference. A softmax over tokens does not see what all keys share; a neuron's key is its bias.

        Args:
            x: ``[token, d_model]``, normalised residual vectors.
        """
        keys = x @ self.W_K.to(x.dtype)
        return keys if self.compares_keys else keys + self.b_K.to(x.dtype)

    def gram(self, side: Side) -> Float[Tensor, "d_head d_head"]:
        """``W.T @ W`` of one side's weights in float64 (``W @ W.T`` for O); see ``HeadBank.gram``.

        Args:
            side: "Q", "K", "V" or "O".
        """
        return self.bank.gram(side, slice(self.index, self.index + 1))[0]

    def pattern(self, cache: Cache, batch: int = 0) -> Float[Tensor, "query key_plus_bias"]:
        """The dense attention picture of this head on a cached run.

        Args:
            cache: what ``model.run_with_cache`` returned, with or without a batch dimension.
            batch: which sequence of the batch.

        Returns:
            ``[query, key + 1]``: one column per real token, then the bias token's column. An
            attention head puts nothing on the bias token; a neuron puts ``gate`` on itself and
            ``1 - gate`` there (Huben & Morris 2023).
        """
        return self.bank.dense_pattern(self.bank.cached_pattern(cache, batch), self.index)

    def show(self, prompt: str | list[int] | Tensor, *, positions: slice = slice(None)) -> Page:
        """The head's attention on a prompt, as a CircuitsVis view that works offline and when saved.

        Args:
            prompt: a text, or token ids ``[pos]``.
            positions: which tokens to show, such as ``slice(-40, None)``; at most 64.

        Raises:
            MechInterpError: the head was taken from a bank and not from a model, an unusable prompt,
                or too many tokens to show.
        """
        self._runs("show")
        return draw(self, prompt, form="page", positions=positions)

    def plot(self, prompt: str | list[int] | Tensor) -> Figure:
        """The head's pattern on a prompt as a plotly figure.

        Args:
            prompt: a text, or token ids ``[pos]``.

        Raises:
            MechInterpError: the head was taken from a bank and not from a model, or an unusable prompt.
        """
        self._runs("plot")
        return draw(self, prompt)

    def _runs(self, method: str) -> None:
        if self.model is None:
            raise MechInterpError(
                f"this {self.label} was taken from a bank, which cannot run a prompt; take it from the "
                f"model: model[{self.label!r}].{method}(prompt)"
            )


class HeadBank(nn.Module, OnARun):
    """All heads of one sublayer that share a rule for their pattern.

    Subclasses hold the weights. Whatever differs between attention and neurons is a method here;
    nothing downstream asks what kind of bank it has.

    Attributes:
        kind: "attention" or "mlp".
        letter: "H" or "N", as in labels.
        part: the bank's name inside its block, ``blocks.{layer}.{part}``.
        b_O: the bias of the whole sublayer, added beside the heads, ``[d_model]``.
        place: which sublayer of its block this is, counted from 0.
        parallel: the block's sublayers all read the same stream.
        mixes_positions: whether heads can attend to tokens other than their own.
        parts: how many heads stand for one attention head or neuron of the source.
        sides: what the heads read from the stream; a neuron's key is constant.
        norms_behind: the norms that what the heads write passes before it is read (Gemma 2, BERT).
        has_gate: the pattern is a function of the head's own score, its gate, as a neuron's.
        has_circuit: what a head writes is linear in what it reads, once its pattern is frozen.
        over_others: a gate that looks at other heads' scores as well (SoLU, a router, TopK).
        mean_unseen: nothing reads the mean of what they write: every norm of the model centres.
    """

    kind: ClassVar[Kind]
    letter: ClassVar[str]
    part: ClassVar[str]
    place: ClassVar[int]
    mixes_positions: ClassVar[bool]
    points: ClassVar[
        Mapping[str, str]
    ] = {}  # hooks that are not called ``hook_`` and the role: see ``hook``
    parallel: bool = False
    parts: int = 1
    sides: ClassVar[tuple[Side, ...]] = ("Q", "V")
    norms_behind: tuple[Norm, ...] = ()
    mean_unseen: bool = False
    has_gate: ClassVar[bool] = False
    has_circuit: ClassVar[bool] = True
    over_others: bool = False

    layer: int
    n_heads: int
    d_head: int
    d_model: int
    b_O: Any

    @property
    def path(self) -> str:
        """Where the bank stands in the model and in its caches: ``blocks.0.attn``."""
        return f"blocks.{self.layer}.{self.part}"

    @property
    def step(self) -> int:
        """When the bank reads and writes: a head reads what banks of smaller steps have written."""
        return 3 * self.layer + (0 if self.parallel and self.place < 2 else self.place)

    @property
    def reads(self) -> dict[str, Float[Tensor, "head d_model d_head"]]:
        """What every head reads its queries, keys and values with, the weights in front of ``hook_q``,
        ``hook_k`` and ``hook_v``, detached; without what is the same whatever the stream holds.
        """
        return {side: self.stacked(side) for side in self.sides}

    @property
    @abstractmethod
    def z_constant(self) -> Shaped[Tensor, head * d_head]:
        """What every head holds (``z``) whatever it looks at, in the shape that ``hook_z`` gives it."""

    def of(self, kind: str) -> bool:
        """Whether the heads are of a kind, "attention" or "mlp"; all are of the kind "all"."""
        return kind in ("all", self.kind)

    def label(self, index: int) -> str:
        return f"L{self.layer}{self.letter}{index}"

    def labels(self) -> list[str]:
        return [self.label(i) for i in range(self.n_heads)]

    def head(self, index: int) -> Head:
        """One head, its weights detached views of the bank's (no copy)."""
        weights = self.weights(index)
        return Head(
            label=self.label(index),
            kind=self.kind,
            layer=self.layer,
            index=index,
            bank=self,
            **{name: w.detach() for name, w in weights.items()},
        )

    def hook(self, role: str) -> str:
        """The name of the hook that sees the bank's queries ("q"), keys ("k"), values ("v"), scores
        ("attn_scores"), patterns ("pattern") or what its heads hold ("z").
        """
        return f"{self.path}.{self.points.get(role, f'hook_{role}')}"

    def point(self, role: str) -> HookPoint:
        """That hook itself."""
        return cast(HookPoint, getattr(self, self.points.get(role, f"hook_{role}")))

    @abstractmethod
    def weights(self, index: int) -> dict[str, Tensor]:
        """``W_Q W_K W_V W_O b_Q b_K b_V`` of one head, as views."""

    def stacked(
        self,
        side: Side,
        heads: slice | Int[Tensor, " head"] = slice(None),
        dtype: torch.dtype | None = None,
    ) -> Float[Tensor, "head rows columns"]:
        """``W_Q``, ``W_K``, ``W_V`` ``[head, d_model, d_head]`` or ``W_O`` ``[head, d_head, d_model]``
        of many heads at once, detached; shared keys and values (GQA) are given to every head.

        ``W_O`` is taken as the rest of the model sees it (``seen``), the others as they are.

        Args:
            dtype: of the result; by default the model's.
        """
        W = self._stacked(side, heads)
        W = W if dtype is None else W.to(dtype)
        return self.seen(W) if side == "O" else W

    @abstractmethod
    def _stacked(self, side: Side, heads: slice | Tensor) -> Tensor:
        """The weights themselves."""

    def behind(self, W: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """What heads write, through the norms behind the sublayer: their gain (and centring) folded in as
        that of the norm in front is in what heads read, their scale left out.
        """
        for norm in self.norms_behind:
            W = norm.freeze(None).turn(W)
        return W

    def seen(self, W: Float[Tensor, "*n d_model"]) -> Float[Tensor, "*n d_model"]:
        """What heads write, as far as anything reads it: ``behind``, and without its mean where all
        readers of the stream take the mean out.
        """
        W = self.behind(W)
        return W - W.mean(-1, keepdim=True) if self.mean_unseen else W

    def gram(
        self,
        side: Side,
        heads: slice | Int[Tensor, " head"] = slice(None),
        dtype: torch.dtype = torch.float64,
    ) -> Float[Tensor, "head d_head d_head"]:
        """Inner products of the columns of ``W_Q``, ``W_K`` or ``W_V`` (rows of ``W_O``), taken in a dtype;
        those of vectors, which cost little, always in float64.

        A neuron's key is the constant coordinate of the bias-token construction (Huben & Morris
        2023), which is not part of d_model: its key Gram is 1 although its ``W_K`` is zero.
        """
        if self.d_head == 1:
            # Some at a time: a bank of vectors in float64 may be larger than all that is kept of it.
            parts = (part.flatten(1).double() for part in self._stacked(side, heads).split(256))
            parts = (self.seen(part) if side == "O" else part for part in parts)
            return torch.cat([torch.linalg.vecdot(part, part) for part in parts])[:, None, None]
        W = self.stacked(side, heads, dtype)
        return W @ W.mT if side == "O" else W.mT @ W

    @property
    def compares_keys(self) -> bool:
        """Whether patterns are softmaxes over tokens alone; see ``Head.compares_keys``."""
        return False

    @property
    def score_scale(self) -> float:
        """What scores are divided by before the softmax."""
        return 1.0

    def turned(self, x: Float[Tensor, "*n d_head"], position: int) -> Float[Tensor, "*n d_head"]:
        """Queries or keys as they are at a position: rotary heads turn them, others leave them."""
        return x

    def after(self, index: int, moved: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        """``W_Q W_K b_Q b_K`` of a head at the end of a chain, whose score is about what the chain moved.

        Args:
            moved: takes a side of this head ``[d_model, d_head]`` to what it reads of the tokens that
                the chain started from: ``OV_1 OV_2 ... @ side``.
        """
        w = {name: t.detach() for name, t in self.weights(index).items()}
        return {"W_Q": w["W_Q"], "W_K": moved(w["W_K"]), "b_Q": w["b_Q"], "b_K": w["b_K"]}
