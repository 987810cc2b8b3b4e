"""Scores of heads from their patterns: constructed models, a real one, TransformerLens's detector."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import tiny_bridge
from tests.detect.constructed import FIRES_ON, PLANTED, ROLES, V, known_heads

KINDS = ["previous_token", "current_token", "first_token", "duplicate_token", "induction"]


def by_head(model, **options):
    return mia.detect.score_heads(model, **options).frame.set_index("head")


def test_known_heads_score_one_for_what_they_do_and_near_zero_for_the_rest():
    scores = by_head(known_heads())
    for head, role in ROLES.items():
        assert scores.loc[head, role] == pytest.approx(1, abs=1e-6)
        # The first token also happens to be the previous token of one query and the duplicate of a few.
        rests = {"first_token"} if role == "duplicate_token" else set()
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
    assert scores.loc["L1H0", "induction"] < 1 / V  # it attends to all tokens alike


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
    model = mia.load(data / "models" / "indhead_2l")
    scores = by_head(model, draws=200)
    assert scores.loc["L0H0", "previous_token"] == pytest.approx(1.00, abs=0.005)
    assert scores.loc["L0H0", "induction"] < 0.01
    assert scores.loc["L1H0", "previous_token"] < 0.2
    # Its task: the last of 8 tokens occurred once before, and what followed it then comes next.
    generator = torch.Generator().manual_seed(0)
    tokens = torch.stack([torch.randperm(26, generator=generator)[:8] for _ in range(2000)])
    earlier = torch.randint(6, (len(tokens),), generator=generator)
    rows = torch.arange(len(tokens))
    tokens[rows, 7] = tokens[rows, earlier]
    scores = by_head(model, tokens=tokens)
    assert scores.loc["L1H0", "induction"] == pytest.approx(0.91, abs=0.01)  # as published


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
        mia.detect.random_repeats(model, draws=1, seed=0)
    assert mia.detect.score_heads(model).frame["induction"].isna().all()


def test_receipt_and_html():
    result = mia.detect.score_heads(known_heads(), draws=2, seed=5)
    assert result.receipt.ok
    assert result.receipt.notes["seed"] == 5
    assert result.receipt.notes["tokens"] == "8 random tokens x 4"
    assert result.top(1)["head"].item() == "L1H0"
    assert "L1H0" in result._repr_html_()


def test_weighted_scores_are_shares_of_what_is_moved():
    """Attention times the norm of the value read through W_O, with loops over the bridge's cache."""
    bridge = tiny_bridge(n_ctx=20, d_vocab=7)
    model = mia.convert(bridge)
    result = mia.detect.score_heads(model, draws=2)
    tokens = result.probe.tokens
    _, cache = model.run_with_cache(tokens)
    A = cache["blocks.1.attn.hook_pattern"][:, 2]
    moved = cache["blocks.1.attn.hook_v"][:, :, 2] @ model["L1H2"].W_O
    moved = (moved - moved.mean(-1, keepdim=True)).norm(dim=-1)  # [batch, key]; norms take the mean out
    flow = A * moved[:, None, :]
    some = total = 0.0
    for b, row in enumerate(tokens.tolist()):
        for i in range(1, len(row)):
            same = [j for j in range(i) if row[j] == row[i]]
            if same:
                some += sum(float(flow[b, i, j + 1]) for j in same)
                total += float(flow[b, i].sum())
    scores = result.frame.set_index("head")
    assert scores.loc["L1H2", "induction_weighted"] == pytest.approx(some / total, abs=1e-12)
    entropy = -(A * A.clamp_min(1e-300).log()).sum(-1)[:, 1:].mean()
    assert scores.loc["L1H2", "entropy"] == pytest.approx(float(entropy), abs=1e-12)
    gate = cache["blocks.0.neurons.hook_weight"][:, 1:, 5]
    binary = -(gate * gate.log() + (1 - gate) * (1 - gate).log()).mean()
    assert scores.loc["L0N5", "entropy"] == pytest.approx(float(binary), abs=1e-12)
    assert scores.loc["L0N5", "current_token_weighted"] == pytest.approx(1)


