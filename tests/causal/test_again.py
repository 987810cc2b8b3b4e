"""Circuits found again, and what each part of one is worth: sets, chances and runs written out here."""

import json
from itertools import product
from math import comb

import pytest
import torch
from typer.testing import CliRunner

import mechinterp_attn as mia
from mechinterp_attn.causal import words
from mechinterp_attn.cli import app
from tests.causal.test_faithfulness import ByHand
from tests.conftest import random_tokens, tiny_bridge


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge(d_mlp=6, act_fn="relu"))


@pytest.fixture(scope="module")
def task(model):
    clean, corrupt = random_tokens(model, 6, 7), random_tokens(model, 6, 7, seed=1)
    return mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4, 5, 6], against=[7, 8, 9, 10, 11, 12])


def test_minimality_beside_others_put_in_and_taken_out_again(model, task):
    hand, members = ByHand(model, task), ["L0H1", "L1H2", "L1N3"]
    found = mia.causal.minimality(model, task, members, draws=7, seed=3)
    whole = hand.share(hand.heads(members))
    drawn = torch.randperm(20, generator=torch.Generator().manual_seed(3))[: 7 + 3]
    others = [label for label in (list(model.heads)[i] for i in drawn) if label not in members][:7]
    null = [hand.share(hand.heads([*members, one])) - whole for one in others]
    assert found.null.tolist() == pytest.approx(null, abs=1e-9)
    rows = found.frame.set_index("head")
    for label in members:
        loss = whole - hand.share(hand.heads([one for one in members if one != label]))
        assert rows["loss"][label] == pytest.approx(loss, abs=1e-9)
        assert rows["p"][label] == pytest.approx((1 + sum(x >= loss - 1e-12 for x in null)) / 8)
    assert found.receipt.ok
    assert mia.causal.minimality(model, task, members, draws=0).frame["p"].isna().all()
    edges = mia.causal.discover(model, task, units="edges").circuit(3)
    worth = edges.minimality(model, draws=4)
    assert len(worth.null) == 4
    assert worth.receipt.notes["not held out"] == "6 of 6 prompts were used to find the ranking"


def chance(model, mine, theirs):
    """Of random circuits with as many heads of each kind, every overlap with its probability."""
    kinds = model.heads.frame.set_index("head")["kind"]
    by_kind = []
    for kind in kinds.unique():
        n = int((kinds == kind).sum())
        a, b = (sum(kinds[head] == kind for head in some) for some in (mine, theirs))
        by_kind.append([(k, comb(a, k) * comb(n - a, b - k) / comb(n, b)) for k in range(min(a, b) + 1)])
    out = {}
    for ways in product(*by_kind):
        shared, p = sum(k for k, _ in ways), 1.0
        for _, q in ways:
            p *= q
        out[shared] = out.get(shared, 0.0) + p
    return out


def test_halves_and_rephrasings(model, task):
    clean, corrupt = (random_tokens(model, 4, 9, seed=seed) for seed in (5, 6))
    other = mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4], against=[5, 6, 7, 8], name="other")
    found = mia.causal.overlap(model, task, 5, rephrasings=[other], resamples=2, seed=4)

    def ranked(prompts):
        return list(mia.causal.discover(model, prompts).frame["head"].head(5))

    pairs, held = [], []
    for k in range(2):
        one, two = task.split(seed=4 + k)
        pairs.append((ranked(one), ranked(two)))
        held.append([(pairs[-1][0], two), (pairs[-1][1], one)])
    pairs.append((ranked(task), ranked(other)))
    held.append([(pairs[-1][0], other)])
    assert list(found.circuit.heads) == pairs[-1][0]
    for row, (mine, theirs), on in zip(found.frame.itertuples(), pairs, held, strict=True):
        both = set(mine) & set(theirs)
        assert row.shared == len(both)
        assert row.jaccard == pytest.approx(len(both) / len({*mine, *theirs}))
        odds = chance(model, mine, theirs)
        assert row.chance == pytest.approx(sum(p * k / (10 - k) for k, p in odds.items()), abs=0.01)
        assert row.p == pytest.approx(sum(p for k, p in odds.items() if k >= len(both)), abs=0.02)
        alone, left = [], []
        for circuit, prompts in on:
            hand = ByHand(model, prompts)
            rest = [label for label in model.heads if label not in circuit]
            alone.append(hand.share(hand.heads(circuit)))
            left.append(hand.share(hand.heads(rest)))
        assert row.faithfulness == pytest.approx(sum(alone) / len(alone), abs=1e-9)
        assert row.removed == pytest.approx(sum(left) / len(left), abs=1e-9)
    assert found.frame["between"].tolist() == ["halves (seed 4)", "halves (seed 5)", "rephrasing 0 (other)"]
    circuits = [set(one) for one in (*pairs[0], *pairs[1], pairs[2][1])]
    share = found.members.set_index("head")["share"]
    for head in set.union(*circuits):
        assert share[head] == pytest.approx(sum(head in one for one in circuits) / 5)
    assert found.receipt.ok


def test_a_planted_circuit_is_found_every_time_and_edges_too():
    model = mia.load("attn-2l")
    task = mia.tasks.induction(model, n=8)
    found = mia.causal.overlap(model, task, 3, resamples=1, units="edges", draws=1)
    assert (found.frame["jaccard"] == 1).all()
    assert (found.frame["p"] < 0.01).all()
    assert (found.members["share"] == 1).all()
    assert "L0H1 -K-> L1H0" in set(found.members["edge"])


def test_wordings():
    """Each of its own template, and none beside them."""
    model = mia.load("gelu-2l")
    for wording, template in enumerate(words.SVA):
        start = template.split("{")[0]
        task = mia.tasks.sva(model, n=4, wording=wording)
        assert all(text.startswith(start) for text in task.clean)
        assert task.name == f"sva, wording {wording}"
    assert mia.tasks.WORDINGS["sva"] == len(words.SVA)
    with pytest.raises(mia.MechInterpError, match="wording=9; this behaviour has 0 to 4"):
        mia.tasks.sva(model, wording=9)


def test_refusals(model, task):
    for options, said in (
        (dict(resamples=0), "resamples=0 and no rephrasings"),
        (dict(draws=0), "size=3, draws=0; expected at least 1"),
        (dict(size=0), "size=0, draws=3"),
        (dict(size=99), "n=99; this table has 20 heads"),
    ):
        with pytest.raises(mia.MechInterpError, match=said):
            mia.causal.overlap(model, task, **({"size": 3} | options))
    with pytest.raises(mia.MechInterpError, match="a task of 1 prompt has no halves"):
        mia.causal.overlap(model, task.take([0]), 3)
    with pytest.raises(mia.MechInterpError, match="draws=-1"):
        mia.causal.minimality(model, task, ["L0H1"], draws=-1)


def test_the_commands():
    def run(*words):
        result = CliRunner().invoke(app, ["causal", "attn-2l", *words, "--json", "--quiet"])
        assert result.exit_code == 0, result.exception
        return json.loads(result.stdout)

    worth = run("minimality", "induction", "--size", "3", "--prompts", "4")
    model = mia.load("attn-2l")
    found_on, held_out = mia.tasks.induction(model, n=4).split()
    circuit = mia.causal.discover(model, found_on).circuit(3)
    own = circuit.minimality(model, held_out).frame
    assert [row["head"] for row in worth] == own["head"].tolist()
    assert [row["loss"] for row in worth] == pytest.approx(own["loss"].tolist(), abs=1e-6)
    again = run("overlap", "induction", "--size", "3", "--prompts", "4")
    assert [row["between"] for row in again] == [f"halves (seed {k})" for k in range(3)]
