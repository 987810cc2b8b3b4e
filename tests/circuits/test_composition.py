"""Composition scores against dense matrices, TransformerLens, random models, and a real model."""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import mechinterp_attn as mia
from mechinterp_attn.circuits import pair_search
from mechinterp_attn.circuits.chance import Chance
from mechinterp_attn.circuits.null import mean_and_spread
from tests.circuits import dense
from tests.conftest import tiny_bridge

C = mia.circuits


@pytest.fixture(scope="module")
def model():
    return mia.convert(tiny_bridge())


def random_model(seed: int = 0, *, scale: float = 0.05, **changes):
    cfg = dict(n_layers=2, n_heads=3, d_model=32, d_head=8, n_ctx=8, d_vocab=20, d_mlp=40, act_fn="gelu")
    cfg |= dict(normalization_type=None) | changes
    generator = torch.Generator().manual_seed(seed)
    h, d, k, m, v = (cfg[n] for n in ("n_heads", "d_model", "d_head", "d_mlp", "d_vocab"))
    shapes = {"embed.W_E": (v, d), "unembed.W_U": (d, cfg.get("d_vocab_out", v))}
    if cfg.get("positional_embedding_type", "standard") == "standard":
        shapes["pos_embed.W_pos"] = (cfg["n_ctx"], d)
    for layer in range(cfg["n_layers"]):
        at = f"blocks.{layer}"
        shapes |= {f"{at}.attn.W_{x}": (h, d, k) for x in "QKV"} | {f"{at}.attn.W_O": (h, k, d)}
        shapes |= {f"{at}.mlp.W_in": (d, m), f"{at}.mlp.W_out": (m, d)}
    state = {n: torch.randn(s, generator=generator, dtype=torch.float64) for n, s in shapes.items()}
    return mia.convert(mia.Checkpoint(cfg, state), check=False)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_every_pair_equals_the_dense_matrices(model, kind):
    result = C.composition(model, kind)
    heads = {label: model[label] for label in model.heads}
    for row in result.frame.itertuples():
        expected = dense.composition(heads[row.src], heads[row.dst], kind)
        assert row.score == pytest.approx(expected, abs=1e-10)
    # 4 + 24 heads a layer: attention is read by its block's neurons and by the next layer
    assert len(result.frame) == 2 * 4 * 24 + 28 * 28
    assert result.receipt.ok


