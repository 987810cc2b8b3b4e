"""Heads cut out: against the source model with hooks, by hand, and the estimate against the exact."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.conftest import random_tokens, tiny_bridge
from tests.detect.constructed import FIRES_ON, PLANTED, SPEAKS_FOR, known_heads


@pytest.fixture(scope="module")
def bridge():
    return tiny_bridge()


@pytest.fixture(scope="module")
def model(bridge):
    return mia.convert(bridge)


@torch.no_grad()
def loss_with(bridge, tokens, hooks, where=slice(None)):
    logits = bridge.run_with_hooks(tokens, fwd_hooks=hooks)
    logp = logits[:, :-1].log_softmax(-1)
    return -logp.gather(-1, tokens[:, 1:, None])[..., 0][:, where]


def setting(index, value=0.0):
    """A hook on the source: one head's z, or one neuron's activation, set to a value."""

    def hook(x, hook):
        x = x.clone()
        x[:, :, index] = value
        return x

    return hook


def test_cutting_a_head_or_neuron_is_zeroing_it_in_the_source(model, bridge):
    tokens = random_tokens(model, batch=3)
    heads = ["L0H2", "L1H0", "L0N7", "L1N23"]
    names = [
        "blocks.0.attn.hook_z",
        "blocks.1.attn.hook_z",
        "blocks.0.mlp.hook_post",
        "blocks.1.mlp.hook_post",
    ]
    result = mia.detect.ablate(model, tokens, heads=heads)
    assert result.receipt.ok
    assert list(result.frame["head"]) == heads
    plain = loss_with(bridge, tokens, [])
    assert result.loss == pytest.approx(float(plain.mean()), abs=1e-6)
    for row, (name, index) in enumerate(zip(names, [2, 0, 7, 23], strict=True)):
        expected = loss_with(bridge, tokens, [(name, setting(index))]) - plain
        assert result.loss_changes[row].double().sub(expected).abs().max() < 1e-6  # kept as float32
        assert result.frame["loss_change"][row] == pytest.approx(float(expected.mean()), abs=1e-6)


def test_gated_neurons_and_shared_keys():
    """The same in a Llama-shaped source: rotary, RMS, grouped keys and values, a gated MLP."""
    rotary = dict(positional_embedding_type="rotary", rotary_dim=4, n_key_value_heads=2)
    source = tiny_bridge(**rotary, normalization_type="RMS", act_fn="silu", gated_mlp=True)
    tokens = random_tokens(mia.convert(source))
    result = mia.detect.ablate(mia.convert(source), tokens, heads=["L0H2", "L1N7"])
    plain = loss_with(source, tokens, []).mean()
    hooks = [("blocks.0.attn.hook_z", setting(2)), ("blocks.1.mlp.hook_post", setting(7))]
    for row, hook in enumerate(hooks):
        expected = loss_with(source, tokens, [hook]).mean() - plain
        assert result.frame["loss_change"][row] == pytest.approx(float(expected), abs=1e-6)


def test_heads_cut_together(model, bridge):
    tokens = random_tokens(model)
    result = mia.detect.ablate(model, tokens, heads=["L0H2", "L0H3", "L1N5"], together=True)
    hooks = [("blocks.0.attn.hook_z", setting([2, 3])), ("blocks.1.mlp.hook_post", setting(5))]
    expected = loss_with(bridge, tokens, hooks).mean() - loss_with(bridge, tokens, []).mean()
    assert result.frame["head"].item() == "L0H2 + L0H3 + L1N5"
    assert result.frame["loss_change"].item() == pytest.approx(float(expected), abs=1e-6)


def test_mean_ablation(model, bridge):
    tokens, other = random_tokens(model), random_tokens(model, batch=4, pos=9, seed=5)
    plain = loss_with(bridge, tokens, []).mean()
    for reference, source in ((None, tokens), (other, other)):
        _, cache = bridge.run_with_cache(source)
        z = cache["blocks.0.attn.hook_z"][:, :, 1].mean((0, 1))
        post = cache["blocks.0.mlp.hook_post"][:, :, 9].mean()
        result = mia.detect.ablate(
            model, tokens, heads=["L0H1", "L0N9"], replace="mean", reference=reference
        )
        for row, hook in enumerate(
            [("blocks.0.attn.hook_z", setting(1, z)), ("blocks.0.mlp.hook_post", setting(9, post))]
        ):
            expected = loss_with(bridge, tokens, [hook]).mean() - plain
            assert result.frame["loss_change"][row] == pytest.approx(float(expected), abs=1e-6)


def test_pattern_preserving_ablation_holds_every_pattern(bridge):
    """In an attention-only source: TransformerLens's own patterns put back while a head is zeroed."""
    source = tiny_bridge(attn_only=True, d_mlp=None)
    model = mia.convert(source)
    tokens = random_tokens(model)
    _, cache = source.run_with_cache(tokens)
    saved = cache["blocks.1.attn.hook_pattern"]
    hooks = [
        ("blocks.0.attn.hook_z", setting(0)),
        ("blocks.1.attn.hook_pattern", lambda p, hook: saved),
    ]
    expected = loss_with(source, tokens, hooks).mean() - loss_with(source, tokens, []).mean()
    kept = mia.detect.ablate(model, tokens, heads=["L0H0"], keep_patterns=True)
    full = mia.detect.ablate(model, tokens, heads=["L0H0"])
    assert kept.frame["loss_change"].item() == pytest.approx(float(expected), abs=1e-6)
    assert abs(kept.frame["loss_change"].item() - full.frame["loss_change"].item()) > 1e-4


