"""The bundled models: there, small, honest about themselves, and what they were trained to be."""

import math
import socket
from pathlib import Path

import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.sources.zoo import bundled_folder, bundled_names, read_bundled

NEURONS = {
    "attn-1l": 0, "attn-2l": 0, "bigram-0l": 0, "gelu-2l": 2 * 512, "relu-1l": 512, "silu-2l": 2 * 512,
    "swiglu-4l": 4 * 344,
}  # fmt: skip
NAMES = sorted(NEURONS)
WITH_HEADS = [name for name in NAMES if name != "bigram-0l"]

ROOT = Path(__file__).resolve().parents[1]


def test_the_table_lists_them_with_their_cards():
    frame = mia.models()
    assert frame["name"].tolist() == NAMES
    for row in frame.itertuples():
        card = mia.card(row.name)
        for needed in ("data", "licence", "steps", "tokens", "loss", "loss_later_passes", "command"):
            assert card[needed] is not None
        assert "CC-BY" in card["data"]
        assert math.isnan(row.induction_score) == (row.name == "bigram-0l")


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
    assert n_mlp == NEURONS[name]


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


@pytest.mark.parametrize("name", WITH_HEADS)
def test_the_card_tells_the_scores_that_we_measure(name):
    card = mia.card(name)
    scores = mia.detect.score_heads(mia.load(name)).frame
    # other random tokens than the card's: 10 draws of 75 queries agree to a few hundredths
    assert scores["induction"].max() == pytest.approx(card["induction_score"], abs=0.05)


@pytest.mark.parametrize("name", NAMES)
def test_the_card_tells_the_loss_on_held_out_novels(name):
    loss = mia.load(name)(mia.held_out(), return_type="loss").item()
    # 128 documents spread over the five novels, out of 10,000: standard error 0.03
    assert loss == pytest.approx(mia.card(name)["loss"], abs=0.1)


@pytest.mark.parametrize("name", ["attn-1l", "relu-1l", "bigram-0l"])
def test_fewer_than_two_layers_gain_little_from_repetition(name):
    card = mia.card(name)
    assert card["loss_first_pass"] - card["loss_later_passes"] < 0.5


def test_training_scores_show_the_phase_change():
    """Of one two-layer model: induction score and in-context learning against tokens, a dozen rows."""
    rows = pd.read_csv(bundled_folder("attn-2l") / "scores.csv")
    assert len(rows) >= 12
    assert {"tokens", "induction_score", "in_context_learning"} <= set(rows.columns)
    formed = rows["induction_score"].gt(0.5).idxmax()
    gain = rows["loss_first_pass"] - rows["loss_later_passes"]
    assert rows["induction_score"][: formed - 1].max() < 0.2
    assert gain[: formed - 1].max() < 0.5
    assert rows["induction_score"][formed + 1 :].min() > 0.8
    assert gain[formed + 1 :].min() > 5


def test_zero_layers_are_a_bigram_table():
    model, counts = mia.load("bigram-0l"), mia.bigram_counts()
    assert model.n_heads == 0
    table = (model.W_E @ model.W_U).detach()
    tokens = mia.held_out()[:4]
    assert torch.equal(model(tokens), table[tokens])
    assert counts.sum() == 22_603_140  # tokens of the training novels, less one
    pairs = counts[1:].double()  # row 0 is the separator of novels
    entropy = -torch.special.xlogy(pairs, pairs / pairs.sum(1, keepdim=True)).nansum() / pairs.sum()
    loss = -(pairs * table[1:].double().log_softmax(-1)).sum() / pairs.sum()
    assert entropy < loss < entropy + 0.1  # the least that any table can reach


def test_a_model_without_heads_says_so():
    model = mia.load("bigram-0l")
    assert model.heads.frame.empty
    assert list(model.heads.frame) == ["head", "layer", "kind", "index"]
    assert repr(model.heads) == "0 heads: none"
    with pytest.raises(mia.MechInterpError, match="no head L0H0; this model has none"):
        model["L0H0"]
    for analysis in (
        mia.circuits.copying_scores,
        mia.detect.score_heads,
        mia.detect.offsets,
        mia.detect.score_weights,
        mia.detect.induction,
    ):
        with pytest.raises(mia.MechInterpError, match="no layers, so it has no heads to analyse"):
            analysis(model)
    with pytest.raises(mia.MechInterpError, match="no layers, so it has no heads"):
        mia.circuits.composition(model, kind="K")
    with pytest.raises(mia.MechInterpError, match="no layers, so it has no heads"):
        mia.detect.ablate(model, mia.held_out()[:1])
    with pytest.raises(mia.MechInterpError, match="no layers, so it has no heads"):
        mia.detect.over_corpus(model, ["It was the best of times"])
    frozen = mia.paths.freeze(model, mia.held_out()[0])
    assert frozen.receipt.ok
    with pytest.raises(mia.MechInterpError, match="no layers, so it has no heads"):
        mia.paths.attribution_graph(frozen)
    assert mia.detect.in_context_learning(model, mia.held_out()[:2]).frame["loss"].notna().all()


