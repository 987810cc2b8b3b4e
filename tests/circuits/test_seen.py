"""What softmax and norms see is in the circuits, and nothing else is.

Query biases, norms behind a sublayer or the embedding, neurons at the end of a chain: against what the
model itself computes, or dense float64 products. Then the symmetries of a transformer, as properties.
"""

import sys

import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import mechinterp_attn as mia
from tests.circuits import dense
from tests.circuits.test_composition import random_model
from tests.conftest import tiny_bridge

C = mia.circuits


def biased(seed: int = 0, **changes):
    """A random model in which every bias is there."""
    model = random_model(seed, **changes)
    generator = torch.Generator().manual_seed(seed + 100)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ".b_" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def test_a_head_that_asks_with_its_bias_alone():
    """W_Q = 0 and b_Q along the key of token 7: every query attends to token 7 most."""
    model = random_model(d_vocab=20, d_head=16)
    bank = model.banks[0]
    with torch.no_grad():
        keys = model.W_E @ bank.W_K[1]
        keys = keys / keys.norm(dim=1, keepdim=True)
        bank.W_K[1] = torch.linalg.pinv(model.W_E) @ keys
        bank.W_Q[1] = 0
        bank.b_Q[1] = (model.W_E @ bank.W_K[1])[7]
    found = C.qk_top(model, "L0H1", over="rows", top_k=1).frame
    assert found["token_id"].tolist() == [7] * 20
    trigrams = C.skip_trigrams(model, "L0H1", sources=[7], top_k=1).frame
    assert (trigrams["qk"] > 0).all()


def test_qk_circuits_say_what_a_trained_model_attends_to():
    """attn-1l, 12 queries and 120 keys at one pair of positions: rank correlation with the real scores,
    against the circuit without the query's bias. What is missing to 1 are the norm's scales."""
    model = mia.load("attn-1l")
    generator = torch.Generator().manual_seed(0)
    keys, queries = (torch.randperm(model.spec.d_vocab, generator=generator)[:n] for n in (120, 12))
    pairs = torch.cartesian_prod(queries, keys)
    _, cache = model.run_with_cache(pairs.flip(1))  # the key stands before the query
    for h in range(4):
        real = cache["blocks.0.attn.hook_attn_scores"][:, h, 1, 0].view(12, 120)
        table = C.qk_circuit(model, f"L0H{h}").block(queries.tolist(), keys.tolist()).values
        head = model[f"L0H{h}"]
        rows, columns = (model.W_E.detach()[ids].double() for ids in (queries, keys))
        plain = rows @ dense.qk(head) @ columns.T
        rho, without = (
            pd.DataFrame(real.T.numpy()).corrwith(pd.DataFrame(t.T.numpy()), method="spearman").mean()
            for t in (table, plain)
        )
        assert rho > 0.6
        assert rho > without + 0.2


def test_neurons_and_heads_are_read_with_one_meaning():
    model = biased(d_mlp=6)
    x = model.W_E.detach()
    for label in ("L0H1", "L1N4", "L0H1 > L1H2"):
        head = C.resolve_head(model, label)
        torch.testing.assert_close(head.query_read(x), x @ head.W_Q + head.b_Q)


@pytest.mark.parametrize("label", ["L0H2 > L1N3", "L0H1 > L0N2 > L1N3", "L0N2 > L1H0 > L1N3"])
def test_a_neuron_at_the_end_of_a_chain_fires_on_what_was_moved_to_it(label):
    """Its pre-activation on the query token with the key token moved there, one pair at a time."""
    model = biased(1, d_mlp=6)
    *before, last = (model[part] for part in label.split(" > "))
    x = model.W_E.detach()
    moved = x
    for head in before:
        moved = moved @ head.W_V @ head.W_O
    expected = ((x[:, None] + moved) @ last.W_Q + last.b_Q)[..., 0]
    head = C.resolve_head(model, label)
    assert head.mixes_positions
    table = C.qk_circuit(model, label).block(list(range(20)), list(range(20))).values
    torch.testing.assert_close(table, expected, rtol=0, atol=1e-9)
    found = C.qk_top(model, label, top_k=5).frame
    assert found["value"].to_numpy() == pytest.approx(expected.flatten().topk(5).values.numpy())
    assert C.factoring_bugs(model, label, top_k=2).receipt.ok
    assert C.skip_trigrams(model, label, top_k=3).receipt.ok