def test_gates_are_patterns_too(model):
    """With every pattern held and no norms in the way, cutting is linear: effects on logits add up."""
    linear = mia.convert(tiny_bridge(normalization_type=None))
    tokens = random_tokens(linear)
    one, two, both = (
        mia.detect.ablate(linear, tokens, heads=heads, together=True, keep_patterns=True)
        for heads in (["L0H1"], ["L0H3"], ["L0H1", "L0H3"])
    )
    assert (one.logit_changes + two.logit_changes - both.logit_changes).abs().max() < 1e-5


def test_the_planted_neuron_is_what_raises_its_token():
    model = known_heads(neurons=True)
    tokens = torch.tensor([[1, FIRES_ON, SPEAKS_FOR, 2, FIRES_ON, SPEAKS_FOR, 0]])
    result = mia.detect.ablate(model, tokens, exact=16)
    assert len(result.frame) == len(model.heads)
    changes = result.frame.set_index("head")["logit_change"]
    after = tokens[0, :-1] == FIRES_ON
    row = list(result.frame["head"]).index(PLANTED)
    # relu(5) * 4 on each, against the average of the 8 logits
    assert result.logit_changes[row, 0][after].tolist() == [-17.5, -17.5]
    assert (result.logit_changes[row, 0][~after] == 0).all()
    neurons = changes[[head for head in changes.index if "N" in head and head != PLANTED]]
    assert (neurons == 0).all()


def test_induction_by_ablation():
    """Without the induction head, or the previous-token head it reads, repeats are not predicted."""
    model = known_heads()
    probe = mia.detect.random_repeats(model, draws=3, seed=0)
    heads = ["L0H0", "L1H0", "L0H1", "L0H3", ("L0H0", "L1H0")]
    frame = mia.detect.ablate(model, probe.tokens, heads=heads, where=probe.repeated).frame
    change = frame.set_index("head")["loss_change"]
    assert change["L1H0"] == pytest.approx(torch.tensor(8.0).log().item(), abs=1e-2)  # back to uniform
    assert change["L0H0"] > 1
    assert change[["L0H1", "L0H3"]].abs().max() < 1e-6
    # The previous-token head acts through the induction head's keys, not its values.
    assert change["L0H0 > L1H0"] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize(
    "chain", [("L0H1", "L1H2"), ("L0N3", "L1H2"), ("L0H1", "L0N4"), ("L0H0", "L0N3", "L1H1", "L1N5")]
)
def test_a_virtual_head_is_cut_out_of_the_last_heads_output(model, chain):
    """By hand: what the first head writes, read through the frozen heads, taken out of the last."""
    tokens = random_tokens(model, batch=1)
    _, cache = model.run_with_cache(tokens)
    x = None
    for label in chain:
        head = model[label]
        A = head.pattern(cache)[:, :-1]
        if x is None:
            z = cache[head.bank.hook("z")][0][:, head.index].reshape(len(A), -1)
        else:
            norm = cache[f"blocks.{head.layer}.{'ln1' if head.kind == 'attention' else 'ln2'}.hook_scale"][
                0
            ]
            z = A @ (((x - x.mean(-1, keepdim=True)) / norm) @ head.W_V)
        x = z @ head.W_O
    place = "attn_out" if head.kind == "attention" else "mlp_out"

    def without(out, hook):
        return out - x

    logits = model.run_with_hooks(tokens, fwd_hooks=[(f"blocks.{head.layer}.hook_{place}", without)])
    expected = model.loss_fn(logits, tokens) - model(tokens, return_type="loss")
    result = mia.detect.ablate(model, tokens, heads=[chain])
    row = result.frame.iloc[0]
    assert row["head"] == " > ".join(chain)
    assert row["kind"] == "virtual"
    assert row["loss_change"] == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("label", ["L0H1", "L1N4"])
