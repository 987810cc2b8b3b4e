"""Discovery: the sums that each method promises, its finite differences, and circuits that are known."""

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.causal.rules import Rules
from tests.conftest import random_tokens, tiny_bridge
from tests.detect.constructed import known_heads

FAMILIES = {
    "gelu": dict(),
    "gated": dict(act_fn="silu", gated_mlp=True, normalization_type="RMS"),
    "attention only": dict(attn_only=True, d_mlp=None),
    "no norms": dict(normalization_type=None, act_fn="relu"),
    "rotary": dict(positional_embedding_type="rotary", act_fn="gelu_new"),
}


def tiny(family="gelu", **more):
    return mia.convert(tiny_bridge(**(FAMILIES[family] | more)))


def pairs(model, n=4, pos=7):
    clean, corrupt = random_tokens(model, n, pos), random_tokens(model, n, pos, seed=1)
    return mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4][:n], against=[5, 6, 7, 8][:n])


@pytest.mark.parametrize("family", FAMILIES)
def test_secant_scores_are_complete_everywhere(family):
    """What goes into the inputs comes out at the logits, and what goes into a head comes out of it: through
    patterns, gates and norms, to float64's precision. The metric's difference is measured by plain runs."""
    model = tiny(family)
    task = pairs(model)
    heads = mia.causal.discover(model, task, "secant")
    assert heads.receipt.checks[0].error < 1e-9
    found = mia.causal.discover(model, task, "secant", "edges", top_k=10**6)
    assert found.receipt.checks[0].error < 1e-6
    edges = found.frame
    whole = (model(torch.tensor(task.clean)) - model(torch.tensor(task.corrupt))).detach()[:, -1]
    rows = torch.arange(4)
    difference = float((whole[rows, task.answer] - whole[rows, task.against]).mean())
    into, out = (edges.groupby(end)["score"].sum() for end in ("dst", "src"))
    assert into["logits"] == pytest.approx(difference, abs=1e-6)  # edges are kept in float32
    assert out["embed"] == pytest.approx(difference, abs=1e-6)
    score = heads.frame.set_index("head")["score"]
    assert float((score - into[score.index]).abs().max()) < 1e-6
    assert float((score - out[score.index]).abs().max()) < 1e-6


def test_secant_is_complete_for_every_metric_and_padding():
    model = tiny()
    rows = [random_tokens(model, 1, n, seed=n)[0].tolist() for n in (4, 7, 6)]
    others = [random_tokens(model, 1, n, seed=n + 50)[0].tolist() for n in (4, 7, 6)]
    for metric in ("logit", "prob", "loss", "kl"):
        task = mia.Task(rows, corrupt=others, answer=[1, 2, 3], metric=metric)
        assert mia.causal.discover(model, task).receipt.checks[0].error < 1e-9


@pytest.mark.parametrize("family", ["gelu", "gated"])
def test_gradient_edges_add_up_to_the_head(family):
    """By the chain rule: the edges out of a head are its score."""
    model = tiny(family)
    task = pairs(model)
    score = mia.causal.discover(model, task, "gradient").frame.set_index("head")["score"]
    edges = mia.causal.discover(model, task, "eap", "edges", top_k=10**6).frame
    out = edges.groupby("src")["score"].sum()
    assert float((score - out[score.index]).abs().max()) < 1e-6  # edges are kept in float32


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_an_edges_score_is_a_derivative(mode):
    """Of the metric, as the queries, keys or values of a head read a little less of an earlier one: by
    hand, with the stream split in front of the norm, in a model with shared keys and values."""
    model = tiny("gated", n_key_value_heads=2)
    task = pairs(model)
    frame = mia.causal.discover(model, task, "eap", "edges", top_k=10**6).frame.set_index("edge")
    clean = torch.tensor(task.clean)
    _, cache = model.run_with_cache(clean)
    _, other = model.run_with_cache(torch.tensor(task.corrupt))
    bank = model.banks[2]
    src, dst, rows = 1, 3, torch.arange(4)
    z = "blocks.0.attn.hook_z"
    written = (cache[z] - other[z])[:, :, src] @ model.banks[0].W_O[src]
    stream = cache["blocks.1.hook_resid_pre"]
    W = {"Q": bank.W_Q, "K": bank.W_K, "V": bank.W_V}[mode]
    index = dst if mode == "Q" else dst // bank.group
    values = {}
    for step in (1e-5, -1e-5):
        normed = model.blocks[1].ln1(stream - step * written)
        # Only this head's share of a key or value that two heads read: its own pattern and output.
        side = normed @ W[index]
        plain = model.blocks[1].ln1(stream) @ W[index]
        values[step] = (side - plain).detach()

    def metric(step):
        def hook(x, hook):
            x = x.clone()
            x[:, :, index] += values[step]
            return x

        seen = {}

        def keep(x, hook):
            seen["z"] = x

        name = f"blocks.1.attn.hook_{mode.lower()}"
        model.run_with_hooks(clean, fwd_hooks=[(name, hook), ("blocks.1.attn.hook_z", keep)])
        moved = seen["z"][:, :, dst]

        def only(x, hook):
            x = x.clone()
            x[:, :, dst] = moved
            return x

        logits = model.run_with_hooks(clean, fwd_hooks=[("blocks.1.attn.hook_z", only)])[:, -1]
        return (logits[rows, task.answer] - logits[rows, task.against]).detach().mean()

    slope = -float(metric(1e-5) - metric(-1e-5)) / 2e-5
    assert frame["score"][f"L0H1 -{mode}-> L1H3"] == pytest.approx(slope, rel=1e-4, abs=1e-8)


