"""What a behaviour may lack, said by every analysis that needs it, as a user meets it."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal import discover, effects, faithfulness, minimality, overlap, path_patch

ANALYSES = {
    "effects": lambda m, t: effects(m, t, exact=1),
    "discover": discover,
    "edges": lambda m, t: discover(m, t, units="edges"),
    "faithfulness": lambda m, t: faithfulness(m, t, ["L1H0"], draws=1),
    "minimality": lambda m, t: minimality(m, t, ["L1H0"], draws=1),
    "path_patch": lambda m, t: path_patch(m, t, "L1H0 -> logits"),
    "overlap": lambda m, t: overlap(m, t, 1, resamples=1, draws=1),
    "induction": lambda m, t: mia.detect.induction(m, task=t, draws=1, neurons=0),
}
TEXTS = ["The man said", "A man said", "My man said"]
OTHERS = ["The girl said", "A girl said", "My girl said"]


@pytest.fixture(scope="module")
def model():
    return mia.load("attn-2l")


@pytest.fixture(params=ANALYSES)
def analysis(request):
    return ANALYSES[request.param]


def task(**changes):
    return mia.Task(**{"clean": TEXTS, "corrupt": OTHERS, "answer": " me", "against": " the"} | changes)


@pytest.mark.parametrize("given", ["The man said", None, 7])
def test_what_is_no_task(as_users_run_it, model, analysis, given):
    if given is None and analysis is ANALYSES["induction"]:
        pytest.skip("induction without a task")
    with pytest.raises(mia.MechInterpError, match=r"is no task; give mia.Task\(prompts, answer="):
        analysis(model, given)


def test_misaligned_prompts(model, analysis):
    """With the token at which they part."""
    longer = [OTHERS[0], "A girl said to", "My man"]
    with pytest.raises(mia.MechInterpError) as error:
        analysis(model, task(corrupt=longer))
    for said in (
        "prompts misaligned with their counterfactuals",
        "prompt 1 has 4 tokens and its counterfactual 5; they part at position 2",
        "prompt 2 has 5 tokens and its counterfactual 4; they part at position 4",
    ):
        assert said in str(error.value)


def test_answers_of_several_tokens(model, analysis):
    """With their pieces."""
    with pytest.raises(
        mia.MechInterpError, match=r"' extraordinarily' is \d tokens, not one: \[' ex', 't'"
    ):
        analysis(model, task(answer=" extraordinarily"))


def test_missing_counterfactuals(model, analysis):
    with pytest.raises(
        mia.MechInterpError, match=r"needs counterfactual prompts .* Task\(\.\.\., corrupt="
    ):
        analysis(model, task(corrupt=None))


def test_what_can_be_done_without_counterfactuals_is_offered(model):
    """And only where it can be done."""
    bare = task(corrupt=None)
    with pytest.raises(mia.MechInterpError, match=r"or patch='mean' .* method='gradient'$"):
        discover(model, bare)
    assert discover(model, bare, "gradient", patch="mean").frame["score"].notna().all()
    with pytest.raises(mia.MechInterpError, match=r"as many tokens$"):
        faithfulness(model, bare, ["L1H0"])


def test_a_constant_metric(model, analysis):
    with pytest.raises(mia.MechInterpError, match=r"is constant: it is 1 whatever the logits are"):
        analysis(model, task(metric=lambda logits: 0 * logits.sum((1, 2)) + 1))
    with pytest.raises(mia.MechInterpError, match="is constant: it is the same on every prompt"):
        analysis(model, task(corrupt=TEXTS))


def test_a_constant_metric_without_counterfactuals(model):
    flat = task(corrupt=None, metric=lambda logits: torch.ones(len(logits)))
    for call in (
        lambda: mia.detect.ablate(model, flat, ["L0H1"]),
        lambda: effects(model, flat, patch="mean"),
        lambda: discover(model, flat, "gradient", patch="mean"),
    ):
        with pytest.raises(mia.MechInterpError, match="whatever the logits are"):
            call()


def test_a_metric_that_is_a_step_has_effects_and_no_estimates(model):
    middle = (model(TEXTS)[0, -1, 5] + model(OTHERS)[0, -1, 5]) / 2

    def wins(logits):
        return (logits[:, -1, 5] > middle).float()

    found = effects(model, task(metric=wins), ["L0H1", "L1H0"])
    assert found.frame["estimate"].isna().all()
    assert found.frame["effect"].notna().all()
    with pytest.raises(mia.MechInterpError, match=r"has no gradient: .* or method='exact'"):
        discover(model, task(metric=wins))
    assert len(discover(model, task(metric=wins), "exact").frame) == 8


def test_a_behaviour_the_model_does_not_have(model, analysis):
    """Its clean score stands beside chance, and nobody has to ask."""
    result = analysis(model, task())
    warning = result.receipt.notes["warning"]
    assert "hardly has this behaviour: its answer wins on 0% of the prompts, chance is 50%" in warning
    clean = float(task().score(model).mean())
    assert f"mean clean score {clean:.3g}" in warning
    assert "hardly has this behaviour" in result._repr_html_()