def test_the_table_is_compared_with_counts_of_a_corpus():
    model, counts = mia.load("bigram-0l"), mia.bigram_counts()
    found = mia.circuits.bigrams(model, counts=counts, top_k=1).correlations.set_index("source_id")
    row = 263  # " the"
    seen = counts.sum(0) > 0
    logits = (model.W_E[row].double() @ model.W_U.double()).detach()[seen]
    frame = pd.DataFrame({"logit": logits, "times": counts[row, seen]})
    assert found.loc[row, "spearman"] == pytest.approx(frame.corr("spearman").iloc[0, 1], abs=1e-9)
    assert found.loc[row, "count"] == counts[row].sum()
    with pytest.raises(mia.MechInterpError, match=r"counts have shape \(3, 3\)"):
        mia.circuits.bigrams(model, counts=torch.ones(3, 3, dtype=torch.long))
    with pytest.raises(mia.MechInterpError, match="a text and counts were given"):
        mia.circuits.bigrams(model, counts=counts, text="It was the best of times")


def test_swiglu_4l_is_a_llama():
    """The same weights in Hugging Face's LlamaForCausalLM, which turns halves and not neighbours."""
    from transformers import LlamaConfig, LlamaForCausalLM

    checkpoint = read_bundled("swiglu-4l")
    cfg, sd = checkpoint.cfg, checkpoint.state_dict
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=cfg["d_vocab"], hidden_size=cfg["d_model"], intermediate_size=cfg["d_mlp"],
            num_hidden_layers=cfg["n_layers"], num_attention_heads=cfg["n_heads"],
            num_key_value_heads=cfg["n_key_value_heads"], head_dim=cfg["d_head"], hidden_act="silu",
            max_position_embeddings=cfg["n_ctx"], rms_norm_eps=cfg["eps"], tie_word_embeddings=False,
            rope_parameters={"rope_type": "default", "rope_theta": cfg["rotary_base"]},
            attn_implementation="eager",
        )
    ).eval()  # fmt: skip
    halves = torch.cat([torch.arange(0, cfg["d_head"], 2), torch.arange(1, cfg["d_head"], 2)])
    state = {
        "model.embed_tokens.weight": sd["embed.W_E"],
        "model.norm.weight": sd["ln_final.w"],
        "lm_head.weight": sd["unembed.W_U"].T,
    }
    for layer in range(cfg["n_layers"]):
        at, to = f"blocks.{layer}", f"model.layers.{layer}"
        for letter, name in zip("QKV", ("q_proj", "k_proj", "v_proj"), strict=True):
            W = sd[f"{at}.attn.W_{letter}"]
            W = W if letter == "V" else W[..., halves]
            state[f"{to}.self_attn.{name}.weight"] = W.mT.flatten(0, 1)
        state[f"{to}.self_attn.o_proj.weight"] = sd[f"{at}.attn.W_O"].flatten(0, 1).T
        state[f"{to}.input_layernorm.weight"] = sd[f"{at}.ln1.w"]
        state[f"{to}.post_attention_layernorm.weight"] = sd[f"{at}.ln2.w"]
        for ours, theirs in (("W_gate", "gate_proj"), ("W_in", "up_proj"), ("W_out", "down_proj")):
            state[f"{to}.mlp.{theirs}.weight"] = sd[f"{at}.mlp.{ours}"].T
    llama.load_state_dict(state)
    tokens = mia.held_out()[:2]
    with torch.no_grad():
        expected, logits = llama(tokens).logits, mia.load("swiglu-4l")(tokens)
    assert (logits - expected).abs().max() < 1e-4 * expected.abs().max()  # float32


@pytest.mark.parametrize("name", NAMES)
def test_the_table_in_the_docs_agrees_with_the_cards(name):
    page = (ROOT / "docs" / "models.md").read_text(encoding="utf-8")
    numbers = page.split("\n\n| name | shape |")[0]
    (row,) = (line for line in numbers.splitlines() if line.startswith(f"| `{name}` | "))
    card = mia.card(name)
    _, _, parameters, tokens, loss, induction, previous, repeats, _ = (
        cell.strip() for cell in row.split("|")
    )
    assert parameters == f"{card['n_parameters']:,}"
    assert tokens == f"{card['tokens'] / 1e6:.0f} M"
    assert loss == f"{card['loss']:.2f}"
    assert repeats == f"{card['loss_first_pass']:.2f} / {card['loss_later_passes']:.2f}"
    for cell, score in ((induction, "induction"), (previous, "previous_token")):
        known = f"{score}_score" in card
        assert cell == (f"{card[f'{score}_score']:.2f} {card[f'{score}_head']}" if known else "–")


def test_unknown_names_are_told_the_known_ones():
    with pytest.raises(mia.MechInterpError, match=r"no bundled model 'gelu-9l'; there are .*gelu-2l"):
        mia.source_model("gelu-9l")
    with pytest.raises(mia.MechInterpError, match=r"'gelu-9l' is neither a bundled model .*gelu-2l"):
        mia.load("gelu-9l")


def test_the_names_are_folders_with_a_card():
    assert bundled_names() == sorted(bundled_names())
    assert bundled_folder("../weights/gelu-2l") is None
