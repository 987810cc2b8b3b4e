"""Expansions against every path multiplied out, on models small enough to enumerate."""

import itertools

import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import tiny_bridge
from tests.paths.brute import Brute, tiny_family

# float64; sums of a few hundred terms of size 1 to 10
CLOSE = dict(rtol=0, atol=1e-10)
SMALL = dict(num_hidden_layers=2, num_attention_heads=2, intermediate_size=3, hidden_size=8)
GPT2 = dict(n_layer=2, n_head=2, n_inner=3, n_embd=8)
CASES = {
    "gelu, LN": lambda: mia.convert(
        tiny_bridge(d_model=8, d_head=4, n_heads=2, d_mlp=3, n_layers=2), check=False
    ),
    "attention only, no norm": lambda: mia.convert(
        tiny_bridge(attn_only=True, normalization_type=None, n_heads=2, n_layers=3), check=False
    ),
    "parallel, rotary": lambda: tiny_family("gpt_neox", **SMALL),
    "gated, grouped keys": lambda: tiny_family("llama", **SMALL | dict(num_key_value_heads=1)),
    "post-norms, gated, windows, soft caps": lambda: tiny_family(
        "gemma2", **SMALL | dict(num_key_value_heads=1, sliding_window=2)
    ),
    "norms on queries and keys": lambda: tiny_family("qwen3", **SMALL | dict(num_key_value_heads=2)),
    "learned positions": lambda: tiny_family("gpt2", **GPT2),
}
TOKENS = torch.tensor([3, 5, 4, 3])


@pytest.fixture(scope="module", params=CASES)
def model(request):
    return CASES[request.param]()


@pytest.fixture(scope="module")
def frozen(model):
    return mia.paths.freeze(model, TOKENS)


@pytest.fixture(scope="module")
def brute(model):
    return Brute(model, TOKENS)


def test_the_frozen_model_is_the_model(frozen):
    assert frozen.receipt.ok
    assert len(frozen.receipt.checks) == 1


@pytest.mark.parametrize("count", ["all", "attention", "mlp"])
def test_orders_term_by_term(model, frozen, brute, count):
    orders = mia.paths.orders(frozen, count=count)
    letter = {"all": "", "attention": "H", "mlp": "N"}[count]
    for n, logits in enumerate(orders.logits):
        torch.testing.assert_close(logits, brute.order(n, lambda label: letter in label), **CLOSE)
    assert not brute.order(len(orders.logits), lambda label: letter in label).any()
    assert orders.receipt.ok


def test_the_highest_orders_together(frozen, brute):
    cut = mia.paths.orders(frozen, max_order=1)
    torch.testing.assert_close(cut.logits[:2], torch.stack([brute.order(0), brute.order(1)]), **CLOSE)
    torch.testing.assert_close(cut.logits.sum(0), brute.logits, **CLOSE)
    assert list(cut.frame["order"]) == ["0", "1", ">1"]


@pytest.mark.parametrize("positions", ["source", "summed"])
def test_all_paths_one_by_one(frozen, brute, positions):
    target = int(frozen.logits[-1].argmax())
    expected = brute.values(target, len(TOKENS) - 1, summed=positions == "summed")
    expected = pd.Series({name: value for name, value in expected.items() if abs(value) > 1e-12})
    found = mia.paths.top_paths(
        frozen, top_k=10**5, positions=positions, max_expansions=10**6, progress=False
    )
    assert found.proven
    assert found.receipt.ok
    own = found.frame.set_index("path")["contribution"]
    own = own[own.abs() > 1e-12]
    assert own.index.is_unique
    assert set(own.index) == set(expected.index)
    assert (own - expected.reindex(own.index)).abs().max() < 1e-10
    assert found.remainder == pytest.approx(0, abs=1e-9)


@pytest.mark.parametrize("k", [1, 7])
def test_a_search_that_ends_is_proven_and_right(frozen, brute, k):
    target = int(frozen.logits[1].argmin())
    found = mia.paths.top_paths(
        frozen, target=target, position=1, top_k=k, max_expansions=10**6, progress=False
    )
    best = sorted(brute.values(target, 1).values(), key=abs, reverse=True)[:k]
    assert found.proven
    assert found.frame["contribution"].tolist() == pytest.approx(best, abs=1e-10)
    assert found.total == pytest.approx(found.explained + found.remainder)


def test_a_search_cut_short_says_what_it_may_have_missed(frozen, brute):
    found = mia.paths.top_paths(frozen, top_k=5, max_expansions=2, progress=False)
    values = brute.values(found.target, found.position)
    missed = {name for name in values if name not in set(found.frame["path"])}
    best_missed = max(abs(values[name]) for name in missed)
    smallest = float(found.frame["contribution"].abs().min())
    assert best_missed <= max(found.bound, smallest) + 1e-10
    if best_missed > smallest + 1e-10:
        assert not found.proven


