"""Small numbers on which verdicts stand: what each is divided by, taken from, compared with.

Every test here is one that a small slip in the package must break (``tests/mutants`` makes those slips).
"""

import math
import re

import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal.batches import rows_within
from mechinterp_attn.causal.cuts import mean_z, next_token
from mechinterp_attn.circuits import copying
from mechinterp_attn.conversion.modes import gate_bound
from mechinterp_attn.detect import removals
from mechinterp_attn.detect.weights import NULL_DRAWS, score_weights
from mechinterp_attn.paths import best_first
from tests.circuits.test_composition import random_model
from tests.conftest import random_tokens, tiny_bridge

C = mia.circuits


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


def test_copying_is_counted_from_the_mean_of_random_heads(model, monkeypatch):
    monkeypatch.setattr(copying, "_null", lambda *given: (0.25, 0.5))
    frame = C.copying_scores(model, "attention").frame
    assert frame["z"].to_numpy() == pytest.approx((frame["copying_score"].to_numpy() - 0.25) / 0.5)


def test_the_copying_null_is_that_of_drawn_heads(model):
    """Of 4 dimensions: mean and deviation of 1000 heads drawn in the stream itself, without its mean; to 4
    standard errors of 200 and of 1000 draws.
    """
    middle = (model.W_U - model.W_U.mean(1, keepdim=True)).detach() @ model.W_E.detach()
    seen = torch.eye(16, dtype=torch.float64) - 1 / 16
    generator, drawn = torch.Generator().manual_seed(5), []
    for _ in range(1000):
        read, write = torch.randn(2, 16, 4, generator=generator, dtype=torch.float64)
        values = torch.linalg.eigvals((seen @ write).T @ middle @ seen @ read)
        drawn.append(float(values.sum().real / values.abs().sum()))
    scores = torch.tensor(drawn)
    mean, spread = copying._null(copying.unembed_embed(model, torch.arange(13)), 4, 0)
    assert mean == pytest.approx(float(scores.mean()), abs=4 * spread * (1 / 200 + 1 / 1000) ** 0.5)
    assert spread == pytest.approx(float(scores.std()), rel=4 * (0.5 / 200 + 0.5 / 1000) ** 0.5)


def test_neurons_copy_in_deviations_of_drawn_directions(model):
    """The eigenvalue of 20,000 neurons of the same norm and random directions: deviation to 3 %."""
    row = C.copying_scores(model, ["L0N3"]).frame.iloc[0]
    head = model["L0N3"]
    centred = head.W_O - head.W_O.mean(-1, keepdim=True)
    size = float(head.W_V.norm() * centred.norm())
    middle = (model.W_U - model.W_U.mean(1, keepdim=True)).detach() @ model.W_E.detach()
    generator = torch.Generator().manual_seed(0)
    sides = torch.randn(2, 20_000, 16, generator=generator, dtype=torch.float64)
    sides = sides - sides.mean(-1, keepdim=True)  # every reader takes the mean out
    reads, writes = sides / sides.norm(dim=-1, keepdim=True)
    deviation = size * float(((writes @ middle) * reads).sum(-1).std())
    assert row["eigenvalue"] / row["z"] == pytest.approx(deviation, rel=0.03)


def test_a_trace_is_counted_in_deviations_of_turned_heads(model):
    """``trace_z`` against Monte Carlo: the earlier head's OV turned by 3000 random rotations of what the
    model sees, to 5 %.
    """
    pairs = score_weights(model, draws=1).pairs.set_index(["src", "dst"])
    E = model.W_E.detach() - model.W_E.detach().mean(0)
    seen = torch.linalg.qr(torch.eye(16, dtype=torch.float64)[:, :15] - 1 / 16).Q
    generator = torch.Generator().manual_seed(0)
    for src, dst in (("L0H1", "L1H2"), ("L0H3", "L1H0")):
        OV = seen.T @ model[src].OV.dense() @ seen
        turned = []
        for _ in range(3000):
            one, two = torch.linalg.qr(torch.randn(2, 15, 15, generator=generator, dtype=torch.float64)).Q
            turned.append(seen @ one @ OV @ two @ seen.T)
        QK = model[dst].W_Q @ model[dst].W_K.T
        middle = E.T @ E @ QK
        traces = (torch.stack(turned).mT.flatten(1) @ middle.mT.flatten()) / 12
        row = pairs.loc[(src, dst)]
        assert float(traces.mean()) == pytest.approx(0, abs=4 * float(traces.std()) / 3000**0.5)
        assert row["trace"] / row["trace_z"] == pytest.approx(float(traces.std()), rel=0.05)


