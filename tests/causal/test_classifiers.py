"""Bidirectional classifiers on prompts of unequal lengths, against hooks on Hugging Face's own model."""

import pytest
import torch

import mechinterp_attn as mia
from tests.causal.classifiers import Classifier
from tests.conftest import random_tokens, tiny_bridge

EXACT = dict(atol=1e-10, rtol=1e-9)  # float64, another order of sums
SOME = ["L0H1", "L1H3", "L0N2", "L1N7"]


@pytest.fixture(scope="module", params=["bert", "roberta"])
def known(request):
    return Classifier(request.param)


def test_the_score_is_the_classifiers_own(known):
    task = known.task()
    torch.testing.assert_close(task.score(known.model), known.metric(known.logits(task.clean, {})), **EXACT)
    by_number = mia.Task(task.clean, labels=[2, 0, 1, 0], position=0, metric="prob")
    p = known.logits(task.clean, {}).softmax(-1)[torch.arange(4), [2, 0, 1, 0]]
    torch.testing.assert_close(by_number.score(known.model), p, **EXACT)


def test_effects_are_patches_of_hugging_faces_model(known):
    """Every head and some neurons, from the counterfactual, from zero and from the mean, and back."""
    task, model = known.task(), known.model
    clean, corrupt = known.holds(task.clean), known.holds(task.corrupt)
    real = known.padded(task.clean)["attention_mask"].bool()
    mean = {label: z[real].mean(0) for label, z in clean.items()}
    whole = known.metric(known.logits(task.clean, {}))
    nothing = known.metric(known.logits(task.corrupt, {}))
    heads = [*SOME, ["L0H0", "L1N3", "L1H2"]]
    groups = [[one] if isinstance(one, str) else one for one in heads]
    for patch, fill in (("corrupt", corrupt), ("zero", dict.fromkeys(clean, 0.0)), ("mean", mean)):
        found = mia.causal.effects(model, task, heads, patch)
        by_hand = [
            whole - known.metric(known.logits(task.clean, {one: fill[one] for one in group}))
            for group in groups
        ]
        torch.testing.assert_close(found.effects, torch.stack(by_hand), **EXACT)
        assert found.receipt.ok
    found = mia.causal.effects(model, task, heads, direction="denoising")
    by_hand = [
        known.metric(known.logits(task.corrupt, {one: clean[one] for one in group})) - nothing
        for group in groups
    ]
    torch.testing.assert_close(found.effects, torch.stack(by_hand), **EXACT)


def test_ablation_is_a_hook_on_hugging_faces_model(known):
    task = known.task()
    whole = known.metric(known.logits(task.clean, {}))
    found = mia.detect.ablate(known.model, task, SOME)
    by_hand = [whole - known.metric(known.logits(task.clean, {one: torch.tensor(0.0)})) for one in SOME]
    torch.testing.assert_close(found.effects, torch.stack(by_hand), **EXACT)


def test_circuits_alone_are_hugging_faces_model_with_all_else_replaced(known):
    task, model = known.task(), known.model
    corrupt = known.holds(task.corrupt)
    order = [*SOME, "L0H3", "L0N5"]
    found = mia.causal.faithfulness(model, task, order, sizes=[2, 6], draws=1)
    for row, size in enumerate((2, 6)):
        rest = {label: z for label, z in corrupt.items() if label not in order[:size]}
        torch.testing.assert_close(found.metric[row], known.metric(known.logits(task.clean, rest)), **EXACT)
    ends = [known.metric(known.logits(rows, {})).mean() for rows in (task.corrupt, task.clean)]
    own = {label: corrupt[label] for label in order}
    left = known.metric(known.logits(task.clean, own)).mean()
    assert found.frame["removed"][1] == pytest.approx(float((left - ends[0]) / (ends[1] - ends[0])))


def test_estimates_and_secant_scores(known):
    """The estimate is the slope of a small patch in Hugging Face's model; chords add up to the change."""
    task, model = known.task(), known.model
    found = mia.causal.effects(model, task, exact=0).frame.set_index("head")["estimate"]
    clean, corrupt = known.holds(task.clean), known.holds(task.corrupt)
    step = 1e-5
    for label in SOME:
        slopes = [
            known.metric(known.logits(task.clean, {label: torch.lerp(clean[label], corrupt[label], s)}))
            for s in (-step, step)
        ]
        slope = float((slopes[0] - slopes[1]).mean() / (2 * step))
        assert found[label] == pytest.approx(slope, rel=1e-5, abs=1e-8)  # differences of two points
    assert mia.causal.discover(model, task).receipt.checks[0].ok


