"""Path analyses of a behaviour's metric: against the same metric written out, in float64."""

import re

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge

ANSWER, AGAINST = [3, 7, 1], [5, 2, 0]


@pytest.fixture(scope="module", params=["gelu", "gated", "cap"])
def model(request):
    more = {
        "gelu": {},
        "gated": dict(act_fn="silu", gated_mlp=True, normalization_type="RMS"),
        "cap": dict(output_logits_soft_cap=3.0),
    }
    return mia.convert(tiny_bridge(**more[request.param]))


def task_of(model, metric="logit_diff", **options):
    tokens = random_tokens(model, 3, 9).tolist()
    return mia.Task([tokens[0], tokens[1][:6], tokens[2]], answer=ANSWER, against=AGAINST, metric=metric,
                    **options)  # fmt: skip


def by_hand(metric, logits, row):
    """The metric of one prompt from the logits at its last position."""
    logp = logits.log_softmax(-1)
    a, b = ANSWER[row], AGAINST[row]
    return {
        "logit": logits[a],
        "logit_diff": logits[a] - logits[b],
        "loss": -logp[a],
        "prob": logp[a].exp(),
    }[metric]


@pytest.mark.parametrize("metric", ["logit_diff", "loss", "prob"])
def test_orders_measure_the_metric(model, metric):
    """Of every order and those below it, by hand from the logits; the last is the whole model's."""
    task = task_of(model, metric)
    for row in range(3):
        frozen = mia.paths.freeze(model, torch.tensor(task.clean[row]))
        result = mia.paths.orders(frozen, task=task)
        expected = [float(by_hand(metric, part[-1], row)) for part in result.logits.cumsum(0)]
        assert result.frame["metric"].tolist() == pytest.approx(expected, abs=1e-9)
        assert expected[-1] == pytest.approx(float(task.score(model)[row]), abs=1e-9)
        assert result.receipt.notes["metric"] == metric


def test_attribution_explains_the_metric(model):
    """A logit difference is a sum over heads, neurons and biases; a probability is, to first order."""
    frozen = mia.paths.freeze(model, torch.tensor(task_of(model).clean[1]))
    linear = mia.paths.logit_attribution(frozen, task=task_of(model))
    same = mia.paths.logit_attribution(frozen, target=ANSWER[1], against=AGAINST[1])
    assert linear.about == same.about
    torch.testing.assert_close(
        torch.tensor(linear.frame["value"]), torch.tensor(same.frame["value"]), atol=1e-12, rtol=1e-9
    )
    curved = mia.paths.logit_attribution(frozen, task=task_of(model, "prob"))
    logits = frozen.logits[-1].clone().requires_grad_()
    (weights,) = torch.autograd.grad(by_hand("prob", logits, 1), logits)
    assert curved.total == pytest.approx(float(weights @ frozen.logits[-1]), abs=1e-9)
    assert curved.about.startswith("prob, linearised: logit ")
    assert float(curved.frame["value"].sum()) == pytest.approx(curved.total, abs=1e-9)
    assert curved.receipt.ok


@pytest.mark.parametrize("analysis", ["top_paths", "top_circuits", "attribution_graph", "virtual_head"])
def test_paths_take_a_task(model, analysis):
    """What explains a target explains the task that means it, to the last digit."""
    task = task_of(model)
    frozen = mia.paths.freeze(model, torch.tensor(task.clean[0]))
    heads = ("L0H1", "L1N3") if analysis == "virtual_head" else ()
    options = {"top_k": 6} if analysis.startswith("top") else {}
    function = getattr(mia.paths, analysis)
    one = function(frozen, *heads, task=task, **options)
    two = function(frozen, *heads, target=ANSWER[0], against=AGAINST[0], **options)
    assert one.about == two.about
    column = {"attribution_graph": "weight", "virtual_head": "value"}.get(analysis, "contribution")
    torch.testing.assert_close(torch.tensor(one.frame[column]), torch.tensor(two.frame[column]))
    assert one.receipt.ok


