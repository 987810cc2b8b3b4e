"""The induction circuit by three views, and the loss along the context."""

from dataclasses import replace

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.detect.null import DRAWS, random_removals, seen_basis
from mechinterp_attn.sources.zoo import read_bundled
from tests.conftest import random_tokens, tiny_bridge
from tests.detect.constructed import PLANTED, known_heads


@pytest.fixture(scope="module")
def found():
    return mia.detect.induction(known_heads(neurons=True), neurons=3)


def test_the_planted_circuit_is_found(found):
    assert found.found
    assert found.receipt.ok
    assert found.heads("induction", views=3) == ["L1H0"]
    assert found.heads("previous_token") == ["L0H0"]
    assert len(found.heads("induction", views=1)) == len(found.heads("previous_token", views=1)) == 1
    edge = found.edges.iloc[0]
    assert (edge["src"], edge["dst"]) == ("L0H0", "L1H0")
    assert edge["attention"] == pytest.approx(1)
    assert edge["attention_without"] < 1 / 8  # without what L0H0 brings it attends to all tokens alike
    assert found.gain > 2
    assert str(found).startswith("L0H0 -> L1H0 (behaviour, weights, intervention); repetition is worth")
    others = found.frame[~found.frame["head"].isin(["L0H0", "L1H0", PLANTED])]
    assert (others["loss_change"].abs() < 1e-5).all()


def test_the_null_of_a_cut_is_as_much_taken_out_in_random_directions():
    """By hand on the stream: a head's output turned by the same rotations, subtracted."""
    model = mia.convert(tiny_bridge())
    probe = mia.detect.random_repeats(model, draws=2, seed=3)
    found = random_removals(model, probe.batch, probe.repeated, ["L0H1"], seed=7, max_bytes=2**30)
    _, cache = model.run_with_cache(probe.tokens)
    written = cache["blocks.0.attn.hook_z"][:, :, 1] @ model["L0H1"].W_O
    generator = torch.Generator().manual_seed(7)
    seen = seen_basis(model, generator)  # 15 directions: every reader takes the mean out
    assert torch.allclose(seen.T @ seen, torch.eye(15, dtype=torch.float64))
    assert torch.allclose(seen.sum(0), torch.zeros(15, dtype=torch.float64))

    def loss(hooks):
        logits = model.run_with_hooks(probe.tokens, fwd_hooks=hooks)
        logp = logits[:, :-1].log_softmax(-1)
        return -logp.gather(-1, probe.tokens[:, 1:, None])[..., 0][probe.repeated].mean().item()

    changes = []
    for _ in range(DRAWS):
        turn = torch.linalg.qr(torch.randn(15, 15, generator=generator, dtype=torch.float64))[0]
        turn = seen @ turn @ seen.T
        centred = written - written.mean(-1, keepdim=True)
        assert torch.allclose((written @ turn).norm(dim=-1), centred.norm(dim=-1))
        out = [("blocks.0.hook_resid_mid", lambda x, hook, turn=turn: x - written @ turn)]
        changes.append(loss(out) - loss([]))
    expected = torch.tensor(changes, dtype=torch.float64)
    assert found["mean"]["L0H1"] == pytest.approx(float(expected.mean()), abs=1e-9)
    assert found["std"]["L0H1"] == pytest.approx(float(expected.std()), rel=1e-6)
    bounded = random_removals(model, probe.batch, probe.repeated, ["L0H1"], seed=7, max_bytes=200_000)
    assert bounded["std"]["L0H1"] > 0


def test_figures_show_the_heads(found):
    names = [text for trace in found.plot().data for text in trace.text]
    assert {"L0H0", "L1H0"} <= set(names)
    assert "L0H0" in found._repr_html_()


def test_random_models_stay_in_the_null():
    """No circuit, and the cuts of random heads are no worse than random directions."""
    result = mia.detect.induction(mia.convert(tiny_bridge(noise=0.02)), draws=3, neurons=8)
    assert not result.found
    assert str(result).startswith("no induction circuit found")
    assert len(result.frame) == 8 + 8
    assert (result.frame["loss_z"] < 5).all()
    assert (result.frame["loss_z"] > -10).all()


@pytest.mark.parametrize("name", ["relu-1l", "silu-2l"])
def test_shuffled_weights_have_no_circuit(name):
    """A trained model's matrices, each shuffled: repetition is worth nothing, so nobody loses it. (Single
    cuts may stand out of the random directions by chance: losses have long tails.)"""
    source = read_bundled(name)
    generator = torch.Generator().manual_seed(0)
    weights = {
        key: W.flatten()[torch.randperm(W.numel(), generator=generator)].view_as(W)
        for key, W in source.state_dict.items()
    }
    result = mia.detect.induction(mia.convert(replace(source, state_dict=weights)), draws=4, neurons=4)
    assert not result.found
    assert abs(result.gain_z) < 4
    assert not result.frame[["by_behaviour", "by_intervention"]].any(axis=None)


