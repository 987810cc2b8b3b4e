"""The arithmetic behind graphs and searches, on made-up numbers: influence, pruning, a full queue."""

import numpy as np
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.frozen.goals import resolve_goal
from mechinterp_attn.paths import best_first
from mechinterp_attn.paths.flow import Flow, influence_of, most_influential, prune_edges, share_of
from tests.conftest import tiny_bridge

N, POS = 6, 3  # nodes, tokens


@pytest.fixture(scope="module")
def flow():
    """Every node reads all earlier ones and the tokens, the target (the last row) reads all."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(N + 1, N + POS, generator=generator, dtype=torch.float64)
    weights[:, :N] = weights[:, :N].tril(-1)
    bias, pruned = torch.randn(2, N + 1, generator=generator, dtype=torch.float64)
    return Flow(weights, bias, pruned, 0.0)


def shares(flow):
    """What of each row's absolute input comes from each source, by NumPy."""
    size = np.abs(flow.weights.numpy())
    whole = size.sum(1) + np.abs(flow.bias.numpy()) + np.abs(flow.pruned.numpy())
    return size / whole[:, None]


def test_influence_is_the_sum_over_all_paths(flow):
    """Shares multiplied along every path to the target, all at once: a geometric series of matrices."""
    share = shares(flow)
    between = share[:N, :N]
    to_nodes = share[N, :N] @ np.linalg.inv(np.eye(N) - between)
    to_tokens = share[N, N:] + to_nodes @ share[:N, N:]
    expected = np.concatenate([to_nodes, to_tokens])
    for size in (1, 1e-6, 1e6):  # shares have no unit
        sized = Flow(size * flow.weights, size * flow.bias, size * flow.pruned, 0.0)
        assert influence_of(sized).numpy() == pytest.approx(expected, abs=1e-14)  # float64, 64 paths


@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
def test_the_fewest_that_hold_a_share(share):
    values = torch.tensor([0.05, 0.4, 0.1, 0.3, 0.15], dtype=torch.float64)
    n = next(n for n in range(1, 6) if n == 5 or (share < 1 and sum(sorted(values)[-n:]) >= share))
    largest = sorted(range(5), key=lambda i: -values[i])
    assert most_influential(values, share).tolist() == sorted(largest[:n])
    assert most_influential(values, share, 2).tolist() == sorted(largest[: min(n, 2)])
    assert share_of(values, most_influential(values, share)) >= share - 1e-12
    assert share_of(values, torch.tensor([0, 2])) == pytest.approx(0.15)
    assert share_of(values * 0, torch.tensor([0])) == 1.0


def test_the_least_influential_edges_go_first(flow):
    influence = influence_of(flow)
    through = np.concatenate([influence[:N].numpy(), [1.0]])[:, None] * shares(flow)
    pruned = prune_edges(flow, influence, 0.7)
    kept = pruned != 0
    assert torch.equal(pruned[kept], flow.weights[kept])
    assert through[kept].min() > through[~kept.numpy()].max()
    held = through[kept].sum() / through.sum()
    assert held >= 0.7 > held - through[kept].min() / through.sum()


def test_a_full_queue_keeps_the_strongest(monkeypatch):
    """What is left out is weaker than all that waits, and the bound on it is counted."""
    model = mia.convert(tiny_bridge(n_layers=3, d_mlp=4), check=False)
    frozen = mia.paths.freeze(model, torch.tensor([1, 5, 2]))
    search = best_first.Search(frozen, resolve_goal(frozen, target=3, against=5, position=-1), 5, "summed")
    for _ in range(3):
        search.step(2)

    def waiting():
        groups = [group for _, _, group in search.queue]
        every = [(float(g.size[i]), float(g.bound[i])) for g in groups for i in range(g.next, len(g.flat))]
        return sorted(every, reverse=True)

    before, least = waiting(), search.left_out()
    n = int(len(before) / 2.5)
    monkeypatch.setattr(best_first, "QUEUE", n)
    search._shorten()
    after = waiting()
    assert after == before[:n]
    assert search._waiting == n
    first = search.queue[0][2]
    assert float(first.size[first.next]) == before[0][0]  # and the strongest is opened next
    assert search.left_out() >= max(bound for _, bound in before)
    assert search.left_out() == pytest.approx(least)  # the largest bound waits still, or is counted
    monkeypatch.setattr(best_first, "QUEUE", n // 2 + 1)
    search._shorten()
    assert len(waiting()) == n  # it may grow to twice its size


def test_what_a_head_writes_along_a_direction():
    """Head by head, from what it holds and its own weights."""
    model = mia.convert(tiny_bridge(n_layers=1), check=False)
    frozen = mia.paths.freeze(model, torch.tensor([1, 5, 2]))
    bank, head = frozen.banks[0], model["L0H1"]
    y = torch.randn(3, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    held = (bank.read(frozen.residuals[0]) + bank.z_bias)[:, 1]
    expected = ((held @ head.W_O) * y).sum(-1)
    torch.testing.assert_close(bank.along(frozen.residuals[0], y)[:, 1], expected, rtol=0, atol=1e-12)
