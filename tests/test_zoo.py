"""The bundled models: there, small, honest about themselves, and what they were trained to be."""

import lzma
import math
import socket

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.sources.zoo import bundled_folder, bundled_names

NAMES = ["attn-1l", "attn-2l", "gelu-2l", "silu-2l"]
MLP_NAMES = ["gelu-2l", "silu-2l"]


def test_the_table_lists_them_with_their_cards():
    frame = mia.models()
    assert set(NAMES) <= set(frame["name"])
    for row in frame.itertuples():
        card = mia.card(row.name)
        for needed in ("data", "licence", "steps", "tokens", "loss", "induction_score", "command"):
            assert card[needed] is not None
        assert "CC-BY" in card["data"]


@pytest.mark.parametrize("name", NAMES)
def test_they_load_without_any_network(name, monkeypatch):
    def refused(*args, **kwargs):
        raise AssertionError("a bundled model asked for the network")

    monkeypatch.setattr(socket.socket, "connect", refused)
    model = mia.load(name)
    assert model.provenance["fidelity"]["ok"]
    assert model.to_string(model.to_tokens("It was the best of times")[0, 1:]) == "It was the best of times"


@pytest.mark.parametrize("name", NAMES)
def test_each_file_is_small(name):
    for file in bundled_folder(name).iterdir():
        assert file.stat().st_size <= 2_000_000, file.name


@pytest.mark.parametrize("name", NAMES)
def test_the_model_equals_its_source_bridge(name):
    model, bridge = mia.load(name), mia.source_model(name)
    fidelity = mia.verify(model, bridge, "She was not at all sure that he would come back to the house.")
    assert fidelity.ok, str(fidelity)
    assert fidelity.top1_agreement == 1.0
    n_mlp = sum(bank.n_heads for bank in model.banks if bank.kind == "mlp")
    assert n_mlp == (2 * 512 if name in MLP_NAMES else 0)


@pytest.mark.parametrize("name", ["attn-2l", "gelu-2l", "silu-2l"])
def test_two_layers_have_induction_heads_and_use_them(name):
    model = mia.load(name)
    scores = mia.detect.score_heads(model)
    best = scores.top(1).iloc[0]
    assert best["induction"] >= 0.5
    assert best["layer"] == 1
    tokens = scores.probe.tokens
    assert torch.equal(tokens[:, 1:26], tokens[:, 26:51])  # 25 tokens, again and again
    loss = model(tokens, return_type="loss", loss_per_token=True).mean(0)
    first, later = loss[:25].mean(), loss[26:].mean()
    assert later < first - 3  # nats; random tokens cost about ln(1024) = 6.9 the first time


def test_one_layer_has_none():
    scores = mia.detect.score_heads(mia.load("attn-1l"))
    assert scores.frame["induction"].max() < 0.2


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_scores_that_we_measure(name):
    card = mia.card(name)
    scores = mia.detect.score_heads(mia.load(name)).frame
    # other random tokens than the card's: 10 draws of 75 queries agree to a few hundredths
    assert scores["induction"].max() == pytest.approx(card["induction_score"], abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_loss_on_held_out_novels(name, data):
    with lzma.open(data / "corpora" / "litbank.txt.xz", "rt", encoding="utf-8", newline="") as file:
        novel = file.read().split("<|endoftext|>")[-1]
    model = mia.load(name)
    ids = model.to_tokens(novel[200_000:280_000], prepend_bos=False)[0]
    n = model.spec.n_ctx - 1
    rows = ids[: len(ids) // n * n].view(-1, n)
    tokens = torch.cat([torch.full((len(rows), 1), model.bos_token_id), rows], 1)
    loss = model(tokens, return_type="loss").item()
    # one passage of one of the five held-out novels: authors differ by a few tenths of a nat
    assert loss == pytest.approx(mia.card(name)["loss"], abs=0.4)
    assert loss < math.log(1024) - 3


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(mia.MechInterpError, match=r"no bundled model 'gelu-9l'; there are .*gelu-2l"):
        mia.source_model("gelu-9l")
    with pytest.raises(mia.MechInterpError, match=r"'gelu-9l' is neither a bundled model .*gelu-2l"):
        mia.load("gelu-9l")


def test_the_names_are_folders_with_a_card():
    assert bundled_names() == sorted(bundled_names())
    assert bundled_folder("../weights/gelu-2l") is None