def test_a_trained_model_with_mlps():
    """gelu-2l: the views agree on who brings the previous token and who matches it."""
    result = mia.detect.induction(mia.load("gelu-2l"), draws=3, neurons=4)
    assert result.found
    src, dst = result.edges.iloc[0][["src", "dst"]]
    frame = result.frame.set_index("head")
    assert (frame.loc[[src, dst], "views"] == 3).all()
    attention = frame[frame["kind"] == "attention"]
    assert (attention["by_intervention"] <= (attention["role"] != "")).all()  # nobody without a role
    assert result.edges["attention"].min() > 0.8
    assert result.edges["attention_without"].max() < 0.2
    assert result.gain > 3
    assert result.gain_z > 20
    assert (result.frame["kind"] == "mlp").sum() == 4


def test_losses_by_position():
    model = mia.convert(tiny_bridge())
    tokens = random_tokens(model, batch=6, pos=20)
    result = mia.detect.in_context_learning(model, tokens, early=3, late=15)
    losses = model(tokens, return_type="loss", loss_per_token=True).detach()
    assert result.losses.double().sub(losses).abs().max() < 1e-5
    assert result.score == pytest.approx(float(losses[:, 14].mean() - losses[:, 2].mean()), abs=1e-5)
    assert result.frame["loss"].tolist() == pytest.approx(losses.mean(0).tolist(), abs=1e-5)
    error = losses.std(0) / 6**0.5
    assert result.frame["error"].tolist() == pytest.approx(error.tolist(), abs=1e-5)
    assert len(result.plot().data) == 1


def test_padding_is_in_no_mean():
    """Texts of unequal lengths: each position over the texts that reach it, with their own spread."""
    model = mia.convert(tiny_bridge())
    rows = [random_tokens(model, 1, n, seed=n)[0] for n in (12, 9, 6)]
    losses = [model(row, return_type="loss", loss_per_token=True)[0].detach() for row in rows]
    result = mia.detect.in_context_learning(model, rows, early=2, late=7)
    for row in result.frame.itertuples():
        own = torch.stack([loss[row.position - 1] for loss in losses if len(loss) >= row.position]).double()
        assert row.count == len(own)
        assert row.loss == pytest.approx(float(own.mean()), abs=1e-5)  # float32
        error = float(own.std() / len(own) ** 0.5) if len(own) > 1 else 0.0
        assert row.error == pytest.approx(error, abs=1e-5)
    assert result.score == pytest.approx(result.frame["loss"][6] - result.frame["loss"][1])
    assert result.receipt.ok


def test_the_shares_of_a_published_context_stand_for_it():
    """Olsson et al. 2022: 50 and 500 of 512, and as much of a shorter context."""
    model = mia.convert(tiny_bridge(n_ctx=128, n_layers=1))
    result = mia.detect.in_context_learning(model, random_tokens(model, pos=128))
    assert (result.early, result.late) == (round(128 * 50 / 512), 128 * 500 // 512)


def test_default_positions_fit_a_short_prompt():
    """13 tokens have 12 predictions: the share of 500 in 512 must not lie behind the last."""
    model = mia.convert(tiny_bridge())
    for n in (3, 5, 13):
        result = mia.detect.in_context_learning(model, random_tokens(model, pos=n))
        assert 1 <= result.early < result.late <= n - 1
    with pytest.raises(MechInterpError, match="early=0 and late=4"):
        mia.detect.in_context_learning(model, random_tokens(model), early=0, late=4)


def test_repeats_are_learned_in_context():
    """On random tokens repeated, a model with an induction head loses nothing from the second pass on."""
    model = known_heads()
    probe = mia.detect.random_repeats(model, draws=8, seed=0)
    result = mia.detect.in_context_learning(model, probe.tokens, early=4, late=20)
    assert result.score < -2
    assert (result.losses[probe.repeated] < 0.01).all()


def test_unusable_positions_are_refused():
    model = mia.convert(tiny_bridge())
    with pytest.raises(MechInterpError, match="early=9 and late=4; expected 1 <= early < late <= 11"):
        mia.detect.in_context_learning(model, random_tokens(model), early=9, late=4)
    with pytest.raises(MechInterpError, match="at least 2 tokens"):
        mia.detect.in_context_learning(model, torch.tensor([1]))
