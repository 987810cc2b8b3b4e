"""Virtual heads, copying, bigrams, trigrams, positions and singular directions."""

from itertools import pairwise

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.model.select import resolve_head
from tests.circuits import dense
from tests.circuits.test_composition import random_model
from tests.conftest import random_tokens, tiny_bridge

C = mia.circuits


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


@pytest.fixture(scope="module")
def cache(model):
    return model.run_with_cache(random_tokens(model))[1]


@pytest.mark.parametrize(
    "labels",
    [
        ("L0H1", "L1H2"),
        ("L0H1", "L0N3"),
        ("L0N3", "L1H0"),
        ("L0H0", "L0N1", "L1H3"),
        ("L0N1", "L1H0", "L1N4"),  # the narrowest first, two more behind it
    ],
)
def test_a_virtual_head_is_the_product_of_its_heads(model, cache, labels):
    virtual = C.virtual_head(model, *labels)
    parts = [model[label] for label in labels]
    assert isinstance(virtual, mia.Head)
    assert virtual.label == " > ".join(labels)
    product = parts[0].OV.dense()
    for part in parts[1:]:
        product = product @ part.OV.dense()
    torch.testing.assert_close(virtual.OV.dense(), product, rtol=0, atol=1e-12)
    assert virtual.OV.rank == min(part.OV.rank for part in parts)
    keys = parts[-1].QK.dense()
    for part in reversed(parts[:-1]):
        keys = keys @ part.OV.dense().T
    torch.testing.assert_close(virtual.QK.dense(), keys, rtol=0, atol=1e-12)
    # On the real tokens the patterns multiply; what reaches the bias token stays there.
    pattern = virtual.pattern(cache, batch=1)
    expected = torch.eye(12, dtype=pattern.dtype)
    for part in parts:
        expected = part.pattern(cache, batch=1)[:, :-1] @ expected
    torch.testing.assert_close(pattern[:, :-1], expected, rtol=0, atol=1e-12)
    torch.testing.assert_close(pattern.sum(-1), torch.ones(12, dtype=pattern.dtype), rtol=0, atol=1e-12)


def test_virtual_heads_nest_and_are_found_by_label(model):
    pair = C.virtual_head(model, "L0H1", "L0N3")
    three = C.virtual_head(model, pair, "L1H2")
    same = resolve_head(model, "L0H1>L0N3>L1H2")
    assert three.label == same.label == "L0H1 > L0N3 > L1H2"
    assert torch.equal(three.W_V, same.W_V)
    assert resolve_head(model, three) is three


def test_a_planted_virtual_head_is_ranked_first():
    model = random_model(3, n_heads=4)
    with torch.no_grad():
        model.banks[2].W_V[3] = 3 * model.banks[0].W_O[2].T
    frame = C.virtual_heads(model, top_k=5).frame
    assert frame["head"].iloc[0] == "L0H2 > L1H3"
    first = resolve_head(model, frame["head"].iloc[0])
    assert frame["norm"].iloc[0] == pytest.approx(float(first.OV.dense().norm()))
    assert (frame["norm"].diff().dropna() <= 0).all()
    assert frame["copying_score"].iloc[0] == pytest.approx(
        C.ov_circuit(model, first).statistics()["copying_score"]
    )


