"""Circuits as objects: what they carry, what each part is worth, files, pictures."""

import plotly.graph_objects as go
import pytest

import mechinterp_attn as mia
from mechinterp_attn.causal import Circuit
from tests.causal.test_faithfulness import ByHand


@pytest.fixture(scope="module")
def model():
    return mia.load("attn-2l")


@pytest.fixture(scope="module")
def task(model):
    return mia.tasks.induction(model, n=8)


@pytest.fixture(scope="module")
def circuit(model, task):
    return mia.causal.discover(model, task, units="edges").circuit(6)


def test_what_a_circuit_carries_and_what_its_parts_are_worth(model, task, circuit):
    """Against the runs by hand of the tests of faithfulness."""
    hand = ByHand(model, task)
    held = mia.tasks.induction(model, n=8, seed=5)
    whole = hand.share(hand.edges(set(circuit.edges)))
    assert circuit.faithfulness(model).frame["faithfulness"].tolist() == [pytest.approx(whole, abs=1e-5)]
    other = circuit.faithfulness(model, held)
    assert other.receipt.notes["held out"]
    assert list(other.frame["size"]) == [6]
    parts = circuit.minimality(model)
    assert parts.faithfulness == pytest.approx(whole, abs=1e-5)
    rows = parts.frame.set_index("edge")
    for src, dst, mode in circuit.edges[:2]:
        name = f"{src} -{mode}-> {dst}" if mode else f"{src} -> {dst}"
        without = hand.share(hand.edges(set(circuit.edges) - {(src, dst, mode)}))
        assert rows["without"][name] == pytest.approx(without, abs=1e-5)  # float32
        assert rows["loss"][name] == pytest.approx(whole - without, abs=1e-5)
    heads = Circuit(circuit.heads, task=task).minimality(model).frame
    assert set(heads["head"]) == set(circuit.heads)


def test_a_circuit_comes_back_from_its_file(circuit, tmp_path, model):
    back = Circuit.load(circuit.save(tmp_path / "circuit.json"))
    assert (back.heads, back.edges, back.scores) == (circuit.heads, circuit.edges, circuit.scores)
    assert set(back.diff(circuit)["both"]) == set(circuit.diff(back)["both"])
    assert len(back) == 6
    assert back.diff(circuit)["only_self"] == back.diff(circuit)["only_other"] == []
    with pytest.raises(mia.MechInterpError, match="has no task"):
        back.faithfulness(model)


def test_a_circuits_spec_is_read_by_the_checker(model, circuit):
    spec = circuit.spec()
    assert set(spec["heads"]) == set(circuit.heads)
    claims = mia.detect.check_circuit(model, spec).frame
    assert len(claims) == len(spec.get("edges", []))


def test_pictures(circuit):
    drawing = circuit.draw()
    assert isinstance(drawing, go.Figure)
    texts = {text for trace in drawing.data for text in (trace.text or ())}
    assert set(circuit.heads) <= texts
    lines = [trace for trace in drawing.data if trace.mode == "lines"]
    assert len(lines) == 6
    heads = Circuit(("L0H1", "L1N3", "L1H0")).draw()
    assert {text for trace in heads.data for text in trace.text} == {"L0H1", "L1N3", "L1H0"}


def test_the_curve(model, task):
    ranking = mia.causal.discover(model, task)
    result = mia.causal.faithfulness(model, task, ranking, sizes=[1, 2, 4, 8])
    names = {trace.name for trace in result.plot().data}
    assert names == {"95 % over prompts", "circuit", "random", "reverse ranking"}
