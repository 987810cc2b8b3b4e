"""Plans: one estimate for every heavy call, one limit, and no changed return type."""

import inspect

import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.plan import MAX_BYTES, Plan, duration, plans, size, within

ROOMS = (mia.circuits, mia.paths, mia.detect, mia.causal)


def heavy():
    """Every public function of the rooms that has a plan, or a limit on memory."""
    yield pytest.param(mia.Task.score, id="Task.score")
    for room in ROOMS:
        for name in room.__all__:
            function = getattr(room, name)
            limited = inspect.isfunction(function) and "max_bytes" in inspect.signature(function).parameters
            if hasattr(function, "estimate") or limited:
                yield pytest.param(function, id=f"{room.__name__.split('.')[-1]}.{name}")


@pytest.mark.parametrize("function", list(heavy()))
def test_what_has_a_plan_has_the_limit_and_the_other_way_round(function):
    parameters = inspect.signature(function).parameters
    assert parameters["max_bytes"].default == MAX_BYTES
    assert "plan" not in parameters
    named = set(inspect.signature(function.estimate).parameters)
    assert named <= set(parameters) | {"options"}


def test_the_old_word_warns_and_gives_the_plan():
    model = mia.load("attn-1l")
    with pytest.warns(FutureWarning, match=r"use mia\.plan\(bigrams, \.\.\.\)"):
        old = mia.circuits.bigrams(model, top_k=3, plan=True)
    new = mia.plan(mia.circuits.bigrams, model, top_k=3)
    assert (old.flops, old.bytes, old.what) == (new.flops, new.bytes, new.what)
    with pytest.warns(FutureWarning):
        assert len(mia.circuits.bigrams(model, top_k=3, sources=[5], plan=False).frame) == 3


def test_what_has_no_plan_says_so():
    with pytest.raises(mia.MechInterpError, match="there is no plan of models"):
        mia.plan(mia.models)
    with pytest.raises(mia.MechInterpError, match="bigrams: got an unexpected keyword argument 'topk'"):
        mia.plan(mia.circuits.bigrams, None, topk=3)


def test_an_estimate_sees_the_functions_own_arguments_and_defaults():
    @plans(lambda b, c, d: Plan("sum", b + c + d, 0, 1, 0.0))
    def add(a, b=2, *, c=3, **options):
        raise AssertionError("it ran")

    assert mia.plan(add, 1, d=4).flops == 9
    assert mia.plan(add, 1, 5, c=1, d=0).flops == 6

    class Adder:
        @plans(lambda self, b: Plan("sum", self.a + b, 0, 1, 0.0))
        def add(self, b):
            raise AssertionError("it ran")

        a = 10

    assert mia.plan(Adder().add, 5).flops == 15
    assert mia.plan(Adder.add, Adder(), 5).flops == 15


def test_the_limit_names_itself():
    made = Plan("scores", 10, 3 * 2**30, 1, 0.0)
    assert within(made, 3 * 2**30) is made
    with pytest.raises(
        mia.MechInterpError, match=r"scores: needs about 3.0 GiB, more than max_bytes=2,147,"
    ):
        within(made, MAX_BYTES)
    with pytest.raises(mia.MechInterpError, match="give a smaller top_k, or max_bytes=3,221,225,472"):
        within(made, MAX_BYTES, "a smaller top_k")


def test_a_plan_reads_well():
    made = Plan("scores", 2_500_000_000, 3 * 2**30, 1, 8000.0, result=2**20)
    assert str(made) == (
        "scores: 2.5 GFLOP in 1 block, 3.0 GiB beyond the model (1.0 MiB of it the result), about 2.2 hours"
    )
    assert [duration(s) for s in (0.123, 200.0, 90_000.0, 1e6)] == [
        "0.12 seconds", "3.3 minutes", "25.0 hours", "11.6 days",
    ]  # fmt: skip
    assert size(5 * 2**20) == "5.0 MiB"


@pytest.fixture(scope="module")
def model():
    return mia.load("attn-2l")


LIMITED = {
    "ov_top": (mia.circuits.ov_top, ("L1H0",), {}),
    "ov_top rows": (mia.circuits.ov_top, ("L1H0",), {"over": "rows", "top_k": 50}),
    "qk_top": (mia.circuits.qk_top, ("L1H0",), {}),
    "bigrams": (mia.circuits.bigrams, (), {}),
    "skip_trigrams": (mia.circuits.skip_trigrams, (), {}),
    "factoring_bugs": (mia.circuits.factoring_bugs, ("L1H0",), {}),
    "copying_scores": (mia.circuits.copying_scores, (), {}),
    "composition": (mia.circuits.composition, ("K",), {}),
    "virtual_heads": (mia.circuits.virtual_heads, (), {}),
}


ON_A_PROMPT = {
    "orders": {},
    "logit_attribution": {},
    "top_paths": {},
    "attribution_graph": {"max_nodes": 50},
    "virtual_head": {},
    "expand_score": {},
}


@pytest.mark.parametrize("name", ON_A_PROMPT)
def test_too_little_memory_for_a_prompt_is_refused_before_the_work(name, model):
    frozen = mia.paths.freeze(model, "He said that she")
    function = getattr(mia.paths, name)
    args = {"virtual_head": ("L0H0", "L1H0"), "expand_score": ("L1H0", -1, 1)}.get(name, ())
    made = mia.plan(function, frozen, *args, **ON_A_PROMPT[name])
    assert made.flops > 0
    assert made.bytes > made.result > 0
    with pytest.raises(mia.MechInterpError, match=r"needs about .* max_bytes=1,000; give .* max_b"):
        function(frozen, *args, **ON_A_PROMPT[name], max_bytes=1000)
    function(frozen, *args, **ON_A_PROMPT[name], max_bytes=made.bytes)


@pytest.mark.parametrize("name", LIMITED)
def test_too_little_memory_is_refused_before_the_work(name, model):
    function, args, options = LIMITED[name]
    made = mia.plan(function, model, *args, **options)
    assert made.flops > 0
    assert made.bytes > made.result >= 0
    with pytest.raises(mia.MechInterpError, match="max_bytes="):
        function(model, *args, **options, max_bytes=1000)