def test_chains_of_three_are_those_of_all_products():
    """The bounded search lists what multiplying every triple out finds."""
    model = random_model(4, n_heads=2, n_layers=4, d_mlp=5)
    for selection in ("attention", None):
        frame = C.virtual_heads(model, src=selection, dst=selection, length=3, top_k=7).frame
        heads = [model[label] for label in model.heads if selection is None or "H" in label]
        norms, ov = {}, {head.label: dense.ov(head) for head in heads}
        for one in heads:
            for two in (h for h in heads if h.reads_at > one.writes_at):
                pair = ov[one.label] @ ov[two.label]
                for three in (h for h in heads if h.reads_at > two.writes_at):
                    product = pair @ ov[three.label]
                    norms[f"{one.label} > {two.label} > {three.label}"] = float(product.norm())
        expected = sorted(norms, key=norms.__getitem__, reverse=True)[:7]
        assert frame["head"].tolist() == expected
        assert frame["norm"].to_numpy() == pytest.approx([norms[label] for label in expected])
    plan = mia.plan(C.virtual_heads, model, length=3)
    assert "at most 32 " in f"{plan.what} "
    with pytest.raises(mia.MechInterpError, match="no chain of three"):
        C.virtual_heads(random_model(n_layers=2), length=3)
    with pytest.raises(mia.MechInterpError, match="length=4; expected"):
        C.virtual_heads(model, length=4)


def test_the_search_for_trigrams_stops_early_and_misses_nothing():
    """Large enough for several parts of the vocabulary; a few strong sources end the search."""
    model = random_model(6, d_vocab=700, n_heads=2)
    with torch.no_grad():
        model.embed.W_E[[500, 3]] *= 4
    found = C.skip_trigrams(model, top_k=9).frame
    best = []
    for label in (label for label in model.heads if "H" in label):
        head = model[label]
        scores = dense.over_vocabulary(model, head, "QK") / head.bank.scale
        attention = (scores - scores.mean(1, keepdim=True)).T.clamp_min(0)
        logits = dense.over_vocabulary(model, head, "OV")
        logits = (logits - logits.mean(1, keepdim=True)).clamp_min(0)
        products = attention.topk(9).values[:, :, None] * logits.topk(9).values[:, None]
        best.append(products.flatten().topk(9).values)
    assert found["value"].to_numpy() == pytest.approx(torch.cat(best).topk(9).values.numpy())


def test_copying_scores_are_those_of_the_dense_circuits(model):
    result = C.copying_scores(model, diagonals=True)
    frame = result.frame.set_index("head")
    for label in ("L0H0", "L1H3", "L0N4", "L1N11"):
        table = dense.over_vocabulary(model, model[label], "OV")
        eigenvalues = torch.linalg.eigvals(table)
        score = float(eigenvalues.real.sum() / eigenvalues.abs().sum())
        # eigenvalues of a defective matrix (zero is a 12-fold one) are only good to a root of 1e-16
        assert frame.loc[label, "copying_score"] == pytest.approx(score, abs=1e-5)
        assert frame.loc[label, "positive_diagonal"] == pytest.approx(
            float((table.diagonal() > 0).double().mean())
        )
        own = (table.argmax(1) == torch.arange(13)).double().mean()
        assert frame.loc[label, "top1_on_diagonal"] == pytest.approx(float(own))
    assert frame.loc["L0N4", "eigenvalue"] == pytest.approx(
        float(dense.over_vocabulary(model, model["L0N4"], "OV").trace())
    )
    assert frame.loc["L0H0"].isna()["eigenvalue"]
    neurons = frame["eigenvalue"].dropna()
    assert frame["percentile"].idxmax() == neurons.idxmax()
    assert len(result.plot("L0H0").data[0].x) == 4
    assert len(result.plot().data[0].x) == 8


