"""Every receipt of the detectors can turn red: the counting is broken on purpose, and its check says so."""

from dataclasses import replace

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal import cuts
from mechinterp_attn.detect import corpus, losses
from mechinterp_attn.model.attention import AttentionBank
from mechinterp_attn.model.neurons import NeuronBank
from tests.conftest import tiny_bridge

TOKENS = torch.tensor([[1, 2, 3, 1, 2, 3, 5], [4, 4, 4, 1, 0, 12, 7]])
TEXTS = [[1, 2, 3, 1, 2, 3, 5], [4, 4, 1, 0, 12]]
CIRCUIT = {"heads": {"L0H1": "member", "L1H2": "member"}, "edges": ["L0H1 -Q-> L1H2"]}


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


def measured(model):
    return {
        "score_heads": lambda: mia.detect.score_heads(model, tokens=TOKENS),
        "offsets": lambda: mia.detect.offsets(model, tokens=TOKENS, up_to=3),
        "match": lambda: mia.detect.match(model, TOKENS, "current_token"),
        "in_context_learning": lambda: mia.detect.in_context_learning(model, TOKENS),
        "over_corpus": lambda: mia.detect.over_corpus(model, TEXTS, heads=["L0H1"]),
        "check_circuit": lambda: mia.detect.check_circuit(model, CIRCUIT),
    }


@pytest.mark.parametrize("name", ["score_heads", "offsets", "match", "in_context_learning", "over_corpus",
                                  "check_circuit"])  # fmt: skip
def test_what_is_right_passes(model, name):
    receipt = measured(model)[name]().receipt
    assert receipt.ok is True
    assert receipt.checks


@pytest.mark.parametrize("bank", [AttentionBank, NeuronBank])
@pytest.mark.parametrize("name", ["score_heads", "offsets", "match", "over_corpus"])
def test_attention_summed_wrong_is_noticed(model, monkeypatch, name, bank):
    right = bank.attention_on
    monkeypatch.setattr(bank, "attention_on", lambda *given, **named: 1.01 * right(*given, **named))
    with pytest.warns(mia.FailedCheckWarning):
        assert measured(model)[name]().receipt.ok is False


@pytest.mark.parametrize("row", [0, 1])
def test_losses_of_the_wrong_token_are_noticed(model, monkeypatch, row):
    right = losses.token_losses

    def shifted(*given, **named):
        found = right(*given, **named)
        found[row] = found[row].roll(1)
        return found

    monkeypatch.setattr(losses, "token_losses", shifted)
    with pytest.warns(mia.FailedCheckWarning, match="first and last sequence"):
        mia.detect.in_context_learning(model, TOKENS)


@pytest.mark.parametrize("change", [dict(tokens=torch.ones(1).double()), dict(loss=torch.ones(1).double())])
def test_a_corpus_counted_wrong_is_noticed(model, monkeypatch, change):
    right = corpus.count
    monkeypatch.setattr(corpus, "count", lambda *given: replace(right(*given), **change))
    with pytest.warns(mia.FailedCheckWarning):
        mia.detect.over_corpus(model, TEXTS)


def test_an_edge_cut_wrong_is_noticed(model, monkeypatch):
    right = cuts.through
    monkeypatch.setattr(cuts, "through", lambda *given: 1.01 * right(*given))
    with pytest.warns(mia.FailedCheckWarning, match="L0H1 -Q-> L1H2 on one sequence"):
        mia.detect.check_circuit(model, CIRCUIT)
