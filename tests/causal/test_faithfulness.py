"""Circuits alone, against runs written out here: every reader of an edge with a stream of its own."""

import numpy as np
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal.alone import Parts, alone_of
from mechinterp_attn.causal.wires import Edges
from tests.conftest import random_tokens, tiny_bridge

FAMILIES = {
    "gelu": dict(),
    "gated, shared keys": dict(
        act_fn="silu", gated_mlp=True, normalization_type="RMS", n_key_value_heads=2
    ),
    "rotary, three layers": dict(positional_embedding_type="rotary", n_layers=3, n_heads=2, act_fn="relu"),
    "no norms": dict(normalization_type=None, act_fn="relu"),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return mia.convert(tiny_bridge(d_mlp=6, **FAMILIES[request.param]))


@pytest.fixture(scope="module")
def task(model):
    clean, corrupt = random_tokens(model, 4, 7), random_tokens(model, 4, 7, seed=1)
    return mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4], against=[5, 6, 7, 8])


class ByHand:
    """A forward pass in which every head reads what it is told to, with matrices alone."""

    def __init__(self, model, task):
        self.model, self.task = model, task
        self.clean, self.corrupt = torch.tensor(task.clean), torch.tensor(task.corrupt)
        _, self.clean_cache = model.run_with_cache(self.clean)
        _, self.cache = model.run_with_cache(self.corrupt)
        self.whole, self.nothing = (self.metric(model(t)[:, -1]) for t in (self.clean, self.corrupt))

    def metric(self, logits):
        rows = torch.arange(len(self.task))
        return (logits[rows, self.task.answer] - logits[rows, self.task.against]).detach().double()

    def written(self, bank, index, z):
        z = z[:, :, index]
        return (z[..., None] if z.ndim == 2 else z) @ bank.head(index).W_O

    def edges(self, keep):
        """The metric with these edges alone, the rest from the counterfactual: one head at a time, its
        own stream through its own norm, by whole runs of the model with nothing but it replaced."""
        model, first = self.model, "blocks.0.hook_resid_pre"
        change = {"embed": self.clean_cache[first] - self.cache[first]}
        for bank in model.banks:
            norm, _ = model.norm_of(bank)
            x = self.cache[model.stream_of(bank)]
            for index, label in enumerate(bank.labels()):
                hooks = []
                for mode, W in bank.reads.items():
                    moved = sum(
                        (v for s, v in change.items() if (s, label, mode) in keep), torch.zeros_like(x)
                    )
                    delta = (norm(x + moved) - norm(x)) @ W[index]
                    hooks.append((bank.hook(mode.lower()), adding(delta, index, bank)))
                seen = {}
                hooks.append((bank.hook("z"), lambda z, hook, seen=seen: seen.__setitem__("z", z)))
                model.run_with_hooks(self.corrupt, fwd_hooks=hooks)
                change[label] = self.written(bank, index, seen["z"] - self.cache[bank.hook("z")])
        last = self.cache[f"blocks.{model.spec.n_layers - 1}.hook_resid_post"]
        end = last + sum(
            (v for s, v in change.items() if (s, "logits", "") in keep), torch.zeros_like(last)
        )
        return self.metric(model(end, start_at_layer=model.spec.n_layers)[:, -1])

    def heads(self, keep):
        """The metric with these heads alone, by one run with all others replaced one after the other."""
        hooks = []
        for bank in self.model.banks:
            for index, label in enumerate(bank.labels()):
                if label not in keep:
                    hooks.append((bank.hook("z"), setting(self.cache[bank.hook("z")], index)))
        return self.metric(self.model.run_with_hooks(self.clean, fwd_hooks=hooks)[:, -1])

    def share(self, metric):
        return float((metric - self.nothing).mean() / (self.whole - self.nothing).mean())


def adding(delta, index, bank):
    def hook(x, hook):
        x = x.clone()
        place = index // (bank.n_heads // x.shape[2])
        x[:, :, place] += delta if x.ndim == 4 else delta[..., 0]
        return x

    return hook


def setting(value, index):
    def hook(z, hook):
        z = z.clone()
        z[:, :, index] = value[:, :, index]
        return z

    return hook


