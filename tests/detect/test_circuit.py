"""Circuits written down, and checked against models that have them or do not."""

import pytest

import mechinterp_attn as mia
from mechinterp_attn.errors import MechInterpError
from tests.conftest import tiny_bridge
from tests.detect.constructed import FIRES_ON, PLANTED, SPEAKS_FOR, known_heads
from tests.detect.test_scores import Words

INDUCTION = """
name: induction
heads:
  L0H0: previous_token
  L1H0: {induction: 1.0}
edges: [L0H0 -K-> L1H0]
behaviour: {task: induction, carries: 1.0, needed: 1.0}
"""


@pytest.fixture(scope="module")
def model():
    return known_heads()


def test_a_circuit_that_is_there(model, tmp_path):
    result = mia.detect.assert_circuit(model, INDUCTION)
    assert result.ok
    assert list(result.frame["claim"]) == [
        "L0H0 previous_token", "L1H0 induction", "L0H0 -K-> L1H0 (deviations)",
        "carries the behaviour", "needed for the behaviour",
    ]  # fmt: skip
    assert result.frame["measured"].tolist()[3:] == pytest.approx([1, 1], abs=1e-6)
    file = tmp_path / "induction.yaml"
    file.write_text(INDUCTION)
    assert mia.detect.assert_circuit(model, file).frame.equals(result.frame)


def test_every_claim_that_does_not_hold_is_listed(model):
    wrong = {
        "heads": {"L0H1": "previous_token", "L1H0": "induction"},
        "edges": ["L0H1 -K-> L1H0"],
        "behaviour": "induction",
    }
    with pytest.raises(AssertionError) as error:
        mia.detect.assert_circuit(model, wrong)
    message = str(error.value)
    assert message.startswith("3 of 4 claims do not hold: L0H1 previous_token: 0.03")
    assert "expected at least 0.350" in message
    assert "L0H1 -K-> L1H0 (deviations)" in message
    assert "carries the behaviour" in message
    assert not mia.detect.check_circuit(model, wrong).ok


def test_a_neuron_carries_a_behaviour_in_prompts():
    model = known_heads(neurons=True)
    model.tokenizer = Words()
    model.tokenizer.bos_token_id = None
    letter = {i: chr(ord("a") + i - 1) for i in range(1, 8)}
    prompts = [
        {"prompt": f"{letter[i]}{letter[FIRES_ON]}", "answer": letter[SPEAKS_FOR]} for i in (1, 2, 4, 6)
    ]
    spec = {"heads": {PLANTED: "member"}, "behaviour": {"prompts": prompts, "carries": 0.9, "needed": 0.9}}
    result = mia.detect.assert_circuit(model, spec)
    assert len(result.frame) == 2
    with pytest.raises(AssertionError, match="1 of 1 claims do not hold: carries the behaviour"):
        mia.detect.assert_circuit(model, {"heads": {"L0H*": "member"}, "behaviour": {"prompts": prompts}})


def test_a_found_circuit_passes_its_own_test(model):
    found = mia.detect.induction(model)
    assert mia.detect.assert_circuit(model, found.spec()).ok


def test_an_edge_through_values(model):
    """L0H0 acts through keys: its virtual head into L1H0 costs nothing."""
    spec = {"heads": {"L0H0": "member", "L1H0": "member"}, "edges": ["L0H0 -V-> L1H0"]}
    with pytest.raises(AssertionError, match=r"L0H0 -V-> L1H0 \(nats\): 0.000, expected at least 0.100"):
        mia.detect.assert_circuit(model, spec)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("[1, 2]", r"the circuit is \[1, 2\]; expected a mapping"),
        ("heads: {a: [", "the circuit is not YAML"),
        (
            {"head": {}, "edges": ["L0H0 > L1H0"], "behaviour": "copying"},
            "unknown key 'head' .* no heads: .* edge 'L0H0 > L1H0': .* behaviour 'copying'",
        ),
        (
            {"heads": {"L7H0": "member", "L0H0": "clever"}, "edges": ["L0H0 -K-> L1H1"]},
            "no head L7H0; .* L0H0: role 'clever'; expected previous_token, .* L1H1 is not among the heads",
        ),
    ],
)
def test_a_spec_that_cannot_be_read_says_all_that_is_wrong(model, spec, message):
    with pytest.raises(MechInterpError, match=message):
        mia.detect.assert_circuit(model, spec)


def test_a_model_without_the_behaviour():
    model = mia.convert(tiny_bridge(noise=1.0))
    with pytest.raises(MechInterpError, match="the model does not have it"):
        mia.detect.assert_circuit(model, {"heads": {"L0H0": "member"}, "behaviour": "induction"}, draws=2)
