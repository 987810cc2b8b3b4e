"""Outputs that are not next tokens: every analysis works without a next-token loss, or says why not.

Classifiers and models of modular arithmetic read one vocabulary and give another, in contexts of a few
tokens; bidirectional models read what follows. None of them has a next-token loss.
"""

import json
import math

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError

SHAPES = {
    "modular": dict(d_vocab=12, d_vocab_out=11, n_ctx=3, act_fn="relu", normalization_type=None),
    "classes": dict(d_vocab=9, d_vocab_out=2, n_ctx=3, n_layers=1, attn_only=True),
    "wide": dict(d_vocab=7, d_vocab_out=19, n_ctx=12),
    "one_token": dict(d_vocab=7, d_vocab_out=3, n_ctx=1, n_layers=1),
    "no_layers": dict(d_vocab=7, d_vocab_out=5, n_ctx=3, n_layers=0),
    "bidirectional": dict(d_vocab=13, n_ctx=12, attention_dir="bidirectional"),
}
LOSS = ("term_importance", "ablate", "induction", "in_context_learning", "loss", "check_circuit")


def build(shape):
    """A checkpoint with random weights and nothing trivial in it, and what it converts to."""
    from mechinterp_attn.sources.checkpoint import expected_shapes
    from mechinterp_attn.sources.config import spec_from_config

    cfg = dict(
        n_layers=2, n_heads=4, d_model=16, d_head=4, d_mlp=24, act_fn="gelu", normalization_type="LN"
    )
    cfg |= dict(positional_embedding_type="standard") | SHAPES[shape]
    generator = torch.Generator().manual_seed(0)
    required, optional = expected_shapes(spec_from_config(cfg, shape))
    state = {name: 0.5 * torch.randn(size, generator=generator) for name, size in required.items()}
    for name, size in optional.items():
        state[name] = float(name.endswith(".w")) + 0.3 * torch.randn(size, generator=generator)
    source = mia.Checkpoint(cfg, state)
    return source, mia.convert(source)


@pytest.fixture(scope="module", params=SHAPES)
def both(request):
    return build(request.param)


def analyses(source, model):
    """Every public analysis, each as a user would first call it."""
    c, p, d, causal = mia.circuits, mia.paths, mia.detect, mia.causal
    n = min(model.spec.n_ctx, 3)
    ids = (torch.arange(6 * n) % model.spec.d_vocab).view(6, n)
    frozen = p.freeze(model, ids[0])
    last = f"L{max(model.spec.n_layers - 1, 0)}"
    task = mia.Task(ids, corrupt=ids.flip(0), answer=[0, 1] * 3, against=[1, 0] * 3, labels=["a", "b"])
    if model.spec.d_vocab_out == model.spec.d_vocab:
        task = mia.Task(ids, corrupt=ids.flip(0), answer=[0, 1] * 3, against=[1, 0] * 3)
    heads = ["L0H0", f"{last}H1"] if model.n_heads else []
    return {
        "verify": lambda: mia.verify(model, source, ids),
        "loss": lambda: model(ids, return_type="loss"),
        "bigrams": lambda: c.bigrams(model),
        "ov_top": lambda: c.ov_top(model, "L0H1"),
        "ov_top neuron": lambda: c.ov_top(model, "L0N1"),
        "qk_top": lambda: c.qk_top(model, "L0H1"),
        "ov statistics": lambda: c.ov_circuit(model, "L0H1").statistics(),
        "skip_trigrams": lambda: c.skip_trigrams(model),
        "factoring_bugs": lambda: c.factoring_bugs(model, "L0H1"),
        "copying": lambda: c.copying_scores(model),
        "copying diagonals": lambda: c.copying_scores(model, diagonals=True),
        "composition": lambda: c.composition(model),
        "virtual_heads": lambda: c.virtual_heads(model),
        "position_circuit": lambda: c.position_circuit(model, "L0H1"),
        "token_positions": lambda: c.token_positions(model, "L0H1"),
        "singular_directions": lambda: c.singular_directions(model, "L0H1"),
        "reads_and_writes": lambda: c.reads_and_writes(model, "L0N1"),
        "orders": lambda: p.orders(frozen),
        "term_importance": lambda: p.term_importance(model, ids[0]),
        "logit_attribution": lambda: p.logit_attribution(frozen),
        "logit difference": lambda: p.logit_attribution(frozen, target=1, against=0),
        "top_paths": lambda: p.top_paths(frozen),
        "virtual_head": lambda: p.virtual_head(frozen, *heads[:1]),
        "expand_score": lambda: p.expand_score(frozen, "L0H1", n - 1, 0),
        "graph": lambda: p.attribution_graph(frozen),
        "score_heads": lambda: d.score_heads(model),
        "score_heads tokens": lambda: d.score_heads(model, tokens=ids),
        "score_weights": lambda: d.score_weights(model),
        "offsets": lambda: d.offsets(model),
        "match": lambda: d.match(model, ids, "previous_token"),
        "induction": lambda: d.induction(model),
        "in_context_learning": lambda: d.in_context_learning(model, ids),
        "ablate": lambda: d.ablate(model, ids, heads),
        "over_corpus": lambda: d.over_corpus(model, list(ids)),
        "check_circuit": lambda: d.check_circuit(
            model, {"heads": {"L0H0": "member"}, "behaviour": {"task": "induction"}}
        ),
        "effects": lambda: causal.effects(model, task),
        "discover": lambda: causal.discover(model, task),
        "discover edges": lambda: causal.discover(model, task, units="edges"),
        "faithfulness": lambda: causal.faithfulness(model, task, causal.discover(model, task)),
        "literal": lambda: mia.theorems.attention_only(model)(ids),
        "report": lambda: mia.report(model, ids[0], progress=False),
    }


