"""Every construction of the paper against plain formulas, on streams of any shape (float64)."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st

from mechinterp_attn import MechInterpError
from mechinterp_attn.model.norm import Norm
from mechinterp_attn.theorems import (
    Layout,
    PartialNorm,
    SoftmaxActivation,
    SoftmaxHeads,
    Sublayer,
    activation_heads,
    bias_head,
    gated_mlp,
    generalised_silu,
    glu_heads,
    linear_sublayer,
    masks,
    mlp_sublayer,
    neuron_heads,
    product_heads,
    relu_squared_mlp,
    run,
    solu_heads,
    three_sublayers,
)

TOL = 1e-12  # float64, values of order 10, sums of up to a hundred terms
shapes = st.tuples(
    st.integers(1, 9),  # d_model
    st.integers(1, 9),  # neurons
    st.integers(1, 7),  # tokens
    st.integers(0, 10**6),  # seed
)
fast = settings(deadline=None, max_examples=25)


def draw(seed, *shapes):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


def gap(layout, sublayers, X, expected):
    """Largest difference between the whole augmented streams: data, constant, scratch, bias row."""
    sublayers = sublayers if isinstance(sublayers, (list, tuple)) else [sublayers]
    return float((run(sublayers, layout.augment(X)) - layout.augment(expected)).abs().max())


@fast
@given(shapes, st.integers(0, 3), st.booleans())
def test_augmenting_and_back_is_bit_exact(shape, scratch, positions):
    d, _, n, seed = shape
    (X,) = draw(seed, (2, n, d))
    layout = Layout(d, scratch=scratch, positions=(n + 1) * positions)
    Y = layout.augment(X)
    assert Y.shape == (2, n + 1, layout.width)
    assert torch.equal(layout.deaugment(Y), X)
    assert not Y[:, 0, : d + 1].any()  # the bias token
    assert bool((Y[:, 1:, layout.constant] == 1).all())


@fast
@given(shapes, st.booleans(), st.booleans())
def test_an_mlp_is_a_sum_of_neuron_heads(shape, bias_in, bias_out):
    d, m, n, seed = shape
    X, W_in, W_out, b_in, b_out = draw(seed, (2, n, d), (d, m), (m, d), (m,), (d,))
    layout = Layout(d)
    sublayer = mlp_sublayer(layout, W_in, W_out, b_in if bias_in else None, b_out if bias_out else None)
    expected = X + F.silu(X @ W_in + b_in * bias_in) @ W_out + b_out * bias_out
    assert gap(layout, sublayer, X, expected) < TOL
    assert sublayer.n_heads == m + bias_out


def test_a_neuron_head_has_rank_one_and_attends_to_itself_and_the_bias_token():
    X, W_in, W_out, b = draw(0, (4, 5), (5, 3), (3, 5), (3,))
    layout = Layout(5)
    heads = neuron_heads(layout, W_in, W_out, b)
    for i in range(3):
        assert torch.linalg.matrix_rank(heads[i].W_QK.dense()) == 1
        assert torch.linalg.matrix_rank(heads[i].W_OV.dense()) == 1
    pattern = heads.patterns(layout.augment(X))
    own = torch.sigmoid(X @ W_in + b).T
    assert torch.allclose(pattern.diagonal(dim1=-2, dim2=-1)[:, 1:], own, atol=1e-15)
    assert torch.allclose(pattern[:, 1:, 0], 1 - own, atol=1e-15)
    # W_QK reads the neuron's input direction: its column is W_in's.
    assert torch.equal(heads[1].W_QK.dense()[:5, layout.constant], W_in[:, 1])


def test_the_heads_written_out_entry_by_entry():
    """softmax(mask(X W_QK X^T)) X W_OV from dense matrices and loops, for one head of each mask."""
    X, W_Q, W_K, W_V, W_O = draw(1, (3, 2), (1, 3, 2), (1, 3, 2), (1, 3, 2), (1, 2, 3))
    layout = Layout(2)
    Y = layout.augment(X)
    for rule in (masks.causal, masks.self_and_bias, masks.self_only, masks.bidirectional):
        head = SoftmaxHeads(layout=layout, W_Q=W_Q, W_K=W_K, W_V=W_V, W_O=W_O, mask=rule)
        W_QK, W_OV = W_Q[0] @ W_K[0].T, W_V[0] @ W_O[0]
        expected = torch.zeros_like(Y)
        for i in range(4):
            seen = [j for j in range(4) if rule(4)[i, j]]
            weights = torch.stack([torch.exp(Y[i] @ W_QK @ Y[j]) for j in seen])
            expected[i] = sum(w / weights.sum() * (Y[j] @ W_OV) for w, j in zip(weights, seen, strict=True))
        assert torch.allclose(head(Y), expected, atol=TOL)


@fast
@given(shapes, st.integers(1, 10), st.booleans())
def test_a_linear_map_is_heads_of_any_dimension(shape, d_head, skip):
    d, _, n, seed = shape
    X, W = draw(seed, (2, n, d), (d, d))
    layout = Layout(d)
    sublayer = linear_sublayer(layout, W, d_head=d_head, skip=skip)
    out = layout.deaugment(sublayer(layout.augment(X)))
    assert float((out - X @ W).abs().max()) < TOL
    assert sublayer.n_heads == -(-d // d_head)
    assert sublayer.heads[0].W_V.shape[-1] == d_head


def test_a_linear_map_of_low_rank_takes_few_heads():
    A, B, X = draw(2, (6, 2), (2, 6), (4, 6))
    layout = Layout(6)
    W = A @ B + torch.eye(6, dtype=torch.float64)
    sublayer = linear_sublayer(layout, W, d_head=1)
    assert sublayer.n_heads == 2
    assert gap(layout, sublayer, X, X @ W) < TOL


ACTIVATIONS = {
    "silu": F.silu,
    "gelu": lambda z: z * torch.sigmoid(1.702 * z),
    "relu": lambda z: z * torch.sigmoid(1000 * z),
    generalised_silu(2.0, 3.0): lambda z: 2 * F.silu(3 * z),
    generalised_silu(0.5, -2.0): lambda z: 0.5 * F.silu(-2 * z),
    SoftmaxActivation(((0.7, 1.0, 0.2), (0.3, 2.0, -0.1)), "two terms"): lambda z: (
        0.7 * z * torch.sigmoid(z + 0.2) + 0.3 * z * torch.sigmoid(2 * z - 0.1)
    ),
}


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
def test_activations_in_place_in_neurons_and_in_three_sublayers(activation):
    act = ACTIVATIONS[activation]
    X, W_in, W_out, b_in, b_out = draw(3, (2, 5, 4), (4, 7), (7, 4), (7,), (4,))
    layout = Layout(4)
    in_place = activation_heads(layout, layout.data, activation=activation, dtype=X.dtype)
    assert gap(layout, Sublayer(in_place), X, act(X)) < TOL
    expected = X + act(X @ W_in + b_in) @ W_out + b_out
    one = mlp_sublayer(layout, W_in, W_out, b_in, b_out, activation=activation)
    assert gap(layout, one, X, expected) < TOL
    layout = Layout(4, scratch=7)
    three = three_sublayers(layout, W_in, W_out, b_in, b_out, activation=activation, d_head=2)
    assert gap(layout, three, X, expected) < TOL  # and the scratch is zero again


def test_biases_are_one_head():
    X, b = draw(4, (3, 5), (5,))
    layout = Layout(5)
    head = bias_head(layout, b)
    assert gap(layout, Sublayer((head,)), X, X + b) == 0.0
    assert head.W_QK.rank == 0
    assert head.W_OV.rank == 1


@pytest.mark.parametrize("kind", ["LN", "RMS"])
def test_norms_act_on_the_original_coordinates_only(kind):
    X, W_in, W_out, b = draw(5, (2, 4, 6), (6, 5), (5, 6), (5,))
    layout = Layout(6, scratch=2, positions=5)
    stacks = mlp_sublayer(layout, W_in, W_out, b).heads
    sublayer = Sublayer(stacks, norm=PartialNorm(Norm(kind, 1e-5), layout))
    centred = X - X.mean(-1, keepdim=True) * (kind == "LN")
    normed = centred / (centred.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    assert gap(layout, sublayer, X, X + F.silu(normed @ W_in + b) @ W_out) < TOL


def test_a_parallel_block_is_one_sublayer():
    X, W_in, W_out, W_Q, W_K, W_V, W_O = draw(
        6, (5, 4), (4, 6), (6, 4), (2, 4, 3), (2, 4, 3), (2, 4, 3), (2, 3, 4)
    )
    layout = Layout(4)
    reads = (layout.embed(W, layout.data, dim=1) for W in (W_Q, W_K, W_V))
    attention = SoftmaxHeads(layout, *reads, layout.embed(W_O, layout.data, dim=2), masks.causal)
    sublayer = Sublayer((attention, neuron_heads(layout, W_in, W_out)))
    expected = X + F.silu(X @ W_in) @ W_out
    for h in range(2):
        scores = X @ W_Q[h] @ W_K[h].T @ X.T
        future = torch.ones(5, 5, dtype=torch.bool).triu(1)
        pattern = scores.masked_fill(future, -torch.inf).softmax(-1)
        expected = expected + pattern @ X @ W_V[h] @ W_O[h]
    assert gap(layout, sublayer, X, expected) < TOL
    assert sublayer.n_heads == 8


@fast
@given(shapes)
def test_a_sigmoid_glu_is_one_head_a_neuron_exactly(shape):
    d, m, n, seed = shape
    X, W_g, W_in, W_out, b_g, b = draw(seed, (n, d), (d, m), (d, m), (m, d), (m,), (m,))
    layout = Layout(d)
    heads = glu_heads(layout, W_g, W_in, W_out, b_g, b)
    expected = X + (torch.sigmoid(X @ W_g + b_g) * (X @ W_in + b)) @ W_out
    assert gap(layout, Sublayer((heads,)), X, expected) < TOL


@pytest.mark.parametrize("activation", ["silu", "gelu", "relu"])
def test_gated_mlps_through_scratch(activation):
    act = ACTIVATIONS[activation]
    X, W_g, W_in, W_out, b_g, b, b_out = draw(7, (2, 5, 4), (4, 6), (4, 6), (6, 4), (6,), (6,), (4,))
    layout = Layout(4, scratch=6)
    two = gated_mlp(layout, W_g, W_in, W_out, b_g, b, b_out, activation=activation)
    expected = X + (act(X @ W_g + b_g) * (X @ W_in + b)) @ W_out + b_out
    # A product is off by eps^2 g^2 / 12 of itself and by rounding 1/eps times larger: about 1e-9.
    assert gap(layout, two, X, expected) < 1e-7


def test_a_product_errs_as_the_series_says():
    layout = Layout(2, scratch=1)
    X = torch.tensor([[3.0, 2.0]], dtype=torch.float64)
    g, u = torch.eye(2, dtype=torch.float64).split(1, dim=1)
    for eps in (0.3, 0.1, 0.03):
        heads = product_heads(layout, layout.affine(g), layout.affine(u), layout.scratch_at, eps=eps)
        made = float(Sublayer(heads)(layout.augment(X))[1, layout.scratch_at.start])
        assert made == pytest.approx(6 * (1 - eps**2 * 9 / 12), rel=2 * (eps * 3) ** 4 / 120)


def test_squared_relu_and_its_bound():
    X, W_in, W_out = draw(8, (50, 3), (3, 5), (5, 3))
    layout = Layout(3, scratch=5)
    two = relu_squared_mlp(layout, W_in, W_out, sharpness=100.0)
    error = gap(layout, two, X, X + F.relu(X @ W_in) ** 2 @ W_out)
    assert 0 < error < 5 * 0.483 / 100**2 * float(W_out.abs().max()) + 1e-7


def test_solu_in_one_sublayer():
    X, W_in, W_out, b = draw(9, (2, 4, 3), (3, 6), (6, 3), (6,))
    layout = Layout(3, persistent=6, positions=10)
    heads = solu_heads(layout, W_in, W_out, b)
    z = X @ W_in + b
    assert gap(layout, Sublayer(heads), X, X + (z * z.softmax(-1)) @ W_out) < TOL


def test_bad_input_says_what_to_do():
    layout = Layout(3)
    X, W_in, W_out = draw(10, (4, 3), (3, 5), (5, 3))
    with pytest.raises(MechInterpError, match=r"shape \(4, 3\).*expected \[\.\.\., pos, 2\]"):
        Layout(2).augment(X)
    with pytest.raises(MechInterpError, match=r"use Layout\(positions=5\)"):
        Layout(3, positions=4).augment(X)
    with pytest.raises(MechInterpError, match=r"W_in \(3, 5\) has 5 neurons and W_out \(4, 3\) has 4"):
        neuron_heads(layout, W_in, W_out[:4])
    with pytest.raises(MechInterpError, match="for 3 coordinates; expected 3 entries"):
        neuron_heads(layout, W_in[:2], W_out)
    heads = neuron_heads(layout, W_in, W_out)
    with pytest.raises(MechInterpError, match=r"W_Q has shape \(5, 4, 1\), expected \(5, 5, 1\).*W_O"):
        SoftmaxHeads(Layout(4), heads.W_Q, heads.W_K, heads.W_V, heads.W_O, masks.causal)
    with pytest.raises(MechInterpError, match="needs 5 scratch coordinates and the stream has 0"):
        three_sublayers(layout, W_in, W_out)
    with pytest.raises(MechInterpError, match="needs 5 persistent rows"):
        solu_heads(layout, W_in, W_out)
    with pytest.raises(MechInterpError, match="d_head=0"):
        linear_sublayer(layout, torch.eye(3), d_head=0)
    with pytest.raises(MechInterpError, match="of 5 heads; take one"):
        heads.W_QK  # noqa: B018
    half = [W.bfloat16() for W in (W_in, W_in, W_out)]
    with pytest.raises(MechInterpError, match="float32 or float64, got bfloat16"):
        gated_mlp(Layout(3, scratch=5), *half)
