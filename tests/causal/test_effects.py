"""Effects against patches made by hand, in float64."""

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge


@pytest.fixture(scope="module", params=["gelu", "gated"])
def model(request):
    more = {} if request.param == "gelu" else dict(act_fn="silu", gated_mlp=True, normalization_type="RMS")
    return mia.convert(tiny_bridge(**more))


@pytest.fixture(scope="module")
def task(model):
    clean, corrupt = random_tokens(model, 5, 9), random_tokens(model, 5, 9, seed=1)
    return mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4, 5], against=[6, 7, 8, 9, 10])


def by_hand(model, task, tokens, edits):
    """The metric with plain hooks."""
    logits = model.run_with_hooks(torch.tensor(tokens), fwd_hooks=edits)[:, -1]
    rows = torch.arange(len(task))
    return (logits[rows, task.answer] - logits[rows, task.against]).detach()


def setting(value, head, at=slice(None)):
    def hook(z, hook):
        z = z.clone()
        z[:, at, head] = value[:, at, head] if isinstance(value, torch.Tensor) else value
        return z

    return hook


@pytest.mark.parametrize(("label", "name", "head"), [
    ("L0H1", "blocks.0.attn.hook_z", 1), ("L1N5", "blocks.1.neurons.hook_act", 5),
])  # fmt: skip
def test_exact_effects_are_patches_by_hand(model, task, label, name, head):
    """Noising, denoising, zero, mean, and one position alone, for heads of both kinds."""
    clean, corrupt = torch.tensor(task.clean), torch.tensor(task.corrupt)
    _, cache = model.run_with_cache(clean)
    _, other = model.run_with_cache(corrupt)
    whole, broken = by_hand(model, task, task.clean, []), by_hand(model, task, task.corrupt, [])
    mean = cache[name].mean((0, 1), keepdim=True).expand_as(cache[name])
    cases = [
        (dict(), whole - by_hand(model, task, task.clean, [(name, setting(other[name], head))])),
        (dict(patch="zero"), whole - by_hand(model, task, task.clean, [(name, setting(0.0, head))])),
        (dict(patch="mean"), whole - by_hand(model, task, task.clean, [(name, setting(mean, head))])),
        (
            dict(direction="denoising"),
            by_hand(model, task, task.corrupt, [(name, setting(cache[name], head))]) - broken,
        ),
    ]
    for options, expected in cases:
        found = mia.causal.effects(model, task, [label], **options)
        torch.testing.assert_close(
            found.effects[0].double(), expected.float().double(), atol=1e-5, rtol=1e-5
        )
        assert found.frame["effect"][0] == pytest.approx(float(expected.mean()), abs=1e-5)
        assert found.receipt.ok
    each = mia.causal.effects(model, task, [label], positions="each")
    for place in (2, 8):
        expected = whole - by_hand(
            model, task, task.clean, [(name, setting(other[name], head, slice(place, place + 1)))]
        )
        row = each.frame[each.frame["position"] == place]
        assert float(row["effect"].iloc[0]) == pytest.approx(float(expected.mean()), abs=1e-5)


def test_value_bias_is_a_choice(model, task):
    """Kept, a head of zero still writes its value bias: what TransformerLens's folded models keep."""
    bias = model.banks[0].z_constant[1].expand(5, 9, -1)
    hook = setting(bias[:, :, None].expand(-1, -1, 4, -1), 1)
    whole = by_hand(model, task, task.clean, [])
    expected = whole - by_hand(model, task, task.clean, [("blocks.0.attn.hook_z", hook)])
    kept = mia.causal.effects(model, task, ["L0H1"], "zero", value_bias="kept")
    cut = mia.causal.effects(model, task, ["L0H1"], "zero")
    assert kept.frame["effect"][0] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert abs(kept.frame["effect"][0] - cut.frame["effect"][0]) > 1e-3
    for call in (
        lambda **o: mia.causal.effects(model, task, ["L0H1"], **o),
        lambda **o: mia.causal.discover(model, task, "gradient", **o),
        lambda **o: mia.causal.path_patch(model, task, "L0H1 -> logits", **o),
    ):
        said = [
            call(patch="zero", value_bias=choice).receipt.notes["value bias"] for choice in ("cut", "kept")
        ]
        assert said == ["cut with the head", "kept: the head goes on writing it"]
        assert "value bias" not in call(patch="mean").receipt.notes


def test_estimates_are_derivatives(model, task):
    """The estimate is the slope of the exact effect of going a little of the way to the patch."""
    frame = mia.causal.effects(model, task, exact=0).frame.set_index("head")
    _, cache = model.run_with_cache(torch.tensor(task.clean))
    _, other = model.run_with_cache(torch.tensor(task.corrupt))
    step = 1e-5
    for label, name, head in (
        ("L0H1", "blocks.0.attn.hook_z", 1),
        ("L1N5", "blocks.1.neurons.hook_act", 5),
    ):
        ends = []
        for side in (step, -step):
            middle = cache[name] + side * (other[name] - cache[name])
            ends.append(by_hand(model, task, task.clean, [(name, setting(middle, head))]).mean())
        slope = -float(ends[0] - ends[1]) / (2 * step)
        assert frame["estimate"][label] == pytest.approx(slope, rel=1e-5, abs=1e-8)