def test_neurons_one_after_the_other_see_their_own_token():
    model = biased(2, d_mlp=6)
    one, two = model["L0N2"], model["L1N3"]
    x = model.W_E.detach()
    z = (x + x @ one.W_V @ one.W_O) @ two.W_Q + two.b_Q
    found = C.qk_top(model, "L0N2 > L1N3", top_k=4).frame
    assert found["value"].to_numpy() == pytest.approx(z[:, 0].topk(4).values.numpy())
    assert (found["source_id"] == found["token_id"]).all()
    with pytest.raises(mia.MechInterpError, match="sees only its own token"):
        C.factoring_bugs(model, "L0N2 > L1N3")


def test_bugs_are_checked_against_the_circuits(monkeypatch):
    """The receipt turns red when a half is wrong, which no product of the same halves could show."""
    bugs = sys.modules["mechinterp_attn.circuits.bugs"]
    model = random_model(d_vocab=12)
    assert C.factoring_bugs(model, "L0H0").receipt.ok
    right = bugs.halves_of

    def wrong(*args):
        query, key, read, write = right(*args)
        return 1.01 * query, key, read, write

    monkeypatch.setattr(bugs, "halves_of", wrong)
    with pytest.warns(mia.FailedCheckWarning):
        assert not C.factoring_bugs(model, "L0H0").receipt.ok


# The symmetries: changes of the weights after which the model computes the same.

LABELS = ("L0H0", "L0H2", "L1H1", "L0N3", "L1N5", "L0H1 > L1H2")


def scores_of(model) -> dict[str, torch.Tensor]:
    """Every score and z that the package reads from weights, under names that a permutation keeps."""
    found = {}

    def keep(name, frame, columns, key="head"):
        keys = [key] if isinstance(key, str) else key
        frame = frame.sort_values(keys, kind="stable")
        for column in columns:
            found[f"{name} {column}"] = torch.tensor(frame[column].to_numpy(dtype=float))

    pair = ["src", "dst"]
    keep("copying", C.copying_scores(model, diagonals=True).frame,
         ["copying_score", "z", "eigenvalue", "size", "positive_diagonal", "top1_on_diagonal"])  # fmt: skip
    for kind in "QKV":
        keep(kind, C.composition(model, kind).frame, ["score", "baseline", "z", "z_spectrum"], pair)
    weights = mia.detect.score_weights(model, draws=2)
    keep("weights", weights.frame, ["copying", "copying_z", "pure_copying", "induction", "induction_z"])
    keep("pairs", weights.pairs, ["composition", "trace", "trace_z", "matching", "matching_z"], pair)
    keep("virtual", C.virtual_heads(model, top_k=6).frame, ["norm", "score", "z", "copying_score"])
    for label in LABELS:
        directions = C.singular_directions(model, label, components=1, top_k=3)
        found[f"{label} directions"] = directions.singular_values
        found[f"{label} in and out"] = torch.tensor(directions.frame["value"].to_numpy())
        for name, circuit in (("OV", C.ov_circuit), ("QK", C.qk_circuit)):
            circuit = circuit(model, label)
            found[f"{label} {name}"] = torch.tensor(circuit.statistics().frame["value"].to_numpy())
        found[f"{label} ov_top"] = torch.tensor(C.ov_top(model, label, top_k=5).frame["value"].to_numpy())
        found[f"{label} qk_top"] = torch.tensor(
            C.qk_top(model, label, top_k=1, over="rows").frame["value"].to_numpy()
        )
    found["trigrams"] = torch.tensor(C.skip_trigrams(model, top_k=5).frame["value"].to_numpy())
    found["bigrams"] = torch.tensor(C.bigrams(model, top_k=3).frame["value"].to_numpy())
    reads = C.reads_and_writes(model, ["L0N3", "L1N5"], top_k=3).frame
    found["reads and writes"] = torch.tensor(reads["value"].to_numpy())
    return found


UNITLESS = """copying_score z positive_diagonal top1_on_diagonal score baseline z_spectrum copying copying_z
pure_copying induction induction_z composition trace_z matching matching_z"""


