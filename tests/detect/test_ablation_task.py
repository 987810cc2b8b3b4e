"""Cutting heads out for a behaviour: by hand, and the same in all the ways to say it."""

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


def test_what_a_logit_loses(model):
    tokens = random_tokens(model, 3, 8)

    def without(z, hook):
        z = z.clone()
        z[:, :, 2] = 0
        return z

    whole = model(tokens)[:, 4, 5]
    cut = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.attn.hook_z", without)])[:, 4, 5]
    found = mia.detect.ablate(model, tokens, ["L0H2"], target=5, position=4)
    torch.testing.assert_close(found.effects[0], (whole - cut).detach().double(), atol=1e-6, rtol=1e-6)
    task = mia.Task(tokens, answer=5, position=4, metric="logit")
    for same in (
        mia.detect.ablate(model, task, ["L0H2"]),
        mia.detect.ablate(model, task=task, heads=["L0H2"]),
        mia.detect.ablate(model, tokens, "L0H2", task=task),
    ):
        assert torch.equal(same.effects, found.effects)
    both = mia.detect.ablate(model, task, ["L0H2", "L0N3"], together=True).frame
    assert both["head"].tolist() == ["L0H2 + L0N3"]
    assert mia.detect.ablate(model, task, "attention").frame["head"].nunique() == 8
    assert mia.detect.ablate(model, task, exact=3).frame["effect"].notna().sum() == 3


@pytest.mark.usefixtures("as_users_run_it")
def test_refusals(model):
    tokens = random_tokens(model, 3, 8)
    task = mia.Task(tokens, answer=5, metric="logit")
    with pytest.raises(mia.MechInterpError, match="keep_patterns= is about the losses of all tokens"):
        mia.detect.ablate(model, task, keep_patterns=True)
    with pytest.raises(mia.MechInterpError, match="give one task"):
        mia.detect.ablate(model, task=task, target=3)
    with pytest.raises(mia.MechInterpError, match="give target= too"):
        mia.detect.ablate(model, tokens, position=3)
    with pytest.raises(mia.MechInterpError, match="nothing to ablate heads on"):
        mia.detect.ablate(model)


def test_the_induction_circuit_runs_alone():
    model = mia.load("attn-2l")
    circuit = mia.detect.induction(model, draws=4).circuit(mia.tasks.induction(model, n=8))
    assert ("L0H1", "L1H0", "K") in circuit.edges
    assert circuit.faithfulness(model, draws=1).frame["faithfulness"][0] > 0.5
    with pytest.raises(mia.MechInterpError, match="no circuit to give"):
        mia.detect.induction(mia.convert(tiny_bridge()), draws=4).circuit()
