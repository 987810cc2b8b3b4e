"""Scores of heads from their patterns: constructed models, a real one, TransformerLens's detector."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.errors import MechInterpError
from tests.conftest import tiny_bridge
from tests.detect.constructed import FIRES_ON, PLANTED, ROLES, V, known_heads

KINDS = ["previous_token", "current_token", "first_token", "duplicate_token", "induction"]


def by_head(model, **options):
    return mia.detect.score_heads(model, **options).frame.set_index("head")


def test_known_heads_score_one_for_what_they_do_and_near_zero_for_the_rest():
    scores = by_head(known_heads())
    for head, role in ROLES.items():
        assert scores.loc[head, role] == pytest.approx(1, abs=1e-6)
        # A head that finds nothing to match rests on the first token, which also happens to be the
        # previous token of one query and the duplicate of a few.
        rests = {"first_token"} if role in ("duplicate_token", "induction") else set()
        others = [kind for kind in KINDS if kind != role and kind not in rests]
        assert scores.loc[head, others].max() <= 1 / V + 1e-6


def test_a_planted_neuron_looks_at_itself_where_it_fires_and_nowhere_else():
    result = mia.detect.score_heads(known_heads(neurons=True), draws=3)
    scores = result.frame.set_index("head")
    fires = (result.probe.tokens[:, 1:] == FIRES_ON).double().mean()
    assert scores.loc[PLANTED, "current_token"] == pytest.approx(float(fires), abs=1e-12)
    neurons = scores[scores["kind"] == "mlp"]
    assert len(neurons) == 8
    assert (neurons[["previous_token", "first_token", "duplicate_token", "induction"]] == 0).all(axis=None)
    assert (neurons["current_token"].drop(PLANTED) == 0).all()


def test_without_the_previous_token_head_there_is_no_induction_head():
    model = known_heads()
    with torch.no_grad():
        model.blocks[0].attn.W_O[0] = 0
    scores = by_head(model)
    assert scores.loc["L0H0", "previous_token"] == pytest.approx(1, abs=1e-6)  # it still looks there
    assert scores.loc["L1H0", "induction"] < 1e-6


def test_the_table_has_the_columns_that_others_rely_on():
    model = known_heads(neurons=True)
    frame = mia.detect.score_heads(model, draws=1).frame
    assert list(frame.columns[:9]) == ["head", "layer", "index", "kind", *KINDS]
    assert list(frame["head"]) == list(model.heads)
    assert frame[KINDS].notna().all(axis=None)
    assert ((frame[KINDS] >= 0) & (frame[KINDS] <= 1 + 1e-12)).all(axis=None)


def test_scores_are_the_patterns_averaged_one_by_one():
    """The same numbers from the bridge's own patterns, with loops and the definitions in words."""
    bridge = tiny_bridge(n_ctx=20, d_vocab=7)
    result = mia.detect.score_heads(mia.convert(bridge), draws=2, seed=3)
    scores = result.frame.set_index("head")
    tokens = result.probe.tokens
    _, cache = bridge.run_with_cache(tokens)
    for layer in range(2):
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        for head in range(4):
            sums = {kind: [] for kind in KINDS}
            for row, A in zip(tokens.tolist(), pattern[:, head].tolist(), strict=True):
                for i in range(1, len(row)):
                    same = [j for j in range(i) if row[j] == row[i]]
                    sums["previous_token"].append(A[i][i - 1])
                    sums["current_token"].append(A[i][i])
                    sums["first_token"].append(A[i][0])
                    if same:
                        sums["duplicate_token"].append(sum(A[i][j] for j in same))
                        sums["induction"].append(sum(A[i][j + 1] for j in same))
            for kind, values in sums.items():
                mean = sum(values) / len(values)
                assert scores.loc[f"L{layer}H{head}", kind] == pytest.approx(mean, abs=1e-12)


def test_a_real_induction_model(data):
    """A published 2-layer model: L0 attends to the previous token, L1 to what followed."""
    scores = by_head(mia.load(data / "models" / "indhead_2l"), draws=200)
    assert scores.loc["L0H0", "previous_token"] == pytest.approx(1.00, abs=0.005)
    assert scores.loc["L0H0", "induction"] < 0.01
    assert scores.loc["L1H0", "induction"] == pytest.approx(0.88, abs=0.02)
    assert scores.loc["L1H0", "previous_token"] < 0.2


def test_the_seed_decides_the_numbers():
    model = mia.convert(tiny_bridge())
    first, again, other = (by_head(model, seed=seed, draws=2) for seed in (1, 1, 2))
    assert first.equals(again)
    assert not first.equals(other)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (dict(n_ctx=3), "a context of at least 4 and 2 tokens in the vocabulary; this model has 3 and 13"),
        (dict(d_vocab=1), "this model has 24 and 1"),
    ],
)
def test_too_small_for_repeats_says_the_least_that_would_do(config, message):
    model = mia.convert(tiny_bridge(d_mlp=None, attn_only=True, **config))
    with pytest.raises(MechInterpError, match=message):
        mia.detect.score_heads(model)


def test_receipt_and_html():
    result = mia.detect.score_heads(known_heads(), draws=2, seed=5)
    assert result.receipt.ok
    assert result.receipt.notes["seed"] == 5
    assert result.receipt.notes["tokens"] == "8 random tokens x 4"
    assert result.top(1)["head"].item() == "L1H0"
    assert "L1H0" in result._repr_html_()
