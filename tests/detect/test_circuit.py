"""Circuits written down, and checked against models that have them or do not."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge
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
        "L0H0 previous_token", "L1H0 induction", "L0H0 -K-> L1H0",
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
    assert message == (
        "3 of 4 claims do not hold:\n"
        "  L0H1 previous_token: 0.032, expected at least 0.350\n"
        "  L0H1 -K-> L1H0: 0.000, expected at least 0.250\n"
        "  carries the behaviour: -0.125, expected at least 0.450\n"
        "  (these hold: L1H0 induction)"
    )
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
    with pytest.raises(AssertionError, match=r"1 of 1 claims do not hold:\n  carries the behaviour"):
        mia.detect.assert_circuit(model, {"heads": {"L0H*": "member"}, "behaviour": {"prompts": prompts}})


def test_a_found_circuit_passes_its_own_test(model):
    found = mia.detect.induction(model)
    assert mia.detect.assert_circuit(model, found.spec()).ok


def test_edges_through_queries_keys_and_values(model):
    """L0H0 acts through keys, and through keys only."""
    spec = {"heads": {"L0H0": "member", "L1H0": "member"}, "behaviour": {"task": "induction", "needed": 0}}
    found = mia.detect.check_circuit(model, spec | {"edges": [f"L0H0 -{side}-> L1H0" for side in "QKV"]})
    edges = found.frame.set_index("claim")["measured"]
    assert edges[["L0H0 -Q-> L1H0", "L0H0 -V-> L1H0"]].abs().max() < 1e-6
    assert 0.5 < edges["L0H0 -K-> L1H0"] < 2
    assert list(found.frame["ok"]) == [False, True, False, True]
    stated = {"edges": [{"L0H0 -K-> L1H0": 0.5}]}
    assert mia.detect.assert_circuit(model, spec | stated).frame["at_least"][0] == pytest.approx(0.45)


def test_a_bundled_model_keeps_its_circuit():
    """A trained model's own circuit, written down from ``induction``, as the manual shows it."""
    model = mia.load("gelu-2l")
    found = mia.detect.induction(model, draws=4, neurons=0)
    spec = found.spec() | {"behaviour": {"task": "induction", "needed": 0.5}}
    result = mia.detect.assert_circuit(model, spec, draws=4)
    edges = result.frame[result.frame["claim"].str.contains("->")]
    assert len(edges) == len(found.edges) > 0
    other = next(head for head in model.heads if head.startswith("L0H") and head not in spec["heads"])
    dst = found.edges["dst"][0]
    wrong = {"heads": {other: "member", dst: "member"}, "edges": [f"{other} -K-> {dst}"]}
    with pytest.raises(AssertionError, match=f"{other} -K-> {dst}"):
        mia.detect.assert_circuit(model, wrong | {"behaviour": {"task": "induction", "needed": 0}}, draws=4)


LAUGHS = "a: &a [x, x]\nb: &b [*a, *a]\nheads: *b"
DEEP = "[" * 5000


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("[1, 2]", r"the circuit is \[1, 2\]; expected a mapping"),
        ("circuit.yaml", r"expected a mapping .* or the pathlib.Path of a YAML file"),
        ("heads: {a: [", "the circuit is not YAML"),
        ("heads: !!python/object/apply:os.system [exit]", "the circuit is not YAML: could not determine"),
        (LAUGHS, "aliases are not read"),
        (DEEP, "nested too deeply"),
        ("heads: {L0H0: member}\nheads: {L1H0: member}", "the key 'heads' stands twice"),
        ("heads: {L0H0: member, L0H0: induction}", "the key 'L0H0' stands twice"),
        (
            "heads: {L0H0: previous_tokn}",
            "heads.L0H0.previous_tokn='previous_tokn', expected 'previous_token'",
        ),
        ("heads: {L0H0: {induction: high}}", "heads.L0H0.induction='high', expected a valid number"),
        ("heads: {L0H0: {induction: true}}", "heads.L0H0.induction=True, expected a valid number"),
        ("heads: {L0H0: {induction: .nan}}", "heads.L0H0.induction=nan, expected a finite number"),
        ("heads: {L0H0: }", "heads.L0H0=None, expected an object"),
        ("heads: L0H0", "heads='L0H0', expected an object"),
        ("heads: {}", "heads={}, expected .* at least 1 item"),
        ("heads: {L0H0: member}\nedges: L0H0 -K-> L1H0", "edges='L0H0 -K-> L1H0', expected a valid array"),
        ("heads: {L0H0: member}\nedges: [{L0H0 -K-> L1H0: much}]", "edges.0.L0H0 -K-> L1H0='much'"),
        ("heads: {L0H0: member}\nbehavior: induction", "behavior, which is not a known field"),
        (
            "heads: {L0H0: member}\nbehaviour: {tasks: induction}",
            "behaviour.tasks, which is not a known field",
        ),
        ("heads: {L0H0: member}\nbehaviour: {carries: 0.5}", "behaviour has nothing to look at"),
        ("heads: {L0H0: member}\nbehaviour: {task: induction, texts: [a]}", "has task and texts; expected"),
        ("heads: {L0H0: member}\nbehaviour: {task: induction, needed: '1'}", "behaviour.needed='1'"),
        (
            "heads: {L0H0: member}\nbehaviour: {texts: a text}",
            "behaviour.texts='a text', expected a valid array",
        ),
        ("heads: {L0H0: member}\nbehaviour: {prompts: [{prompt: a}]}", "no behaviour.prompts.0.answer"),
        (
            {"heads": {"L0H0": "member"}, "edges": ["L0H0 > L1H0"]},
            "edge 'L0H0 > L1H0', expected 'L0H2 -K->",
        ),
        (
            {"head": {}, "edges": ["L0H0 > L1H0"], "behaviour": "copying"},
            "no heads; behaviour.task='copying', expected 'induction'; head, which is not a known field",
        ),
        (
            {"heads": {"L7H0": "member", "L0H0": "member"}, "edges": ["L0H0 -K-> L1H1"]},
            "no head L7H0; .* L1H1 is not among the heads",
        ),
    ],
)
def test_a_spec_that_cannot_be_read_says_all_that_is_wrong(model, spec, message):
    with pytest.raises(MechInterpError, match=message) as caught:
        mia.detect.assert_circuit(model, spec)
    assert len(str(caught.value)) < 1000