def test_groups_and_virtual_heads(model, task):
    """A group is patched together; what comes through two heads is less than all of the second."""
    found = mia.causal.effects(model, task, [["L0H0", "L1N3"], "L0H0 > L1H1", "L0H0 -K-> L1H1"])
    _, other = model.run_with_cache(torch.tensor(task.corrupt))
    edits = [
        ("blocks.0.attn.hook_z", setting(other["blocks.0.attn.hook_z"], 0)),
        ("blocks.1.neurons.hook_act", setting(other["blocks.1.neurons.hook_act"], 3)),
    ]
    expected = by_hand(model, task, task.clean, []) - by_hand(model, task, task.clean, edits)
    assert found.frame["effect"][0] == pytest.approx(float(expected.mean()), abs=1e-5)
    assert list(found.frame["head"]) == ["L0H0 + L1N3", "L0H0 > L1H1", "L0H0 -K-> L1H1"]
    assert found.frame["effect"].abs().min() > 0
    chain = ["L0H0 > L1H1"]
    assert "taken out" in found.receipt.notes["chains and edges"]  # and so the patch makes no difference
    same = mia.causal.effects(model, task, chain, "zero")
    assert "chains and edges" not in same.receipt.notes
    assert float(same["effect"][0]) == pytest.approx(found["effect"][1], abs=1e-6)
    with pytest.raises(mia.MechInterpError, match="taken out of the clean run, not put into"):
        mia.causal.effects(model, task, chain, direction="denoising")


def test_resampling_puts_in_another_prompts_values(model, task):
    found = mia.causal.effects(model, task, ["L0H1"], "resample", seed=3)
    name = "blocks.0.attn.hook_z"
    _, cache = model.run_with_cache(torch.tensor(task.clean))
    seen = []
    for i in range(5):  # it must be one of the other four prompts'
        alone = task.take([i])
        options = []
        for j in range(5):
            value = cache[name][j : j + 1]
            edits = [(name, setting(value, 1))]
            options.append(
                float(by_hand(model, alone, alone.clean, []) - by_hand(model, alone, alone.clean, edits))
            )
        seen.append(int((torch.tensor(options) - found.effects[0, i]).abs().argmin()))
        assert abs(options[seen[-1]] - float(found.effects[0, i])) < 1e-5
    assert all(i != j for i, j in enumerate(seen))
    assert sorted(seen) == list(range(5))


def test_nothing_is_left_on_the_model(model, task):
    before = {name: p.clone() for name, p in model.named_parameters()}
    mia.causal.effects(model, task)
    mia.causal.discover(model, task)
    assert not any(point.has_hooks() for point in model.hook_dict.values())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert all(torch.equal(before[name], p) for name, p in model.named_parameters())
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.usefixtures("as_users_run_it")
def test_refusals(model, task):
    bare = mia.Task(task.clean, answer=task.answer, against=task.against)
    with pytest.raises(mia.MechInterpError, match=r"needs counterfactual prompts.*corrupt="):
        mia.causal.effects(model, bare)
    same = mia.Task(task.clean, corrupt=task.clean, answer=task.answer, against=task.against)
    with pytest.raises(mia.MechInterpError, match="is constant"):
        mia.causal.effects(model, same)
    flat = mia.Task(task.clean, metric=lambda logits: torch.ones(len(logits)))
    with pytest.raises(mia.MechInterpError, match="is constant: it is 1 whatever the logits are"):
        mia.causal.effects(model, flat, patch="zero")
    with pytest.raises(mia.MechInterpError, match="no use for patch='zero'"):
        mia.causal.effects(model, task, patch="zero", direction="denoising")
    with pytest.raises(mia.MechInterpError, match=r"needs about .* or max_bytes="):
        mia.causal.effects(model, task, max_bytes=1000)


def test_a_behaviour_that_is_not_there_is_said(model):
    """Random models answer at chance."""
    clean, corrupt = random_tokens(model, 16, 9), random_tokens(model, 16, 9, seed=1)
    answers = mia.Task(clean, answer=[0] * 16).bind(model)
    logits = model(clean)[:, -1]
    worst, best = logits.argmin(-1).tolist(), logits.argmax(-1).tolist()
    assert answers is not None
    task = mia.Task(clean, corrupt=corrupt, answer=worst, against=best)
    assert "hardly has this behaviour" in str(mia.causal.effects(model, task, exact=0).receipt)
    task = mia.Task(clean, corrupt=corrupt, answer=best, against=worst)
    assert "hardly has this behaviour" not in str(mia.causal.effects(model, task, exact=0).receipt)


def test_the_head_behind_induction_is_at_the_top():
    """L0H2 of gelu-2l acts through another head's keys, which no direct effect shows."""
    model = mia.load("gelu-2l")
    task = mia.tasks.induction(model, n=16)
    found = mia.causal.effects(model, task)
    assert found.top(2)["head"].tolist() == ["L0H2", "L1H3"]
    assert found.receipt.notes["correlation of estimate and exact"] > 0.8
