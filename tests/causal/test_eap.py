"""Edge attribution patching, written here in plain PyTorch on TransformerLens's own bridge."""

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge


def test_eap_of_the_bridge_is_ours():
    """Syed et al. 2023 at the granularity of heads: (clean - counterfactual) output of one head, along the
    gradient of the metric at the queries, keys and values of a later one, through the bridge's own norm
    and its own (unfolded) weights; and along the gradient at the end of the stream."""
    bridge = tiny_bridge()
    model = mia.convert(bridge)
    clean, corrupt = random_tokens(model, 4, 7), random_tokens(model, 4, 7, seed=1)
    answer, against = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])
    rows = torch.arange(4)
    seen = {}

    def keep(name):
        def hook(x, hook):
            seen[name] = x
            x.retain_grad()
            return x

        return name, hook

    names = ["blocks.1.attn.hook_q", "blocks.1.attn.hook_k", "blocks.1.attn.hook_v",
             "blocks.1.hook_resid_post"]  # fmt: skip
    with torch.enable_grad():
        logits = bridge.run_with_hooks(clean, fwd_hooks=[keep(name) for name in names])[:, -1]
        (logits[rows, answer] - logits[rows, against]).sum().backward()
    with torch.no_grad():
        _, one = bridge.run_with_cache(clean)
        _, two = bridge.run_with_cache(corrupt)
    task = mia.Task(clean, corrupt=corrupt, answer=answer.tolist(), against=against.tolist())
    ours = mia.causal.discover(model, task, "eap", "edges", top_k=10**6).frame
    ours = ours.set_index(["src", "dst", "mode"])["score"]
    change = (one["blocks.0.attn.hook_z"] - two["blocks.0.attn.hook_z"]).reshape(4, 7, 4, 4)
    written = torch.einsum("bthk,hkd->bthd", change, bridge.W_O[0])
    stream = one["blocks.1.hook_resid_pre"].detach().clone().requires_grad_()
    weights = {"Q": bridge.W_Q, "K": bridge.W_K, "V": bridge.W_V}
    for src in range(4):
        for mode, W in weights.items():
            for dst in range(4):
                read = bridge.blocks[1].ln1(stream) @ W[1, dst]
                gradient = seen[f"blocks.1.attn.hook_{mode.lower()}"].grad.reshape(4, 7, 4, 4)[:, :, dst]
                (field,) = torch.autograd.grad((read * gradient).sum(), stream)
                expected = float((written[:, :, src] * field).sum()) / 4
                found = ours[f"L0H{src}", f"L1H{dst}", mode]
                assert found == pytest.approx(expected, abs=1e-6), (src, dst, mode)  # float32 tables
        end = seen["blocks.1.hook_resid_post"].grad
        expected = float((written[:, :, src] * end).sum()) / 4
        assert ours[f"L0H{src}", "logits", ""] == pytest.approx(expected, abs=1e-6)