def test_a_file_that_is_not_there_is_said(model, tmp_path):
    for wrong, message in ((tmp_path / "none.yaml", "No such file"), (tmp_path, "not a regular file")):
        with pytest.raises(MechInterpError, match=message):
            mia.detect.assert_circuit(model, wrong)


def test_a_circuit_for_a_task():
    """Shares of the task's metric, by hand: everything but the circuit held to the counterfactual."""
    model = mia.convert(tiny_bridge())
    clean, corrupt = random_tokens(model, 6, 7), random_tokens(model, 6, 7, seed=1)
    answer = model(clean)[:, -1].argmax(-1).tolist()
    task = mia.Task(clean, corrupt=corrupt, answer=answer, metric="logit")
    _, other = model.run_with_cache(corrupt)

    def metric(replaced):
        def held(bank):
            def hook(z, hook):
                z = z.clone()
                own = [i for i, label in enumerate(bank.labels()) if label in replaced]
                z[:, :, own] = other[bank.hook("z")][:, :, own]
                return z

            return bank.hook("z"), hook

        logits = model.run_with_hooks(clean, fwd_hooks=[held(bank) for bank in model.banks])[:, -1]
        return float(logits[torch.arange(6), answer].mean())

    circuit = {"L0H1", "L1H0", *(f"L0N{i}" for i in range(24))}
    every = set(model.heads)
    none, whole = metric(every), metric(set())
    spec = {"heads": {"L0H1": "member", "L1H0": "member", "L0N*": "member"}, "edges": ["L0H1 -K-> L1H0"]}
    spec["behaviour"] = {"carries": -9.0, "needed": -9.0}
    assert whole > none  # the answers are what the whole model says
    found = mia.detect.check_circuit(model, spec, task=task)
    measured = found.frame.set_index("claim")["measured"]
    expected = (metric(every - circuit) - none) / (whole - none)
    assert measured["carries the behaviour"] == pytest.approx(expected, abs=1e-6)
    expected = (whole - metric(circuit)) / (whole - none)
    assert measured["needed for the behaviour"] == pytest.approx(expected, abs=1e-6)
    assert "L0H1 -K-> L1H0" in measured
    assert found.receipt.ok
    with pytest.raises(AssertionError, match="carries the behaviour"):
        mia.detect.assert_circuit(model, {**spec, "behaviour": {"carries": 9.0}}, task=task)
    with pytest.raises(MechInterpError, match="behaviour has task, and a task was given too"):
        mia.detect.check_circuit(model, {**spec, "behaviour": "induction"}, task=task)


def test_a_model_without_the_behaviour():
    model = mia.convert(tiny_bridge(noise=1.0))
    with pytest.raises(MechInterpError, match="the model does not have it"):
        mia.detect.assert_circuit(model, {"heads": {"L0H0": "member"}, "behaviour": "induction"}, draws=2)