def test_a_linear_model_is_patched_exactly_by_every_method():
    """Without norms, positions to look at or gates (patterns of one token are 1), first order is all."""
    model = tiny("no norms", attn_only=True, d_mlp=None)
    task = pairs(model, pos=1)
    exact = mia.causal.discover(model, task, "exact").frame.set_index("head")["score"]
    for method in ("secant", "gradient", "eap-ig", "eap-ig-activations", "relp", "frozen"):
        score = mia.causal.discover(model, task, method).frame.set_index("head")["score"]
        assert float((score - exact[score.index]).abs().max()) < 1e-9, method
    edges = mia.causal.discover(model, task, "eap", "edges").frame.set_index("edge")["score"]
    assert edges["L1H2 -> logits"] == pytest.approx(exact["L1H2"], abs=1e-6)


def test_integrated_gradients_become_complete():
    """The more steps, the nearer the inputs' scores come to the metric's difference."""
    model = tiny()
    task = pairs(model)

    def missing(steps):
        notes = mia.causal.discover(model, task, "eap-ig", steps=steps).receipt.notes
        return float(notes["the inputs' scores miss the metric's difference by"].rstrip("%"))

    assert missing(1) > 2
    assert missing(60) < 1


def test_frozen_scores_are_the_frozen_models():
    """The frozen model of ``paths`` is linear: what a head writes along its gradient."""
    model = tiny("gated")
    task = pairs(model, n=1)
    score = mia.causal.discover(model, task, "frozen", patch="zero").frame.set_index("head")["score"]
    frozen = mia.paths.freeze(model, torch.tensor(task.clean[0]))
    direction = torch.zeros_like(frozen.logits)
    direction[-1, task.answer[0]], direction[-1, task.against[0]] = 1, -1
    fields = frozen.backward(frozen.read_back(direction @ model.W_U.detach().T)).streams
    at = 0
    for i, sublayer in enumerate(frozen.sublayers):
        for bank in sublayer.banks:
            own = bank.along(sublayer.stream, fields[i + 1]).sum(0)
            labels = bank.bank.labels()
            assert torch.allclose(torch.tensor(score[labels].to_numpy()), own, atol=1e-9)
            at += len(labels)
    assert at == len(score)


def test_relp_conserves_a_gated_neurons_output():
    """Half to the gate's reading and half to the value's: together the whole product, where the gate alone
    has the value's part only."""
    model = tiny("gated", n_layers=1)
    task = pairs(model, n=1)
    biasless = {name: b for name, b in model.named_parameters() if "b_in" in name or "b_gate" in name}
    with torch.no_grad():
        for b in biasless.values():
            b.zero_()  # a bias would take its share of the neuron's output
    edges = mia.causal.discover(model, task, "relp", "edges", patch="zero", top_k=10**6).frame
    score = mia.causal.discover(model, task, "relp", patch="zero").frame.set_index("head")["score"]
    into = edges[edges["dst"] == "L0N3"].groupby("mode")["score"].sum()
    assert set(into.index) == {"Q", "V"}
    assert score["L0N3"] != 0
    frozen = mia.causal.discover(
        model, task, Rules("fixed", "fixed", "fixed"), "edges", patch="zero", top_k=10**6
    )
    value = frozen.frame[frozen.frame["dst"] == "L0N3"].groupby("mode")["score"].sum()["V"]
    assert into["V"] == pytest.approx(value / 2, abs=1e-6)  # edges are kept in float32


