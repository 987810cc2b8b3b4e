"""Circuits planted by hand: small exact models whose heads, neurons and edges are known.

Each builder writes the weights of a transformer whose circuit is a program in the manner of RASP and tracr
(Weiss et al. 2021, Lindner et al. 2023): one-hot parts of the residual stream, heads that look things up,
neurons that compute. Every head and neuron that is not part of the program has random weights: it reads
everything the circuit writes, writes into a part of its own that other such heads read, and that part
reaches all logits a little. The whole stream is then turned by a random rotation, so that nothing lies
along a coordinate.

``Planted.nodes`` and ``Planted.edges`` name what carries the difference between a prompt and its
counterfactual: an edge ``(src, dst, mode)`` is part of the truth when giving ``dst`` the counterfactual of
what ``src`` writes, in its queries, keys or values alone, takes the behaviour away. What is the same in
both prompts, such as a head's attention to positions, carries no difference and is not counted. A ReLU
neuron reads by its gate (Q) and by its value (V); its pre-activations in the two prompts are never opposite
numbers, for which a fair division of ``gate x value`` leaves the gate nothing.
`tests/causal/test_planted.py` checks the truth by making those patches.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from program import SHARP, P, Planted, Program, V, column, draw, eye, one, task
from torch import Tensor


def induction(n: int = 24, seed: int = 0) -> Planted:
    """``.. A B .. A``: L0H1 brings every token to the next position, L1H2 looks for it there (K)."""
    p = Program("induction", layers=2, heads=4, parts={"before": V}, seed=seed)
    p.previous(0, 1, "token", "before")
    p.head(
        1, 2, query={"token": eye(V, SHARP)}, key={"before": eye()}, value={"token": eye()},
        out={"out": eye()}, rest=SHARP / 2,
    )  # fmt: skip
    clean = draw(n, p.generator, length=8)
    spare = clean[:, 8].clone()
    clean[:, 8] = clean[:, 3]
    corrupt = clean.clone()
    corrupt[:, 3] = spare  # nothing to find
    edges = [("embed", "L0H1", "V"), ("L0H1", "L1H2", "K"), ("L1H2", "logits", "")]
    asked = task("induction", clean, corrupt, clean[:, 4], clean[:, 6])
    return p.done(asked, ["L0H1", "L1H2"], edges)


def previous_token(n: int = 24, seed: int = 1) -> Planted:
    """L1H0 says the token before the last one."""
    p = Program("previous token", layers=2, heads=4, seed=seed)
    p.previous(1, 0, "token", "out")
    clean = draw(n, p.generator, length=7)
    corrupt = clean.clone()
    corrupt[:, -2] = (clean[:, -2] % (V - 1)) + 1
    edges = [("embed", "L1H0", "V"), ("L1H0", "logits", "")]
    asked = task(p.name, clean, corrupt, clean[:, -2], corrupt[:, -2])
    return p.done(asked, ["L1H0"], edges)


def two_hop(n: int = 24, seed: int = 2) -> Planted:
    """A token carried over two positions by two heads, composed through values."""
    p = Program("two hops of copying", layers=3, heads=4, parts={"carried": V}, seed=seed)
    p.previous(0, 2, "token", "carried")
    p.previous(2, 1, "carried", "out")
    clean = draw(n, p.generator, length=7)
    corrupt = clean.clone()
    corrupt[:, -3] = (clean[:, -3] % (V - 1)) + 1
    edges = [("embed", "L0H2", "V"), ("L0H2", "L2H1", "V"), ("L2H1", "logits", "")]
    asked = task(p.name, clean, corrupt, clean[:, -3], corrupt[:, -3])
    return p.done(asked, ["L0H2", "L2H1"], edges)


def duplicate_token(n: int = 24, seed: int = 3) -> Planted:
    """L0H0 finds an earlier copy of its token, L1H3 reads that flag at the position before and says so."""
    p = Program("duplicate token", layers=2, heads=4, parts={"again": 1}, seed=seed)
    same = eye(V, SHARP)
    away = torch.zeros(P, p.k, dtype=torch.float64)
    away[:, V : V + P] = eye(P)
    p.head(
        0, 0, query={"token": same, "position": away}, key={"token": eye(), "position": -SHARP * away},
        value={"token": column(torch.cat([one(0, 1, 0.0), torch.ones(V - 1)]), p.k, 0)},
        out={"again": one(0, 1)[None]}, rest=SHARP / 2,
    )  # fmt: skip
    p.previous(1, 3, "again", "again")
    p.W["blocks.1.attn.W_O"][3, :, p.parts["again"]] = 0
    p.W["blocks.1.attn.W_O"][3, 0, p.parts["out"]] = one(5).double()
    clean = draw(n, p.generator, low=2, length=8)
    spare = clean[:, 2].clone()
    clean[:, 2] = clean[:, -2]
    corrupt = clean.clone()
    corrupt[:, 2] = spare
    edges = [("embed", "L0H0", "K"), ("L0H0", "L1H3", "V"), ("L1H3", "logits", "")]
    return p.done(task(p.name, clean, corrupt, 5, 6), ["L0H0", "L1H3"], edges)


def counter(n: int = 24, seed: int = 4) -> Planted:
    """L0H1 has the share of 3s in the prompt; two neurons turn it into "at least three of them"."""
    p = Program("counter", layers=2, heads=3, neurons=10, parts={"share": 1}, seed=seed)
    length = 8
    none = torch.zeros(V, p.k, dtype=torch.float64)
    p.head(
        0, 1, query={"token": none}, key={"token": none}, value={"token": column(one(3), p.k, 0)},
        out={"share": one(0, 1, float(length))[None]},
    )  # fmt: skip
    for index, (bias, sign) in ((2, (-2.25, 2.0)), (7, (-2.75, -2.0))):  # a step of height 1 in the middle
        p.neuron(0, index, read={"share": one(0, 1)}, bias=bias, out={"out": one(5, V, sign)})
    clean = draw(n, p.generator, low=4, length=length - 1)[:, :length]
    clean[:, 1:] = torch.where(clean[:, 1:] == 5, 9, clean[:, 1:])
    places = torch.stack([torch.randperm(6, generator=p.generator)[:3] + 1 for _ in range(n)])
    corrupt = clean.clone()
    clean.scatter_(1, places, 3)
    nodes = ["L0H1", "L0N2", "L0N7"]
    edges = [("embed", "L0H1", "V")]
    edges += [("L0H1", f"L0N{i}", mode) for i in (2, 7) for mode in "QV"]
    edges += [(f"L0N{i}", "logits", "") for i in (2, 7)]
    return p.done(task(p.name, clean, corrupt, 5, 6), nodes, edges)


def skip_trigram(n: int = 24, seed: int = 5) -> Planted:
    """``A .. B`` gives C: a single head, the A by its keys and the C by its values."""
    p = Program("skip trigram", layers=2, heads=4, seed=seed)
    p.head(
        0, 2, query={"token": column(one(4, V, SHARP), p.k, 0)}, key={"token": column(one(7), p.k, 0)},
        value={"token": column(one(7), p.k, 0)}, out={"out": one(2)[None]}, rest=SHARP / 2,
    )  # fmt: skip
    clean = draw(n, p.generator, length=8)
    clean = torch.where((clean == 7) | (clean == 4), 1, clean)
    clean[:, -1] = 4
    corrupt = clean.clone()
    place = torch.randint(1, 7, (n, 1), generator=p.generator)
    clean.scatter_(1, place, 7)
    edges = [("embed", "L0H2", "K"), ("embed", "L0H2", "V"), ("L0H2", "logits", "")]
    return p.done(task(p.name, clean, corrupt, 2, 3), ["L0H2"], edges)


def _finds(p: Program, index: int, token: int, flag: int) -> None:
    """A head that raises a flag where a token has occurred: the token by keys and by values."""
    everywhere = torch.full((V,), SHARP, dtype=torch.float64)
    p.head(
        0, index, query={"token": column(everywhere, p.k, 0)}, key={"token": column(one(token), p.k, 0)},
        value={"token": column(one(token), p.k, 0)}, out={"flags": one(flag, 2)[None]}, rest=SHARP / 2,
    )  # fmt: skip


def _flag_prompts(p: Program, n: int, tokens: Iterable[int]) -> tuple[Tensor, Tensor]:
    clean = draw(n, p.generator, length=7)
    first, second = tokens
    clean = torch.where((clean == first) | (clean == second), 1, clean)
    corrupt = clean.clone()
    for row in range(n):
        places = torch.randperm(6, generator=p.generator)[:2] + 1
        clean[row, places[0]], clean[row, places[1]] = first, second
    return clean, corrupt


def and_gate(n: int = 24, seed: int = 6) -> Planted:
    """Two heads look for a token each; a neuron fires where both were found."""
    p = Program("AND of two tokens", layers=2, heads=4, neurons=10, parts={"flags": 2}, seed=seed)
    _finds(p, 0, 3, 0)
    _finds(p, 3, 8, 1)
    both = torch.full((2,), 1.5, dtype=torch.float64)
    p.neuron(0, 4, read={"flags": both}, bias=-2.0, out={"out": one(6)})
    clean, corrupt = _flag_prompts(p, n, (3, 8))
    edges = [("embed", head, mode) for head in ("L0H0", "L0H3") for mode in "KV"]
    edges += [(head, "L0N4", mode) for head in ("L0H0", "L0H3") for mode in "QV"]
    edges.append(("L0N4", "logits", ""))
    return p.done(task(p.name, clean, corrupt, 6, 2), ["L0H0", "L0H3", "L0N4"], edges)


def gated_product(n: int = 24, seed: int = 7) -> Planted:
    """The AND as a gated neuron: one head reaches its gate (Q), the other its value (V)."""
    p = Program(
        "gated AND", layers=2, heads=4, neurons=10, parts={"flags": 2}, gated=True, act_fn="silu", seed=seed
    )
    _finds(p, 1, 3, 0)
    _finds(p, 2, 8, 1)
    p.neuron(
        0, 6, read={"flags": one(1, 2)}, bias=0.0, gate=({"flags": one(0, 2, 8.0)}, -4.0),
        out={"out": one(6, V, 0.25)},
    )  # fmt: skip
    clean, corrupt = _flag_prompts(p, n, (3, 8))
    edges = [("embed", head, mode) for head in ("L0H1", "L0H2") for mode in "KV"]
    edges += [("L0H1", "L0N6", "Q"), ("L0H2", "L0N6", "V"), ("L0N6", "logits", "")]
    return p.done(task(p.name, clean, corrupt, 6, 2), ["L0H1", "L0H2", "L0N6"], edges)


def chain(n: int = 24, seed: int = 8) -> Planted:
    """A neuron's finding carried by an attention head to a neuron of the next layer."""
    p = Program(
        "neuron, head, neuron", layers=2, heads=4, neurons=10, parts={"seen": 1, "brought": 1}, seed=seed
    )
    p.neuron(0, 3, read={"token": one(3, V, 1.5)}, bias=-0.5, out={"seen": one(0, 1)})
    p.previous(1, 2, "seen", "brought", back=2)
    p.neuron(1, 8, read={"brought": one(0, 1, 1.5)}, bias=-0.5, out={"out": one(6)})
    clean = draw(n, p.generator, low=4, length=6)
    corrupt = clean.clone()
    clean[:, -3] = 3
    nodes = ["L0N3", "L1H2", "L1N8"]
    edges = [("embed", "L0N3", mode) for mode in "QV"] + [("L0N3", "L1H2", "V")]
    edges += [("L1H2", "L1N8", mode) for mode in "QV"] + [("L1N8", "logits", "")]
    return p.done(task(p.name, clean, corrupt, 6, 2), nodes, edges)


