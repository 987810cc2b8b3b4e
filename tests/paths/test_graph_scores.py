"""The two scores of an attribution graph, its pools, and targets that are directions of logits."""

import math

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge

CLOSE = dict(abs=1e-10)  # float64, sums of terms of size 1 to 10


@pytest.fixture(scope="module", params=["exact", "mixture"])
def model(request):
    return mia.convert(tiny_bridge(), mlp=request.param, components=2, check=False)


@pytest.fixture(scope="module")
def frozen(model):
    return mia.paths.freeze(model, random_tokens(model, 1, 7)[0])


@pytest.fixture(scope="module")
def graph(frozen):
    return mia.paths.attribution_graph(frozen, target=3, against=5, max_nodes=40)


def heads_of(graph):
    """Every (label, position) that stands in some node."""
    rows = graph.nodes[graph.nodes["members"].notna()].itertuples()
    return [(head, int(row.position)) for row in rows for head in graph.members(row.node)]


def run_patched(model, graph, tokens, instead, *, pinned=()):
    """The target with every head outside the graph holding something else, one head at a time."""
    kept = set(heads_of(graph))

    def replace(z, hook, bank):
        out = bank.by_head(z).clone()
        for i in range(bank.n_heads):
            for p in range(out.shape[1]):
                if (bank.label(i), p) not in kept:
                    out[:, p, i] = instead[bank.path][p, i]
        return out.reshape(z.shape)

    hooks = [(bank.hook("z"), lambda z, hook, bank=bank: replace(z, hook, bank)) for bank in model.banks]
    logits = model.run_with_hooks(tokens[None], fwd_hooks=[*pinned, *hooks])[0, graph.position]
    return sum(weight * float(logits[token]) for token, weight in graph.weights.items())


def held(model, tokens):
    _, cache = model.run_with_cache(tokens)
    return {bank.path: bank.by_head(cache[bank.hook("z")])[0] for bank in model.banks}


def test_every_head_stands_in_one_node_at_most_and_pools_hold_the_rest(graph, frozen):
    found = heads_of(graph)
    assert len(found) == len(set(found)) == graph.nodes["members"].sum()
    everything = mia.paths.attribution_graph(frozen, max_nodes=1000)
    assert len(set(heads_of(everything))) == everything.n_candidates
    inner = graph.nodes[graph.nodes["members"].notna()]
    assert len(inner) == 40
    assert (inner["members"] > 1).sum() > 5
    assert inner["index"].isna().sum() == inner["node"].str.contains("*", regex=False).sum()


def test_a_pool_is_the_sum_of_its_members(graph, frozen):
    singles = mia.paths.attribution_graph(
        frozen, target=3, against=5, max_nodes=10**6, pools=False, edge_threshold=1.0
    )
    value = singles.nodes.set_index("node")["value"]
    pools = graph.nodes[graph.nodes["members"] > 1]
    assert len(pools)
    for row in pools.itertuples():
        members = [f"{head}@{row.position}" for head in graph.members(row.node)]
        assert row.value == pytest.approx(value[members].sum(), **CLOSE)
        listed = graph.strongest[graph.strongest["node"] == row.node]
        expected = value[members].abs().nlargest(12)
        assert set(listed["head"] + f"@{row.position}") == set(expected.index)
        assert listed["value"].tolist() == pytest.approx(value[expected.index].tolist(), **CLOSE)


@torch.no_grad()
def test_inside_is_a_run_with_patterns_held_and_all_others_silent(model, graph, frozen):
    tokens = frozen.tokens
    held_still = [bank.hook("pattern") for bank in model.banks]
    held_still += [name for name in model.hook_dict if name.endswith("hook_scale")]
    _, cache = model.run_with_cache(tokens, names_filter=held_still, return_cache_object=False)
    pinned = [(name, lambda value, hook, kept=kept: kept) for name, kept in cache.items()]
    silent = {path: torch.zeros_like(z) for path, z in held(model, tokens).items()}
    assert run_patched(model, graph, tokens, silent, pinned=pinned) == pytest.approx(graph.kept, **CLOSE)
    assert graph.inside == graph.kept / graph.total