def test_matching_is_counted_in_deviations_of_random_heads(model):
    """``matching_z`` against 400 random heads in the place of the earlier one, written out densely: to 4
    standard errors of 100 and of 400 draws.
    """
    pairs = score_weights(model, draws=1).pairs.set_index(["src", "dst"])
    E = model.W_E.detach().double()
    E = E - E.mean(0)
    seen = torch.eye(16, dtype=torch.float64) - 1 / 16
    generator, drawn = torch.Generator().manual_seed(1), []
    QK = model["L1H2"].W_Q.double() @ model["L1H2"].W_K.double().T
    for _ in range(400):
        read, write = torch.randn(2, 16, 4, generator=generator, dtype=torch.float64)
        circuit = E.T @ E @ QK @ seen @ write @ read.T @ seen
        values = torch.linalg.eigvals(circuit)
        drawn.append(float(values.sum().real / values.abs().sum()))
    mean, spread = float(torch.tensor(drawn).mean()), float(torch.tensor(drawn).std())
    one, other = pairs.loc[("L0H1", "L1H2")], pairs.loc[("L0H0", "L1H2")]
    deviation = (one["matching"] - other["matching"]) / (one["matching_z"] - other["matching_z"])
    assert deviation == pytest.approx(spread, rel=4 * (0.5 / NULL_DRAWS + 0.5 / 400) ** 0.5)
    middle = one["matching"] - deviation * one["matching_z"]
    assert middle == pytest.approx(mean, abs=4 * spread * (1 / NULL_DRAWS + 1 / 400) ** 0.5)


@pytest.mark.parametrize(("above", "named"), [(4.5, False), (5.5, True)])
def test_interventions_are_counted_from_random_directions(model, monkeypatch, above, named):
    """From their mean, in their deviations; and 5 of those name a head."""
    changes = mia.detect.induction(model, draws=2, neurons=2).frame.set_index("head")["loss_change"]
    mean, std = changes - 0.1 * above, pd.Series(0.1, index=changes.index)
    monkeypatch.setattr(
        removals,
        "random_removals",
        lambda *given, **named: pd.DataFrame({"mean": mean, "std": std}),
    )
    monkeypatch.setattr(removals, "_gain", lambda *given: (1.0, 9.0))
    frame = mia.detect.induction(model, draws=2, neurons=2).frame
    assert frame["loss_z"].to_numpy() == pytest.approx(above)
    assert (frame["by_intervention"] == named).all()


@pytest.mark.parametrize(("above", "named"), [(4.5, False), (5.5, True)])
def test_repetition_must_help(model, monkeypatch, above, named):
    """Nobody is named by intervention where the gain is less than 5 standard errors."""
    labels = list(model.heads)
    far = pd.DataFrame({"mean": -1e3, "std": 1.0}, index=labels)
    monkeypatch.setattr(removals, "random_removals", lambda *given, **named: far)
    monkeypatch.setattr(removals, "_gain", lambda *given: (1.0, above))
    assert (mia.detect.induction(model, draws=2, neurons=2).frame["by_intervention"] == named).all()


def test_a_gain_has_a_sign():
    first, later = torch.tensor([1.0, 2.0, 3.0]), torch.tensor([5.0, 6.0, 7.0, 8.0])
    gain, z = removals._gain(first, later)
    assert gain == pytest.approx(-4.5)
    assert z == pytest.approx(-4.5 / math.sqrt(1 / 3 + (5 / 3) / 4))


def test_means_are_over_real_tokens(model):
    """Rows of 5 and 9 tokens as one batch: the mean of what a head holds over 14 tokens, not 18."""
    rows = [random_tokens(model, 1, n, seed=n)[0] for n in (5, 9)]
    batch = model.to_batch(rows, padding_side="right")
    found = mean_z(model, batch.split(2))["blocks.0.attn"]
    held = torch.cat([model.run_with_cache(row[None])[1]["blocks.0.attn.hook_z"][0] for row in rows])
    torch.testing.assert_close(found, held.double().mean(0), rtol=1e-9, atol=1e-12)


def test_padding_has_no_loss(model):
    batch = model.to_batch([random_tokens(model, 1, n)[0] for n in (5, 9)], padding_side="right")
    loss, logit = next_token(model(batch.tokens, attention_mask=batch.mask), batch)
    assert (loss[0, 4:] == 0).all()
    assert (logit[0, 4:] == 0).all()
    assert (loss[0, :4] > 0).all()


@pytest.mark.parametrize(
    ("dtype", "kept"), [(torch.float64, "float64"), (torch.float32, "float32"), (torch.bfloat16, "float32")]
)
def test_ablate_computes_in_the_dtype_of_its_receipt(dtype, kept):
    """In float64 the loss has 13 digits."""
    model = mia.convert(tiny_bridge()).to(dtype)
    result = mia.detect.ablate(model, random_tokens(model), heads=["L0H1"])
    assert str(result.loss_changes.dtype) == f"torch.{kept}"
    assert result.receipt.notes["dtype"] == str(dtype).removeprefix("torch.")
    assert result.receipt.notes["losses kept in"] == kept
    if dtype == torch.float64:
        logits = model(random_tokens(model))[:, :-1].detach()
        expected = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), random_tokens(model)[:, 1:].flatten()
        )
        assert result.loss == pytest.approx(float(expected), abs=1e-13)


