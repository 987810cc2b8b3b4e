"""Heads, labels and the low-rank factors they are made of."""

import math

import pytest
import torch
from hypothesis import given, settings, strategies as st

import mechinterp_attn as mia
from mechinterp_attn.model.low_rank import LowRank
from tests.conftest import random_tokens, tiny_bridge


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge(act_fn="silu"))


def test_every_head_has_a_label_and_a_row(model):
    frame = model.heads.frame
    assert list(frame.columns) == ["head", "layer", "kind", "index"]
    assert model.n_heads == len(frame) == 2 * (4 + 24)
    assert list(frame["head"]) == list(model.heads)
    for row in frame.itertuples():
        head = model[row.head]
        assert (head.layer, head.kind, head.index) == (row.layer, row.kind, row.index)
        assert row.head == f"L{row.layer}{'H' if row.kind == 'attention' else 'N'}{row.index}"


@pytest.mark.parametrize("label", ["L0H4", "L2H0", "L0N24", "L0X1"])
def test_an_unknown_head_is_told_which_exist(model, label):
    with pytest.raises(mia.MechInterpError, match=rf"no head {label}; .*L0H0\.\.L0H3, L0N0\.\.L0N23"):
        model[label]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("label", ["", "H3", "head 3", "L0H", 3])
def test_a_malformed_label_is_told_the_form(model, label):
    with pytest.raises(mia.MechInterpError, match="not a head label; write L<layer>H<head>"):
        model[label]


@pytest.mark.parametrize(
    ("heads", "labels"),
    [
        ("L1H*", ["L1H0", "L1H1", "L1H2", "L1H3"]),
        ("l0n10-12", ["L0N10", "L0N11", "L0N12"]),
        ("L0-1H3", ["L0H3", "L1H3"]),
        ("L*N23", ["L0N23", "L1N23"]),
        (["L1H2", "L1H2 ", ("L0H1", "L1H2"), "l0h1>L0N3"], ["L1H2", "L0H1 > L1H2", "L0H1 > L0N3"]),
        ("L0*", [f"L0H{i}" for i in range(4)] + [f"L0N{i}" for i in range(24)]),
        ("attention", [f"L{layer}H{i}" for layer in range(2) for i in range(4)]),
        ({"L1N2": "a dictionary's keys"}, ["L1N2"]),
    ],
)
def test_heads_are_chosen_by_labels_patterns_and_kinds(model, heads, labels):
    assert model.heads.labels(heads) == labels
    assert [head.label for head in model.heads.select(heads)] == labels
    assert all(head.model is model for head in model.heads.select(heads))


def test_a_model_gives_heads_by_label_number_and_pattern(model):
    assert model["l1h2"].label == model[1, 2].label == model[-1, -2].label == "L1H2"
    assert [head.label for head in model["L1H2-3"]] == ["L1H2", "L1H3"]
    chain = model["L0H1 > L1H2"]
    assert [head.label for head in chain.chain] == ["L0H1", "L1H2"]
    assert model["L0N3"].chain[0].index == 3
    assert {"L0H0", "L1N23", "mlp"} <= set(model._ipython_key_completions_())
    given = model["L1H0"]
    assert model.heads.select([given]) == [given]
    mixture = mia.convert(tiny_bridge(), mlp="mixture", components=2)
    assert mixture.heads.labels("L0N3-4") == ["L0N3.0", "L0N3.1", "L0N4.0", "L0N4.1"]
    assert mixture.heads.labels("L*N0.1") == ["L0N0.1", "L1N0.1"]


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ("L7H*", r"no head matches 'L7H\*'; this model has L0H0\.\.L0H3"),
        ([], "no heads selected"),
        (["L1H9", "nonsense"], r"no head L1H9.*near it: L1.*; 'nonsense' is not a head label"),
        (("L1H0", "L0H1"), None),
        ([("L1H0", "L0H1")], "L0H1 does not read what L1H0 writes"),
        ("L1H0 > L0H1", "L0H1 does not read what L1H0 writes"),
    ],
)
def test_what_cannot_be_chosen_is_said_at_once(model, heads, message):
    if message is None:  # a tuple at the top is a list, not a virtual head
        assert model.heads.labels(heads) == list(heads)
        return
    with pytest.raises(mia.MechInterpError, match=message):
        model.heads.select(heads)


def test_a_kind_that_a_model_has_not_is_named():
    model = mia.convert(tiny_bridge(attn_only=True))
    with pytest.raises(mia.MechInterpError, match="no heads of kind 'mlp'"):
        model.heads.select("mlp")
    with pytest.raises(mia.MechInterpError, match="no head 4 in layer 0"):
        model[0, 4]


