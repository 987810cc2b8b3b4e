"""Transformers written by hand: parts of the stream by name, heads and neurons that use them.

`planted.py` has the programs, and says what they are for.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

import mechinterp_attn as mia

V, P = 10, 12  # tokens (0 is the BOS, in front of every prompt), positions
JUNK = 16  # of the stream, written by the heads that are not in the circuit
GAIN = 6.0  # logit of the answer
LEAK = 0.02  # how much of that junk reaches the logits
SHARP = 40.0  # attention scores where a head looks something up: softmax saturates

Edge = tuple[str, str, str]


@dataclass(frozen=True, eq=False)
class Planted:
    """A model, a task on it, and the truth.

    Attributes:
        nodes: labels of the heads and neurons of the circuit.
        edges: ``(src, dst, mode)``: "embed" and labels, labels and "logits", "Q", "K", "V" or "".
    """

    name: str
    model: mia.AttentionOnlyModel
    task: mia.Task
    nodes: frozenset[str]
    edges: frozenset[Edge]

    def candidates(self) -> list[Edge]:
        """Every edge of the model, from the embedding to the logits."""
        banks = list(self.model.banks)
        out: list[Edge] = [("embed", "logits", "")]
        for bank in banks:
            earlier = [label for b in banks if b.step < bank.step for label in b.labels()]
            for label in bank.labels():
                out += [(src, label, mode) for src in ("embed", *earlier) for mode in bank.reads]
                out.append((label, "logits", ""))
        return out


class Program:
    """Weights under construction: parts of the stream by name, heads and neurons that use them."""

    def __init__(
        self,
        name: str,
        *,
        layers: int,
        heads: int = 3,
        neurons: int = 0,
        parts: Mapping[str, int] = {},
        act_fn: str = "relu",
        gated: bool = False,
        seed: int = 0,
    ):
        self.name, self.layers, self.heads, self.neurons = name, layers, heads, neurons
        self.generator = torch.Generator().manual_seed(seed)
        sizes = {"token": V, "position": P, **parts, "out": V, "junk": JUNK}
        ends = torch.tensor([0, *sizes.values()]).cumsum(0).tolist()
        self.parts = {p: slice(a, b) for p, a, b in zip(sizes, ends, ends[1:], strict=False)}
        self.d, self.k = ends[-1], V + P + 1
        self.one = self.k - 1  # the coordinate of a head where every query is 1
        d, k, m = self.d, self.k, neurons
        self.cfg = dict(
            n_layers=layers, n_heads=heads, d_model=d, d_head=k, n_ctx=P, d_vocab=V, attn_only=not m,
            d_mlp=m or None, act_fn=act_fn if m else None, gated_mlp=gated, normalization_type=None,
            use_attn_scale=False,
        )  # fmt: skip
        W = {"embed.W_E": self._zeros(V, d), "pos_embed.W_pos": self._zeros(P, d)}
        W["embed.W_E"][:, self.parts["token"]] = torch.eye(V, dtype=torch.float64)
        W["pos_embed.W_pos"][:, self.parts["position"]] = torch.eye(P, dtype=torch.float64)
        W["unembed.W_U"] = self._zeros(d, V)
        W["unembed.W_U"][self.parts["out"]] = GAIN * torch.eye(V, dtype=torch.float64)
        W["unembed.W_U"][self.parts["junk"]] = self._noise(JUNK, V) * LEAK
        everything = [p for p in self.parts if p not in ("out", "junk")]
        for layer in range(layers):
            at = f"blocks.{layer}"
            for side in "QKV":
                W[f"{at}.attn.W_{side}"] = self._reading(heads, everything, k)
            W[f"{at}.attn.W_O"] = self._writing(heads, k)
            W[f"{at}.attn.b_Q"] = self._zeros(heads, k)
            if m:
                for side in ("in", "gate") if gated else ("in",):
                    W[f"{at}.mlp.W_{side}"] = self._reading(1, everything, m)[0]
                    W[f"{at}.mlp.b_{side}"] = self._noise(m) * 0.1
                W[f"{at}.mlp.W_out"] = self._writing(1, m)[0]
        self.W = W

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64)

    def _noise(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, dtype=torch.float64)

    def _reading(self, n: int, parts: Iterable[str], width: int) -> Tensor:
        W = self._zeros(n, self.d, width)
        for part in (*parts, "junk"):
            where = self.parts[part]
            W[:, where] = self._noise(n, where.stop - where.start, width) * 0.3
        return W

    def _writing(self, n: int, width: int) -> Tensor:
        W = self._zeros(n, width, self.d)
        W[:, :, self.parts["junk"]] = self._noise(n, width, JUNK) * width**-0.5
        return W

    def head(
        self,
        layer: int,
        index: int,
        *,
        query: Mapping[str, Tensor],
        key: Mapping[str, Tensor],
        value: Mapping[str, Tensor],
        out: Mapping[str, Tensor],
        rest: float = 0.0,
    ) -> None:
        """A head of the circuit: matrices ``[part, d_head]`` by part of the stream, ``out`` transposed.

        Args:
            rest: score of the BOS, where the head rests when it finds nothing.
        """
        at = f"blocks.{layer}.attn"
        for side, read in (("Q", query), ("K", key), ("V", value)):
            self.W[f"{at}.W_{side}"][index] = 0
            for part, matrix in read.items():
                self.W[f"{at}.W_{side}"][index, self.parts[part], : matrix.shape[1]] = matrix.double()
        self.W[f"{at}.b_Q"][index, self.one] = 1.0
        self.W[f"{at}.W_K"][index, self.parts["token"].start, self.one] += rest
        self.W[f"{at}.W_O"][index] = 0
        for part, matrix in out.items():
            self.W[f"{at}.W_O"][index, : matrix.shape[0], self.parts[part]] = matrix.double()

    def neuron(
        self,
        layer: int,
        index: int,
        *,
        read: Mapping[str, Tensor],
        bias: float,
        out: Mapping[str, Tensor],
        gate: tuple[Mapping[str, Tensor], float] | None = None,
    ) -> None:
        """A neuron of the circuit: vectors ``[part]`` by part of the stream."""
        at = f"blocks.{layer}.mlp"
        sides = {"in": (read, bias)} | ({} if gate is None else {"gate": gate})
        for side, (vectors, b) in sides.items():
            self.W[f"{at}.W_{side}"][:, index] = 0
            self.W[f"{at}.b_{side}"][index] = b
            for part, vector in vectors.items():
                self.W[f"{at}.W_{side}"][self.parts[part], index] = vector.double()
        self.W[f"{at}.W_out"][index] = 0
        for part, vector in out.items():
            self.W[f"{at}.W_out"][index, self.parts[part]] = vector.double()

    def previous(self, layer: int, index: int, moves: str, into: str, back: int = 1) -> None:
        """A head that brings one part of the stream from ``back`` positions before into another part."""
        look = self._zeros(P, P)
        look[torch.arange(P - back), torch.arange(back, P)] = 1.0
        size = self.parts[moves].stop - self.parts[moves].start
        eye = torch.eye(size, dtype=torch.float64)
        self.head(
            layer, index, query={"position": SHARP * torch.eye(P)}, key={"position": look},
            value={moves: eye}, out={into: eye},
        )  # fmt: skip

    def done(self, task: mia.Task, nodes: Iterable[str], edges: Iterable[Edge]) -> Planted:
        turn = torch.linalg.qr(self._noise(self.d, self.d))[0]
        W = {}
        for name, tensor in self.W.items():
            if name.endswith(("W_E", "W_pos", "W_O", "W_out")):
                tensor = tensor @ turn
            elif name.endswith(("W_Q", "W_K", "W_V", "W_in", "W_gate", "W_U")):
                tensor = turn.T @ tensor
            W[name] = tensor
        model = mia.convert(mia.Checkpoint(self.cfg, W, None, self.name))
        return Planted(self.name, model, task, frozenset(nodes), frozenset(edges))


def one(i: int, n: int = V, size: float = 1.0) -> Tensor:
    """A one-hot vector."""
    return size * torch.nn.functional.one_hot(torch.tensor(i), n).double()


def eye(n: int = V, size: float = 1.0) -> Tensor:
    return size * torch.eye(n, dtype=torch.float64)


def column(vector: Tensor, k: int, at: int) -> Tensor:
    """A matrix ``[part, d_head]`` with the vector in one column."""
    out = torch.zeros(len(vector), k, dtype=torch.float64)
    out[:, at] = vector
    return out


def task(
    name: str, clean: Tensor, corrupt: Tensor, answer: Tensor | int, against: Tensor | int
) -> mia.Task:
    n = len(clean)
    sides = [x.tolist() if isinstance(x, Tensor) else [x] * n for x in (answer, against)]
    return mia.Task(clean.tolist(), corrupt=corrupt.tolist(), answer=sides[0], against=sides[1], name=name)


def draw(n: int, generator: torch.Generator, low: int = 1, length: int = P - 1) -> Tensor:
    """Prompts of different tokens, each once, behind a BOS."""
    rows = [torch.randperm(V - low, generator=generator)[:length] + low for _ in range(n)]
    return torch.cat([torch.zeros(n, 1, dtype=torch.long), torch.stack(rows)], 1)


def auroc(scores: Mapping[object, float], truth: Iterable[object]) -> float:
    """Chance that a true one has a larger score than a false one, ties counted half."""
    truth = set(truth)
    true = torch.tensor([s for key, s in scores.items() if key in truth], dtype=torch.float64)
    false = torch.tensor([s for key, s in scores.items() if key not in truth], dtype=torch.float64)
    more = (true[:, None] > false).double() + 0.5 * (true[:, None] == false).double()
    return float(more.mean())
