"""The names that code outside calls, with the arguments as it writes them: they stay."""

import inspect

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge

TASK = ["clean", "corrupt", "answer", "against", "position", "metric", "labels", "attention_mask", "name"]


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


@pytest.fixture(scope="module")
def task(model):
    clean, corrupt = random_tokens(model, 6, 8), random_tokens(model, 6, 8, seed=1)
    return mia.Task(
        clean, corrupt=corrupt, answer=[1, 2, 3, 4, 5, 6], against=[7] * 6, position=-1,
        metric="logit_diff", labels=None, attention_mask=None, name="a name",
    )  # fmt: skip


def test_tasks(model, task, tmp_path):
    own = [name for name in inspect.signature(mia.Task).parameters if not name.startswith("_")]
    assert own == TASK
    score = task.score(model)
    assert isinstance(score, torch.Tensor)
    assert score.shape == (6,)
    one, two = task.split(share=0.5, seed=0)
    assert (len(task), len(one), len(two)) == (6, 3, 3)
    task.save(tmp_path / "task.jsonl")
    assert torch.equal(mia.Task.load(tmp_path / "task.jsonl").score(model), score)
    custom = mia.Task(task.clean, metric=lambda logits: logits[:, -1, 3])
    torch.testing.assert_close(custom.score(model), model(torch.tensor(task.clean))[:, -1, 3].detach())
    assert isinstance(mia.tasks.induction(model, n=4, seed=0), mia.Task)
    for name in ("ioi", "sva", "greater_than"):
        assert {"model", "n", "seed"} <= set(inspect.signature(getattr(mia.tasks, name)).parameters)


@pytest.mark.parametrize("patch", ["corrupt", "zero", "mean", "resample"])
def test_effects(model, task, patch):
    frame = mia.causal.effects(model, task, heads=None, patch=patch, exact=3).frame
    assert {"head", "layer", "index", "kind", "estimate", "effect"} <= set(frame)
    assert frame["effect"].notna().sum() == 3
    assert len(frame) == model.n_heads
    assert len(mia.causal.effects(model, task, heads=["L0H1"], patch=patch).frame) == 1


@pytest.mark.parametrize("method", ["gradient", "eap", "eap-ig", "relp", "frozen", "exact"])
def test_discover(model, task, method):
    found = mia.causal.discover(model, task, method=method, units="heads")
    assert {"head", "score"} <= set(found.frame)
    assert isinstance(found.circuit(3), mia.causal.Circuit)
    if method != "exact":
        edges = mia.causal.discover(model, task, method=method, units="edges")
        assert {"src", "dst", "mode", "score"} <= set(edges.frame)
        assert isinstance(edges.circuit(3), mia.causal.Circuit)


def test_faithfulness_and_paths(model, task):
    ranking = mia.causal.discover(model, task)
    found = mia.causal.faithfulness(model, task, ranking, sizes=None)
    assert {"share", "size", "faithfulness", "random"} <= set(found.frame)
    assert all(isinstance(value, float) for value in (found.cmd, found.cpr, found.cmd_random))
    assert len(mia.causal.path_patch(model, task, "L0H2 -K-> L1H3 -> logits").frame) == 1


def test_what_takes_a_task(model, task):
    prompts = torch.tensor(task.clean)
    mia.detect.ablate(model, prompts, heads=["L0H1"], task=task, target=None, position=None)
    mia.detect.ablate(model, prompts, heads=["L0H1"], task=None, target=3, position=-1)
    frozen = mia.paths.freeze(model, prompts[0])
    graph = mia.paths.attribution_graph(frozen, task=task)
    assert isinstance(graph.inside, float)
    assert isinstance(graph.faithfulness, float)


@pytest.mark.parametrize(
    "heads", ["L0H1", ["L0H1", "L1N3"], "attention", "mlp", "L1H*", "L0H1 > L1H2", "a head"]
)
def test_heads_are_named_in_every_way(model, task, heads):
    chosen = model["L0H1"] if heads == "a head" else heads
    assert len(mia.causal.effects(model, task, heads=chosen).frame) >= 1
    assert len(mia.detect.ablate(model, torch.tensor(task.clean), heads=chosen).frame)


def test_two_models(model, task):
    assert {"head", "z"} <= set(mia.diff(model, mia.convert(tiny_bridge(seed=1)), task).frame)
    read = torch.eye(model.spec.d_model)[:, :6]  # six features, each a direction of the stream
    dictionary = mia.Dictionary(W_enc=read, b_enc=torch.zeros(6), W_dec=read.T, b_dec=read.sum(1))
    attached = mia.attach(model, dictionary, layer=1, at="mlp")
    tokens = random_tokens(model, 2, 8)
    assert torch.equal(attached(tokens), model(tokens))
    assert attached["L1F5"].kind == "feature"
