"""Patches along paths, against the same made with matrices and one hook at a time."""

import pytest
import torch

import mechinterp_attn as mia
from tests.causal.test_faithfulness import ByHand, adding, setting
from tests.conftest import random_tokens, tiny_bridge

FAMILIES = {
    "gelu": dict(),
    "gated, shared keys": dict(
        act_fn="silu", gated_mlp=True, normalization_type="RMS", n_key_value_heads=2
    ),
}


@pytest.fixture(scope="module", params=FAMILIES)
def model(request):
    return mia.convert(tiny_bridge(d_mlp=6, n_layers=3, **FAMILIES[request.param]))


@pytest.fixture(scope="module")
def task(model):
    clean, corrupt = random_tokens(model, 4, 7), random_tokens(model, 4, 7, seed=1)
    return mia.Task(clean, corrupt=corrupt, answer=[1, 2, 3, 4], against=[5, 6, 7, 8])


class Along(ByHand):
    """Follows a change from station to station in the clean run."""

    def start(self, label):
        if label == "embed":
            first = "blocks.0.hook_resid_pre"
            return self.cache[first] - self.clean_cache[first]
        bank, index = self.model.heads.find(label)
        return self.written(bank, index, self.cache[bank.hook("z")] - self.clean_cache[bank.hook("z")])

    def z(self, change, label, modes):
        """What a head holds when it reads the change with some of its sides."""
        bank, index = self.model.heads.find(label)
        norm, _ = self.model.norm_of(bank)
        x = self.clean_cache[self.model.stream_of(bank)]
        seen, hooks = {}, []
        for mode in modes:
            delta = (norm(x + change) - norm(x)) @ bank.reads[mode][index]
            hooks.append((bank.hook(mode.lower()), adding(delta, index, bank)))
        hooks.append((bank.hook("z"), lambda z, hook: seen.__setitem__("z", z)))
        self.model.run_with_hooks(self.clean, fwd_hooks=hooks)
        return seen["z"]

    def station(self, change, label, modes):
        bank, index = self.model.heads.find(label)
        return self.written(bank, index, self.z(change, label, modes) - self.clean_cache[bank.hook("z")])

    def logits(self, change):
        end = self.clean_cache[f"blocks.{self.model.spec.n_layers - 1}.hook_resid_post"] + change
        return self.whole - self.metric(self.model(end, start_at_layer=self.model.spec.n_layers)[:, -1])

    def onwards(self, change, label, modes):
        bank, index = self.model.heads.find(label)
        hooks = [(bank.hook("z"), setting(self.z(change, label, modes), index))]
        return self.whole - self.metric(self.model.run_with_hooks(self.clean, fwd_hooks=hooks)[:, -1])


def test_paths_are_followed_by_hand(model, task):
    hand = Along(model, task)
    first, neuron = hand.start("L0H1"), hand.start("L0N2")
    cases = {
        "L0H1 -> logits": hand.logits(first),
        "L0H1 -K-> L1H2 -> logits": hand.logits(hand.station(first, "L1H2", "K")),
        "L0H1 -Q-> L1N3 -> logits": hand.logits(hand.station(first, "L1N3", "Q")),
        "L0N2 -V-> L1H3 -Q-> L2H1 -> logits": hand.logits(
            hand.station(hand.station(neuron, "L1H3", "V"), "L2H1", "Q")
        ),
        "L0N2 -> L1H3 -> logits": hand.logits(hand.station(neuron, "L1H3", "QKV")),
        "embed -V-> L0H1 -> logits": hand.logits(hand.station(hand.start("embed"), "L0H1", "V")),
        "L0H1 -K-> L1H2": hand.onwards(first, "L1H2", "K"),
    }
    found = mia.causal.path_patch(model, task, list(cases))
    assert found.receipt.ok
    assert found.frame["path"].tolist() == list(cases)
    whole = float((hand.whole - hand.nothing).mean())
    for row, (path, expected) in enumerate(cases.items()):
        torch.testing.assert_close(found.effects[row], expected, atol=1e-9, rtol=1e-9, msg=path)  # float64
        assert found.frame["effect"][row] == pytest.approx(float(expected.mean()))
        assert found.frame["share"][row] == pytest.approx(float(expected.mean()) / whole)
    assert float(found.effects.abs().min()) > 0


def test_denoising_and_zero(model, task):
    """Denoising is noising with prompts and counterfactuals exchanged, but for its sign."""
    path = "L0H1 -K-> L1H2 -> logits"
    back = mia.causal.path_patch(model, task, path, direction="denoising")
    swapped = mia.Task(task.corrupt, corrupt=task.clean, answer=task.answer, against=task.against)
    there = mia.causal.path_patch(model, swapped, path)
    torch.testing.assert_close(back.effects, -there.effects)
    hand = Along(model, task)
    bank, index = model.heads.find("L0H1")
    gone = hand.written(bank, index, -hand.clean_cache[bank.hook("z")])
    zero = mia.causal.path_patch(model, task, "L0H1 -> logits", "zero")
    torch.testing.assert_close(zero.effects[0], hand.logits(gone), atol=1e-9, rtol=1e-9)  # float64


def test_patterns_are_every_path_that_exists(model, task):
    found = mia.causal.path_patch(model, task, "L0-1H* -V-> L1H2 -> logits").frame["path"]
    assert set(found) == {f"L0H{i} -V-> L1H2 -> logits" for i in range(4)}


@pytest.mark.usefixtures("as_users_run_it")
def test_refusals(model, task):
    run = mia.causal.path_patch
    with pytest.raises(mia.MechInterpError, match=r"is not a path.*L9H1.*no such edges.*L1H1 -Q-> L0H1"):
        run(model, task, ["L0H1", "L0H1 -> L9H1", "L1H1 -Q-> L0H1"])
    with pytest.raises(mia.MechInterpError, match="'embed' needs other prompts"):
        run(model, task, "embed -> L0H1", "zero")
    with pytest.raises(mia.MechInterpError, match=r"-K-> L1N3"):
        run(model, task, "L0H1 -K-> L1N3 -> logits")
    with pytest.raises(mia.MechInterpError, match="no paths"):
        run(model, task, [])