def test_neurons_have_cosines_and_no_keys(model):
    values = C.composition(model, "V", "mlp", "mlp").frame.set_index(["src", "dst"])["score"]
    one, two = model["L0N3"], model["L1N7"]
    written = one.W_O[0] - one.W_O[0].mean()  # all norms of the model take the mean out
    cosine = torch.nn.functional.cosine_similarity(written, two.W_V[:, 0], dim=0).abs()
    assert values["L0N3", "L1N7"] == pytest.approx(float(cosine))
    queries = C.composition(model, "Q", "mlp", "mlp").frame["score"]
    assert queries.to_numpy() == pytest.approx(values.to_numpy())  # not gated: query and value are one
    keys = C.composition(model, "K", None, "mlp").frame
    assert (keys["score"] == 0).all()
    assert keys["z"].isna().all()  # nothing could be read: no null to compare with


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_dead_and_vanishing_neurons(dtype, monkeypatch):
    """A neuron that writes nothing scores 0; a small one is a direction like any other; one whose weights
    vanish in float32 spoils no other."""
    monkeypatch.setattr(pair_search, "SMALL", 0)
    model, plain = (random_model().to(dtype) for _ in range(2))
    sizes = {"L0N3": 0.0, "L0N5": 1e-12, "L0N7": 1e-41}  # of its output weights; 1e-41 is subnormal
    with torch.no_grad():
        for label, size in sizes.items():
            model[label].bank.W_out[model[label].index] *= size
    found = C.composition(model, "V", "mlp", "mlp", top_k=1000)
    assert str(dtype).removeprefix("torch.") in found.receipt.notes["dtype"]
    gone = ["L0N3"] if dtype == torch.float64 else ["L0N3", "L0N7"]
    every = C.composition(plain, "V", "mlp", "mlp").frame
    expected = every[~every["src"].isin(gone)]["score"].nlargest(1000)
    # float32: weights of 1e-12 keep their 7 digits
    assert found.frame["score"].to_numpy() == pytest.approx(expected.to_numpy(), abs=1e-6)
    assert "L0N5" in set(found.frame["src"])
    assert (C.composition(model, "V", "L0N3", "mlp").frame["score"] == 0).all()


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_attention_pairs_have_transformer_lenss_own_numbers(kind):
    bridge = tiny_bridge(normalization_type=None, attn_only=True, n_layers=3)
    theirs = bridge.all_composition_scores(kind).scores.flatten(0, 1).flatten(1, 2)
    ours = C.composition(mia.convert(bridge), kind)
    assert ours.scores is not None
    torch.testing.assert_close(ours.scores.nan_to_num(), theirs.detach().double(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_wide_heads_taken_as_whole_matrices_have_the_same_scores(kind):
    """In float32, where a head's inner dimension makes that the shorter way; against float64 products."""
    model = random_model(n_layers=4, n_heads=12, d_model=384, d_head=64, d_mlp=2)
    heads = [label for label in model.heads if "H" in label]
    with torch.no_grad():
        basis = torch.linalg.qr(
            torch.randn(384, 128, generator=torch.Generator().manual_seed(1)).double()
        ).Q
        model["L0H3"].bank.W_O[3] = basis[:, :64].T  # writes where L2H5 does not read: a score of 0
        for name in ("W_Q", "W_K", "W_V"):
            getattr(model["L2H5"].bank, name)[5] = basis[:, 64:]
        for name in ("W_Q", "W_K", "W_V", "W_O"):  # a head that weight decay has nearly put out
            getattr(model["L1H4"].bank, name)[4] *= 1e-7
    exact = C.composition(model, kind, heads, heads)
    expected = exact.scores
    single = C.composition(model.float(), kind, heads, heads)
    assert single.receipt.notes["dtype"] == "float32"
    # float32: scores to 5e-7, over spreads of some 1e-4
    ours, own = (r.frame["z"].to_numpy() for r in (single, exact))
    assert ours == pytest.approx(own, rel=1e-3, abs=1e-2)
    assert torch.equal(single.scores.isnan(), expected.isnan())
    # float32: a square to some 1e-9, where it is small the product to 1e-7
    torch.testing.assert_close(single.scores, expected, rtol=0, atol=5e-7, equal_nan=True)
    assert single.scores[heads.index("L0H3"), heads.index("L2H5")] < 1e-6
    with_less = C.composition(model, kind, heads, heads, max_bytes=20_000_000)  # too little for the strips
    torch.testing.assert_close(single.scores, with_less.scores, rtol=0, atol=5e-7, equal_nan=True)
    plans = [mia.plan(C.composition, model, kind, heads, heads, max_bytes=b) for b in (2**30, 20_000_000)]
    assert plans[0].flops < plans[1].flops


def gaussian(d, r):
    """The participation of ``A @ B``, A [d, r] and B [r, d] Gaussian: expected fourth powers of the
    singular values over the squared expected second powers."""
    return 1.0 if r == 1 else ((d + 1) * (d + r + 1) + r * d + 2) / (d * d * r)


def shape_null(d, r1, r2):
    p1, p2 = (torch.tensor(gaussian(d, r), dtype=torch.float64) for r in (r1, r2))
    return tuple(float(x) for x in mean_and_spread(p1, p2, d))


@pytest.mark.parametrize(
    "ranks", [(1, 1, 64), (1, 8, 64), (16, 16, 64), (32, 1, 64), (64, 64, 64), (4, 4, 32)]
)
def test_the_null_is_what_random_heads_have(ranks):
    """Closed form against drawn Gaussian heads: the mean to 3 standard errors of 400 draws plus
    1 %, the spread to 15 % (400 draws know a spread to 4 %, the moment fit to a few %)."""
    r1, r2, d = ranks
    generator = torch.Generator().manual_seed(0)
    scores = []
    for _ in range(400):
        one, two = (
            torch.randn(d, r, generator=generator) @ torch.randn(r, d, generator=generator)
            for r in (r1, r2)
        )
        scores.append((one @ two).norm() / one.norm() / two.norm())
    drawn = torch.stack(scores)
    mean, spread = shape_null(d, r1, r2)
    assert float(drawn.mean()) == pytest.approx(mean, abs=3 * spread / 20 + 0.01 * mean)
    assert float(drawn.std()) == pytest.approx(spread, rel=0.15)


@pytest.mark.parametrize(("seed", "d"), [(0, 24), (1, 48)])
def test_z_counts_deviations_of_these_very_heads_turned(seed, d):
    """Heads of few large singular values and neurons, turned by 1500 random rotations: mean and deviation
    of the score to four standard errors; and the share above a z to 0.05 (a fit by two moments)."""
    model = random_model(seed, d_model=d, d_mlp=6)
    with torch.no_grad():
        for bank in model.banks[::2]:  # two of eight dimensions are ten times the others
            bank.W_O[:, :2] *= 10
    generator = torch.Generator().manual_seed(seed)
    for src, dst in (("L0H1", "L1H2"), ("L0N3", "L1H2"), ("L0N3", "L1N4")):
        found = C.composition(model, "V", [src], [dst])
        row = found.frame.iloc[0]
        one, two = dense.ov(model[src]), dense.ov(model[dst])
        drawn = []
        for _ in range(1500):
            turn = torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=torch.float64)).Q
            drawn.append((one @ turn @ two).norm() / one.norm() / two.norm())
        scores = torch.stack(drawn)
        assert float(scores.mean()) == pytest.approx(row["baseline"], abs=4 * row["spread"] / 1500**0.5)
        assert float(scores.std()) == pytest.approx(row["spread"], rel=0.1)
        assert row["z"] == pytest.approx((row["score"] - row["baseline"]) / row["spread"])
        for z in (0.3, 1.0, 2.0):
            above = float((scores > row["baseline"] + z * row["spread"]).double().mean())
            p = torch.ones(1, dtype=torch.float64)
            own = [participation(model[label]) for label in (src, dst)]
            assert float(Chance([tuple(own)], d).above(p * z)) == pytest.approx(above, abs=0.05)


