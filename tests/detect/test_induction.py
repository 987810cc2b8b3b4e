"""The induction circuit by three views, and the loss along the context."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge
from tests.detect.constructed import known_heads


@pytest.fixture(scope="module")
def found():
    return mia.detect.induction(known_heads(neurons=True), neurons=3)


def test_the_planted_circuit_is_found_by_all_three_views(found):
    assert found.found
    assert found.receipt.ok
    assert found.receipt.notes["all views agree"]
    assert found.heads("induction", views=3) == ["L1H0"]
    assert found.heads("previous_token", views=3) == ["L0H0"]
    edge = found.edges.iloc[0]
    assert (edge["src"], edge["dst"]) == ("L0H0", "L1H0")
    assert edge["attention"] == pytest.approx(1)
    assert edge["attention_without"] < 1 / 8  # without what L0H0 brings it attends to all tokens alike
    assert found.gain > 2
    assert str(found).startswith("L0H0 -> L1H0 (behaviour, weights, intervention); repetition is worth")


def test_figures_show_the_heads(found):
    names = [text for trace in found.plot().data for text in trace.text]
    assert {"L0H0", "L1H0"} <= set(names)
    assert "L0H0" in found._repr_html_()


def test_a_random_model_has_no_induction_circuit():
    result = mia.detect.induction(mia.convert(tiny_bridge(noise=0.02)), draws=3, neurons=2)
    assert not result.found
    assert str(result).startswith("no induction circuit found")


def test_a_trained_model_with_mlps():
    """gelu-2l: the views agree on who brings the previous token and who matches it."""
    result = mia.detect.induction(mia.load("gelu-2l"), draws=3, neurons=4)
    assert result.found
    src, dst = result.edges.iloc[0][["src", "dst"]]
    assert {src, dst} <= set(result.frame.query("views >= 2")["head"])
    assert result.edges["attention"].min() > 0.8
    assert result.edges["attention_without"].max() < 0.2
    assert result.gain > 3
    assert (result.frame["kind"] == "mlp").sum() == 4


def test_losses_by_position():
    model = mia.convert(tiny_bridge())
    tokens = random_tokens(model, batch=6, pos=20)
    result = mia.detect.in_context_learning(model, tokens, early=3, late=15)
    losses = model(tokens, return_type="loss", loss_per_token=True).detach()
    assert result.losses.double().sub(losses).abs().max() < 1e-5
    assert result.score == pytest.approx(float(losses[:, 14].mean() - losses[:, 2].mean()), abs=1e-5)
    assert result.frame["loss"].tolist() == pytest.approx(losses.mean(0).tolist(), abs=1e-5)
    error = losses.std(0) / 6**0.5
    assert result.frame["error"].tolist() == pytest.approx(error.tolist(), abs=1e-5)
    assert len(result.plot().data) == 1


def test_repeats_are_learned_in_context():
    """On random tokens repeated, a model with an induction head loses nothing from the second pass on."""
    model = known_heads()
    probe = mia.detect.random_repeats(model, draws=8, seed=0)
    result = mia.detect.in_context_learning(model, probe.tokens, early=4, late=20)
    assert result.score < -2
    assert (result.losses[probe.repeated] < 0.01).all()


def test_unusable_positions_are_refused():
    model = mia.convert(tiny_bridge())
    with pytest.raises(MechInterpError, match="early=9 and late=4; expected 1 <= early < late <= 11"):
        mia.detect.in_context_learning(model, random_tokens(model), early=9, late=4)
    with pytest.raises(MechInterpError, match="at least 2 tokens"):
        mia.detect.in_context_learning(model, torch.tensor([1]))