@pytest.mark.parametrize("case", ["gelu, LN", "post-norms, gated, windows, soft caps", "parallel, rotary"])
def test_paths_apart_and_graph_edges_by_brute_force(case):
    """Every edge of the unpruned graph is the sum of all paths that use it."""
    tokens = TOKENS[:2]
    model = CASES[case]()
    frozen = mia.paths.freeze(model, tokens)
    brute = Brute(model, tokens, apart=True)
    target = int(frozen.logits[-1].argmax())
    expected = brute.values(target, 1)
    found = mia.paths.top_paths(
        frozen, top_k=10**5, positions="apart", max_expansions=10**6, progress=False
    )
    own = dict(zip(found.frame["path"], found.frame["contribution"], strict=True))
    for name, value in expected.items():
        assert own.get(name, 0.0) == pytest.approx(value, abs=1e-10), name

    graph = mia.paths.attribution_graph(frozen, node_threshold=1.0, edge_threshold=1.0, max_nodes=10**6)
    edges: dict[tuple[str, str], float] = {}
    nodes: dict[str, float] = {}
    for name, value in expected.items():
        source, *steps = name.split(" > ")
        at = source.split("@")[-1]
        is_token = "bias" not in source
        source = f"token@{at}" if is_token else "bias"
        stops = [source, *steps]
        for a, b in itertools.pairwise(stops):
            edges[a, b] = edges.get((a, b), 0.0) + value
        for stop in stops:
            nodes[stop] = nodes.get(stop, 0.0) + value
    own_edges = {(e.source, e.target): e.weight for e in graph.edges.itertuples()}
    for edge, value in edges.items():
        assert own_edges.pop(edge, 0.0) == pytest.approx(value, abs=1e-10), edge
    assert all(abs(weight) < 1e-10 for weight in own_edges.values())
    for row in graph.nodes.itertuples():
        assert row.value == pytest.approx(nodes.get(row.node, 0.0), abs=1e-9), row.node
        assert row.pruned == pytest.approx(0, abs=1e-10)
    assert graph.kept == pytest.approx(graph.total)
    assert graph.receipt.ok


def test_term_importance_is_the_loss_of_partial_sums(model, frozen, brute):
    loss = lambda logits: float(frozen.loss(logits))  # noqa: E731
    result = mia.paths.term_importance(model, TOKENS, max_order=2, heads=3)
    partial = [brute.order(0)]
    for n in (1, 2):
        partial.append(partial[-1] + brute.order(n))
    losses = result.frame["loss"].tolist()
    assert losses[:3] == pytest.approx([loss(p) for p in partial], abs=1e-10)
    assert losses[-1] == pytest.approx(loss(brute.logits), abs=1e-10)

    def ending(n, keep):
        """Logits of order-n paths that ``keep`` accepts by their heads."""
        terms = [x for (_, _, heads), x in brute.terms.items() if len(heads) == n and keep(heads)]
        return brute.read_out(sum(terms)) if terms else torch.zeros_like(brute.logits)

    for row in result.layers[result.layers["order"].isin(["1", "2"])].itertuples():
        n, letter = int(row.order), "H" if row.kind == "attention" else "N"
        part = ending(
            n, lambda heads, row=row, letter=letter: heads[-1].startswith(f"L{row.layer}{letter}")
        )
        assert row.alone == pytest.approx(loss(partial[n - 1] + part) - loss(partial[n - 1]), abs=1e-10)
        assert row.given_others == pytest.approx(loss(partial[n]) - loss(partial[n] - part), abs=1e-10)
    measured = result.heads.dropna(subset=["alone"])
    assert len(measured)
    for order, heads in result.heads.groupby("order"):  # the three with the largest estimate that is not 0
        largest = heads[heads["estimate"] != 0].sort_values("estimate", key=abs).tail(3)
        assert set(measured["head"][measured["order"] == order]) == set(largest["head"])
    for row in measured.itertuples():
        n = int(row.order)
        part = ending(n, lambda heads, row=row: heads[-1] == row.head)
        assert row.alone == pytest.approx(loss(partial[n - 1] + part) - loss(partial[n - 1]), abs=1e-10)
        assert row.given_others == pytest.approx(loss(partial[n]) - loss(partial[n] - part), abs=1e-10)
    label = model.banks[0].label(1)
    named = mia.paths.term_importance(model, TOKENS, max_order=2, heads=[label]).heads
    named = named.dropna(subset=["alone"])
    assert list(zip(named["order"], named["head"], strict=True)) == [("1", label), ("2", label)]
    for n in (1, 2):
        pure = ending(n, lambda heads: not any("N" in head for head in heads))
        expected = loss(partial[n - 1] + pure) - loss(partial[n - 1])
        assert result.frame["attention_only"][n] == pytest.approx(expected, abs=1e-10)


def test_virtual_heads_are_terms_of_the_expansion(model, frozen, brute):
    bank_a, bank_b = model.sublayers()[0].banks[0], model.sublayers()[-1].banks[-1]
    labels = (bank_a.label(1), bank_b.label(0))
    term = mia.paths.virtual_head(frozen, *labels)
    alone = [x for (source, _, heads), x in brute.terms.items() if heads == labels and "bias" not in source]
    torch.testing.assert_close(term.logits, brute.read_out(sum(alone)), **CLOSE)
    dense = [model[label].pattern(brute.cache)[:, :-1] for label in labels]
    torch.testing.assert_close(term.pattern, dense[1] @ dense[0])
    total = float(term.logits[-1, int(frozen.logits[-1].argmax())])
    assert term.frame["value"].sum() == pytest.approx(total, abs=1e-10)
