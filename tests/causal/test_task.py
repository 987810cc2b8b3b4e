"""Tasks: what they hold, what they measure, and what they refuse."""

import json

import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


@pytest.fixture(scope="module")
def gelu():
    return mia.load("gelu-2l")


def test_metrics_are_what_they_say(model):
    """Against plain formulas on the model's own logits, prompt by prompt, at positions of their own."""
    tokens = random_tokens(model, 4, 9)
    answer, against, position = [1, 2, 3, 4], [5, 6, 7, 8], [-1, 3, 8, -4]
    logits = model(tokens)
    at = torch.stack([logits[i, p] for i, p in enumerate(position)])
    rows = torch.arange(4)
    p = at.softmax(-1)
    right, wrong = at[rows, answer], at[rows, against]
    expected = {
        "logit": right,
        "logit_diff": right - wrong,
        "prob": p[rows, answer],
        "prob_diff": p[rows, answer] - p[rows, against],
        "loss": -p[rows, answer].log(),
        "kl": torch.zeros(4),
        "accuracy": (right > wrong).double(),
    }
    for metric, value in expected.items():
        task = mia.Task(tokens, answer=answer, against=against, position=position, metric=metric)
        torch.testing.assert_close(task.score(model), value.detach().double(), atol=1e-9, rtol=0)


def test_sets_of_answers(model):
    tokens = random_tokens(model, 2, 6)
    p = model(tokens)[:, -1].softmax(-1)
    task = mia.Task(tokens, answer=[[1, 2, 3], [4]], against=[[5], [6, 7]], metric="prob_diff")
    expected = torch.stack([p[0, [1, 2, 3]].sum() - p[0, 5], p[1, 4] - p[1, [6, 7]].sum()])
    torch.testing.assert_close(task.score(model), expected.detach(), atol=1e-9, rtol=0)


def test_without_against_a_logit_is_held_against_the_mean(model):
    """So that nothing which the softmax cannot see is part of it."""
    tokens = random_tokens(model, 2, 6)
    logits = model(tokens)[:, -1]
    task = mia.Task(tokens, answer=[1, 2])
    expected = logits[[0, 1], [1, 2]] - logits.mean(-1)
    torch.testing.assert_close(task.score(model), expected.detach(), atol=1e-9, rtol=0)