@torch.no_grad()
@pytest.mark.parametrize("patch", ["zero", "mean", "corrupt"])
def test_faithfulness_is_the_running_model_with_the_rest_patched(model, frozen, patch):
    tokens = frozen.tokens
    other = random_tokens(model, 1, 7, seed=5)[0]
    how = dict(corrupt=other) if patch == "corrupt" else dict(patch=patch)
    graph = mia.paths.attribution_graph(frozen, target=3, against=5, max_nodes=40, **how)
    own = held(model, other if patch == "corrupt" else tokens)
    instead = {
        path: z if patch == "corrupt" else z.mean(0).expand_as(z) * (patch == "mean")
        for path, z in own.items()
    }
    kept = run_patched(model, graph, tokens, instead)
    empty = mia.paths.attribution_graph(frozen, target=3, against=5, max_nodes=1, pools=False, patch=None)
    none = run_patched(model, _without_heads(empty), tokens, instead)
    assert graph.runs.kept == pytest.approx(kept, **CLOSE)
    assert graph.runs.none == pytest.approx(none, **CLOSE)
    assert graph.faithfulness == pytest.approx((kept - none) / (graph.total - none), **CLOSE)
    assert math.isnan(empty.faithfulness)


def _without_heads(graph):
    from dataclasses import replace

    return replace(graph, nodes=graph.nodes[graph.nodes["members"].isna()])


def test_a_graph_of_everything_keeps_everything(frozen):
    graph = mia.paths.attribution_graph(frozen, max_nodes=10**5)
    assert (graph.inside, graph.faithfulness) == pytest.approx((1, 1), **CLOSE)


def test_few_nodes_and_their_pools_hold_most_of_a_real_prediction():
    """gelu-2l, the end of a word that stood there before. Ten nodes add up to the logit by
    chance (1.01 of it inside), and the running model shows that they do not make it; 150 do."""
    frozen = mia.paths.freeze(mia.load("gelu-2l"), "Mr. Dorling was a tall man. I had never seen Mr. Dor")
    few, many = (mia.paths.attribution_graph(frozen, target="ling", max_nodes=n) for n in (10, 150))
    alone = mia.paths.attribution_graph(frozen, target="ling", max_nodes=150, pools=False)
    assert 0.8 < many.inside < 1.2
    assert few.faithfulness < 0.6 < 0.8 < many.faithfulness < 1.2
    assert abs(1 - many.inside) < abs(1 - alone.inside)
    assert many.receipt.ok


def test_a_target_is_any_direction_of_logits(frozen):
    weights = {3: 2.0, 5: -0.5, 7: -0.5}
    expected = float(sum(weight * frozen.logits[4, token] for token, weight in weights.items()))
    graph = mia.paths.attribution_graph(frozen, target=weights, position=4, max_nodes=30)
    paths = mia.paths.top_paths(
        frozen, target=weights, position=4, top_k=3, max_expansions=5, progress=False
    )
    direct = mia.paths.logit_attribution(frozen, target=weights, position=4)
    for result in (graph, paths, direct):
        assert result.total == pytest.approx(expected, **CLOSE)
        assert (result.target, result.receipt.ok) == (3, True)
        assert result.about.startswith("logit 2 '<3>' - 0.5 '<5>' - 0.5 '<7>' after")
    assert direct.frame["value"].sum() == pytest.approx(expected, **CLOSE)
    pair = mia.paths.logit_attribution(frozen, target=3, against=5)
    same = mia.paths.logit_attribution(frozen, target={3: 1.0, 5: -1.0})
    assert (pair.frame["value"] == same.frame["value"]).all()
    assert pair.about == same.about


@pytest.mark.usefixtures("as_users_run_it")
def test_errors_name_what_is_wrong(frozen, graph):
    with pytest.raises(MechInterpError, match=r"token id 99 .*; the weight of 3 is nan"):
        mia.paths.attribution_graph(frozen, target={99: 1.0, 3: math.nan})
    with pytest.raises(MechInterpError, match="no weight differs from 0"):
        mia.paths.top_paths(frozen, target={3: 0.0})
    with pytest.raises(MechInterpError, match="put its weight, such as -1, among the others"):
        mia.paths.logit_attribution(frozen, target={3: 1.0}, against=4)
    with pytest.raises(MechInterpError, match="patch='noise'; expected 'mean' or 'zero'"):
        mia.paths.attribution_graph(frozen, patch="noise")
    with pytest.raises(MechInterpError, match="corrupt is 1 prompt of 3 tokens; expected 1 of 7"):
        mia.paths.attribution_graph(frozen, corrupt=torch.tensor([1, 2, 3]))
    with pytest.raises(KeyError, match="no head, neuron or pool 'logit'"):
        graph.members("logit")