def test_the_estimate_is_first_and_second_order_at_every_position(model, label):
    """By finite differences: a head's output shrunk a little at one position of one sequence."""
    tokens = random_tokens(model)
    estimate = mia.detect.ablate(model, tokens, exact=0).frame.set_index("head")["estimate"][label]
    head, step = model[label], 1e-6
    plain = model(tokens, return_type="loss", loss_per_token=True).sum()
    total = 0.0
    for row in range(2):
        for position in range(12):

            def shrink(z, hook, row=row, position=position):
                z = z.clone()
                z[row, position, head.index] *= 1 - step
                return z

            hooks = [(head.bank.hook("z"), shrink)]
            with model.hooks(fwd_hooks=hooks):
                loss = model(tokens, return_type="loss", loss_per_token=True).sum()
            c = ((loss - plain) / step).item()
            total += c + c**2 / 2
    assert total / 22 == pytest.approx(estimate, rel=1e-4, abs=1e-8)


def test_estimates_rank_heads_as_cutting_does():
    """On text, where a first-order estimate alone ranks no better than chance."""
    model = mia.load("gelu-2l")
    text = "I had never seen Mr. Dorling before. He was a tall man, with a face that said little, and he "
    result = mia.detect.ablate(model, text * 2, exact=40)
    both = result.frame.dropna()
    assert len(both) == 40
    rank = result.receipt.notes["rank correlation of estimate and exact"]
    assert rank == pytest.approx(both["loss_change"].corr(both["estimate"], method="spearman"), abs=1e-3)
    assert rank > 0.5


