"""Long prompts: the memory that the analyses hold, counted tensor by tensor."""

import re
import weakref
from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge

N = 384


class Held(TorchDispatchMode):
    """Counts the bytes of all tensors made inside that are alive, and the most there were at once."""

    def __init__(self):
        super().__init__()
        self._owners, self._now, self.peak = Counter(), 0, 0
        self._known = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        inputs = {t.untyped_storage().data_ptr() for t in tree_leaves((args, kwargs)) if is_tensor(t)}
        out = func(*args, **(kwargs or {}))
        for tensor in filter(is_tensor, tree_leaves(out)):
            storage = tensor.untyped_storage()
            key, size = storage.data_ptr(), storage.nbytes()
            if key in inputs and key not in self._owners:
                continue  # a view of something from before
            if id(tensor) in self._known:
                continue  # written in place
            self._known.add(id(tensor))
            self._now += 0 if self._owners[key] else size
            self._owners[key] += 1
            self.peak = max(self.peak, self._now)
            weakref.finalize(tensor, self._free, key, size, id(tensor))
        return out

    def _free(self, key, size, number):
        self._known.discard(number)
        self._owners[key] -= 1
        if not self._owners[key]:
            del self._owners[key]
            self._now -= size


def is_tensor(x):
    return isinstance(x, torch.Tensor)


def peak(work):
    with Held() as held:
        result = work()
    return result, held.peak


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge(n_ctx=N, d_vocab=40))


@pytest.fixture(scope="module")
def frozen(model):
    frozen = mia.paths.freeze(model, random_tokens(model, 1, N)[0])
    assert frozen.held  # kept by the frozen prompt from the first analysis on
    return frozen


def test_the_counter_counts():
    def work():
        a = torch.zeros(1000, dtype=torch.float64)
        b = a + 1
        del a
        return b.view(10, 100)[0].exp_() + b.sum()

    _, most = peak(work)
    assert 16_000 <= most < 17_000


@pytest.mark.parametrize(
    "work",
    [
        lambda model, frozen, **m: mia.paths.freeze(model, frozen.tokens, **m),
        lambda model, frozen, **m: mia.paths.orders(frozen, **m),
        lambda model, frozen, **m: mia.paths.logit_attribution(frozen, **m),
        lambda model, frozen, **m: mia.paths.top_paths(frozen, top_k=5, max_expansions=20, **m),
        lambda model, frozen, **m: mia.paths.top_circuits(frozen, max_expansions=20, **m),
        lambda model, frozen, **m: mia.paths.top_circuits(frozen, scores=True, max_expansions=20, **m),
        lambda model, frozen, **m: mia.paths.expand_score(frozen, "L1H0", 300, 200, **m),
        lambda model, frozen, **m: mia.paths.virtual_head(frozen, "L0H0", "L1H1", **m),
        lambda model, frozen, **m: mia.paths.attribution_graph(frozen, **m),
        lambda model, frozen, **m: mia.paths.attribution_graph(
            frozen, node_threshold=1.0, edge_threshold=1.0, max_nodes=600, **m
        ),
    ],
    ids=[
        "freeze",
        "orders",
        "attribution",
        "paths",
        "circuits",
        "scores",
        "score",
        "virtual",
        "graph",
        "unpruned graph",
    ],
)
def test_what_is_announced_is_enough(model, frozen, work):
    with pytest.raises(MechInterpError, match=r"more than max_bytes=1,000; give (a|fewer) ") as refused:
        work(model, frozen, max_bytes=1000)
    need = int(re.search(r"or max_bytes=([\d,]+)", str(refused.value))[1].replace(",", ""))
    with pytest.raises(MechInterpError, match="more than max_bytes"):
        work(model, frozen, max_bytes=need - 1)
    result, most = peak(lambda: work(model, frozen, max_bytes=need))
    assert result.receipt.ok
    assert most <= need
    assert need < 8 * most + 2**25  # and not a bound that refuses what would fit


def test_term_importance_announces_its_memory(model, frozen):
    with pytest.raises(MechInterpError, match=r"384 tokens: needs about .* shorter prompts, or max_") as e:
        mia.paths.term_importance(model, frozen.tokens, heads=2, max_bytes=1000)
    need = int(re.search(r"or max_bytes=([\d,]+)", str(e.value))[1].replace(",", ""))
    result, most = peak(lambda: mia.paths.term_importance(model, frozen.tokens, heads=2, max_bytes=need))
    assert result.receipt.ok
    assert most <= need < 8 * most


def test_searches_and_scores_hold_no_more_than_the_frozen_prompt(model, frozen):
    """Nothing grows with pattern entries per head and position, or with the number of terms."""
    size = frozen.end.element_size()
    prompt = size * sum(bank.pattern.numel() + bank.z_bias.numel() for bank in frozen.banks)
    works = [
        lambda: mia.paths.logit_attribution(frozen),
        lambda: mia.paths.expand_score(frozen, "L1H1", -1, 5, against="others", by_source=True),
        lambda: mia.paths.top_paths(frozen, top_k=5, max_expansions=10, progress=False),
        lambda: mia.paths.top_paths(frozen, top_k=5, max_expansions=10, progress=False, positions="summed"),
    ]
    for work in works:
        result, most = peak(work)
        assert result.receipt.ok
        assert most < 2 * prompt
    apart, most = peak(
        lambda: mia.paths.top_paths(frozen, top_k=5, max_expansions=10, progress=False, positions="apart")
    )
    assert apart.receipt.ok
    rows = 4096 * N * size  # complete paths are evaluated so many at once, a few vectors each
    assert most < 2 * prompt + 8 * rows


def test_a_short_queue_says_what_it_left_out(model, frozen, monkeypatch):
    whole = mia.paths.top_paths(frozen, top_k=5, max_expansions=30, progress=False)
    monkeypatch.setattr("mechinterp_attn.paths.best_first.QUEUE", 30)
    short = mia.paths.top_paths(frozen, top_k=5, max_expansions=30, progress=False)
    assert list(short.frame["path"]) == list(whole.frame["path"])  # the strongest were opened all the same
    assert short.bound == pytest.approx(whole.bound)
    assert not short.proven