def test_planted_circuit_with_its_modes():
    """A model built by hand: a previous-token head feeds an induction head's keys, and its softmaxes are so
    saturated that gradients see nothing."""
    model = known_heads()
    task = mia.tasks.induction(model, n=16)
    heads = mia.causal.discover(model, task)
    assert heads.frame["head"].head(2).tolist() in (["L1H0", "L0H0"], ["L0H0", "L1H0"])
    assert heads.frame["score"].abs()[2] < 0.05 * heads.frame["score"].abs()[1]
    edges = mia.causal.discover(model, task, units="edges").frame
    assert "L0H0 -K-> L1H0" in edges["edge"].head(3).tolist()
    assert "L1H0 -> logits" in edges["edge"].head(3).tolist()
    circuit = mia.causal.discover(model, task, units="edges").circuit(3)
    assert set(circuit.heads) == {"L0H0", "L1H0"}


CIRCUITS = {  # who composes by all three views of detect.induction
    "attn-2l": {"L0H1", "L1H0"},
    "gelu-2l": {"L0H2", "L1H1", "L1H3"},
    "silu-2l": {"L0H2", "L1H1", "L1H3"},
}


@pytest.mark.parametrize("name", CIRCUITS)
def test_induction_of_bundled_models(name):
    """By one call: the heads of the circuit stand first, among more than a thousand."""
    model = mia.load(name)
    found = mia.causal.discover(model, mia.tasks.induction(model, n=16))
    assert set(found.frame["head"].head(len(CIRCUITS[name]))) == CIRCUITS[name]
    assert found.receipt.ok


def test_induction_of_a_real_small_model(data):
    """Two layers of one head each: both are the circuit, by the second one's keys."""
    model = mia.load(data / "models" / "indhead_2l")
    edges = mia.causal.discover(model, mia.tasks.induction(model, n=32), units="edges").frame
    assert edges["edge"].head(3).tolist().count("L0H0 -K-> L1H0") == 1


def test_some_heads_only():
    """What is ranked among some heads has the scores that it has among all."""
    model = tiny()
    task = pairs(model)
    for options in ({}, {"method": "exact"}, {"positions": "each"}):
        every = mia.causal.discover(model, task, **options).frame
        some = mia.causal.discover(model, task, heads=["L0H*", "L1N3"], **options)
        expected = every[every["head"].isin(["L1N3", *(f"L0H{i}" for i in range(4))])]
        assert some.frame["head"].tolist() == expected["head"].tolist()
        assert some.frame["score"].tolist() == pytest.approx(expected["score"].tolist(), abs=1e-9)
    every = mia.causal.discover(model, task, units="edges", top_k=10**6).frame
    ends = {"L0H1", "L1H2", "L1N3", "embed", "logits"}
    expected = every[every["src"].isin(ends) & every["dst"].isin(ends)]
    some = mia.causal.discover(model, task, units="edges", heads=["L0H1", "L1H2", "L1N3"])
    assert sorted(some.frame["edge"]) == sorted(expected["edge"])
    assert some.total == len(expected)
    whole = mia.causal.discover(model, task, units="edges", pools=True, heads=["L0H1", "L1N*"])
    assert set(whole.frame["src"]) | set(whole.frame["dst"]) == {"embed", "L0H1", "L1N*", "logits"}


@pytest.mark.usefixtures("as_users_run_it")
def test_refusals():
    model = tiny()
    task = pairs(model)
    with pytest.raises(mia.MechInterpError, match=r"method='acdc'; expected secant, .*; units='nodes'"):
        mia.causal.discover(model, task, "acdc", "nodes")
    with pytest.raises(mia.MechInterpError, match="patch='corrupt' only"):
        mia.causal.discover(model, task, "secant", patch="zero")
    with pytest.raises(mia.MechInterpError, match="'accuracy' is a step"):
        mia.causal.discover(model, mia.Task(task.clean, corrupt=task.corrupt, answer=1, metric="accuracy"))
    with pytest.raises(mia.MechInterpError, match=r"1 of the 24 neurons of layer 0.*give all of them"):
        mia.causal.discover(model, task, units="edges", pools=True, heads=["L0N1"])
    with pytest.raises(mia.MechInterpError, match="virtual heads are not ranked"):
        mia.causal.discover(model, task, heads=["L0H1 > L1H2"])
    with pytest.raises(mia.MechInterpError, match="pools=True is for units='edges'"):
        mia.causal.discover(model, task, pools=True)
    with pytest.raises(mia.MechInterpError, match=r"n=0; this table has .* heads"):
        mia.causal.discover(model, task).circuit(0)
