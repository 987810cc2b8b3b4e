"""Every score and every z of the package is about the function that a model computes, not about how its
weights happen to be written: symmetries of a transformer, in any combination, change none of them.

A new analysis is added to ``SCORES``; every number in its table is then looked at.
"""

import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import pandas as pd
import pytest
import torch
from hypothesis import Phase, given, settings, strategies as st

import mechinterp_attn as mia
from mechinterp_attn.model.virtual import JOIN
from tests.conftest import tiny_bridge

C, D, P = mia.circuits, mia.detect, mia.paths
TOKENS = torch.tensor([[1, 5, 9, 1, 5, 9, 1, 5], [2, 2, 11, 7, 0, 2, 11, 3]])
LABELS = ("L0H0", "L1H1", "L0N3", "L0H1 > L1H2", "L0H2 > L1N5")
MIXING = ("L0H0", "L1H1")
D_MODEL, D_HEAD, HEADS, NEURONS = 12, 3, 3, 6


@dataclass(frozen=True)
class Version:
    """A model, and what its heads are called that the original calls ``label``."""

    model: mia.AttentionOnlyModel
    names: dict[str, str] = field(default_factory=dict)

    def __call__(self, label: str) -> str:
        return JOIN.join(self.names.get(part, part) for part in label.split(JOIN))

    def original(self, label: str) -> str:
        back = {new: old for old, new in self.names.items()}
        return JOIN.join(back.get(part, part) for part in label.split(JOIN))


def _each(labels, run: Callable) -> Callable[[Version], pd.DataFrame]:
    """The tables of some heads under one another."""

    def frames(v: Version) -> pd.DataFrame:
        return pd.concat([run(v.model, v(label)).assign(head=v(label)) for label in labels])

    return frames


def _task(model):
    corrupt = TOKENS.clone()
    corrupt[:, -2] = torch.tensor([4, 8])
    return mia.Task(TOKENS.tolist(), corrupt=corrupt.tolist(), answer=[9, 6], against=[3, 1])


def _induction(v: Version) -> pd.DataFrame:
    found = D.induction(v.model, draws=2, neurons=2 * NEURONS)
    return found.frame.drop(columns="partner").assign(gain=found.gain, gain_z=found.gain_z)


def _frozen(v: Version):
    return P.freeze(v.model, TOKENS[0])


# What is read from weights alone.
WEIGHTS: dict[str, Callable[[Version], pd.DataFrame]] = {
    "copying": lambda v: C.copying_scores(v.model, diagonals=True).frame,
    **{f"composition {k}": lambda v, k=k: C.composition(v.model, k).frame for k in "QKV"},
    "composition, best": lambda v: C.composition(v.model, "V", top_k=10, rank_by="z").frame,
    **{f"on tokens {k}": lambda v, k=k: C.token_composition(v.model, k).frame for k in "QK"},
    "weights": lambda v: D.score_weights(v.model, draws=2).frame,
    "pairs": lambda v: D.score_weights(v.model, draws=2).pairs,
    "virtual heads": lambda v: C.virtual_heads(v.model, top_k=6).frame,
    "spectrum": _each(LABELS, lambda m, h: C.singular_directions(m, h, components=1, top_k=3).frame),
    "OV": _each(LABELS, lambda m, h: C.ov_circuit(m, h).statistics().frame),
    "QK": _each(LABELS, lambda m, h: C.qk_circuit(m, h).statistics().frame),
    "OV block": _each(LABELS, lambda m, h: C.ov_circuit(m, h).block([1, 2, 3], [0, 5]).frame),
    "ov_top": _each(LABELS, lambda m, h: C.ov_top(m, h, top_k=5).frame),
    "qk_top": _each(LABELS, lambda m, h: C.qk_top(m, h, top_k=1, over="rows").frame),
    "positions": _each(MIXING, lambda m, h: C.position_circuit(m, h).frame),
    "token positions": _each(MIXING, lambda m, h: C.token_positions(m, h, top_k=3).frame),
    "skip-trigrams": lambda v: C.skip_trigrams(v.model, top_k=5).frame,
    "bigrams": lambda v: C.bigrams(v.model, top_k=3).frame,
    "bugs": _each(MIXING, lambda m, h: C.factoring_bugs(m, h, top_k=3).frame),
    "reads and writes": lambda v: C.reads_and_writes(v.model, [v("L0N3"), v("L1N5")], top_k=3).frame,
}  # fmt: skip
# What needs runs of the model.
RUNS: dict[str, Callable[[Version], pd.DataFrame]] = {
    "score_heads": lambda v: D.score_heads(v.model, tokens=TOKENS).frame,
    "chains": lambda v: D.score_heads(v.model, [v("L0H1 > L1H2")], draws=2).frame,
    "offsets": lambda v: D.offsets(v.model, draws=2, up_to=3).frame.drop(columns="at"),
    "match": lambda v: D.match(v.model, TOKENS, "previous_token").frame,
    "induction": _induction,
    "ablate": lambda v: D.ablate(v.model, TOKENS, [v(label) for label in LABELS]).frame,
    "mean ablation": lambda v: D.ablate(v.model, TOKENS, exact=3, replace="mean").frame,
    "in context": lambda v: D.in_context_learning(v.model, TOKENS).frame,
    "corpus": lambda v: D.over_corpus(v.model, TOKENS.tolist(), heads=[v("L0H1"), v("L1N2")]).frame,
    "effects": lambda v: mia.causal.effects(v.model, _task(v.model)).frame,
    "discover": lambda v: mia.causal.discover(v.model, _task(v.model)).frame,
    "prompt circuits": lambda v: mia.causal.prompt_circuits(v.model, _task(v.model)).frame,
    "replacement": lambda v: P.replacement_scores(_frozen(v), target=3, against=7, patch=None).frame,
    "intervene": lambda v: mia.causal.intervene(
        v.model, TOKENS[0], mia.causal.Edit([v("L0H1"), v("L1N2")], scale=2)
    ).frame,
    "loadings": lambda v: mia.causal.head_loadings(
        v.model, TOKENS[0], v("L1H1"), 5, 2, against="others"
    ).frame,
    "logit attribution": lambda v: P.logit_attribution(_frozen(v), target=3, against=7).frame,
    "orders": lambda v: P.orders(_frozen(v)).frame,
    "term importance": lambda v: P.term_importance(v.model, TOKENS, progress=False).frame,
    "score": lambda v: P.expand_score(_frozen(v), v("L1H1"), 5, 2).frame,
    "graph": lambda v: P.attribution_graph(_frozen(v), target=3, against=7).nodes,
    "virtual head": lambda v: P.virtual_head(
        _frozen(v), v("L0H0"), v("L1H1"), target=3, against=7
    ).frame,
    "circuits": lambda v: P.top_circuits(_frozen(v), target=3, against=7, top_k=5, progress=False).frame,
    "paths": lambda v: P.top_paths(_frozen(v), target=3, against=7, top_k=5, progress=False).frame,
}  # fmt: skip
SCORES = WEIGHTS | RUNS
# Scores that are ratios, whatever the units of the stream and of logits, and their columns that are not.
RATIOS = {
    "copying": ["eigenvalue", "size"], "weights": ["copying_size"], "pairs": ["trace"],
    "virtual heads": ["norm"], "composition, best": [],
    "on tokens Q": [], "on tokens K": [], **{f"composition {kind}": [] for kind in "QKV"},
}  # fmt: skip
SIZES = RATIOS | {name: [] for name in RUNS} | {"corpus": ["written"]}