def test_random_heads_do_not_copy_and_a_planted_one_does():
    model = random_model(5, n_heads=8, d_model=64, d_vocab=200)
    z = C.copying_scores(model).frame["z"]
    assert z.abs().max() < 5
    assert abs(z.mean()) < 0.5
    with torch.no_grad():  # reads an embedding and writes what unembeds to the same token
        basis = torch.randn(64, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        model.banks[2].W_V[5] = basis
        model.banks[2].W_O[5] = (
            basis.T @ torch.linalg.pinv(model.W_U @ model.W_E).T @ torch.eye(64).double()
        )
        model.banks[2].W_O[5] = torch.linalg.pinv(basis) @ torch.linalg.pinv(model.W_U @ model.W_E)
    best = C.copying_scores(model, "attention").top(1)
    assert best["head"].tolist() == ["L1H5"]
    assert float(best["copying_score"].iloc[0]) == pytest.approx(1.0, abs=1e-6)


def test_diagonals_need_one_vocabulary():
    model = random_model(d_vocab_out=5)
    with pytest.raises(mia.MechInterpError, match="20 and 5 of them"):
        C.copying_scores(model, diagonals=True)


def test_bigrams_are_rows_of_the_direct_table(model):
    table = model.W_E.detach() @ model.W_U.detach()
    table = table - table.mean(1, keepdim=True)
    frame = C.bigrams(model, top_k=3).frame
    assert frame["value"].to_numpy() == pytest.approx(table.topk(3).values.flatten().numpy())
    assert frame["token_id"].tolist() == table.topk(3).indices.flatten().tolist()
    with_bias = C.bigrams(model, top_k=1, bias=True, sources=[4]).frame
    logits = (table + model.b_U.detach())[4]
    assert with_bias["value"].iloc[0] == pytest.approx(float(logits.max() - logits.mean()))


def test_rank_correlation_with_a_text_is_spearmans(model):
    """Tokens drawn from the table's own softmax correlate; scipy computes the same rho."""
    scipy = pytest.importorskip("scipy.stats")
    generator = torch.Generator().manual_seed(0)
    p = (3 * model.W_E.detach() @ model.W_U.detach()).softmax(-1)
    tokens = [0]
    for _ in range(3000):
        tokens.append(int(torch.multinomial(p[tokens[-1]], 1, generator=generator)))
    result = C.bigrams(model, top_k=1, text=torch.tensor(tokens))
    assert result.rank_correlation > 0.8
    shuffled = torch.tensor(tokens)[torch.randperm(len(tokens), generator=generator)]
    assert abs(C.bigrams(model, top_k=1, text=shuffled).rank_correlation) < 0.35
    row = result.correlations.iloc[0]
    source = int(row["source_id"])
    seen = sorted(set(tokens[1:]))
    counts = [sum(a == source and b == t for a, b in pairwise(tokens)) for t in seen]
    logits = (model.W_E.detach()[source] @ model.W_U.detach())[seen]
    assert row["spearman"] == pytest.approx(scipy.spearmanr(logits, counts).statistic)


def test_skip_trigrams_equal_the_whole_cube(model):
    """On a small vocabulary the vocabulary^3 table can be made: the search finds its largest."""
    cube, labels = [], [b.label(i) for b in model.banks if b.kind == "attention" for i in range(4)]
    for label in labels:
        head = model[label]
        scores = dense.over_vocabulary(model, head, "QK") / head.bank.scale
        attention = (scores - scores.mean(1, keepdim=True)).T  # [source, destination]
        logits = dense.over_vocabulary(model, head, "OV")
        logits = logits - logits.mean(1, keepdim=True)
        cube.append(attention.clamp_min(0)[:, :, None] * logits.clamp_min(0)[:, None])
    cube = torch.stack(cube)
    found = C.skip_trigrams(model, top_k=12).frame
    assert found["value"].to_numpy() == pytest.approx(cube.flatten().topk(12).values.numpy(), abs=1e-10)
    ids = found[["source_id", "destination_id", "token_id"]].to_numpy().T
    where = cube[[labels.index(h) for h in found["head"]], *(torch.tensor(i) for i in ids)]
    assert where.numpy() == pytest.approx(found["value"].to_numpy(), abs=1e-10)
    one = C.skip_trigrams(model, "L1H2", sources=[6, 2], top_k=5).frame
    expected = cube[labels.index("L1H2")][[6, 2]].flatten(1).topk(5).values.flatten()
    assert one["value"].to_numpy() == pytest.approx(expected.numpy(), abs=1e-10)
    assert one["rank"].tolist() == [1, 2, 3, 4, 5] * 2


def trigram_model():
    """One layer, orthogonal tokens: source 0, destinations 1 and 2, outputs 3 and 4, one head that
    attends from both destinations to the source and writes both outputs."""
    d = v = 12
    eye = torch.eye(v, dtype=torch.float64)
    noise = torch.randn(v, d, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 0.01
    state = {
        "embed.W_E": eye + noise,
        "unembed.W_U": torch.zeros(d, v, dtype=torch.float64),
        "pos_embed.W_pos": torch.zeros(4, d, dtype=torch.float64),
    }
    state["unembed.W_U"][:, :] = eye * 0.01
    state["unembed.W_U"][1, 3] = state["unembed.W_U"][2, 4] = 1.0  # the direct path: 1 -> 3, 2 -> 4
    state["unembed.W_U"][10, 3] = state["unembed.W_U"][10, 4] = 1.0
    zeros = torch.zeros(2, d, 3, dtype=torch.float64)
    W = {x: zeros.clone() for x in "QKV"} | {"O": zeros.mT.clone()}
    W["Q"][1, 1, 0] = W["Q"][1, 2, 0] = 5.0
    W["K"][1, 0, 0] = 1.0
    W["V"][1, 0, 0] = 1.0
    W["O"][1, 0, 10] = 2.0
    state |= {f"blocks.0.attn.W_{x}": W[x] + 0.001 for x in W}
    cfg = dict(n_layers=1, n_heads=2, d_model=d, d_head=3, n_ctx=4, d_vocab=v, attn_only=True)
    return mia.convert(mia.Checkpoint(cfg | {"normalization_type": None}, state))


def test_planted_trigrams_and_their_bug_come_out_on_top():
    model = trigram_model()
    top = C.skip_trigrams(model, top_k=4).frame
    assert set(top["head"]) == {"L0H1"}
    assert set(top["source_id"]) == {0}
    assert set(zip(top["destination_id"], top["token_id"], strict=True)) == {(1, 3), (1, 4), (2, 3), (2, 4)}
    bug = C.factoring_bugs(model, "L0H1", top_k=1).frame.iloc[0]
    trigrams = {(bug["destination"], bug["token"]), (bug["other_destination"], bug["other_token"])}
    assert (bug["source"], trigrams) == ("<0>", {("<1>", "<3>"), ("<2>", "<4>")})
    text = torch.tensor([0, 1, 3, 5, 0, 6, 2, 4, 7, 8] * 3)
    bug = C.factoring_bugs(model, "L0H1", text=text, top_k=1).frame.iloc[0]
    trigrams = {(bug["destination"], bug["token"]), (bug["other_destination"], bug["other_token"])}
    assert trigrams == {("<1>", "<3>"), ("<2>", "<4>")}
    good_crossing = torch.cat([text, torch.tensor([0, 1, 4])])  # now 1 -> 4 is said too: no bug
    found = C.factoring_bugs(model, "L0H1", text=good_crossing).frame
    assert not len(found) or not (found["source"] == "<0>").any()


def test_a_neuron_has_its_own_token_as_destination(model):
    frame = C.skip_trigrams(model, "L0N3", top_k=5).frame
    assert (frame["source_id"] == frame["destination_id"]).all()
    z = model.W_E.detach() @ model["L0N3"].W_Q + model["L0N3"].b_Q
    assert frame["qk"].to_numpy() == pytest.approx(z[frame["source_id"].tolist(), 0].numpy())
    with pytest.raises(mia.MechInterpError, match="sees only its own token"):
        C.factoring_bugs(model, "L0N3")


def test_positions_against_dense(model):
    result = C.position_circuit(model, "L1H1")
    head, P = model["L1H1"], model.W_pos.detach()
    scores = P @ dense.qk(head) @ P.T + head.b_Q @ head.W_K.T @ P.T
    torch.testing.assert_close(result.scores, scores, rtol=0, atol=1e-10)
    assert result.pattern.sum(-1).numpy() == pytest.approx(1.0)
    assert result.frame["attention"].iloc[3] == pytest.approx(float(result.pattern.diagonal(-3).mean()))
    table = model.W_E.detach() @ dense.qk(head) @ P.T + head.b_Q @ head.W_K.T @ P.T
    table = table - table.mean(1, keepdim=True)
    found = C.token_positions(model, "L1H1", top_k=6).frame
    assert found["value"].to_numpy() == pytest.approx(table.flatten().topk(6).values.numpy())
    assert table[found["token_id"].tolist(), found["position"].tolist()].numpy() == pytest.approx(
        found["value"].to_numpy()
    )
    turned = (P @ head.W_Q + head.b_Q) @ head.W_K.T @ model.W_E.detach().T
    turned = turned - turned.mean(1, keepdim=True)
    found = C.token_positions(model, "L1H1", query="position", top_k=2).frame
    assert found["value"].to_numpy() == pytest.approx(turned.flatten().topk(2).values.numpy())


def test_positions_need_positions():
    model = random_model()
    model.spec = type(model.spec).from_json(model.spec.to_json() | {"positions": None})
    with pytest.raises(mia.MechInterpError, match="no positions that a head's weights could read"):
        C.position_circuit(model, "L0H0")
    with pytest.raises(mia.MechInterpError, match="needs learned positions; this model has none"):
        C.token_positions(model, "L0H0")


def test_singular_directions(model):
    result = C.singular_directions(model, "L1H2", components=2, top_k=3)
    U, S, V = torch.linalg.svd(dense.ov(model["L1H2"]))
    torch.testing.assert_close(result.singular_values, S[:4], rtol=0, atol=1e-10)
    read = model.W_E.detach() @ U[:, 1]
    written = V[1] @ model.W_U.detach() @ dense.centring(13)
    turn = read[read.abs().argmax()].sign()
    frame = result.frame[result.frame["component"] == 1]
    assert frame[frame["side"] == "in"]["value"].to_numpy() == pytest.approx(
        (turn * read).topk(3).values.numpy()
    )
    assert frame[frame["side"] == "out"]["value"].to_numpy() == pytest.approx(
        (turn * written).topk(3).values.numpy()
    )
    with pytest.raises(mia.MechInterpError, match="expected 1 to 4 components"):
        C.singular_directions(model, "L1H2", components=5)


def test_induction_circuit_of_a_bundled_model_from_weights_alone():
    """On attn-2l: the previous-token head by its position circuit, the induction head by copying and
    the K-composed QK circuit; both are the heads that their patterns name."""
    model = mia.load("attn-2l")
    behaviour = mia.detect.score_heads(model).frame.set_index("head")
    heads = [label for label in model.heads if label.startswith("L0H")]
    previous = {h: C.position_circuit(model, h).frame.set_index("offset")["attention"][1] for h in heads}
    early = max(previous, key=previous.__getitem__)
    assert early == behaviour["previous_token"].idxmax()
    copying = C.copying_scores(model, "attention").frame.set_index("head")["copying_score"]
    later = [label for label in model.heads if label.startswith("L1H")]
    matching = {h: C.qk_circuit(model, f"{early} > {h}").statistics() for h in later}
    found = max(later, key=lambda h: matching[h]["copying_score"] + copying[h])
    assert found == behaviour["induction"].idxmax()
    assert matching[found]["copying_score"] > 0.5
    assert copying[found] > 0.5


def test_tied_embeddings_and_a_model_without_norms():
    model = random_model(7)
    with torch.no_grad():
        model.unembed.W_U.copy_(model.W_E.T)
    frame = C.bigrams(model, top_k=1).frame
    assert (frame["token_id"] == frame["source_id"]).mean() > 0.5  # a token is nearest itself
    table = dense.over_vocabulary(model, model["L1H1"], "OV")
    assert C.ov_top(model, "L1H1", top_k=1).frame["value"].iloc[0] == pytest.approx(float(table.max()))
