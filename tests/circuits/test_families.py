"""Every call over every family: grouped heads, gated and parallel blocks, norms on queries and keys,
all against dense float64 matrices."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.model.select import resolve_head
from tests.circuits import dense
from tests.circuits.test_composition import random_model
from tests.conversion.families import FAMILIES, bridge_of

C = mia.circuits
FLOAT64 = 1e-9  # sums of a few hundred float64 products of order one


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    found = mia.convert(bridge_of(request.param), check=False)
    found.tokenizer = None  # a stand-in, one special token and no texts: rankings shall list every id
    return found


@pytest.fixture(scope="module")
def heads(model):
    """An attention head that shares its keys, a neuron, and both behind an earlier head."""
    last = max(bank.layer for bank in model.banks)
    return [f"L{last}H1", f"L{last}N5", f"L0H1 > L{last}H0", f"L0N3 > L{last}H1", f"L0H1 > L{last}N2"]


def test_vocabulary_circuits(model, heads):
    for label in heads:
        head = resolve_head(model, label)
        for which, top, circuit in (("OV", C.ov_top, C.ov_circuit), ("QK", C.qk_top, C.qk_circuit)):
            table = dense.over_vocabulary(model, head, which)
            if which == "OV" or head.kind != "mlp":  # a neuron's own QK: one key per query
                found = top(model, label, top_k=6)
                assert found.frame["value"].to_numpy() == pytest.approx(
                    table.flatten().topk(6).values.numpy(), rel=FLOAT64, abs=FLOAT64
                )
                assert found.receipt.ok
            rows, columns = [3, 30], [4, 9, 5]
            block = circuit(model, label).block(rows, columns).values
            torch.testing.assert_close(block, table[rows][:, columns], rtol=FLOAT64, atol=FLOAT64)
            seen = table - table.mean(1, keepdim=True) if which == "QK" and head.compares_keys else table
            norm = circuit(model, label).statistics()["frobenius_norm"]
            assert norm == pytest.approx(float(seen.norm()), rel=1e-8)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_composition(model, kind):
    every = C.composition(model, kind)
    some = every.frame.sample(40, random_state=0)
    for row in some.itertuples():
        expected = dense.composition(model[row.src], model[row.dst], kind)
        assert row.score == pytest.approx(expected, abs=FLOAT64)
    best = C.composition(model, kind, top_k=10)
    expected = every.frame["score"].sort_values(ascending=False).head(10)
    assert best.frame["score"].to_numpy() == pytest.approx(expected.to_numpy(), abs=FLOAT64)
    assert every.receipt.ok
    assert best.receipt.ok


def test_copying_directions_and_virtual_heads(model, heads):
    scores = C.copying_scores(model)
    assert scores.receipt.ok
    own = scores.frame.set_index("head")
    for label in heads[:2]:
        table = dense.over_vocabulary(model, model[label], "OV")
        eigenvalues = torch.linalg.eigvals(table)
        assert own.loc[label, "size"] * len(table) == pytest.approx(
            float(eigenvalues.abs().sum()), rel=1e-4
        )
    for label in heads:
        found = C.singular_directions(model, label, components=1, top_k=2)
        ov = dense.ov(resolve_head(model, label))
        assert float(found.singular_values[0]) == pytest.approx(float(torch.linalg.matrix_norm(ov, 2)))
    for row in C.virtual_heads(model, top_k=3).frame.itertuples():
        product = dense.ov(model[row.src]) @ dense.ov(model[row.dst])
        assert row.norm == pytest.approx(float(product.norm()), rel=1e-8)


def test_trigrams_and_bigrams(model, heads):
    head = model[heads[0]]
    scores = dense.over_vocabulary(model, head, "QK") / head.bank.score_scale
    attention = (scores - scores.mean(1, keepdim=True)).T
    logits = dense.over_vocabulary(model, head, "OV")
    logits = logits - logits.mean(1, keepdim=True)
    cube = attention.clamp_min(0)[:, :, None] * logits.clamp_min(0)[:, None]
    found = C.skip_trigrams(model, heads[0], top_k=5)
    assert found.frame["value"].to_numpy() == pytest.approx(cube.flatten().topk(5).values.numpy(), rel=1e-8)
    assert found.receipt.ok
    assert C.skip_trigrams(model, top_k=3).receipt.ok
    assert C.factoring_bugs(model, heads[0], top_k=3).receipt.ok
    table = dense.embedded(model, model.W_E) @ model.W_U.detach().double()
    table = table - table.mean(1, keepdim=True)
    bigrams = C.bigrams(model, top_k=2)
    assert bigrams.frame["value"].to_numpy() == pytest.approx(table.topk(2).values.flatten().numpy())


def test_positions(model, heads):
    """Learned positions as a table, rotary ones as a curve; a model without says so."""
    if model.spec.positions is None:
        with pytest.raises(mia.MechInterpError, match="no positions"):
            C.position_circuit(model, heads[0])
        return
    found = C.position_circuit(model, heads[0])
    assert found.receipt.ok
    assert found.pattern.sum(-1).numpy() == pytest.approx(1.0)
    if model.spec.positions == "standard":
        P, head = model.W_pos.detach().double()[: len(found.pattern)], model[heads[0]]
        keys, queries = dense.embedded(model, P), dense.embedded(model, P, bias=True)
        scores = (queries @ head.W_Q.double() + head.b_Q.double()) @ (keys @ head.W_K.double()).T
        torch.testing.assert_close(found.scores, scores, rtol=FLOAT64, atol=FLOAT64)
        assert C.token_positions(model, heads[0], top_k=3).receipt.ok
    else:
        assert found.scores.shape == (model.spec.n_ctx,)


def test_outputs_that_are_no_inputs_and_no_positions():
    """More outputs than inputs, and neither W_pos nor rotations."""
    model = random_model(2, d_vocab_out=31, positional_embedding_type=None)
    table = dense.over_vocabulary(model, model["L1H1"], "OV")
    assert table.shape == (20, 31)
    assert C.ov_top(model, "L1H1", top_k=2).frame["value"].iloc[0] == pytest.approx(float(table.max()))
    statistics = C.ov_circuit(model, "L1H1").statistics()
    assert "copying_score" not in statistics.frame["statistic"].tolist()
    assert statistics["frobenius_norm"] == pytest.approx(float(table.norm()))
    assert C.skip_trigrams(model, top_k=2).receipt.ok
    assert C.factoring_bugs(model, "L0H0", top_k=2).receipt.ok
    assert C.bigrams(model, top_k=31).receipt.ok
    chains = C.virtual_heads(model, top_k=2)
    assert chains.frame["copying_score"].between(-1, 1).all()
    assert "outputs 0..19" in chains.receipt.notes["alignment"]
    assert C.singular_directions(model, "L1N1", components=1, top_k=3).receipt.ok
    assert len(C.composition(model, "Q", top_k=4).frame) == 4
    with pytest.raises(mia.MechInterpError, match="20 and 31 of them"):
        C.copying_scores(model, diagonals=True)
    with pytest.raises(mia.MechInterpError, match="no positions"):
        C.position_circuit(model, "L0H0")