def test_every_analysis_works_or_says_why(both):
    """No stranger's exception, no red receipt, no loss that means nothing."""
    source, model = both
    refused = {}
    for name, call in analyses(source, model).items():
        try:
            result = call()
        except MechInterpError as error:
            refused[name] = str(error)
            continue
        receipt = getattr(result, "receipt", None)
        assert receipt is None or receipt.ok is not False, (name, receipt)
        if hasattr(result, "frame"):
            loss = [column for column in result.frame.columns if str(column).startswith("loss")]
            assert result.frame[loss].isna().all(axis=None), name
    for name, message in refused.items():
        assert "\n" not in message, (name, message)
        assert len(message) > 20, (name, message)
    if model.n_heads:  # without heads, that is the reason
        for name in LOSS:
            assert "next-token loss" in refused[name] or "context of at least" in refused[name], name
    always = {"orders", "logit_attribution", "bigrams", "verify", "report"}
    assert not always & set(refused)


@pytest.mark.parametrize("shape", ["modular", "wide", "bidirectional"])
def test_what_needs_no_loss_is_not_refused(shape):
    source, model = build(shape)
    needed = set(analyses(source, model)) - set(LOSS) - {"copying diagonals", "literal"}
    for name, call in analyses(source, model).items():
        if name in needed:
            call()


def test_a_context_too_short_for_one_score_gives_the_others():
    _, model = build("modular")
    found = mia.detect.score_heads(model)
    attention = found.frame[found.frame["kind"] == "attention"]
    assert attention[["induction", "duplicate_token"]].isna().all(axis=None)
    assert attention[["previous_token", "first_token", "current_token", "entropy"]].notna().all(axis=None)
    assert "two tokens said twice need" in found.receipt.notes["not scored"]
    pattern = model.run_with_cache(found.probe.tokens)[1]["blocks.0.attn.hook_pattern"]
    own = float(pattern[:, 1].diagonal(-1, 1, 2).mean())
    assert attention["previous_token"].iloc[1] == pytest.approx(own, rel=1e-5)  # float32