def unchanged(before, after):
    """To float64 rounding; eigenvalues of random products of heads lose some digits."""
    wrong = [
        name
        for name, value in before.items()
        if not torch.allclose(after[name], value, rtol=1e-6, atol=1e-8, equal_nan=True)
    ]
    assert not wrong


def symmetric(seed: int):
    """Without norms, with all biases; some tens of heads."""
    return biased(seed, d_vocab=16, d_mlp=8, d_model=24, d_head=5)


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1000))
def test_turning_the_residual_stream_changes_nothing(seed):
    model = symmetric(seed)
    before = scores_of(model)
    generator = torch.Generator().manual_seed(seed)
    R = torch.linalg.qr(torch.randn(24, 24, generator=generator, dtype=torch.float64)).Q
    with torch.no_grad():
        model.W_E.copy_(model.W_E @ R)
        model.W_pos.copy_(model.W_pos @ R)
        model.W_U.copy_(R.T @ model.W_U)
        for bank in model.banks:
            for name, W in bank.named_parameters():
                if name in ("W_Q", "W_K", "W_V", "W_in"):
                    W.copy_(R.T @ W)
                elif name in ("W_O", "W_out", "b_O", "b_out"):
                    W.copy_(W @ R)
    unchanged(before, scores_of(model))


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(0.2, 5))
def test_gauges_of_heads_and_shifts_of_logits_change_nothing(seed, size):
    """OV and QK each in another basis of the head, other key biases, a vector on all columns of W_U."""
    model = symmetric(seed)
    before = scores_of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for bank in model.banks[::2]:
            for h in range(bank.n_heads):
                G, H = (torch.randn(5, 5, generator=generator, dtype=torch.float64) for _ in range(2))
                bank.W_V[h] = bank.W_V[h] @ G
                bank.b_V[h] = bank.b_V[h] @ G
                bank.W_O[h] = torch.linalg.inv(G) @ bank.W_O[h]
                bank.W_Q[h] = bank.W_Q[h] @ H * size
                bank.b_Q[h] = bank.b_Q[h] @ H * size
                bank.W_K[h] = bank.W_K[h] @ torch.linalg.inv(H).T / size
                bank.b_K[h] = torch.randn(5, generator=generator, dtype=torch.float64)
        model.W_U.add_(10 * torch.randn(24, 1, generator=generator, dtype=torch.float64))
    unchanged(before, scores_of(model))


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(-20, 20))
def test_what_layer_norm_takes_out_changes_nothing(seed, size):
    """A constant added to all coordinates of embeddings, positions and whatever heads write."""
    model = mia.convert(tiny_bridge(seed=seed % 50, d_model=24, d_head=5, d_mlp=8))
    assert model.spec.mean_unseen
    before = scores_of(model)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for W in (
            model.W_E,
            model.W_pos,
            *(b.W_O if b.kind == "attention" else b.W_out for b in model.banks),
        ):
            W.add_(size * torch.randn(*W.shape[:-1], 1, generator=generator, dtype=torch.float64))
        model.W_E.add_(size)
    unchanged(before, scores_of(model))


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1000))
def test_the_order_of_heads_changes_nothing(seed):
    model = symmetric(seed)
    before = {k: v for k, v in scores_of(model).items() if not k.startswith(LABELS)}
    order = torch.randperm(3, generator=torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for bank in model.banks[::2]:
            for name, W in bank.named_parameters():
                if name != "b_O":
                    W.copy_(W[order].clone())
    after = scores_of(model)
    assert len(before) > 20
    unchanged(
        *({name: found[name].nan_to_num(9).sort().values for name in before} for found in (before, after))
    )


@settings(max_examples=2, deadline=None)
@given(seed=st.integers(0, 1000), size=st.floats(0.1, 10))
def test_scores_have_no_units(seed, size):
    """Logits and what heads write in other units: ratios and z stay, sizes follow."""
    model = symmetric(seed)
    before = scores_of(model)
    with torch.no_grad():
        model.W_U.mul_(size)
        for bank in model.banks:
            (bank.W_O if bank.kind == "attention" else bank.W_out).mul_(3 * size)
    scores = [name for name in before if name.split()[-1] in UNITLESS.split()]
    assert len(scores) > 20
    after = scores_of(model)
    unchanged({name: before[name] for name in scores}, after)