# Changes of the weights after which the model computes the same. Each is given a generator, and gives the
# new name of every head that has one.


def _banks(model):
    return [(bank, bank.kind == "attention") for bank in model.banks]


def _writes(model):
    """All that writes to the stream, last axis first."""
    of_heads = [
        W for bank, a in _banks(model) for W in ((bank.W_O, bank.b_O) if a else (bank.W_out, bank.b_out))
    ]
    return [model.W_E, model.W_pos, *of_heads]


def other_order(model, draw) -> dict[str, str]:
    names = {}
    for bank, _ in _banks(model):
        order = torch.randperm(bank.n_heads, generator=draw)
        for name, W in bank.named_parameters():
            if name not in ("b_O", "b_out"):
                axis = 1 if name == "W_in" else 0
                W.copy_(W.index_select(axis, order).clone())
        names |= {bank.label(int(old)): bank.label(new) for new, old in enumerate(order)}
    return names


def other_basis_of_the_stream(model, draw) -> None:
    R = torch.linalg.qr(torch.randn(D_MODEL, D_MODEL, generator=draw, dtype=torch.float64)).Q
    for W in _writes(model):
        W.copy_(W @ R)
    model.W_U.copy_(R.T @ model.W_U)
    for bank, attention in _banks(model):
        for W in (bank.W_Q, bank.W_K, bank.W_V) if attention else (bank.W_in,):
            W.copy_(R.T @ W)


def other_bases_of_heads(model, draw) -> None:
    for bank in (bank for bank, attention in _banks(model) if attention):
        for h in range(HEADS):
            G, H = (torch.randn(D_HEAD, D_HEAD, generator=draw, dtype=torch.float64) for _ in range(2))
            bank.W_V[h], bank.b_V[h] = bank.W_V[h] @ G, bank.b_V[h] @ G
            bank.W_O[h] = torch.linalg.inv(G) @ bank.W_O[h]
            bank.W_Q[h], bank.b_Q[h] = bank.W_Q[h] @ H, bank.b_Q[h] @ H
            H = torch.linalg.inv(H).T
            bank.W_K[h], bank.b_K[h] = bank.W_K[h] @ H, bank.b_K[h] @ H


def other_key_biases(model, draw) -> None:
    for bank in (bank for bank, attention in _banks(model) if attention):
        bank.b_K.copy_(torch.randn(bank.b_K.shape, generator=draw, dtype=torch.float64))