def test_the_gate_of_a_gated_neuron_is_no_distribution():
    model = mia.convert(tiny_bridge(act_fn="silu", gated_mlp=True))
    frame = mia.detect.score_heads(model, draws=2).frame
    neurons = frame[frame["kind"] == "mlp"]
    assert neurons["entropy"].isna().any()
    assert neurons["current_token_weighted"].tolist() == pytest.approx([1] * len(neurons))
    assert frame.loc[frame["kind"] == "attention", "entropy"].notna().all()


def test_offsets_are_means_over_the_queries_that_reach_so_far_back():
    model = mia.convert(tiny_bridge())
    result = mia.detect.offsets(model, up_to=5, draws=3)
    tokens = mia.detect.score_heads(model, draws=3).probe.tokens
    _, cache = model.run_with_cache(tokens)
    frame = result.frame.set_index("head")
    assert [name for name in frame if name.startswith("offset_")] == [f"offset_{i}" for i in range(6)]
    for offset in range(1, 6):
        expected = cache["blocks.0.attn.hook_pattern"][:, 3].diagonal(-offset, -2, -1).mean()
        assert frame.loc["L0H3", f"offset_{offset}"] == pytest.approx(float(expected), abs=1e-12)
        assert frame.loc["L1N3", f"offset_{offset}"] == 0
    known = mia.detect.offsets(known_heads()).frame.set_index("head")["at"]
    assert known["L0H0"] == 1
    assert known["L0H2"] == 0
    with pytest.raises(MechInterpError, match="up_to=24; expected 0 to 23, as there are 24 tokens"):
        mia.detect.offsets(model, up_to=24)


class Words:
    """The least of a tokenizer that ``to_tokens`` asks for: one letter, one token."""

    bos_token_id = 0
    pad_token_id = eos_token_id = None

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [ord(letter) - ord("a") + 1 for letter in text]}


@pytest.mark.parametrize("options", [{}, dict(exclude_bos=True), dict(exclude_current_token=True)])
@pytest.mark.parametrize("role", ["previous_token", "duplicate_token", "induction"])
def test_match_is_transformer_lens_detect_head(role, options):
    from transformer_lens.head_detector import detect_head

    model = mia.convert(tiny_bridge())
    model.tokenizer = Words()
    texts = ["abcabcab", "aabbaabbccl"]
    expected = detect_head(model, texts, f"{role}_head", **options)
    own = mia.detect.match(model, texts, role, **options).frame.query("kind == 'attention'")
    assert own["score"].tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-7)


def test_a_pattern_of_ones_own():
    from transformer_lens.head_detector import detect_head

    model = mia.convert(tiny_bridge())
    model.tokenizer = Words()
    mine = torch.ones(7, 7).tril(-2)
    expected = detect_head(model, "abcabc", mine)
    own = mia.detect.match(model, "abcabc", mine).frame.query("kind == 'attention'")
    assert own["score"].tolist() == pytest.approx(expected.flatten().tolist(), abs=1e-6)
    with pytest.raises(MechInterpError, match=r"pairs of shape \(7, 7\); expected \(4, 4\)"):
        mia.detect.match(model, "abc", mine)
    with pytest.raises(MechInterpError, match="pairs='next'; expected one of previous_token"):
        mia.detect.match(model, "abc", "next")


def test_padding_changes_nothing():
    """Texts of different lengths together, and in any batches, as one by one."""
    model = mia.convert(tiny_bridge())
    model.tokenizer = Words()
    texts = ["abcabcab", "ab", "aabbaabbccl", "a"]
    together = mia.detect.score_heads(model, tokens=texts)
    bounded = mia.detect.score_heads(model, tokens=texts, max_bytes=100_000)
    assert (
        together.frame.drop(columns="kind")
        .set_index("head")
        .sub(bounded.frame.drop(columns="kind").set_index("head"))
        .abs()
        .max(axis=None)
        < 1e-12
    )
    rows = [model.to_tokens(text) for text in texts]
    patterns = [model.run_with_cache(row)[1]["blocks.1.attn.hook_pattern"][0, 1] for row in rows]
    previous = torch.cat([A.diagonal(-1) for A in patterns]).mean()
    assert together.frame.set_index("head").loc["L1H1", "previous_token"] == pytest.approx(float(previous))


