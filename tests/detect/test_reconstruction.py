"""The measures of attached dictionaries against the same numbers computed without any head."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.model.rest import ErrorBank
from tests.conftest import random_tokens, tiny_bridge
from tests.conversion.test_dictionary import described, transcoder


@pytest.fixture(scope="module")
def plain():
    return mia.convert(tiny_bridge())


def replaced(model, tokens, dictionaries):
    """Logits of the source with what MLPs write replaced by what dictionaries make of what they read."""
    read, hooks = {}, []
    for layer, dictionary in dictionaries.items():

        def keep(x, hook, layer=layer):
            read[layer] = x

        def write(y, hook, layer=layer, dictionary=dictionary):
            return described(dictionary, read[layer])[1] if dictionary else torch.zeros_like(y)

        hooks.append((f"blocks.{layer}.ln2.hook_normalized", keep))
        hooks.append((f"blocks.{layer}.hook_mlp_out", write))
    return model.run_with_hooks(tokens, fwd_hooks=hooks)


def loss_of(logits, tokens):
    return float(-logits[:, :-1].log_softmax(-1).gather(-1, tokens[:, 1:, None]).mean())


@pytest.mark.parametrize("kind", ["relu", "jumprelu", "topk"])
def test_the_measures_are_the_dictionarys_own(plain, kind):
    tokens = random_tokens(plain, 3)
    dictionaries = {
        layer: transcoder(16, 20, kind=kind, skip=kind == "topk", seed=layer) for layer in range(2)
    }
    model = plain
    for layer, dictionary in dictionaries.items():
        model = mia.attach(model, dictionary, layer=layer)
    found = mia.detect.reconstruction(model, tokens)
    assert found.receipt.ok
    assert found.n_tokens == tokens[:, 1:].numel()
    logits, cache = plain.run_with_cache(tokens)
    whole = loss_of(logits, tokens)
    for row in found.frame.itertuples():
        chosen = {row.layer: dictionaries[row.layer]} if row.layer >= 0 else dictionaries
        without = replaced(plain, tokens, chosen)
        silent = replaced(plain, tokens, dict.fromkeys(chosen))
        kl = torch.nn.functional.kl_div(
            without.log_softmax(-1), logits.log_softmax(-1), reduction="none", log_target=True
        )
        way = loss_of(silent, tokens) - whole
        expected = {
            "loss": whole,
            "loss_without_error": loss_of(without, tokens),
            "loss_ablated": loss_of(silent, tokens),
            "loss_recovered": (loss_of(silent, tokens) - loss_of(without, tokens)) / way,
            "kl": float(kl.sum(-1)[:, :-1].mean()),
        }
        if row.layer >= 0:
            act, out = described(dictionaries[row.layer], cache[f"blocks.{row.layer}.ln2.hook_normalized"])
            wrote, on = cache[f"blocks.{row.layer}.hook_mlp_out"][:, 1:], act[:, 1:] > 0
            left = (wrote - out[:, 1:]).square().sum()
            expected |= {
                "l0": float(on.double().sum(-1).mean()),
                "fve": 1 - float(left / (wrote - wrote.mean((0, 1))).square().sum()),
                "dead": 1 - float(on.any(0).any(0).double().mean()),
            }
        for name, value in expected.items():
            assert getattr(row, name) == pytest.approx(value, rel=1e-9, abs=1e-9), name  # float64


def test_a_perfect_dictionary_recovers_everything():
    """The neurons of a ReLU model, written as a dictionary."""
    plain = mia.convert(tiny_bridge(act_fn="relu"))
    neurons = plain.blocks[1].neurons
    dictionary = mia.Dictionary(neurons.W_in, neurons.b_in, neurons.W_out, neurons.b_out)
    row = mia.detect.reconstruction(
        mia.attach(plain, dictionary, layer=1), random_tokens(plain)
    ).frame.iloc[0]
    assert row["fve"] == pytest.approx(1, abs=1e-12)
    assert row["loss_recovered"] == pytest.approx(1, abs=1e-12)
    assert row["kl"] == pytest.approx(0, abs=1e-12)


def test_padding_counts_for_nothing(plain):
    model = mia.attach(plain, transcoder(16), layer=0)
    tokens = random_tokens(plain, 2)
    rows = [tokens[0], tokens[1, :5]]
    both = mia.detect.reconstruction(model, rows)
    each = [mia.detect.reconstruction(model, row[None]) for row in rows]
    n = [one.n_tokens for one in each]
    assert both.n_tokens == sum(n)
    for name in ("l0", "loss", "loss_without_error", "loss_ablated", "kl"):
        mean = sum(k * one.frame[name][0] for k, one in zip(n, each, strict=True)) / sum(n)
        assert both.frame[name][0] == pytest.approx(mean, rel=1e-9), name


def test_the_check_can_fail(plain, monkeypatch):
    value = ErrorBank.value
    monkeypatch.setattr(ErrorBank, "value", lambda self, v: value(self, v) + 0.01)
    model = mia.attach(plain, transcoder(16), layer=0)
    with pytest.warns(mia.FailedCheckWarning, match="make what they describe"):
        mia.detect.reconstruction(model, random_tokens(plain))


def test_what_cannot_be_measured_is_named(plain):
    with pytest.raises(
        mia.MechInterpError, match=r"no dictionary is attached to this model; see mia\.attach"
    ):
        mia.detect.reconstruction(plain, random_tokens(plain))
    model = mia.attach(plain, transcoder(16), layer=0)
    with pytest.raises(mia.MechInterpError, match="no prompt has a second token"):
        mia.detect.reconstruction(model, random_tokens(plain)[:, :1])
    with pytest.raises(mia.MechInterpError, match="max_bytes"):
        mia.detect.reconstruction(model, random_tokens(plain), max_bytes=1000)


def test_what_rounding_decides_is_not_called_checked(plain):
    """Two features that are the same, one of which may be active: which, no second computation can say."""
    one = transcoder(16, 2, kind="relu")
    twins = mia.Dictionary(one.W_enc[:, [0, 0]], one.b_enc[[0, 0]], one.W_dec, one.b_dec, k=1)
    found = mia.detect.reconstruction(mia.attach(plain, twins, layer=0), random_tokens(plain))
    assert found.receipt.ok is None
    assert found.receipt.notes["left out of the check, at a threshold"] == "24 tokens"