def a_vector_in_all_of_W_U(model, draw) -> None:
    model.W_U.add_(10 * torch.randn(D_MODEL, 1, generator=draw, dtype=torch.float64))
    model.b_U.add_(3)


def a_constant_in_all_that_is_written(model, draw) -> None:
    for W in _writes(model):
        W.add_(5 * torch.randn(*W.shape[:-1], 1, generator=draw, dtype=torch.float64))
    model.W_E.add_(10)  # and one for all tokens


def other_units_of_the_stream(model, draw) -> None:
    for W in _writes(model):
        W.mul_(7)


def other_units_of_logits(model, draw) -> None:
    """These logits are others: for what is read from weights."""
    model.W_U.mul_(7)
    for bank, attention in _banks(model):
        (bank.W_O if attention else bank.W_out).mul_(0.2)


ALWAYS = (
    other_order,
    other_bases_of_heads,
    other_key_biases,
    a_vector_in_all_of_W_U,
    other_units_of_the_stream,
)
SYMMETRIES = {
    "RMS": (*ALWAYS, other_basis_of_the_stream),
    "LN": (*ALWAYS, a_constant_in_all_that_is_written),
}  # fmt: skip


@torch.no_grad()
def version(kind: str, seed: int, changes=()) -> Version:
    # The norm's epsilon is not in units of the stream: next to none of it.
    bridge = tiny_bridge(
        seed=seed, normalization_type=kind, eps=1e-14, d_model=D_MODEL, d_head=D_HEAD, n_heads=HEADS,
        d_mlp=NEURONS, n_ctx=10,
    )  # fmt: skip
    model, names = mia.convert(bridge), {}
    for i, change in enumerate(changes):
        draw = torch.Generator().manual_seed(1000 * seed + i)
        names |= change(model, draw) or {}
    return Version(model, names)


def table(v: Version, name: str, scores=SCORES) -> pd.DataFrame:
    """A score's table under the names of the original model."""
    frame = scores[name](v)
    frame = frame.drop(columns=["index"], errors="ignore").reset_index(drop=True)
    for column in frame:
        if not pd.api.types.is_numeric_dtype(frame[column]):
            frame[column] = [
                re.sub(r"L\d[HN]\d+", lambda m: v.original(m[0]), str(x)) for x in frame[column]
            ]
    texts = [column for column in frame if not pd.api.types.is_numeric_dtype(frame[column])]
    return frame.sort_values(texts, kind="stable").reset_index(drop=True) if texts else frame


@cache
def plain(kind: str, seed: int) -> dict[str, pd.DataFrame]:
    v = version(kind, seed)
    return {name: table(v, name) for name in SCORES}


def unchanged(kind, seed, changes, names) -> None:
    """To float64 rounding; eigenvalues of random products and quotients by small losses lose some of it."""
    before, v = plain(kind, seed), version(kind, seed, changes)
    wrong = []
    for name, sizes in names.items():
        one, other = (frame.drop(columns=sizes) for frame in (before[name], table(v, name)))
        try:
            pd.testing.assert_frame_equal(one, other, rtol=1e-6, atol=1e-7, check_dtype=False)
        except AssertionError as error:
            wrong.append(f"{name}: {str(error).splitlines()[0]}: {one} {other}")
    assert not wrong, "\n".join(wrong)


def looked_at(changes) -> dict[str, list[str]]:
    """Which scores these changes leave alone, and their columns that they do not."""
    names = dict(SIZES) if other_units_of_the_stream in changes else {name: [] for name in SCORES}
    if other_key_biases in changes:
        del names["score"]  # the terms of one score add up to it, the key's bias included
    return names


@pytest.mark.parametrize("kind", SYMMETRIES)
@settings(max_examples=3, deadline=None, phases=[Phase.generate])  # the message says what changed
@given(data=st.data())
def test_how_weights_are_written_changes_no_score(kind, data):
    changes = data.draw(st.lists(st.sampled_from(SYMMETRIES[kind]), min_size=1, unique=True))
    unchanged(kind, data.draw(st.integers(0, 2)), changes, looked_at(changes))


@pytest.mark.parametrize("kind", SYMMETRIES)
def test_all_of_them_at_once(kind):
    unchanged(kind, 0, SYMMETRIES[kind], looked_at(SYMMETRIES[kind]))


def test_ratios_have_no_units():
    unchanged("RMS", 0, [other_units_of_logits], RATIOS)


# What only looks up or draws, what is about a set or path of heads or a dictionary that is given to it, and
# what compares two models (tests/causal/test_diff.py writes one of them in another basis).
NO_SCORES = {
    "assert_circuit", "check_circuit", "diff", "faithfulness", "freeze", "minimality", "overlap",
    "path_patch", "random_repeats", "reconstruction", "resolve_head", "tasks", "virtual_head",
}  # fmt: skip


def test_every_analysis_is_here():
    """Whatever the rooms offer is looked at above, or is no score."""
    own = Path(__file__).read_text()
    offered = {name for room in (C, D, P, mia.causal) for name in room.__all__ if name.islower()}
    assert not {name for name in offered - NO_SCORES if f".{name}(" not in own}
