"""Composition on tokens against dense products, against circuits that are known, and against its null."""

import sys

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.circuits.token_pairs import _scores
from tests.conftest import ROOT, tiny_bridge

sys.path.insert(0, str(ROOT / "benchmarks"))


@pytest.mark.parametrize("kind", ["Q", "K"])
def test_scores_are_cosines_of_dense_maps_from_tokens(kind):
    """Every pair of attention heads and of neurons with heads, grouped keys, float64."""
    model = mia.convert(tiny_bridge(n_key_value_heads=2))
    found = mia.circuits.token_composition(model, kind, None, "attention")
    assert found.receipt.ok
    assert len(found.frame) == 4 * (4 + 24)  # layer 1 reads the heads and neurons of layer 0
    E = model.W_E.detach().double()
    E = E - E.mean(1, keepdim=True)  # LayerNorm's readers see no mean
    E = E - E.mean(0)
    for row in found.frame.iloc[::9].itertuples():
        one, two = model[row.src], model[row.dst]
        out = one.W_O.double()
        out = out - out.mean(1, keepdim=True)
        QK = two.QK.dense().double()
        left, right = E @ one.W_V.double() @ out, E @ (QK if kind == "K" else QK.T)
        cosine = float((left * right).sum() / left.norm() / right.norm())
        assert row.score == pytest.approx(cosine, abs=1e-10)
        inner = left.T @ right / left.norm() / right.norm()
        assert row.spread == pytest.approx(float(inner.norm()) / 16**0.5, rel=1e-9)
    assert found.frame["score"].abs().max() <= 1
    assert found.frame["score"].is_monotonic_decreasing


def test_the_pairs_of_induction_circuits_come_first():
    """In a trained model both induction heads with the previous-token head; in a planted one, its edge."""
    found = mia.circuits.token_composition(mia.load("gelu-2l")).frame
    assert set(zip(found["src"][:2], found["dst"][:2], strict=True)) == {("L0H2", "L1H1"), ("L0H2", "L1H3")}
    assert found["score"][1] > 5 * found["score"][2]
    import planted

    circuit = planted.induction()
    first = mia.circuits.token_composition(circuit.model).frame.iloc[0]
    assert (first["src"], first["dst"], "K") in circuit.edges


def test_the_circuit_that_frobenius_misses_is_seen(data):
    """Below the random mean by squares, far above it on tokens."""
    model = mia.load(data / "models" / "indhead_2l")
    found = mia.circuits.token_composition(model).frame.iloc[0]
    assert (found["src"], found["dst"]) == ("L0H0", "L1H0")
    assert found["score"] == pytest.approx(0.293, abs=0.002)
    assert found["z"] > 20 > 0 > mia.circuits.composition(model).frame["z"].max()


def test_a_hundredth_of_turned_heads_is_above_the_99th_percentile():
    """What the earlier head writes turned at random: z has mean 0, variance 1 and a normal tail."""
    d, r, n = 24, 4, 4000
    generator = torch.Generator().manual_seed(0)

    def draw(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    root, V, out = draw(d, d), draw(1, d, r), draw(1, r, d)
    turns = torch.linalg.qr(draw(n, d, d))[0]
    turns = turns * turns.new_tensor(1.0).copysign(draw(n, 1, d))  # both orientations
    score, spread = _scores(root @ root.T, V.expand(n, -1, -1), out @ turns, draw(1, d, r), draw(1, d, r))
    near = score[:, 0] / spread[:, 0].square().mean().sqrt()
    assert abs(float(near.mean())) < 0.06  # four standard errors
    assert float((near > 2.326).double().mean()) == pytest.approx(0.01, abs=0.007)


def test_what_cannot_be_asked_is_said(as_users_run_it):
    model = mia.load("attn-2l")
    with pytest.raises(mia.MechInterpError, match="nothing is looked for"):
        mia.circuits.token_composition(model, "V")
    with pytest.raises(mia.MechInterpError, match="src must come earlier"):
        mia.circuits.token_composition(model, "K", "L1H0", "L0H1")
    with pytest.raises(mia.MechInterpError, match="max_bytes"):
        mia.circuits.token_composition(model, max_bytes=1000)
