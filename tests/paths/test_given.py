"""Analyses of a frozen prompt take a model and a prompt as well, and say what they take."""

import pandas as pd
import pytest

import mechinterp_attn as mia
from mechinterp_attn.paths import (
    attribution_graph,
    expand_score,
    freeze,
    logit_attribution,
    orders,
    top_circuits,
    top_paths,
    virtual_head,
)

PROMPT = "It was the best of times, it was the"
CALLS = {
    orders: ((), {}),
    logit_attribution: ((), {"target": " b"}),
    top_paths: ((), {"top_k": 3}),
    top_circuits: ((), {"top_k": 3}),
    expand_score: (("L1H1", 5, 3), {}),
    virtual_head: (("L0H1", "L1H2"), {}),
    attribution_graph: ((), {"max_nodes": 20, "patch": None}),
}


@pytest.fixture(scope="module")
def model():
    return mia.load("attn-2l")


@pytest.mark.parametrize("analysis", CALLS, ids=lambda analysis: analysis.__name__)
def test_a_model_and_its_prompt_are_frozen_for_it(model, analysis):
    args, options = CALLS[analysis]
    found = analysis(model, PROMPT, *args, **options)
    same = analysis(freeze(model, PROMPT), *args, **options)
    pd.testing.assert_frame_equal(found.frame, same.frame)


@pytest.mark.parametrize("analysis", CALLS, ids=lambda analysis: analysis.__name__)
def test_what_is_neither_is_refused(model, analysis):
    name = analysis.__name__
    with pytest.raises(mia.MechInterpError, match=rf"give {name}\(model, prompt\), or once"):
        analysis(model)
    for wrong in ([1, 2, 3], PROMPT, None):
        with pytest.raises(
            mia.MechInterpError, match=rf"{name} takes a frozen prompt, got {type(wrong).__name__}"
        ):
            analysis(wrong)


def test_the_plan_is_the_frozen_prompts(model):
    assert mia.plan(orders, freeze(model, PROMPT)).bytes > 0


@pytest.mark.parametrize("label", ["L1H1", "L0H2 > L1H1"])
def test_a_head_draws_its_own_pattern(model, label):
    head = model.heads.select(label)[0]
    _, cache = model.run_with_cache(PROMPT)
    drawn = head.plot(PROMPT).data[0]
    assert drawn.z.shape == (len(drawn.y), len(drawn.x))
    assert drawn.z == pytest.approx(head.pattern(cache)[:, :-1].double().numpy(), abs=1e-6)  # float32
    with pytest.raises(mia.MechInterpError, match=r"model\['L1H1'\].plot\(prompt\)"):
        model.blocks[1].attn.head(1).plot(PROMPT)


def test_a_neuron_shows_its_bias_token():
    drawn = mia.load("gelu-2l")["L0N3"].plot(PROMPT).data[0]
    assert drawn.x[-1] == "bias token"
    assert drawn.z.sum(1) == pytest.approx(1, abs=1e-5)  # its own token and the bias token, in float32