def test_copying_compares_the_outputs_that_stand_for_inputs():
    """Against eigenvalues of the dense table over the pairs."""
    _, model = build("modular")
    table = mia.circuits.ov_circuit(model, "L1H2")
    for align, inputs in ((None, list(range(11))), ([3, 5, 1, 0], [3, 5, 1, 0])):
        found = mia.circuits.copying_scores(model, ["L1H2"], align=align)
        dense = (table.left() @ table.right())[inputs][:, : len(inputs)]
        values = torch.linalg.eigvals(dense)
        expected = float(values.real.sum() / values.abs().sum())
        assert found.frame["copying_score"].iloc[0] == pytest.approx(expected, rel=1e-6)
        assert found.frame["size"].iloc[0] == pytest.approx(float(values.abs().sum()) / len(inputs))
        assert "alignment" in found.receipt.notes
    assert (
        "outputs 0..10 with input tokens 0..10"
        in mia.detect.score_weights(model).receipt.notes["alignment"]
    )


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize(
    ("align", "message"),
    [
        ([], "shape .0,."),
        ([0.5, 1.0], "float32"),
        ([0, 12], "ids from 0 to 12; expected 1 to 11 ids of input tokens 0..11"),
        (list(range(12)), "shape .12,."),
    ],
)
def test_an_alignment_is_checked(align, message):
    _, model = build("modular")
    with pytest.raises(MechInterpError, match=message):
        mia.circuits.copying_scores(model, align=align)


def test_offsets_of_a_bidirectional_model_have_a_sign():
    """Against means over the diagonals of its patterns."""
    _, model = build("bidirectional")
    tokens = torch.arange(24).view(2, 12) % 13
    found = mia.detect.offsets(model, tokens=tokens, up_to=3)
    pattern = model.run_with_cache(tokens)[1]["blocks.1.attn.hook_pattern"][:, 2]
    row = found.frame.set_index("head").loc["L1H2"]
    means = {k: float(pattern.diagonal(-k, 1, 2).mean()) for k in range(-3, 4)}
    assert [column for column in found.frame if column.startswith("offset_")] == [
        f"offset_{k}" for k in range(-3, 4)
    ]
    for k, mean in means.items():
        assert row[f"offset_{k}"] == pytest.approx(mean, rel=1e-5)  # float32
    assert row["at"] == max(means, key=means.get)
    assert found.plot().data[0].x[0] == -3
    circuit = mia.circuits.position_circuit(model, "L0H1")
    assert circuit.frame["offset"].tolist() == list(range(-11, 12))
    assert circuit.frame["score"].iloc[0] == pytest.approx(float(circuit.scores[0, 11]))


def test_rotary_offsets_of_a_bidirectional_model_have_a_sign():
    """One query token and one key token placed as far apart as the offset says, either way."""
    from mechinterp_attn.sources.checkpoint import expected_shapes
    from mechinterp_attn.sources.config import spec_from_config

    cfg = dict(n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=8, n_ctx=6, d_vocab=5, act_fn="gelu")
    cfg |= dict(normalization_type=None, positional_embedding_type="rotary", rotary_dim=4)
    cfg |= dict(attention_dir="bidirectional")
    generator = torch.Generator().manual_seed(1)
    required, optional = expected_shapes(spec_from_config(cfg, "toy"))
    state = {k: torch.randn(s, generator=generator) for k, s in (required | optional).items()}
    state |= {name: torch.zeros_like(t) for name, t in state.items() if name.endswith("b_K")}
    model = mia.convert(mia.Checkpoint(cfg, state))
    tokens = torch.tensor([[4, 1, 1, 2, 1, 3]])
    scores = model.run_with_cache(tokens)[1]["blocks.0.attn.hook_attn_scores"][0, 1]
    for query, key in ((0, 3), (3, 5), (3, 0), (5, 0)):
        entry = mia.circuits.qk_circuit(model, "L0H1", offset=query - key).entry(
            int(tokens[0, query]), int(tokens[0, key])
        )
        assert entry / model.banks[0].score_scale == pytest.approx(float(scores[query, key]), rel=1e-4)
    curve = mia.circuits.position_circuit(model, "L0H1")
    assert curve.frame["offset"].tolist() == list(range(-5, 6))
    assert curve.receipt.ok
    with pytest.raises(MechInterpError, match="offset=-6; expected -5 to 5"):
        mia.circuits.qk_circuit(model, "L0H1", offset=-6)