def test_prompts_of_unequal_lengths_are_padded_without_a_trace(model):
    """Each as if it ran alone; ids with a mask, padded on either side, are the same task."""
    rows = [random_tokens(model, 1, n, seed=n)[0].tolist() for n in (4, 9, 7)]
    task = mia.Task(rows, answer=[1, 2, 3])
    alone = torch.cat(
        [mia.Task([row], answer=[a]).score(model) for row, a in zip(rows, (1, 2, 3), strict=True)]
    )
    torch.testing.assert_close(task.score(model), alone, atol=1e-9, rtol=0)
    left = torch.tensor([[0] * (9 - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (9 - len(row)) + [1] * len(row) for row in rows])
    masked = mia.Task(left, attention_mask=mask, answer=[1, 2, 3])
    torch.testing.assert_close(masked.score(model), alone, atol=1e-9, rtol=0)
    small = task.score(model, max_bytes=2**16)  # one prompt at a time
    torch.testing.assert_close(small, alone, atol=1e-9, rtol=0)


def test_loss_without_answers_is_the_models_own(model):
    tokens = random_tokens(model, 3, 8)
    task = mia.Task(tokens, metric="loss")
    expected = model(tokens, return_type="loss", loss_per_token=True).mean(-1)
    torch.testing.assert_close(task.score(model), expected.detach(), atol=1e-9, rtol=0)


def test_own_metric(model):
    tokens = random_tokens(model, 3, 8)
    task = mia.Task(tokens, metric=lambda logits: logits[:, 2, 5])
    torch.testing.assert_close(task.score(model), model(tokens)[:, 2, 5].detach(), atol=1e-9, rtol=0)


def test_classifier_answers_by_name_or_number():
    """Six outputs that are no tokens."""
    model = mia.convert(tiny_bridge(d_vocab_out=6))
    tokens = random_tokens(model, 3, 8)
    p = model(tokens)[:, -1].softmax(-1).detach()
    names = ["a", "b", "c", "d", "e", "f"]
    by_name = mia.Task(tokens, answer=["b", "f", "a"], labels=names, metric="prob")
    by_number = mia.Task(tokens, labels=[1, 5, 0], metric="prob")
    for task in (by_name, by_number):
        torch.testing.assert_close(task.score(model), p[[0, 1, 2], [1, 5, 0]], atol=1e-9, rtol=0)
    with pytest.raises(mia.MechInterpError, match=r"6 outputs are not tokens.*labels="):
        mia.Task(tokens, answer=["b"] * 3).score(model)


def test_texts(gelu):
    task = mia.Task(
        ["Mr. Dorling was a", "She"], answer=[" man", " was"], against=" the", metric="logit_diff"
    )
    for i, (text, answer) in enumerate([("Mr. Dorling was a", " man"), ("She", " was")]):
        logits = gelu(text)[0, -1].detach()
        expected = logits[gelu.to_single_token(answer)] - logits[gelu.to_single_token(" the")]
        assert float(task.score(gelu)[i]) == pytest.approx(float(expected), abs=1e-4)  # float32


def test_split_is_a_partition_and_repeats(gelu):
    task = mia.tasks.induction(gelu, n=10)
    one, two = task.split(0.3, seed=1)
    assert (len(one), len(two)) == (3, 7)
    assert sorted(one.clean + two.clean) == sorted(task.clean)
    assert one.clean == task.split(0.3, seed=1)[0].clean
    assert one.clean != task.split(0.3, seed=2)[0].clean
    pairs = dict(zip(map(tuple, task.clean), task.answer, strict=True))
    assert [pairs[tuple(row)] for row in one.clean] == one.answer


def test_jsonl_and_frames(gelu, tmp_path):
    task = mia.tasks.sva(gelu, n=6)
    again = mia.Task.load(task.save(tmp_path / "sva.jsonl"))
    torch.testing.assert_close(again.score(gelu), task.score(gelu))
    assert (again.name, again.metric, again.corrupt) == ("sva", "logit_diff", task.corrupt)
    bare = tmp_path / "bare.jsonl"
    bare.write_text(json.dumps({"clean": "She", "answer": " was"}) + "\n")
    assert len(mia.Task.load(bare)) == 1
    frame = pd.DataFrame({"clean": ["She", "He"], "answer": [" was", " had"]})
    assert len(mia.Task.from_frame(frame, metric="prob")) == 2
    with pytest.raises(mia.MechInterpError, match=r"unknown column 'prompt'.*no prompts"):
        mia.Task.from_frame(frame.rename(columns={"clean": "prompt"}))
    (tmp_path / "broken.jsonl").write_text('{"clean": "She"}\n{"clean": ')
    with pytest.raises(mia.MechInterpError, match="line 2 is not JSON"):
        mia.Task.load(tmp_path / "broken.jsonl")
    with pytest.raises(mia.MechInterpError, match="a file cannot hold"):
        mia.Task("She", metric=lambda logits: logits[:, 0, 0]).save(tmp_path / "own.jsonl")


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_wrong_without_a_model_is_said_at_once():
    with pytest.raises(mia.MechInterpError) as error:
        mia.Task(["a", "b"], corrupt=["c"], answer=["d"], position=[1, 2, 3], metric="prob_diff")
    for reason in (
        "2 prompts and 1 counterfactuals",
        "1 in answer",
        "3 positions",
        "'prob_diff' needs against=",
    ):
        assert reason in str(error.value)
    with pytest.raises(mia.MechInterpError, match="metric='logits'; expected logit, logit_diff"):
        mia.Task(["a"], metric="logits")
    with pytest.raises(mia.MechInterpError, match="'logit_diff' needs answer="):
        mia.Task(["a"])
    with pytest.raises(mia.MechInterpError, match="clean is empty"):
        mia.Task([], answer=1)


def test_what_does_not_fit_the_model_is_said_at_once(gelu):
    """Misaligned prompts, answers of several tokens with their pieces, positions outside."""
    task = mia.Task(
        ["Mary went home", "The cat sat"],
        corrupt=["Mary went slowly home", "The dog sat"],
        answer=[" Frankenstein", " was"],
        against=" the",
        position=[-1, 40],
    )
    with pytest.raises(mia.MechInterpError) as error:
        task.score(gelu)
    text = str(error.value)
    assert "misaligned" in text
    assert "they part at position" in text
    assert "' Frankenstein' is" in text
    assert "tokens, not one: [" in text
    assert "position 40 of prompt 1" in text
    with pytest.raises(mia.MechInterpError, match="stand against themselves"):
        mia.Task("She", answer=" was", against=" was").score(gelu)
    with pytest.raises(mia.MechInterpError, match=r"gave \(1,\) for logits.*one number per prompt"):
        mia.Task(["She", "He"], metric=lambda logits: logits[:1, 0, 0]).score(gelu)


def test_generators_keep_what_fits(gelu):
    """Aligned, one-token answers, all different; a behaviour a model cannot be asked says why."""
    for make in (mia.tasks.induction, mia.tasks.sva, mia.tasks.greater_than, mia.tasks.brackets):
        task = make(gelu, n=8, seed=1)
        bound = task.bind(gelu)
        assert len(task) == 8
        assert bound.corrupt is not None
        assert torch.equal(bound.clean.real, bound.corrupt.real)
        assert bool((bound.clean.tokens != bound.corrupt.tokens).any(1).all())
        assert len({str(row) for row in task.clean}) == 8
        assert make(gelu, n=8, seed=1).clean == task.clean
    with pytest.raises(mia.MechInterpError, match=r"only 0 of 4 ioi prompts fit.*not one token"):
        mia.tasks.ioi(gelu, n=4)


def test_induction_differs_in_what_stands_before_the_answer(gelu):
    """The tokens to copy stay where they are; the answer follows the last token's first occurrence."""
    task = mia.tasks.induction(gelu, n=8)
    for clean, corrupt, answer, against in zip(
        task.clean, task.corrupt, task.answer, task.against, strict=True
    ):
        for row, right in ((clean, answer), (corrupt, against)):
            assert row[row.index(row[-1]) + 1] == right
        changed = [i for i, (a, b) in enumerate(zip(clean, corrupt, strict=True)) if a != b]
        assert len(changed) == 2
        assert sorted(clean) == sorted(corrupt)