def test_too_little_memory_names_the_knob():
    model = mia.convert(tiny_bridge())
    with pytest.raises(MechInterpError, match=r"24 tokens: needs about .* or max_bytes="):
        mia.detect.score_heads(model, max_bytes=1000)


def test_a_virtual_head_is_scored_on_the_product_of_its_patterns():
    """With loops over the bridge's patterns, values and norm scales; beside single heads in one table."""
    bridge = tiny_bridge(n_ctx=20, d_vocab=7)
    model = mia.convert(bridge)
    chosen = ["L1H2", "L0H1 > L1H2", "L0N3", mia.circuits.virtual_head(model, "L0N3", "L1H0")]
    result = mia.detect.score_heads(model, chosen, draws=2)
    assert list(result.frame["head"]) == ["L1H2", "L0H1 > L1H2", "L0N3", "L0N3 > L1H0"]
    assert list(result.frame["kind"]) == ["attention", "virtual", "mlp", "virtual"]
    single = by_head(model, draws=2)
    for label in ("L1H2", "L0N3"):
        own = result.frame.set_index("head").loc[label]
        assert own[KINDS].tolist() == pytest.approx(single.loc[label, KINDS].tolist())
    tokens = result.probe.tokens
    _, cache = bridge.run_with_cache(tokens)
    first, then = (cache[f"blocks.{layer}.attn.hook_pattern"][:, i] for layer, i in ((0, 1), (1, 2)))
    scores = result.frame.set_index("head").loc["L0H1 > L1H2"]
    product = then @ first
    assert scores["previous_token"] == pytest.approx(float(product.diagonal(-1, 1, 2).mean()), abs=1e-9)
    entropy = torch.special.entr(product).sum(-1)[:, 1:].mean()
    assert scores["entropy"] == pytest.approx(float(entropy), abs=1e-9)
    _, own = model.run_with_cache(tokens)
    value = own["blocks.0.attn.hook_v"][:, :, 1] @ model["L0H1"].W_O @ model["L1H2"].OV.dense()
    scale = own["blocks.1.ln1.hook_scale"][..., 0]
    some = total = 0.0
    for b in range(2):
        for i in range(1, tokens.shape[1]):
            flow = [
                sum(float(then[b, i, m] / scale[b, m] * first[b, m, k]) for m in range(k, i + 1))
                * float((value[b, k] - value[b, k].mean()).norm())
                for k in range(i + 1)
            ]
            some, total = some + flow[i - 1], total + sum(flow)
    assert scores["previous_token_weighted"] == pytest.approx(some / total, abs=1e-9)


def test_a_planted_virtual_head_scores_one():
    """The previous-token head, and the current-token one, passed on by a second current-token head."""
    model = known_heads()
    with torch.no_grad():  # L1H1 as a second current-token head
        for side in ("W_Q", "W_K"):
            getattr(model.blocks[1].attn, side)[1] = getattr(model.blocks[0].attn, side)[2]
    scores = by_head(model, heads=["L0H0 > L1H1", "L0H2 > L1H1"], draws=2)
    assert scores.loc["L0H0 > L1H1", "previous_token"] == pytest.approx(1, abs=1e-6)
    assert scores.loc["L0H2 > L1H1", "current_token"] == pytest.approx(1, abs=1e-6)


def test_heads_that_do_not_exist_are_refused():
    model = mia.convert(tiny_bridge())
    with pytest.raises(MechInterpError, match="no head L0H9"):
        mia.detect.score_heads(model, ["L0H9"])
    with pytest.raises(MechInterpError, match="no heads selected"):
        mia.detect.score_heads(model, [])