@pytest.mark.parametrize("mode", "QKV")
def test_paths_with_norms_in_front(mode):
    """What one head writes, read by another one's queries, keys or values alone, then by the logits."""
    known = Classifier("roberta")
    task, src, dst = known.task(), "L0H1", "L1H2"
    attention = known.layers[1].attention
    clean, corrupt = known.holds(task.clean), known.holds(task.corrupt)
    dense, at = known.place(src)
    change = (corrupt[src] - clean[src]) @ dense.weight[:, at].T
    name = {"Q": "query", "K": "key", "V": "value"}[mode]
    linear, own = getattr(attention.self, name), slice(8, 12)
    seen = {}
    norm = attention.LayerNorm
    first = norm.register_forward_pre_hook(lambda module, args: seen.__setitem__("x", args[0]))
    whole = known.metric(known.logits(task.clean, {}))
    first.remove()

    def moved(module, args, out):
        out = out.clone()
        read = torch.nn.functional.linear(norm(seen["x"] + change), linear.weight, linear.bias)
        out[..., own] = read[..., own]
        return out

    held = {}
    dst_dense, dst_at = known.place(dst)
    keep = dst_dense.register_forward_pre_hook(lambda m, args: held.__setitem__("z", args[0][..., dst_at]))
    into_all = known.metric(known.logits(task.clean, {}, [(linear, moved)]))
    keep.remove()
    to_logits = (held["z"] - clean[dst]) @ dst_dense.weight[:, dst_at].T

    def at_end(module, args):
        return (args[0] + to_logits,)

    end = known.base.LayerNorm.register_forward_pre_hook(at_end)
    into_logits = known.metric(known.logits(task.clean, {}))
    end.remove()
    paths = [f"{src} -{mode}-> {dst}", f"{src} -{mode}-> {dst} -> logits"]
    found = mia.causal.path_patch(known.model, task, paths)
    torch.testing.assert_close(found.effects, whole - torch.stack([into_all, into_logits]), **EXACT)


def test_paths_are_refused_with_norms_behind():
    known = Classifier("bert")
    with pytest.raises(mia.MechInterpError, match=r"norms behind its sublayers.*whole heads"):
        mia.causal.path_patch(known.model, known.task(), "L0H1 -> logits")


def test_a_padded_prompt_is_frozen_without_its_padding(known):
    """As Hugging Face's tokenizer gives it; every path analysis explains the classifier's number."""
    task, model = known.task(), known.model
    whole = known.metric(known.logits(task.clean, {}))
    ids, mask = known.padded(task.clean).values()
    for row in range(4):
        frozen = mia.paths.freeze(model, ids[row], attention_mask=mask[row])
        assert frozen.tokens.tolist() == task.clean[row]
        assert frozen.receipt.ok
        expected = pytest.approx(float(whole[row]), abs=1e-10)
        assert mia.paths.logit_attribution(frozen, task=task).total == expected
        assert mia.paths.orders(frozen, task=task).frame["metric"].iloc[-1] == expected
        assert mia.paths.top_paths(frozen, task=task, top_k=3).total == expected
        assert mia.paths.attribution_graph(frozen, task=task, max_nodes=10).total == expected
        assert mia.paths.virtual_head(frozen, "L0H1", "L1H2", task=task).receipt.ok
    assert len(frozen.receipt.checks) == 1  # nothing was left out of the last one
    first = mia.paths.freeze(model, ids[1:2], attention_mask=mask[1:2])
    assert first.receipt.notes["padding left out"] == "4 tokens"
    assert len(first.receipt.checks) == 2


def test_padding_in_front_of_a_causal_prompt():
    """Positions count the real tokens, learned ones and rotary pairs alike."""
    for more in ({}, dict(positional_embedding_type="rotary", act_fn="relu")):
        model = mia.convert(tiny_bridge(**more))
        tokens = random_tokens(model, 1, 7)
        padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), tokens, tokens[:, :2]], 1)
        mask = torch.tensor([0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0, 0])
        frozen = mia.paths.freeze(model, padded, attention_mask=mask)
        torch.testing.assert_close(frozen.logits, model(tokens)[0].detach(), **EXACT)
        assert frozen.receipt.ok
        assert len(frozen.receipt.checks) == 2


@pytest.mark.usefixtures("as_users_run_it")
def test_masks_that_do_not_fit(known):
    ids = torch.arange(2, 8)
    for mask, said in (
        ([1, 1, 0], r"attention_mask has shape \(1, 3\); expected that of the tokens, \(1, 6\)"),
        ([1, 1, 2, 1, 1, 1], "attention_mask holds 2; expected 0 on padding and 1 elsewhere"),
        ([0] * 6, "attention_mask is 0 everywhere"),
        ([1, 1, 0, 0, 1, 1], r"zeros between real tokens \(0 to 5\)"),
        ([0, 1, 1, 1, 1, 1], "1 tokens of padding in front: .*pad on the right"),
    ):
        with pytest.raises(mia.MechInterpError, match=said):
            mia.paths.freeze(known.model, ids, attention_mask=mask)
    with pytest.raises(mia.MechInterpError, match="attention_mask is for ids; a text has no padding"):
        mia.paths.freeze(mia.load("attn-1l"), "She was", attention_mask=[1])
    with pytest.raises(mia.MechInterpError, match="one by one, each with its own row"):
        mia.paths.freeze(known.model, torch.stack([ids, ids]))