def query_composition(n: int = 24, seed: int = 9) -> Planted:
    """A head brings the wanted token, the next one looks for it: composition through queries."""
    p = Program(
        "composition through queries", layers=2, heads=4, parts={"wanted": V, "before": V}, seed=seed
    )
    p.previous(0, 0, "token", "before")
    p.previous(0, 3, "token", "wanted", back=2)
    # Not at position 7, behind the place from which the wanted token itself was brought.
    p.head(
        1, 1, query={"wanted": eye(V, SHARP)},
        key={"before": eye(), "position": column(one(7, P, -2 * SHARP), p.k, p.one)},
        value={"token": eye()}, out={"out": eye()}, rest=SHARP / 2,
    )  # fmt: skip
    clean = draw(n, p.generator, length=8)
    spare = clean[:, 6].clone()
    clean[:, 6] = clean[:, 2]  # two before the last
    corrupt = clean.clone()
    corrupt[:, 6] = spare
    edges = [("embed", "L0H3", "V"), ("L0H3", "L1H1", "Q"), ("L1H1", "logits", "")]
    asked = task(p.name, clean, corrupt, clean[:, 3], clean[:, 5])
    return p.done(asked, ["L0H3", "L1H1"], edges)


ALL: tuple[Callable[[], Planted], ...] = (
    induction, previous_token, two_hop, duplicate_token, counter, skip_trigram, and_gate, gated_product,
    chain, query_composition,
)  # fmt: skip
