"""Circuits through scores against the running model's derivatives: autograd, norms and gates constant."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.frozen.goals import resolve_goal
from tests.paths.test_brute_force import CASES, TOKENS

CLOSE = dict(rtol=0, atol=1e-10)  # float64, sums of a few hundred terms


@pytest.fixture(scope="module", params=CASES)
def case(request):
    model = CASES[request.param]()
    frozen = mia.paths.freeze(model, TOKENS)
    found = mia.paths.top_circuits(frozen, scores=True, top_k=10**5, max_expansions=10**5, progress=False)
    return model, frozen, found


def derivatives(model, frozen, head=None, side=None):
    """What the stream at each position brings to the target: the derivative of the running model times the
    stream, with norms' scales and neurons' gates constant, and patterns too. Those of one head, or of all
    ("all"), follow their queries and keys, or one of both sides.
    """
    seen = {}

    def keep(name):
        return name, lambda x, hook: seen.setdefault(name, x.requires_grad_() if x.is_leaf else x)

    def constant(x, hook):
        return x.detach()

    hooks = [(name, constant) for name in model.hook_dict if name.endswith("hook_scale")]
    for bank in model.banks:
        if bank.kind == "mlp":
            hooks.append((bank.hook("pattern"), constant))
            continue
        free = torch.zeros(bank.n_heads, 1, 1, dtype=torch.bool)
        free[:] = head == "all"
        if bank.layer == getattr(head, "layer", None):
            free[head.index] = True
        hooks.append((bank.hook("pattern"), lambda p, hook, free=free: torch.where(free, p, p.detach())))
        if side:
            hooks.append((bank.hook("k" if side == "Q" else "q"), constant))
    start, end = "blocks.0.hook_resid_pre", f"blocks.{model.spec.n_layers - 1}.hook_resid_post"
    with torch.enable_grad(), model.hooks(fwd_hooks=[*hooks, keep(start), keep(end)]):
        model(frozen.tokens[None])
    field = resolve_goal(frozen, target=None, against=None, position=-1).field(frozen)
    (gradient,) = torch.autograd.grad((seen[end][0] * field).sum(), seen[start])
    return (gradient[0] * seen[start][0]).sum(-1).detach()


def by_start(frame):
    """Sums of circuits by the position where they start."""
    return torch.tensor(
        [frame["contribution"][frame["token_position"] == at].sum() for at in range(len(TOKENS))],
        dtype=torch.float64,
    )


def test_all_circuits_together_are_the_derivative(case):
    model, frozen, found = case
    assert found.receipt.ok
    assert len(found.receipt.checks) == 2
    values = found.frame[found.frame["score"].isna()]
    torch.testing.assert_close(by_start(values), derivatives(model, frozen), **CLOSE)
    whole = derivatives(model, frozen, "all")
    torch.testing.assert_close(by_start(found.frame), whole, **CLOSE)
    assert (whole - by_start(values)).abs().max() > 1e-3  # scores matter here


@pytest.mark.parametrize("side", ["Q", "K"])
def test_one_score_is_entered_by_one_side(case, side):
    model, frozen, found = case
    head = model[f"L{model.spec.n_layers - 1}H1"]
    expected = derivatives(model, frozen, head, side) - derivatives(model, frozen)
    steps = found.frame["circuit"].str.count("-[QK]->")
    own = found.frame["circuit"].str.contains(f"-{side}-> {head.label} ")
    torch.testing.assert_close(by_start(found.frame[own & (steps == 1)]), expected, **CLOSE)
    named = found.frame["score"][own & (steps == 1)]
    assert named.str.fullmatch(rf"{head.label}@\d+<-\d+").all()


def test_values_are_listed_as_without_scores(case):
    _, frozen, found = case
    plain = mia.paths.top_circuits(frozen, top_k=10**5, max_expansions=10**5, progress=False)
    own = found.frame[found.frame["score"].isna()]
    assert list(own["circuit"]) == list(plain.frame["circuit"])
    assert found.explained == pytest.approx(plain.explained, abs=1e-10)
    assert plain.frame["score"].isna().all()


def test_a_search_that_is_cut_short_still_adds_up():
    frozen = mia.paths.freeze(CASES["gelu, LN"](), TOKENS)
    for opened in (1, 2, 5, 20):
        short = mia.paths.top_circuits(frozen, scores=True, top_k=3, max_expansions=opened, progress=False)
        assert short.receipt.ok
        assert short.explained + short.others + short.unopened == pytest.approx(short.total, abs=1e-10)
        assert short.frame["score"].notna().sum() <= 3
    with pytest.raises(MechInterpError, match="fewer max_expansions or a shorter prompt"):
        mia.paths.top_circuits(frozen, scores=True, max_bytes=10)