def every_edge(model):
    edges = [("embed", "logits", "")]
    for bank in model.banks:
        sources = ["embed", *(label for b in model.banks if b.step < bank.step for label in b.labels())]
        edges += [(s, label, m) for label in bank.labels() for m in bank.reads for s in sources]
        edges += [(label, "logits", "") for label in bank.labels()]
    return edges


def test_edges_have_numbers(model):
    edges = Edges.of(model)
    every = every_edge(model)
    assert len(edges) == len(every)
    assert sorted(edges.ids(every).tolist()) == list(range(len(every)))


def whole_mlps(model):
    """Edges between heads and whole MLPs, each with the edges between heads and neurons that it is."""
    name = {label: f"L{b.layer}N*" for b in model.banks if b.kind == "mlp" for label in b.labels()}
    found = {}
    for src, dst, mode in every_edge(model):
        edge = name.get(src, src), name.get(dst, dst), "" if dst in name else mode
        found.setdefault(edge, []).append((src, dst, mode))
    return found


def test_edges_of_whole_mlps(model, task):
    """A whole MLP is all its neurons: circuits run alone as those of single neurons do, by hand, and the
    scores are their sums."""
    hand, edges = ByHand(model, task), whole_mlps(model)
    generator = np.random.default_rng(1)
    names = list(edges)
    assert len(Edges.of(model, pools=True)) == len(names)
    keep = [names[i] for i in generator.permutation(len(names))[: len(names) // 3]]
    found = mia.causal.faithfulness(model, task, keep, sizes=[len(keep)], draws=1)
    own = {edge for name in keep for edge in edges[name]}
    expected = hand.edges(own)
    torch.testing.assert_close(found.metric[0], expected, atol=1e-9, rtol=1e-9)  # float64
    assert found.frame["removed"][0] == pytest.approx(hand.share(hand.edges(set(every_edge(model)) - own)))
    assert found.receipt.ok
    for method in ("secant", "eap-ig"):
        single = mia.causal.discover(model, task, method, "edges", top_k=10**6).frame
        score = single.set_index(["src", "dst", "mode"])["score"]
        pooled = mia.causal.discover(model, task, method, "edges", pools=True)
        assert len(pooled.frame) == pooled.total == len(names)
        for row in pooled.frame.itertuples():
            parts = [score[edge] for edge in edges[row.src, row.dst, row.mode]]
            assert row.score == pytest.approx(sum(parts), abs=1e-6)  # tables hold float32
    circuit = pooled.circuit(60)
    assert circuit.faithfulness(model, draws=0).total == len(names)
    assert "L0N*" in circuit.spec()["heads"]
    assert not any("N*" in edge for edge in circuit.spec().get("edges", ()))


def test_circuits_of_edges_are_runs_by_hand(model, task):
    """Random ones, dense and sparse, kept and taken out; and everything is the model."""
    hand = ByHand(model, task)
    every = every_edge(model)
    generator = np.random.default_rng(0)
    for share in (0.1, 0.4):
        keep = [every[i] for i in generator.permutation(len(every))[: round(share * len(every))]]
        found = mia.causal.faithfulness(model, task, keep, sizes=[len(keep)], draws=1)
        expected = hand.edges(set(keep))
        torch.testing.assert_close(found.metric[0], expected, atol=1e-9, rtol=1e-9)  # float64
        assert found.frame["faithfulness"][0] == pytest.approx(hand.share(expected))
        removed = hand.share(hand.edges(set(every) - set(keep)))
        assert found.frame["removed"][0] == pytest.approx(removed)
        assert found.receipt.ok
    torch.testing.assert_close(hand.edges(set(every)), hand.whole, atol=1e-9, rtol=1e-9)


def test_circuits_of_heads_are_runs_by_hand(model, task):
    hand = ByHand(model, task)
    ranking = mia.causal.discover(model, task)
    found = mia.causal.faithfulness(model, task, ranking, sizes=[1, 5, 0.5, 1.0])
    order = ranking.frame["head"].tolist()
    for row in found.frame.itertuples():
        assert row.faithfulness == pytest.approx(hand.share(hand.heads(order[: row.size])), abs=1e-9)
        assert row.reverse == pytest.approx(hand.share(hand.heads(order[::-1][: row.size])), abs=1e-9)
        assert row.removed == pytest.approx(hand.share(hand.heads(order[row.size :])), abs=1e-9)
        assert row.low <= row.faithfulness <= row.high
    assert list(found.frame["size"]) == [1, 5, round(len(order) / 2), len(order)]
    assert found.frame["faithfulness"].iloc[-1] == pytest.approx(1)
    shares, values = found.frame["share"].to_numpy(), found.frame["faithfulness"].to_numpy()
    assert found.cpr == pytest.approx(np.trapezoid(values, shares))
    assert found.cmd == pytest.approx(np.trapezoid(abs(1 - values), shares))


def test_heads_are_their_edges(model, task):
    """A circuit of heads is that of all edges between them, from the embedding and to the logits."""
    chosen = ["L0H1", "L1H1", "L0N3", "L1N5"]
    ends = {*chosen, "embed", "logits"}
    every = [edge for edge in every_edge(model) if set(edge[:2]) <= ends]
    heads = mia.causal.faithfulness(model, task, chosen, sizes=[4], draws=0)
    edges = mia.causal.faithfulness(model, task, every, sizes=[len(every)], draws=0)
    torch.testing.assert_close(heads.metric, edges.metric, atol=1e-9, rtol=1e-9)  # float64


def test_prompts_of_different_lengths(model):
    """Padding changes nothing: each prompt alone gives the same."""
    rows = [random_tokens(model, 1, n, seed=n)[0].tolist() for n in (4, 7, 6)]
    others = [random_tokens(model, 1, n, seed=n + 50)[0].tolist() for n in (4, 7, 6)]
    task = mia.Task(rows, corrupt=others, answer=[1, 2, 3], against=[4, 5, 6])
    for ranking in (
        ["L0H1", "L1N5"],
        [("embed", "L1H1", "V"), ("L1H1", "logits", ""), ("embed", "logits", "")],
    ):
        bound = task.bind(model)
        together = alone_of(model, bound, ranking, 2**30)
        metric = together.metric([Parts(together.order)])[0]
        for i in range(3):
            one = alone_of(model, task.take([i]).bind(model), ranking, 2**30)
            assert float(one.metric([Parts(one.order)])[0]) == pytest.approx(float(metric[i]), abs=1e-9)


def test_known_circuit_is_faithful_and_random_ones_are_not():
    """Induction of a bundled model: found on some prompts, held to others."""
    model = mia.load("attn-2l")
    here, there = mia.tasks.induction(model, n=24).split()
    found = mia.causal.discover(model, here, units="edges", top_k=10**6)
    assert len(found.frame) == found.total == len(Edges.of(model))
    result = mia.causal.faithfulness(model, there, found)
    assert result.receipt.notes["held out"]
    assert "not held out" in mia.causal.faithfulness(model, here, found, sizes=[3], draws=0).receipt.notes
    assert result.cmd < 0.2 * result.cmd_random
    assert result.cmd_random > 0.3


@pytest.mark.usefixtures("as_users_run_it")
def test_refusals(model, task):
    run = mia.causal.faithfulness
    with pytest.raises(mia.MechInterpError, match="needs counterfactual prompts"):
        run(model, mia.Task(task.clean, answer=task.answer), ["L0H1"])
    with pytest.raises(mia.MechInterpError, match=r"sizes 0, 1.5, True; expected shares"):
        run(model, task, ["L0H1"], sizes=[0, 1.5, True])
    with pytest.raises(mia.MechInterpError, match=r"5 heads was asked for and the ranking holds 2 of"):
        run(model, task, ["L0H1", "L0H0"], sizes=[5])
    with pytest.raises(mia.MechInterpError, match=r"no such edges.*L1H1 -Q-> L0H1"):
        run(model, task, ["L1H1 -Q-> L0H1", "L0H1 -V-> L1H1"])
    with pytest.raises(mia.MechInterpError, match="no virtual heads"):
        run(model, task, ["L0H1 > L1H1"])
    with pytest.raises(mia.MechInterpError, match="the ranking is empty"):
        run(model, task, [])
    with pytest.raises(mia.MechInterpError, match=r"L9H1"):
        run(model, task, ["L9H1"])
