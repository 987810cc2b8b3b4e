"""Masks as rules, and masks in weights under their bound (float64)."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

from mechinterp_attn import MechInterpError
from mechinterp_attn.theorems import (
    Layout,
    SoftmaxHeads,
    Sublayer,
    bias_head,
    least_omega,
    mask_error_bound,
    masks,
    neuron_heads,
)
from mechinterp_attn.theorems.omega import check_omega, log_leak

fast = settings(deadline=None, max_examples=25)


def attention(layout, n_heads, d_head, seed, mask, scale=1.0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    d = layout.d_model
    reads = (layout.embed(draw(n_heads, d, d_head), layout.data, dim=1) for _ in range(3))
    W_Q, W_K, W_V = reads
    W_O = layout.embed(draw(n_heads, d_head, d), layout.data, dim=2)
    return SoftmaxHeads(layout, scale * W_Q, W_K, W_V, W_O, mask)


def any_mask(rows, seed):
    """Any pattern with at least one allowed key in every row."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand(rows, rows, generator=generator) < 0.4
    row = torch.arange(rows)
    mask[row, torch.randint(rows, (rows,), generator=generator)] = True
    return mask


@fast
@given(st.integers(1, 5), st.integers(1, 6), st.integers(1, 3), st.integers(0, 10**6), st.floats(0.0, 60.0))
def test_any_mask_in_weights_errs_less_than_its_bound(d, n, n_heads, seed, omega):
    layout = Layout(d, positions=n + 1)
    mask = masks.fixed(any_mask(n + 1, seed))
    heads = attention(layout, n_heads, 2, seed, mask, scale=0.5)
    X = torch.randn(3, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    X = layout.augment(X)
    exact = heads(X)
    error = (heads.with_mask_in_weights(omega)(X) - exact).abs().amax(-1)
    bound = (log_leak(heads, X) - omega).exp()  # row by row
    rounding = 1e-14 * max(float(exact.abs().max()), 1.0)
    assert bool((error <= bound + rounding).all())


def test_the_error_falls_by_e_per_unit_down_to_rounding():
    layout = Layout(4, positions=9)
    heads = attention(layout, 3, 2, 0, masks.causal)
    sublayer = Sublayer((heads, bias_head(layout, torch.ones(4, dtype=torch.float64))))
    X = layout.augment(torch.randn(8, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1)))
    exact, omegas = sublayer(X), torch.arange(20.0, 46.0, 5.0)
    errors = [float((sublayer.with_masks_in_weights(w)(X) - exact).abs().max()) for w in omegas.tolist()]
    logs = torch.tensor(errors).log()
    slopes = (logs[1:] - logs[:-1])[torch.tensor(errors[1:]) > 1e-12] / 5
    assert len(slopes) >= 2
    assert float((slopes + 1).abs().max()) < 0.05
    assert float((sublayer.with_masks_in_weights(80.0)(X) - exact).abs().max()) < 1e-14


def test_weights_hold_the_mask_and_nothing_else_does():
    layout = Layout(3, positions=5)
    generator = torch.Generator().manual_seed(0)
    W_in, W_out = (torch.randn(s, generator=generator, dtype=torch.float64) for s in ((3, 2), (2, 3)))
    head = neuron_heads(layout, W_in, W_out)[0]
    heavy = head.with_mask_in_weights(40.0)
    assert bool(heavy.mask(5).all())
    block = heavy.W_QK.dense()
    at = layout.positions_at
    assert torch.equal(block[at.start : at.stop, at.start : at.stop], 40.0 * masks.forbidding(head.mask(5)))
    # d_head = 1 is lost: the rank of W_QK grows by the rank of the mask.
    rank = int(torch.linalg.matrix_rank(block))
    assert torch.linalg.matrix_rank(head.W_QK.dense()) == 1
    assert rank == 1 + masks.mask_rank(head.mask(5))
    X = layout.augment(torch.randn(4, 3, dtype=torch.float64, generator=generator))
    by_hand = (X @ block @ X.T).softmax(-1) @ X @ heavy.W_OV.dense()
    assert torch.allclose(heavy(X), by_hand, atol=1e-14)


def test_the_least_omega_is_the_least():
    layout = Layout(4, positions=7)
    sublayer = Sublayer((attention(layout, 2, 2, 3, masks.causal),))
    X = layout.augment(torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2)))
    leak = math.log(mask_error_bound(sublayer, X, 0.0))
    omega = least_omega(leak, 1e-6)
    assert mask_error_bound(sublayer, X, omega) == pytest.approx(1e-6)
    error = float((sublayer.with_masks_in_weights(omega)(X) - sublayer(X)).abs().max())
    assert error <= 1e-6
    check_omega(omega + 1e-9, leak, 1e-6)
    with pytest.raises(MechInterpError, match=f"the least omega that does is {omega:.2f}"):
        check_omega(omega - 1, leak, 1e-6)
    with pytest.raises(MechInterpError, match="tolerance=0"):
        least_omega(leak, 0.0)


def test_rules_are_parts_of_the_causal_mask_of_the_augmented_sequence():
    causal = torch.ones(6, 6, dtype=torch.bool).tril()
    for rule in (masks.causal, masks.self_only, masks.self_and_bias, masks.windowed(masks.causal, 2)):
        assert not bool((rule(6) & ~causal).any())
        assert bool(rule(6).any(-1).all())
    assert masks.windowed(masks.causal, 2)(5)[4].tolist() == [False, False, False, True, True]


def test_a_row_that_sees_nothing_and_other_bad_masks():
    empty = torch.ones(4, 4, dtype=torch.bool)
    empty[2] = False
    with pytest.raises(MechInterpError, match=r"mask rows \[2\] allow nothing"):
        masks.fixed(empty)
    with pytest.raises(MechInterpError, match=r"shape \(2, 3\)"):
        masks.fixed(torch.ones(2, 3, dtype=torch.bool))
    with pytest.raises(MechInterpError, match="5 rows, but the mask given is for 4"):
        masks.fixed(torch.ones(4, 4, dtype=torch.bool))(5)
    layout = Layout(2)
    with pytest.raises(MechInterpError, match="reads one-hot positions and this stream has none"):
        attention(layout, 1, 1, 0, masks.causal).with_mask_in_weights(10.0)
    half = attention(Layout(2, positions=3), 1, 1, 0, masks.causal)
    half = SoftmaxHeads(
        half.layout, *(W.half() for W in (half.W_Q, half.W_K, half.W_V, half.W_O)), masks.causal
    )
    with pytest.raises(MechInterpError, match=r"float32 or float64, got float16.*masks='exact'"):
        half.with_mask_in_weights(10.0)