@pytest.mark.parametrize("label", ["L0H1", "L1N7"])
def test_what_a_head_holds_has_the_same_axes_for_every_kind(model, label):
    """``by_head`` is a view: what is written into it stands in the hook's own tensor."""
    bank = model[label].bank
    tokens = random_tokens(model)
    _, cache = model.run_with_cache(tokens)
    z = cache[bank.hook("z")]
    by_head = bank.by_head(z)
    assert by_head.shape == (*tokens.shape, bank.n_heads, bank.d_head)
    by_head[:, :, 0] = 7
    assert bool((z[:, :, 0] == 7).all())


def test_head_weights_are_those_of_a_folded_bridge():
    """TransformerLens's own folding of the same model, centring included, gives the same weights."""
    rounding = dict(rtol=0, atol=1e-5)  # TransformerLens folds in float32, whatever the dtype
    bridge, folded = tiny_bridge(), tiny_bridge()
    folded.enable_compatibility_mode(
        fold_ln=True, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    model = mia.convert(bridge)
    for label, layer, index in [("L0H3", 0, 3), ("L1H0", 1, 0)]:
        head, attn = model[label], folded.blocks[layer].attn
        for name in ("W_Q", "W_K", "W_V", "W_O", "b_Q", "b_K", "b_V"):
            torch.testing.assert_close(getattr(head, name), getattr(attn, name)[index], **rounding)
    for label, layer, index in [("L0N0", 0, 0), ("L1N23", 1, 23)]:
        head, mlp = model[label], folded.blocks[layer].mlp
        torch.testing.assert_close(head.W_Q[:, 0], mlp.W_in[:, index], **rounding)
        torch.testing.assert_close(head.W_V, head.W_Q)
        torch.testing.assert_close(head.b_Q[0], mlp.b_in[index], **rounding)
        torch.testing.assert_close(head.W_O[0], mlp.W_out[index], **rounding)
        assert head.QK.rank == head.OV.rank == 1


def test_ov_and_qk_are_products_of_the_weights(model):
    for label in ("L0H2", "L1N5"):
        head = model[label]
        torch.testing.assert_close(head.OV.dense(), head.W_V @ head.W_O)
        torch.testing.assert_close(head.QK.A @ head.QK.B, head.W_Q @ head.W_K.T)
        assert head.OV.shape == head.QK.shape == (16, 16)


def test_a_silu_neuron_is_a_softmax_over_itself_and_the_bias_token(model):
    """Huben & Morris: scores (z, 0), softmax, value z; built here token by token."""
    tokens = random_tokens(model, batch=1, pos=6)
    _, cache = model.run_with_cache(tokens)
    head = model["L0N7"]
    x = cache["blocks.0.ln2.hook_normalized"][0]
    z = (x @ head.W_Q + head.b_Q)[:, 0]
    expected = torch.zeros(6, 7, dtype=torch.float64)
    for i in range(6):
        scores = torch.full((7,), -math.inf, dtype=torch.float64)
        scores[i], scores[6] = z[i], 0.0
        expected[i] = scores.softmax(0)
    pattern = head.pattern(cache)
    torch.testing.assert_close(pattern, expected, rtol=0, atol=1e-14)
    values = torch.cat([(x @ head.W_V + head.b_V)[:, 0], torch.zeros(1, dtype=torch.float64)])
    torch.testing.assert_close(pattern @ values, cache["blocks.0.mlp.hook_post"][0, :, 7])


def test_patterns_come_with_a_bias_column_for_every_kind(model):
    tokens = random_tokens(model, batch=3, pos=5)
    _, cache = model.run_with_cache(tokens)
    own = cache["blocks.1.attn.hook_pattern"][2, 1]
    pattern = model["L1H1"].pattern(cache, batch=2)
    assert pattern.shape == (5, 6)
    assert torch.equal(pattern[:, :5], own)
    assert not pattern[:, 5].any()
    _, flat = model.run_with_cache(tokens[2:], remove_batch_dim=True)
    torch.testing.assert_close(model["L1H1"].pattern(flat), pattern)
    torch.testing.assert_close(model["L1N3"].pattern(flat), model["L1N3"].pattern(cache, batch=2))


@settings(max_examples=40, deadline=None)
@given(rows=st.integers(1, 9), rank=st.integers(1, 4), seed=st.integers(0, 10_000))
def test_low_rank_agrees_with_the_dense_matrix(rows, rank, seed):
    generator = torch.Generator().manual_seed(seed)
    A = torch.randn(rows, rank, generator=generator, dtype=torch.float64)
    B = torch.randn(rank, rows, generator=generator, dtype=torch.float64)
    low, dense = LowRank(A, B), A @ B
    # float64, sizes below 10: a few units in the last place of sums of at most 36 terms
    assert low.norm() == pytest.approx(float(torch.linalg.matrix_norm(dense)), rel=1e-10, abs=1e-10)
    torch.testing.assert_close(low.T.dense(), dense.T)
    assert low.eigenvalues().sum().real == pytest.approx(float(dense.trace()), abs=1e-9)
    powers = torch.linalg.eigvals(dense).pow(2).sum().real
    assert low.eigenvalues().pow(2).sum().real == pytest.approx(float(powers), abs=1e-7)
