"""Metrics on made-up logits, against sums written out prompt by prompt in plain Python."""

import math

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal.metrics import divergence, measure, right, sequence_loss
from tests.conftest import random_tokens, tiny_bridge

GENERATOR = torch.Generator().manual_seed(0)
LOGITS = torch.randn(4, 7, generator=GENERATOR, dtype=torch.float64)
ANSWERS = [[1], [2, 5], [0, 3, 6], [4]]
AGAINST = [[0, 2], [3], [1], [5, 6, 0]]


def padded(sets):
    width = max(len(one) for one in sets)
    return torch.tensor([one + [-1] * (width - len(one)) for one in sets])


def by_hand(name, row, answer, against):
    """One prompt's metric; ``row`` is a list of logits."""
    p = [math.exp(x) / sum(map(math.exp, row)) for x in row]
    mean = lambda ids: sum(row[i] for i in ids) / len(ids)  # noqa: E731
    whole = lambda ids: sum(p[i] for i in ids)  # noqa: E731
    return {
        "logit": lambda: mean(answer),
        "logit_diff": lambda: mean(answer) - mean(against or range(len(row))),
        "prob": lambda: whole(answer),
        "prob_diff": lambda: whole(answer) - whole(against),
        "loss": lambda: -math.log(whole(answer)),
        "accuracy": lambda: float(
            max(row[i] for i in answer) > max(row[i] for i in against or set(range(len(row))) - set(answer))
        ),
    }[name]()


@pytest.mark.parametrize("against", [AGAINST, None])
@pytest.mark.parametrize("name", ["logit", "logit_diff", "prob", "prob_diff", "loss", "accuracy"])
def test_sets_of_tokens_of_unequal_size(name, against):
    if name == "prob_diff" and against is None:
        return  # refused: test_what_is_wrong_without_a_model_is_said_at_once
    logits = torch.cat([LOGITS, -LOGITS])  # some right, some wrong
    more = None if against is None else padded(against * 2)
    got = measure(name, logits, padded(ANSWERS * 2), more)
    rows = zip(logits.tolist(), ANSWERS * 2, (against or [None] * 4) * 2, strict=True)
    assert got.tolist() == pytest.approx([by_hand(name, *row) for row in rows], abs=1e-12)  # float64
    if name == "accuracy":
        assert got.unique().tolist() == [0, 1]


def test_a_tie_is_right_only_where_nothing_is_named():
    """An answer as good as the best of all is the best; as good as its rival, it does not beat it."""
    even = torch.zeros(1, 3)
    answer, rival = torch.tensor([[0]]), torch.tensor([[1]])
    assert right(even, answer, None).tolist() == [True]
    assert right(even, answer, rival).tolist() == [False]


def test_divergence_is_from_the_reference():
    other = LOGITS.roll(1, 1)
    expected = torch.nn.functional.kl_div(
        other.log_softmax(-1), LOGITS.log_softmax(-1), reduction="none", log_target=True
    ).sum(-1)
    assert divergence(other, LOGITS).tolist() == pytest.approx(expected.tolist(), abs=1e-14)
    assert not torch.allclose(divergence(LOGITS, other), divergence(other, LOGITS))


def test_the_loss_of_a_padded_prompt_is_that_of_its_tokens():
    """Tasks pad on the right: a prompt of n tokens has n - 1 predictions."""
    lengths = [5, 3, 2]
    logits = torch.randn(3, 5, 7, generator=GENERATOR, dtype=torch.float64)
    tokens = torch.randint(7, (3, 5), generator=GENERATOR)
    real = torch.arange(5) < torch.tensor(lengths)[:, None]
    logp = logits.log_softmax(-1).tolist()
    expected = [
        -sum(logp[i][at][tokens[i, at + 1]] for at in range(n - 1)) / (n - 1) for i, n in enumerate(lengths)
    ]
    assert sequence_loss(logits, tokens, real).tolist() == pytest.approx(expected, abs=1e-14)  # float64


def test_chance_is_a_draw_among_the_answers_and_what_they_stand_against():
    model = mia.convert(tiny_bridge(n_layers=1), check=False)
    tokens = random_tokens(model, 4, 5)
    named = mia.Task(tokens, answer=ANSWERS, against=AGAINST).bind(model)
    assert named.chance(13) == pytest.approx((1 / 3 + 2 / 3 + 3 / 4 + 1 / 4) / 4)
    assert mia.Task(tokens, answer=ANSWERS).bind(model).chance(13) == pytest.approx(
        (1 + 2 + 3 + 1) / 13 / 4
    )