def participation(head):
    """From the singular values of its dense OV circuit."""
    squares = torch.linalg.svdvals(dense.ov(head)).square()
    return ((squares / squares.sum()).square().sum())[None]


def test_the_largest_of_many_is_expected_to_be_large():
    """Among 40 x 40 random neurons and 3 x 3 heads, over 60 models: on average one pair above the z that
    the receipt names, and by_chance counts what all pairs together are expected to have above it."""
    above = []
    for seed in range(60):
        found = C.composition(random_model(seed), "V")
        notes = found.receipt.notes
        assert notes["compared"] == len(found.frame)
        above.append(int((found.frame["z"] > notes["largest z by chance"]).sum()))
        nearest = found.frame.iloc[(found.frame["z"] - notes["largest z by chance"]).abs().argmin()]
        if abs(nearest["z"] - notes["largest z by chance"]) < 0.01:
            assert nearest["by_chance"] == pytest.approx(1, abs=0.1)
    assert 0.5 < sum(above) / 60 < 1.6  # 60 draws with a deviation of 1: to 4 standard errors
    assert C.composition(random_model(0), "V", top_k=1, rank_by="z").receipt.notes["compared"] == len(
        found.frame
    )


def test_the_published_null():
    """papers: 768 / 64 gives 0.0361 +- 0.0004."""
    mean, spread = shape_null(768, 64, 64)
    assert (round(mean, 4), round(spread, 4)) == (0.0361, 0.0004)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_a_random_model_stays_inside_its_null(kind):
    frame = C.composition(random_model(d_model=64, n_heads=6, n_layers=3), kind).frame
    z = frame["z"].dropna()
    assert abs(z.mean()) < 0.1
    assert 0.85 < z.std() < 1.15
    assert z.abs().max() < 6


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_a_planted_link_comes_out_on_top(kind):
    model = random_model(1, d_model=64, n_heads=4, n_layers=3)
    early, late = model.banks[0], model.banks[4]
    with torch.no_grad():  # the later head reads exactly the subspace that the earlier one writes
        {"Q": late.W_Q, "K": late.W_K, "V": late.W_V}[kind][2] = early.W_O[1].T
    frame = C.composition(model, kind, "attention", "attention").top(1, by="z")
    assert frame[["src", "dst"]].to_numpy().tolist() == [["L0H1", "L2H2"]]
    assert float(frame["z"].iloc[0]) > 20
    best = C.composition(model, kind, top_k=1, rank_by="z").frame
    assert best[["src", "dst"]].to_numpy().tolist() == [["L0H1", "L2H2"]]


def test_a_real_circuit_can_lie_below_the_random_mean(data):
    """indhead_2l: K 0.060, 22 times Q and 91 times V, yet below 0.125; its eigenvalues say 1.00."""
    model = mia.load(data / "models" / "indhead_2l")
    scores = {kind: C.composition(model, kind).frame.iloc[0] for kind in "QKV"}
    assert scores["K"]["score"] == pytest.approx(0.060, abs=5e-4)
    assert round(scores["K"]["score"] / scores["Q"]["score"]) == 22
    assert round(scores["K"]["score"] / scores["V"]["score"]) == 91
    assert scores["K"]["baseline"] == pytest.approx(0.125, abs=5e-4)
    assert scores["K"]["z"] < -10
    copying = C.copying_scores(model).frame.set_index("head")["copying_score"]
    assert copying["L1H0"] == pytest.approx(1.00, abs=5e-3)
    assert copying["L0H0"] == pytest.approx(0.028, abs=5e-3)
    matching = C.qk_circuit(model, "L0H0 > L1H0").statistics()
    assert matching["copying_score"] == pytest.approx(1.00, abs=5e-3)
    positions = C.position_circuit(model, "L0H0").frame.set_index("offset")["attention"]
    assert positions[1] > 0.99