def test_outputs_are_named_as_outputs():
    """Output 8 of a model of arithmetic is no token, whatever the tokenizer says of token 8."""
    _, model = build("modular")
    frozen = mia.paths.freeze(model, torch.tensor([3, 5, 11]))
    assert "logit '<8>'" in mia.paths.logit_attribution(frozen, target=8).about
    with pytest.raises(MechInterpError, match="11 outputs are not tokens; give the number of an output"):
        mia.paths.logit_attribution(frozen, target="8")
    page = mia.report(model, [3, 5, 11], progress=False)
    words = str(page.data["sections"])
    assert "next tokens, so there is no next-token loss" in words
    assert "The most likely outputs" in words
    assert "Not shown" not in words
    assert math.isnan(mia.paths.orders(frozen).frame["loss"].iloc[-1])
    assert "loss" not in str(mia.verify(model, build("modular")[0], torch.tensor([[3, 5, 11]])))


def test_a_corpus_of_tokens_without_a_next_token_loss():
    _, model = build("bidirectional")
    documents = [[1, 2, 3, 4, 5, 1, 2, 3], [7, 8, 9, 7, 8]]
    found = mia.detect.over_corpus(model, documents)
    assert math.isnan(found.loss)
    assert found.receipt.ok
    same = mia.detect.score_heads(model, tokens=torch.tensor(documents[:1])).frame["previous_token"]
    one = mia.detect.over_corpus(model, documents[:1]).frame["previous_token"]
    assert one.to_numpy() == pytest.approx(same.to_numpy(), rel=1e-5)  # float32
    with pytest.raises(MechInterpError, match="estimate=True: next-token losses"):
        mia.detect.over_corpus(model, documents, heads=["L0H0"], estimate=True)


@pytest.mark.usefixtures("as_users_run_it")
def test_where_is_a_table_of_truth_values():
    model = mia.load("attn-1l")
    tokens = torch.tensor([[0, 5, 6, 7]])
    whole = mia.detect.ablate(model, tokens, ["L0H0"], where=torch.tensor([[True, False, True]]))
    listed = mia.detect.ablate(model, tokens, ["L0H0"], where=[[True, False, True]])
    assert whole.loss == listed.loss
    for bad, message in (
        ([[True], [False, True]], "a list that is not a table"),
        ("first", "a str that is not a table"),
        ([[True, False]], "shape .1, 2. and dtype torch.bool; expected .1, 3. truth values"),
        ([[0.5, 1.0, 0.0]], "dtype torch.float32"),
        (None, None),
    ):
        if message is not None:
            with pytest.raises(MechInterpError, match=message):
                mia.detect.ablate(model, tokens, ["L0H0"], where=bad)


@pytest.mark.parametrize("shape", ["modular", "one_token", "bidirectional"])
def test_a_model_without_a_loss_is_saved_and_read_again(shape, tmp_path):
    """JSON has no NaN: the card of the conversion has None for a loss that there is not."""
    _, model = build(shape)
    model.save(tmp_path / "saved")
    again = mia.load(tmp_path / "saved")
    assert again.provenance == json.loads(json.dumps(model.provenance, allow_nan=False))
    assert again.provenance["fidelity"]["loss_model"] is None
    tokens = torch.zeros(1, 1, dtype=torch.long)
    assert torch.equal(again(tokens), model(tokens))
    mia.report(again, tokens[0], sections=["fidelity"], progress=False)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("bad", [b"man", [0.5, 1.0], {"a": 1}])
def test_a_text_to_compare_with_is_a_text_or_ids(bad):
    model = mia.load("attn-1l")
    for call in (mia.circuits.bigrams, lambda m, **given: mia.circuits.factoring_bugs(m, "L0H0", **given)):
        with pytest.raises(MechInterpError, match=r"expected a text|tokens must be integers"):
            call(model, text=bad)
