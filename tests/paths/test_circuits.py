"""Circuits of attention heads against every path multiplied out, summed by the heads on it."""

import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.paths.brute import Brute
from tests.paths.test_brute_force import CASES, TOKENS


def by_circuit(brute, names):
    """Every path's value, its neurons left out and its biases folded."""
    found = {}
    for path, value in brute.values(brute_target(brute), len(TOKENS) - 1).items():
        first, *steps = path.split(" > ")[:-1]
        heads = [label for label in steps if "H" in label]
        source, _, at = first.rpartition("@")
        start = f"{names[int(at)]!r}@{at}" if source and "bias" not in source else "biases"
        name = " -V-> ".join([start, *heads]) + " -> logit"
        found[name] = found.get(name, 0.0) + value
    return found


def brute_target(brute):
    return int(brute.logits[-1].argmax())


@pytest.mark.parametrize("case", CASES)
def test_every_circuit_is_the_sum_of_its_paths(case):
    model = CASES[case]()
    frozen = mia.paths.freeze(model, TOKENS)
    expected = by_circuit(Brute(model, TOKENS), frozen.str_tokens)
    found = mia.paths.top_circuits(frozen, top_k=10**5, max_expansions=10**4, progress=False)
    own = found.frame.set_index("circuit")["contribution"]
    assert own.index.is_unique
    assert found.receipt.ok
    assert (found.unopened, found.others) == pytest.approx((0, 0), abs=1e-10)
    assert found.explained_share == pytest.approx(1)
    for name in {*own.index, *expected}:  # float64, sums of a few hundred terms
        assert own.get(name, 0.0) == pytest.approx(expected.get(name, 0.0), abs=1e-10), name
    assert repr(found).startswith("Top circuits: 100% explained (")
    few = mia.paths.top_circuits(frozen, top_k=3, max_expansions=10**4, progress=False)
    assert list(few.frame["circuit"]) == list(found.frame["circuit"][:3])


def test_a_search_cut_short_says_what_it_did_not_open():
    frozen = mia.paths.freeze(CASES["gelu, LN"](), TOKENS)
    short = mia.paths.top_circuits(frozen, top_k=2, max_expansions=1, progress=False)
    assert short.receipt.ok
    assert short.unopened != 0
    assert short.explained + short.others + short.unopened == pytest.approx(short.total, abs=1e-10)
    with pytest.raises(MechInterpError, match=r"top_k=0; expected at least 1; max_expansions=0"):
        mia.paths.top_circuits(frozen, top_k=0, max_expansions=0)
    with pytest.raises(MechInterpError, match="fewer max_expansions or a shorter prompt"):
        mia.paths.top_circuits(frozen, max_bytes=10)
