"""The induction circuit by a behaviour's metric: cuts, their null and the behaviour's worth, by hand."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.detect.null import DRAWS, random_removals_for, seen_basis
from tests.conftest import random_tokens, tiny_bridge
from tests.detect.constructed import known_heads

METRICS = ["logit_diff", "loss"]


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge(d_vocab=40))


def task_of(model, metric):
    """Prompts of unequal lengths."""
    clean, corrupt = (random_tokens(model, 5, 9, seed=seed).tolist() for seed in (0, 1))
    clean[1], corrupt[1] = clean[1][:6], corrupt[1][:6]
    return mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4, 5], against=[6, 7, 8, 9, 10], metric=metric)


def by_hand(model, task, rows, hooks=()):
    """The metric of prompts one by one, from the logits."""
    out = []
    for row, a, b in zip(rows, task.answer, task.against, strict=True):
        logits = model.run_with_hooks(torch.tensor([row]), fwd_hooks=list(hooks))[0, -1].detach()
        out.append(-logits.log_softmax(-1)[a] if task.metric == "loss" else logits[a] - logits[b])
    return torch.stack(out)


@pytest.mark.parametrize("metric", METRICS)
def test_cuts_worth_and_null_are_by_hand(model, metric):
    task = task_of(model, metric)
    worse = 1 if metric == "loss" else -1
    found = mia.detect.induction(model, task=task, draws=2, neurons=3)
    frame = found.frame.set_index("head")
    assert len(frame) == 8 + 3
    whole = by_hand(model, task, task.clean)
    neuron = next(head for head in frame.index if "N" in head)
    for label in ("L0H1", "L1H3", neuron):
        bank, index = model.heads.find(label)

        def cut(z, hook, index=index):
            z = z.clone()
            z[:, :, index] = 0
            return z

        lost = worse * (by_hand(model, task, task.clean, [(bank.hook("z"), cut)]) - whole)
        assert frame["effect"][label] == pytest.approx(float(lost.mean()), abs=1e-9)
    change = worse * (by_hand(model, task, task.corrupt) - whole)
    assert found.gain == pytest.approx(float(change.mean()), abs=1e-9)
    assert found.gain_z == pytest.approx(float(change.mean() / (change.std() / 5**0.5)), rel=1e-6)
    assert (frame["by_intervention"] == (frame["effect_z"] >= 5) & (found.gain_z >= 5)).all()
    assert found.task is task
    assert found.receipt.ok
    assert metric in found.receipt.notes["by intervention"]
    assert metric in str(found)
    assert metric in found.plot().layout.yaxis.title.text


@pytest.mark.parametrize("metric", METRICS)
def test_the_null_is_as_much_taken_out_in_random_directions(model, metric):
    task = task_of(model, metric)
    found = random_removals_for(model, task.bind(model), ["L0H1"], seed=7, max_bytes=2**30)
    generator = torch.Generator().manual_seed(7)
    seen = seen_basis(model, generator)
    n, changes = seen.shape[1], []
    for _ in range(DRAWS):
        turn = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))[0]
        turn = seen @ turn @ seen.T
        held = {}
        hooks = [
            ("blocks.0.attn.hook_z", lambda z, hook, held=held: held.__setitem__("z", z)),
            (
                "blocks.0.hook_resid_mid",
                lambda x, hook, turn=turn, held=held: x - held["z"][:, :, 1] @ model["L0H1"].W_O @ turn,
            ),
        ]
        change = (by_hand(model, task, task.clean, hooks) - by_hand(model, task, task.clean)).mean()
        changes.append(float(change) * (1 if metric == "loss" else -1))
    expected = torch.tensor(changes, dtype=torch.float64)
    assert found["mean"]["L0H1"] == pytest.approx(float(expected.mean()), abs=1e-9)
    assert found["std"]["L0H1"] == pytest.approx(float(expected.std()), rel=1e-6)


def test_the_planted_circuit_by_a_task():
    """The third view names the same heads; the circuit keeps the task."""
    model = known_heads(neurons=True)
    rows = torch.stack([torch.randperm(8, generator=torch.Generator().manual_seed(i)) for i in range(8)])
    clean = torch.cat([rows[:, :6], rows[:, :1]], 1)
    corrupt = torch.cat([rows[:, :6], rows[:, 6:7]], 1)
    task = mia.Task(clean, corrupt=corrupt, answer=rows[:, 1], against=rows[:, 3], name="repeats")
    found = mia.detect.induction(model, task=task, draws=4, neurons=3)
    assert found.heads("induction", views=3) == ["L1H0"]
    assert found.heads("previous_token", views=3) == ["L0H0"]
    assert found.circuit().task is task
    assert mia.plan(mia.detect.induction, model, task=task).bytes > 0


def test_the_circuit_of_a_bundled_model_is_an_object(tmp_path):
    """Found for a behaviour in gelu-2l, it runs alone on other prompts, draws itself, is checked, saved and
    compared."""
    model = mia.load("gelu-2l")
    task = mia.tasks.induction(model, n=8)
    circuit = mia.detect.induction(model, task=task, draws=2, neurons=2).circuit()
    assert ("L0H2", "L1H3", "K") in circuit.edges
    held_out = mia.tasks.induction(model, n=8, seed=9)
    curve = circuit.faithfulness(model, held_out, draws=1)
    assert curve.frame["faithfulness"][0] > curve.frame["random"][0]
    assert curve.receipt.notes["held out"]
    assert circuit.draw().data
    assert mia.detect.check_circuit(model, circuit.spec(), draws=2).ok
    back = mia.causal.Circuit.load(circuit.save(tmp_path / "circuit.json"), task=task)
    assert back.diff(circuit) == {"both": circuit.diff(back)["both"], "only_self": [], "only_other": []}
    found = mia.causal.discover(model, task, units="edges").circuit(10)
    assert "L0H2 -K-> L1H3" in found.diff(circuit)["both"]


def test_refusals(model):
    task = task_of(model, "logit_diff")
    alone = mia.Task(task.clean, answer=1, against=2)
    with pytest.raises(mia.MechInterpError, match="needs counterfactual prompts and this task has none"):
        mia.detect.induction(model, task=alone, draws=2)
    with pytest.raises(mia.MechInterpError, match="a task of 1 prompt has no standard error"):
        mia.detect.induction(model, task=task.take([0]), draws=2)
