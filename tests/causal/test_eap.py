"""Edge attribution patching and its integrated gradients, written here in plain PyTorch on
TransformerLens's own bridge."""

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge

N, POS, HEADS, D_HEAD = 4, 7, 4, 4
STEPS = 3


class Bridge:
    """Scores of edges through the bridge's own norms and its own (unfolded) weights: what one head or MLP
    writes less what it writes in the counterfactual, along the metric's gradient at what a later one reads.
    """

    def __init__(self, bridge, clean, corrupt, measure, steps):
        self.bridge, self.clean, self.measure = bridge, clean, measure
        with torch.no_grad():
            one, two = (bridge.run_with_cache(tokens)[1] for tokens in (clean, corrupt))
        self.written = {"L0N*": one["blocks.0.hook_mlp_out"] - two["blocks.0.hook_mlp_out"]}
        z = (one["blocks.0.attn.hook_z"] - two["blocks.0.attn.hook_z"]).reshape(N, POS, HEADS, D_HEAD)
        for head in range(HEADS):
            self.written[f"L0H{head}"] = z[:, :, head] @ bridge.W_O[0, head]
        start, end = two["hook_embed"], one["hook_embed"]
        self.written["embed"] = end - start
        self.scores = {}
        # Syed et al. 2023 take the gradient at the prompt; Hanna et al. 2024 the mean of those between.
        for share in [1.0] if steps is None else [(k + 0.5) / steps for k in range(steps)]:
            self.add(start + share * (end - start), 1 / (steps or 1))

    def add(self, embed, weight):
        """The scores from gradients at one embedding of the prompts."""
        seen, layer = {}, self.bridge.blocks[1]

        def keep(name):
            def hook(x, hook):
                seen[name] = x
                x.retain_grad()
                return x

            return name, hook

        sides = [f"blocks.1.attn.hook_{side}" for side in "qkv"]
        names = [*sides, "blocks.1.hook_mlp_out", "blocks.1.hook_resid_post"]
        names += ["blocks.1.hook_resid_pre", "blocks.1.hook_resid_mid"]
        hooks = [("hook_embed", lambda x, hook: embed.clone().requires_grad_()), *map(keep, names)]
        with torch.enable_grad():
            self.measure(self.bridge.run_with_hooks(self.clean, fwd_hooks=hooks)).sum().backward()
        stream = seen["blocks.1.hook_resid_pre"].detach().requires_grad_()
        weights = (self.bridge.W_Q, self.bridge.W_K, self.bridge.W_V)
        for mode, side, W in zip("QKV", sides, weights, strict=True):
            gradient = seen[side].grad.reshape(N, POS, HEADS, D_HEAD)
            for dst in range(HEADS):
                read = (layer.ln1(stream) @ W[1, dst] * gradient[:, :, dst]).sum()
                (field,) = torch.autograd.grad(read, stream)
                self.meet(f"L1H{dst}", mode, field, weight)
        stream = seen["blocks.1.hook_resid_mid"].detach().requires_grad_()
        read = (layer.mlp(layer.ln2(stream)) * seen["blocks.1.hook_mlp_out"].grad).sum()
        self.meet("L1N*", "", torch.autograd.grad(read, stream)[0], weight)
        self.meet("logits", "", seen["blocks.1.hook_resid_post"].grad, weight)

    def meet(self, dst, mode, field, weight):
        for src, written in self.written.items():
            score = float((written * field).sum()) / N * weight
            self.scores[src, dst, mode] = self.scores.get((src, dst, mode), 0.0) + score


@pytest.mark.parametrize(("method", "steps"), [("eap", None), ("eap-ig", STEPS)])
def test_edge_scores_of_the_bridge_are_ours(method, steps):
    bridge = tiny_bridge()
    model = mia.convert(bridge)
    clean, corrupt = random_tokens(model, N, POS), random_tokens(model, N, POS, seed=1)
    answer, against = torch.tensor([1, 2, 3, 4]), torch.tensor([5, 6, 7, 8])

    def measure(logits):
        rows = torch.arange(N)
        return logits[rows, -1, answer] - logits[rows, -1, against]

    expected = Bridge(bridge, clean, corrupt, measure, steps).scores
    task = mia.Task(clean, corrupt=corrupt, answer=answer.tolist(), against=against.tolist())
    for pools in (True, False):
        found = mia.causal.discover(
            model, task, method, "edges", pools=pools, steps=steps or 1, top_k=10**6
        ).frame.set_index(["src", "dst", "mode"])["score"]
        shared = [edge for edge in expected if pools or "N*" not in edge[0] + edge[1]]
        assert len(shared) == (6 * (3 * HEADS + 2) if pools else 5 * (3 * HEADS + 1))
        for edge in shared:  # scores are kept in float32
            assert found[edge] == pytest.approx(expected[edge], abs=1e-6), edge
    signs = {score > 0 for score in expected.values()}
    assert signs == {True, False}
