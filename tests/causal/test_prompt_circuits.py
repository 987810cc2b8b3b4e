"""Circuits of single prompts: the mean is discovery's, groups are the tasks, resamples agree."""

import itertools
from dataclasses import replace

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal.grouping import adjusted_rand, grouped, silhouette
from tests.conftest import random_tokens, tiny_bridge


@pytest.fixture(scope="module")
def trained():
    model = mia.load("gelu-2l")
    tasks = [mia.tasks.induction(model, n=32), mia.tasks.sva(model, n=32)]
    return model, tasks, mia.causal.prompt_circuits(model, tasks)


def test_a_mixture_of_two_tasks_comes_apart(trained):
    """Induction and agreement on a trained model; nothing is said about which prompt is which."""
    _, _, found = trained
    assert found.receipt.ok
    groups = found.clusters(2)
    assert groups.adjusted_rand >= 0.9
    assert groups.silhouette > groups.silhouette_null
    assert groups.receipt.ok
    assert set(groups.frame["task"]) == {"induction", "sva"}


def test_the_mean_is_what_discovery_finds(trained):
    model, tasks, found = trained
    for i, task in enumerate(tasks):
        mean = found.scores[32 * i : 32 * (i + 1)].mean(0)
        alone = mia.causal.discover(model, task).frame.set_index("head")["score"]
        expected = torch.tensor(alone[list(model.heads)].to_numpy())
        torch.testing.assert_close(mean, expected, atol=1e-5, rtol=1e-4)  # float32, other batches


def test_a_circuit_is_stable_across_resamples(trained):
    model, tasks, _ = trained
    found = mia.causal.prompt_circuits(model, tasks[0]).stability(10, draws=50)
    assert found.overlap >= 0.8
    assert found.overlap > 10 * found.random
    assert len(found.frame) >= 10
    assert found.frame["kept"].between(0, 1).all()


@pytest.mark.parametrize("method", ["secant", "gradient", "eap-ig"])
def test_each_prompt_is_scored_by_itself(method):
    """A prompt's scores are those of a task that has no other prompt, padding or not."""
    model = mia.convert(tiny_bridge())
    one, two = random_tokens(model, 3)[0], random_tokens(model, 3)[1, :6]
    other = random_tokens(model, 3, seed=1)
    task = mia.Task(
        [one.tolist(), two.tolist()],
        corrupt=[other[0].tolist(), other[1, :6].tolist()],
        answer=[1, 2],
        against=[3, 4],
    )
    found = mia.causal.prompt_circuits(model, task, method).scores
    for i in range(2):
        alone = mia.causal.discover(model, task.take([i]), method).frame.set_index("head")["score"]
        expected = torch.tensor(alone[list(model.heads)].to_numpy())
        torch.testing.assert_close(found[i], expected, atol=1e-10, rtol=1e-8)  # float64


def test_adjusted_rand_counts_pairs():
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        one, two = (torch.randint(3, (12,), generator=generator).tolist() for _ in range(2))
        together = [
            (a == b, c == d) for (a, c), (b, d) in itertools.combinations(zip(one, two, strict=True), 2)
        ]
        n = len(together)
        both, rows, columns = (
            sum(x) for x in ([a and b for a, b in together], *zip(*together, strict=True))
        )
        expected = (both - rows * columns / n) / ((rows + columns) / 2 - rows * columns / n)
        assert adjusted_rand(one, two) == pytest.approx(expected)
    assert adjusted_rand([0, 0, 1, 1], ["b", "b", "a", "a"]) == 1


def test_groups_of_known_directions_are_found():
    generator = torch.Generator().manual_seed(0)
    true = torch.tensor([0] * 30 + [1] * 20 + [2] * 10)
    x = torch.eye(8, dtype=torch.float64)[true] + 0.1 * torch.randn(60, 8, generator=generator).double()
    x = x * torch.rand(60, 1, generator=generator).double().add(0.1)  # lengths say nothing
    own, centres = grouped(x, 3, generator)
    assert torch.equal(own, true)  # the largest group is the first
    assert torch.equal(centres.argmax(1), torch.arange(3))
    near, far = silhouette(x, own), silhouette(x, own.roll(1))
    assert near > 0.9
    assert far < near


def test_noise_is_called_noise(trained):
    """Scores without groups: no nearer to one another than shuffled ones, and the check says so."""
    *_, found = trained
    noise = torch.randn(found.scores.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with pytest.warns(mia.FailedCheckWarning, match="farther apart than in shuffled scores"):
        groups = replace(found, scores=noise).clusters(2)
    assert groups.silhouette <= groups.silhouette_null
    assert abs(groups.adjusted_rand) < 0.2


def test_what_does_not_fit_is_named(trained):
    model, tasks, found = trained
    with pytest.raises(mia.MechInterpError, match="k=1, expected 2 to the number of prompts, 64"):
        found.clusters(1)
    with pytest.raises(
        mia.MechInterpError, match=r"size=0, expected 1 to 1,032.*draws=0, expected at least 1"
    ):
        found.stability(0, draws=0)
    with pytest.raises(mia.MechInterpError, match="there are no tasks"):
        mia.causal.prompt_circuits(model, [])
    with pytest.raises(mia.MechInterpError, match="method='exact' patches heads on all prompts"):
        mia.causal.prompt_circuits(model, tasks, "exact")
    with pytest.raises(mia.MechInterpError, match="patch='corrupt' only"):
        mia.causal.prompt_circuits(model, tasks, patch="zero")


def test_frozen_edges_of_a_task_are_its_graphs_added_up():
    """Attribution graphs of single prompts, one search each, against one backward pass over all of them:
    edges between heads and to the logits, the mean over prompts of the sums over positions.
    """
    model = mia.convert(tiny_bridge())
    tokens, answer, against = random_tokens(model, 2, 5), [1, 2], [4, 5]
    task = mia.Task(tokens, answer=answer, against=against)
    found = mia.causal.discover(model, task, "frozen", units="edges", patch="zero", top_k=10_000).frame
    total: dict[tuple[str, str], float] = {}
    for row, one, other in zip(tokens, answer, against, strict=True):
        whole = dict(pools=False, max_nodes=1000, edge_threshold=1.0, patch=None)
        graph = mia.paths.attribution_graph(model, row, target=one, against=other, **whole)
        label = dict(zip(graph.nodes["node"], graph.nodes["label"], strict=True))
        kind = dict(zip(graph.nodes["node"], graph.nodes["kind"], strict=True))
        for edge in graph.edges[graph.edges["kind"] == "value"].itertuples():
            src = label[edge.source]
            dst = "logits" if kind[edge.target] == "logit" else label[edge.target]
            total[src, dst] = total.get((src, dst), 0.0) + edge.weight / 2
    found = found[found["mode"].isin(("V", "")) & (found["src"] != "embed")]
    assert len(found) > 500
    for edge in found.itertuples():
        expected = total.get((edge.src, edge.dst), 0.0)
        assert edge.score == pytest.approx(expected, abs=1e-6), edge.edge  # scores are float32