def one_wide(n_layers: int):
    """A stream of one dimension: every bound by norms is reached."""
    cfg = dict(d_model=1, d_head=1, n_heads=2, n_layers=n_layers, d_vocab=4, n_ctx=4)
    return random_model(3, **cfg, d_mlp=1, act_fn="relu")


def paths_of(frozen, **more):
    return mia.paths.top_paths(frozen, target=2, against=0, progress=False, **more)


def test_a_search_that_stops_knows_what_it_left_out():
    """The bound holds for every path that is not listed, however early the search ends."""
    frozen = mia.paths.freeze(one_wide(3), torch.tensor([1]))
    every = paths_of(frozen, top_k=10_000, max_expansions=100_000)
    assert every.proven
    tight = 0.0
    for expansions in (1, 2, 3, 5, 8):
        found = paths_of(frozen, top_k=3, max_expansions=expansions)
        left = every.frame[~every.frame["path"].isin(found.frame["path"])]["contribution"].abs().max()
        assert found.bound >= left * (1 - 1e-6) or left <= found.frame["contribution"].abs().min()
        assert found.proven == (found.bound <= found.frame["contribution"].abs().min())
        tight = max(tight, left / found.bound)
    assert tight > 0.5  # else a bound twice as small would do


def test_paths_that_are_cut_away_are_not_forgotten(monkeypatch):
    frozen = mia.paths.freeze(mia.convert(tiny_bridge(n_layers=3, d_mlp=4)), torch.tensor([1, 5, 2]))
    every = paths_of(frozen, top_k=40, max_expansions=100_000)
    assert every.proven
    for name in ("WIDTH", "QUEUE"):
        with monkeypatch.context() as patch:
            patch.setattr(best_first, name, 1)
            found = paths_of(frozen, top_k=40, max_expansions=100_000)
        missed = every.frame[~every.frame["path"].isin(found.frame["path"])]["contribution"].abs()
        assert len(missed)
        assert not found.proven
        assert found.bound >= missed.max() * (1 - 1e-6)
        assert "heuristic" in found.receipt.notes["top k"]


def test_a_gate_can_read_as_much_as_its_bound():
    model = mia.convert(tiny_bridge(normalization_type="RMS", act_fn="silu", gated_mlp=True), mlp="exact")
    bank = model.banks[1]
    weights = {f"blocks.0.neurons.{name}": W.detach() for name, W in bank.named_parameters()}
    x = bank.W_gate / bank.W_gate.norm(dim=0) * math.sqrt(16)  # as long as the norm lets it be
    reached = ((x * bank.W_gate).sum(0) + bank.b_gate.abs()).max().detach()
    assert gate_bound(model.spec, weights, 0) == pytest.approx(float(reached))


def test_llama_3_stretches_slow_turns():
    """Against Hugging Face's own frequencies."""
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    from mechinterp_attn.sources.config import _by_parts

    scaling = dict(
        rope_type="llama3", rope_theta=500.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0
    )
    scaling["original_max_position_embeddings"] = 64
    hf = LlamaConfig(hidden_size=64, num_attention_heads=2, head_dim=32, rope_parameters=scaling)
    expected, _ = ROPE_INIT_FUNCTIONS["llama3"](hf, "cpu")
    cfg = {
        "use_NTK_by_parts_rope": True, "d_head": 32, "rotary_base": 500.0, "NTK_original_ctx_len": 64,
        "NTK_by_parts_low_freq_factor": 1.0, "NTK_by_parts_high_freq_factor": 4.0,
        "NTK_by_parts_factor": 8.0,
    }  # fmt: skip
    (table,) = _by_parts(cfg)
    assert table.frequencies == pytest.approx(expected.tolist(), rel=1e-6)


def test_the_report_names_the_probability_at_its_position():
    model = mia.load("attn-1l")
    frozen = mia.paths.freeze(model, "Mr. Dorling was a tall man")
    for position in (1, -1):
        report = mia.report(model, "Mr. Dorling was a tall man", position=position, preset="prediction")
        probability = float(frozen.logits[position].softmax(-1).max())
        assert f"probability {probability:.1%}" in report.html()


def test_as_many_rows_as_memory_allows(model):
    """Patterns and eight more pictures, three tensors of values, eight of streams and three of logits, in
    float64, row by row.
    """
    numbers = 8 * ((8 + 8) * 8 + 2 * 3 * (16 + 24) + 8 * 16 + 3 * 13)
    assert rows_within(model, 8, 8 * numbers) == 1
    assert rows_within(model, 8, 8 * numbers * 8 - 1) == 7
    with pytest.raises(mia.MechInterpError, match=re.escape("raise max_bytes")):
        rows_within(model, 8, 8 * numbers - 1)


def test_the_heatmap_is_above_random_heads(model):
    result = C.composition(model, "K", "attention", "attention")
    shown = result.plot().data[0]
    for row in result.frame.itertuples():
        i, j = list(shown.y).index(row.src), list(shown.x).index(row.dst)
        assert shown.z[i][j] == pytest.approx(row.score - row.baseline)