@settings(max_examples=5, deadline=None)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(["Q", "K", "V"]))
def test_scores_do_not_depend_on_basis_gauge_or_order_of_heads(seed, kind):
    """A rotation of the residual stream, an invertible change inside every head, and a permutation
    of heads leave scores, copying and the virtual heads' norms as they are."""
    model, other = random_model(seed), random_model(seed)
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(32, 32, generator=generator, dtype=torch.float64)).Q
    order = torch.randperm(3, generator=generator)
    with torch.no_grad():
        other.embed.W_E.copy_(other.W_E @ Q)
        other.unembed.W_U.copy_(Q.T @ other.W_U)
        for bank in other.banks:
            if bank.kind == "mlp":
                bank.W_in.copy_(Q.T @ bank.W_in)
                bank.W_out.copy_(bank.W_out @ Q)
                continue
            G = torch.randn(3, 8, 8, generator=generator, dtype=torch.float64) + 2 * torch.eye(8)
            inverse = torch.linalg.inv(G)
            bank.W_V.copy_((Q.T @ bank.W_V @ G)[order])
            bank.W_O.copy_((inverse @ bank.W_O @ Q)[order])
            bank.W_Q.copy_((Q.T @ bank.W_Q @ G)[order])
            bank.W_K.copy_((Q.T @ bank.W_K @ inverse.mT)[order])
    names = {f"L{n}H{int(i)}": f"L{n}H{j}" for n in range(2) for j, i in enumerate(order)}
    before, after = (C.composition(m, kind).frame.set_index(["src", "dst"]) for m in (model, other))
    moved = before.rename(index=lambda label: names.get(label, label)).sort_index()
    assert after.sort_index()["score"].to_numpy() == pytest.approx(moved["score"].to_numpy(), abs=1e-8)
    copying = [C.copying_scores(m).frame.set_index("head")["copying_score"] for m in (model, other)]
    moved = copying[0].rename(index=lambda label: names.get(label, label)).sort_index()
    assert copying[1].sort_index().to_numpy() == pytest.approx(moved.to_numpy(), abs=1e-6)


@pytest.mark.parametrize("kind", ["Q", "K", "V"])
def test_a_virtual_head_may_read(model, kind):
    """Its values go through a neuron (rank 1), its queries and keys are as wide as its last head's."""
    pair = C.virtual_head(model, "L0N3", "L1H2")
    found = C.composition(model, kind, ["L0H1", "L0N2"], [pair]).frame.set_index("src")
    assert found.loc["L0H1", "score"] == pytest.approx(
        dense.composition(model["L0H1"], pair, kind), abs=1e-10
    )


def test_selections(model):
    one = C.composition(model, "V", "L0H1", ["L1N2", model["L1H0"], "L0N4"])
    assert one.frame[["src", "dst"]].to_numpy().tolist() == [
        ["L0H1", "L0N4"],
        ["L0H1", "L1H0"],
        ["L0H1", "L1N2"],
    ]
    pair = C.virtual_head(model, "L0H2", "L0N1")
    found = C.composition(model, "V", [pair], ["L1H3"]).frame
    expected = dense.composition(pair, model["L1H3"], "V")
    assert float(found["score"].iloc[0]) == pytest.approx(expected, abs=1e-10)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(kind="V", src="L1H0", dst="L0H0"), "none of the dst heads reads what a src head writes"),
        (dict(kind="V", src="L0H0", dst="L0H1"), "src must come earlier"),
        (dict(kind="V", top_k=0), "top_k=0 is out of range; expected 1 to 976"),
        (dict(kind="V", src=[]), "no heads selected"),
        (dict(kind="V", top_k=3, workers=0), "workers=0, top_k=3; expected at least 1 worker"),
        (dict(kind="V", workers=2), "workers=2, top_k=None; .* only a search for the strongest pairs"),
        (dict(kind="V", src="L7H0"), "no head L7H0"),
    ],
)
def test_bad_input_is_answered_with_what_to_do(model, options, message):
    with pytest.raises(mia.MechInterpError, match=message):
        C.composition(model, **options)


def test_weights_that_are_not_finite_are_named():
    model = mia.convert(tiny_bridge())
    with torch.no_grad():
        model.banks[2].W_K[1, 3, 2] = torch.nan
    with pytest.raises(mia.MechInterpError, match=r"not finite: blocks.1.attn.W_K at \[1, 3, 2\]"):
        C.composition(model, "K")
    with pytest.raises(mia.MechInterpError, match="not finite"):
        C.copying_scores(model)


def test_pictures(model):
    dense_result = C.composition(model, "K", "attention", "attention")
    heatmap = dense_result.plot()
    assert [*heatmap.data[0].y] == [f"L0H{i}" for i in range(4)]  # heads without a partner are left out
    assert [*heatmap.data[0].x] == [f"L1H{i}" for i in range(4)]
    assert len(dense_result.plot(ranking=True, k=5).data[0].x) == 5
    assert len(C.composition(model, "V", top_k=4).plot().data[0].x) == 4