@pytest.mark.parametrize(("src", "dst"), [("L0H1", "L1H2"), ("L0N3", "L1H0"), ("L0H1", "L1N4")])
@pytest.mark.parametrize("side", "QKV")
def test_an_edge_is_one_side_of_one_head_without_another(bridge, model, side, src, dst):
    """In the source: queries, keys or values of one head out of a run in which the other is zero."""
    if side == "K" and "N" in dst:
        with pytest.raises(MechInterpError, match="L1N4 has a constant key"):
            mia.detect.ablate(model, random_tokens(model), [f"{src} -K-> {dst}"])
        return
    tokens = random_tokens(model)
    _, cache = bridge.run_with_cache(tokens)
    first, last = model[src], model[dst]
    zero = "blocks.0.attn.hook_z" if "H" in src else "blocks.0.mlp.hook_post"
    with bridge.hooks(fwd_hooks=[(zero, setting(first.index))]):
        _, without = bridge.run_with_cache(tokens)
    stream = without["blocks.1.hook_resid_pre" if "H" in dst else "blocks.1.hook_resid_mid"]
    stream = stream - stream.mean(-1, keepdim=True)
    normed = stream / (stream.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()
    sides = {
        name: normed @ getattr(last, f"W_{name}") + getattr(last, f"b_{name}") if name == side else None
        for name in "QKV"
    }
    if "H" in dst:
        seen = {n: cache[f"blocks.1.attn.hook_{n.lower()}"][:, :, last.index] for n in "QKV"}
        q, k, v = (seen[n] if x is None else x for n, x in sides.items())
        scores = (q @ k.mT / 2).masked_fill(torch.ones(12, 12).triu(1).bool(), -torch.inf)  # d_head 4
        hook = ("blocks.1.attn.hook_z", setting(last.index, scores.softmax(-1) @ v))
    else:
        pre = cache["blocks.1.mlp.hook_pre"][:, :, last.index]
        gate, value = ((pre if x is None else x[..., 0]) for x in (sides["Q"], sides["V"]))
        hook = ("blocks.1.mlp.hook_post", setting(last.index, torch.special.ndtr(gate) * value))
    expected = loss_with(bridge, tokens, [hook]) - loss_with(bridge, tokens, [])
    result = mia.detect.ablate(model, tokens, [f"{src} -{side}-> {dst}"])
    row = result.frame.iloc[0]
    assert (row["head"], row["kind"]) == (f"{src} -{side}-> {dst}", "edge")
    assert result.loss_changes[0].double().sub(expected).abs().max() < 1e-6


def test_virtual_heads_by_label_chain_or_object(model):
    tokens = random_tokens(model)
    forms = ["L0H1 > L1H2", ("L0H1", "L1H2"), mia.circuits.virtual_head(model, "L0H1", "L1H2")]
    tables = [mia.detect.ablate(model, tokens, [form, model["L0N3"]]).frame for form in forms]
    assert tables[0].equals(tables[1])
    assert tables[0].equals(tables[2])
    assert list(tables[0]["kind"]) == ["virtual", "mlp"]


def test_batches_and_bounds_change_nothing(model):
    tokens = random_tokens(model, batch=3)
    heads = ["L0H1", "L1N3", ("L0H1", "L1H2"), "L0H1 -K-> L1H2", "L0N3 -V-> L1H0"]
    for options in ({}, dict(keep_patterns=True), dict(replace="mean"), dict(together=True)):
        whole = mia.detect.ablate(model, tokens, heads=heads, **options)
        bounded = mia.detect.ablate(model, tokens, heads=heads, max_bytes=100_000, **options)
        assert (whole.loss_changes - bounded.loss_changes).abs().max() < 1e-6
        assert whole.frame["estimate"].tolist() == pytest.approx(
            bounded.frame["estimate"].tolist(), nan_ok=True
        )


def test_padding_changes_nothing(model):
    """Rows of 12, 5 and 8 tokens cut together are those rows cut alone, for heads of every kind."""
    rows = [random_tokens(model, 1, n, seed=n)[0] for n in (12, 5, 8)]
    heads = ["L0H1", "L1N3", "L0H1 > L1H2", "L0H1 -Q-> L1H2", "L0N3 -V-> L1N4"]
    for options in ({}, dict(together=True), dict(keep_patterns=True)):
        found = mia.detect.ablate(model, rows, heads, **options)
        for i, row in enumerate(rows):
            alone = mia.detect.ablate(model, row, heads, **options)
            n = len(row) - 1
            assert (found.loss_changes[:, i, :n] - alone.loss_changes[:, 0]).abs().max() < 1e-10
            assert (found.logit_changes[:, i, :n] - alone.logit_changes[:, 0]).abs().max() < 1e-10
            assert (found.loss_changes[:, i, n:] == 0).all()
        counted = sum(len(row) - 1 for row in rows)
        mean = found.loss_changes.sum((1, 2)) / counted
        assert found.frame["loss_change"].to_numpy() == pytest.approx(mean.numpy(), abs=1e-12)
    task = mia.detect.ablate(model, [row.tolist() for row in rows], heads, target=3)
    for i, row in enumerate(rows):
        alone = mia.detect.ablate(model, row, heads, target=3)
        assert (task.effects[:, i] - alone.effects[:, 0]).abs().max() < 1e-10


def test_prompts_had_another_name(model):
    tokens = random_tokens(model)
    with pytest.warns(FutureWarning, match=r"ablate\(tokens=\) is called prompts= now"):
        old = mia.detect.ablate(model, tokens=tokens, heads=["L0H1"])
    assert old.frame.equals(mia.detect.ablate(model, prompts=tokens, heads=["L0H1"]).frame)


def test_the_model_is_left_as_it_was(model):
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    mia.detect.ablate(model, random_tokens(model), exact=3, keep_patterns=True)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert all(torch.equal(p, before[name]) and p.grad is None for name, p in model.named_parameters())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(heads=["L0H9"]), r"no head L0H9; this model has L0H0\.\.L0H3"),
        (dict(heads=[("L1H0", "L0H1")]), "L0H1 does not read what L1H0 writes"),
        (dict(heads=["L1H0 -Q-> L0H1"]), "L0H1 does not read what L1H0 writes"),
        (dict(heads=[("L1H0",)]), "a virtual head needs at least 2 heads"),
        (dict(replace="median"), "replace='median'; expected 'zero' or 'mean'"),
        (dict(where=torch.ones(2, 5).bool()), r"where has shape \(2, 5\) .*expected \(2, 11\)"),
        (dict(where=torch.zeros(2, 11).bool()), "no next token to count"),
    ],
)
def test_bad_requests_say_what_to_do(model, options, message, as_users_run_it):
    with pytest.raises(MechInterpError, match=message):
        mia.detect.ablate(model, random_tokens(model), **options)


def test_one_token_has_no_loss(model):
    with pytest.raises(MechInterpError, match="at least 2 tokens"):
        mia.detect.ablate(model, torch.tensor([3]))
