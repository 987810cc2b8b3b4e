"""What a plan says is enough: against the bytes of all tensors alive, and against a process's memory."""

import copy

import jaxtyping
import pytest

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge
from tests.paths.test_long import peak


@pytest.fixture(scope="module", autouse=True)
def unchecked():
    """No checks of shapes: they would be counted too, and every tensor takes long enough as it is."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge(n_ctx=24, d_vocab=200))


@pytest.fixture(scope="module")
def tokens(model):
    return random_tokens(model, 12, 24)


@pytest.fixture(scope="module")
def task(model, tokens):
    other = random_tokens(model, 12, 24, seed=1)
    answers = tokens[:, 0].tolist()
    return mia.Task(tokens, corrupt=other, answer=answers, against=other[:, 1].tolist())


CALLS = {
    "score_heads": lambda m, t, k: (mia.detect.score_heads, (m,), {"tokens": t}),
    "offsets": lambda m, t, k: (mia.detect.offsets, (m,), {"tokens": t}),
    "match": lambda m, t, k: (mia.detect.match, (m, t, "induction"), {}),
    "ablate": lambda m, t, k: (mia.detect.ablate, (m, t), {"exact": 4}),
    "ablate edges": lambda m, t, k: (
        mia.detect.ablate,
        (m, t, [f"L0H{i} -{side}-> L1H{j}" for i in range(4) for j in range(4) for side in "QKV"]),
        {},
    ),
    "ablate chains": lambda m, t, k: (mia.detect.ablate, (m, t, ["L0H0 > L1H1", "L0N3 > L1N4"]), {}),
    "ablate heads": lambda m, t, k: (mia.detect.ablate, (m, t, "attention"), {}),
    "losses": lambda m, t, k: (mia.detect.in_context_learning, (m, t), {}),
    "weights": lambda m, t, k: (mia.detect.score_weights, (m,), {}),
    "corpus": lambda m, t, k: (mia.detect.over_corpus, (m, list(t)), {"batch": 4}),
    "circuit": lambda m, t, k: (
        mia.detect.check_circuit,
        (m, {"heads": {"L0H0": "member", "L1H0": "member"}, "edges": ["L0H0 -K-> L1H0"]}),
        {"draws": 4},
    ),
    "score": lambda m, t, k: (mia.Task.score, (k, m), {}),
    "effects": lambda m, t, k: (mia.causal.effects, (m, k), {"exact": 4}),
    "discover": lambda m, t, k: (mia.causal.discover, (m, k), {}),
    "discover eap-ig": lambda m, t, k: (mia.causal.discover, (m, k, "eap-ig"), {"steps": 2}),
    "discover edges": lambda m, t, k: (mia.causal.discover, (m, k, "eap", "edges"), {"top_k": 100}),
    "faithfulness": lambda m, t, k: (
        mia.causal.faithfulness,
        (m, k, ["L1H0", "L0H0"], [1, 2]),
        {"draws": 1},
    ),
    "minimality": lambda m, t, k: (mia.causal.minimality, (m, k, ["L1H0", "L0H0"]), {}),
    "overlap": lambda m, t, k: (mia.causal.overlap, (m, k, 4), {"resamples": 1}),
    "diff": lambda m, t, k: (mia.diff, (m, copy.deepcopy(m), k), {"exact": 2, "draws": 2, "edges": 0}),
    "diff edges": lambda m, t, k: (mia.diff, (m, copy.deepcopy(m), k), {"exact": 0, "edges": 100}),
    "token composition": lambda m, t, k: (mia.circuits.token_composition, (m,), {}),
    "paths": lambda m, t, k: (mia.causal.path_patch, (m, k, "L0H0 -K-> L1H0 -> logits"), {}),
}


ALSO_ALL_AT_ONCE = ("score_heads", "ablate edges", "ablate heads", "effects", "discover")


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.filterwarnings("ignore")
def test_what_is_planned_is_enough(model, tokens, task, name):
    """With all the memory there is, and with little more than one sequence needs."""
    function, args, options = CALLS[name](model, tokens, task)
    large = mia.plan(function, *args, **options)
    with pytest.raises(mia.MechInterpError, match="max_bytes"):
        function(*args, **options, max_bytes=10)
    most = peak(lambda: function(*args, **options))[1] if name in ALSO_ALL_AT_ONCE else 0
    little = max(large.result, large.bytes // 6)
    small = mia.plan(function, *args, **options, max_bytes=little)
    _, least = peak(lambda: function(*args, **options, max_bytes=max(little, small.bytes)))
    assert most <= large.bytes
    assert least <= max(little, small.bytes)