def test_term_importance_of_a_metric(model):
    """Orders as the mean over prompts; single heads' exact changes by cutting their terms out."""
    task = task_of(model, "logit_diff")
    found = mia.paths.term_importance(model, task=task, heads=["L0H2", "L1N4"], progress=False)
    per_prompt = [
        mia.paths.orders(mia.paths.freeze(model, torch.tensor(p)), max_order=4, task=task).frame["metric"]
        for p in task.clean
    ]
    expected = sum(torch.tensor(values) for values in per_prompt) / 3
    torch.testing.assert_close(torch.tensor(found.frame["metric"]), expected, atol=1e-9, rtol=1e-9)
    assert found.n_tokens == 3
    if model.spec.logit_cap is None:  # the metric is linear: what terms add does not depend on the others
        heads = found.heads.dropna(subset=["alone"])
        assert len(heads)
        for column in ("alone", "given_others"):
            assert heads[column].tolist() == pytest.approx(heads["estimate"].tolist(), abs=1e-9)


def test_term_importance_of_the_loss_is_the_same_both_ways(model):
    """Without a task, the loss of all next tokens; as a task of one prompt, the very same numbers."""
    tokens = random_tokens(model, 1, 8)
    one = mia.paths.term_importance(model, tokens, progress=False)
    two = mia.paths.term_importance(model, task=mia.Task(tokens, metric="loss"), progress=False)
    torch.testing.assert_close(torch.tensor(one.frame["loss"]), torch.tensor(two.frame["metric"]))
    torch.testing.assert_close(torch.tensor(one.heads["estimate"]), torch.tensor(two.heads["estimate"]))


def test_every_prediction_counts_the_same(model):
    """Prompts of 3 and 9 tokens: the mean over 2 + 8 predictions, not over prompts or tokens."""
    texts = [random_tokens(model, 1, n, seed=n)[0] for n in (3, 9)]
    found = mia.paths.term_importance(model, texts, heads=0, progress=False)
    losses = torch.cat([-model(t[None])[0, :-1].log_softmax(-1)[range(len(t) - 1), t[1:]] for t in texts])
    assert len(losses) == found.n_tokens == 10
    assert found.frame["loss"].iloc[-1] == pytest.approx(float(losses.mean()), abs=1e-10)  # float64


def test_what_does_not_fit_is_said(model, as_users_run_it):
    task = task_of(model)
    frozen = mia.paths.freeze(model, torch.tensor(task.clean[0]))
    other = mia.paths.freeze(model, torch.tensor([1, 2, 3]))
    whole = mia.Task(task.clean, metric="loss")
    for call, said in (
        (lambda: mia.paths.orders(other, task=task), "not among the 3 prompts"),
        (lambda: mia.paths.top_paths(frozen, task=task, target=3), "an answer and a position of its own"),
        (lambda: mia.paths.logit_attribution(frozen, task=whole), "reads the logits of all positions"),
        (lambda: mia.paths.logit_attribution(frozen, task=task_of(model, "accuracy")), "no gradient"),
        (lambda: mia.paths.logit_attribution(frozen, task=task_of(model, "kl")), "gradient of 0"),
        (lambda: mia.paths.term_importance(model), "one of the two"),
        (lambda: mia.paths.term_importance(model, task.clean[0], task=task), "one of the two"),
    ):
        with pytest.raises(MechInterpError, match=re.escape(said)):
            call()


def test_figures_name_the_metric(model):
    tokens = random_tokens(model, 1, 5)
    task = mia.Task(tokens, answer=5, against=6)
    orders = mia.paths.orders(mia.paths.freeze(model, tokens), task=task)
    assert "logit_diff" in orders.plot().layout.yaxis.title.text
    importance = mia.paths.term_importance(model, task=task, progress=False)
    assert "logit_diff" in importance.plot().layout.xaxis.title.text
