"""What weights say: against dense matrices over the vocabulary, planted circuits, random models."""

import numpy as np
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.circuits import dense
from tests.conftest import tiny_bridge
from tests.detect.constructed import known_heads


def test_eigenvalues_and_norms_are_those_of_the_dense_matrices():
    """numpy on 13 x 13 matrices over the vocabulary and 16 x 16 ones over the stream."""
    model = mia.convert(tiny_bridge(n_key_value_heads=2))
    result = mia.detect.score_weights(model, draws=1)
    frame = result.frame.set_index("head")
    W_E, W_U = (W.detach().numpy() for W in (model.W_E, model.W_U))
    seen = dense.centring(13).numpy()  # softmax over the vocabulary, and over keys, sees no constant
    for label in ("L0H3", "L1H0", "L0N5"):
        eigenvalues = np.linalg.eigvals(W_E @ dense.ov(model[label]).numpy() @ W_U @ seen)
        size = np.abs(eigenvalues).sum()
        assert frame.loc[label, "copying"] == pytest.approx(eigenvalues.sum().real / size, abs=1e-9)
        assert frame.loc[label, "copying_size"] == pytest.approx(size / 13, rel=1e-9)
    for row in result.pairs.itertuples():
        QK, OV = dense.qk(model[row.dst]).numpy(), dense.ov(model[row.src]).numpy()
        bias = model[row.dst].b_Q.numpy() @ model[row.dst].W_K.numpy().T
        eigenvalues = np.linalg.eigvals((W_E @ QK + bias) @ OV.T @ W_E.T @ seen)
        assert row.trace == pytest.approx(eigenvalues.sum().real / 12, rel=1e-9)
        assert row.matching == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-9)
        norms = np.linalg.norm(QK) * np.linalg.norm(OV)
        assert row.composition == pytest.approx(np.linalg.norm(QK @ OV.T) / norms, rel=1e-9)
    assert len(result.pairs) == 16
    assert result.receipt.ok


def test_pure_copying_in_words():
    """Of 13 tokens, all of them drawn: logits through OV, mean removed, negatives dropped, own share."""
    model = mia.convert(tiny_bridge())
    result = mia.detect.score_weights(model, draws=1).frame.set_index("head")
    for label in ("L0H1", "L1N20"):
        logits = (model.W_E @ model[label].OV.dense() @ model.W_U).detach()
        raised = (logits - logits.mean(-1, keepdim=True)).clamp_min(0)
        shares = [float(raised[t, t] / raised[t].sum()) for t in range(13)]
        assert result.loc[label, "pure_copying"] == pytest.approx(2 * np.mean(shares) - 1, abs=1e-9)


def test_the_planted_circuit_is_found_and_nothing_else():
    result = mia.detect.score_weights(known_heads())
    frame = result.frame.set_index("head")
    assert frame.loc["L1H0", "copying"] == pytest.approx(1)
    assert frame.loc["L1H0", "pure_copying"] == pytest.approx(1)
    assert frame.loc["L1H0", "from_head"] == "L0H0"
    assert frame.loc["L1H0", "induction"] == pytest.approx(1)
    pairs = result.pairs.set_index(["src", "dst"])
    assert pairs.loc[("L0H0", "L1H0"), "trace"] == pytest.approx(80)  # 80 on every token: the weights
    assert pairs.loc[("L0H0", "L1H0"), "trace_z"] > 20
    assert (pairs["trace"].drop(("L0H0", "L1H0")) == 0).all()


def test_random_models_stay_in_the_null():
    z = []
    for seed in range(4):
        torch.manual_seed(seed)
        bridge = tiny_bridge(
            d_model=32, d_head=8, d_vocab=40, attn_only=True, d_mlp=None, seed=seed, noise=0
        )
        result = mia.detect.score_weights(mia.convert(bridge), seed=seed)
        z += [*result.frame["copying_z"].dropna(), *result.pairs["trace_z"], *result.pairs["matching_z"]]
    assert len(z) == 4 * (8 + 32)
    assert np.abs(np.mean(z)) < 0.35  # 160 draws of deviation 1, some shared
    assert 0.7 < np.std(z) < 1.4
    assert np.abs(z).max() < 5


def test_a_real_induction_model(data):
    """Its K-composition is small, below that of random heads, and yet all eigenvalues are positive."""
    result = mia.detect.score_weights(mia.load(data / "models" / "indhead_2l"))
    row = result.pairs.iloc[0]
    assert row["composition"] == pytest.approx(0.060, abs=5e-4)
    assert row["matching"] == pytest.approx(1.00, abs=5e-3)
    assert row["trace_z"] > 10
    assert result.frame.set_index("head").loc["L1H0", "copying"] == pytest.approx(1.00, abs=5e-3)


def test_one_layer_has_no_pairs():
    result = mia.detect.score_weights(mia.convert(tiny_bridge(n_layers=1)), draws=1)
    assert result.pairs.empty
    assert result.frame["from_head"].isna().all()


def test_other_outputs_are_aligned_and_a_wrong_alignment_is_refused():
    """13 tokens in, 5 out: each output stands for the input token of its number; the receipt says so."""
    model = mia.convert(tiny_bridge(d_vocab_out=5))
    found = mia.detect.score_weights(model, draws=1)
    given = mia.detect.score_weights(model, draws=1, align=range(5))
    assert found.frame["copying"].equals(given.frame["copying"])
    assert "alignment" in found.receipt.notes
    with pytest.raises(MechInterpError, match="align"):
        mia.detect.score_weights(model, align=[0, 99])


def test_virtual_heads_copy_as_the_product_does():
    model = mia.convert(tiny_bridge())
    heads = ["L1N20", "L0H1 > L1H2", "L0H0"]
    result = mia.detect.score_weights(model, heads, draws=1)
    assert list(result.frame["head"]) == heads
    assert list(result.frame["kind"]) == ["mlp", "virtual", "attention"]
    W_E, W_U = (W.detach().numpy() for W in (model.W_E, model.W_U))
    OV = model["L0H1"].OV.dense().numpy() @ model["L1H2"].OV.dense().numpy()
    eigenvalues = np.linalg.eigvals(W_E @ OV @ W_U @ dense.centring(13).numpy())
    own = result.frame.set_index("head").loc["L0H1 > L1H2"]
    assert own["copying"] == pytest.approx(eigenvalues.sum().real / np.abs(eigenvalues).sum(), abs=1e-9)
    logits = torch.as_tensor(W_E @ OV @ W_U)
    raised = (logits - logits.mean(-1, keepdim=True)).clamp_min(0)
    shares = (raised.diagonal() / raised.sum(-1)).mean()
    assert own["pure_copying"] == pytest.approx(2 * float(shares) - 1, abs=1e-9)
