"""Circuits planted by hand: their truth by exact patches written here, and what is found of them."""

import planted
import pytest
import torch
from program import Planted, auroc

import mechinterp_attn as mia

BUILT: dict[str, Planted] = {}


@pytest.fixture(params=planted.ALL, ids=lambda build: build.__name__)
def circuit(request) -> Planted:
    build = request.param
    if build.__name__ not in BUILT:
        BUILT[build.__name__] = build()
    return BUILT[build.__name__]


def _ids(given: list[int] | int, task: mia.Task) -> torch.Tensor:
    return torch.tensor(given if isinstance(given, list) else [given] * len(task))


class Patching:
    """Gives one reader the counterfactual of what one source writes; only hooks and matrices are used.

    The models have no norms, so that what a source adds to a reader's queries, keys or values is linear.
    """

    def __init__(self, circuit: Planted):
        self.circuit, self.model = circuit, circuit.model
        task = circuit.task
        self.clean, self.corrupt = torch.tensor(task.clean), torch.tensor(task.corrupt)
        self.answer, self.against = _ids(task.answer, task), _ids(task.against, task)
        self.runs = [self.model.run_with_cache(t)[1] for t in (self.clean, self.corrupt)]
        self.banks = {label: (b, i) for b in self.model.banks for i, label in enumerate(b.labels())}
        self.whole = self.metric(self.model(self.clean))

    def metric(self, logits: torch.Tensor) -> float:
        rows = torch.arange(len(logits))
        last = logits[:, -1]
        return float((last[rows, self.answer] - last[rows, self.against]).mean())

    def change(self, src: str) -> torch.Tensor:
        """What the counterfactual adds to the stream by a source, ``[n, pos, d_model]``."""
        clean, corrupt = self.runs
        if src == "embed":
            return corrupt["hook_embed"] - clean["hook_embed"]
        bank, index = self.banks[src]
        z = corrupt[bank.hook("z")] - clean[bank.hook("z")]
        z = z[:, :, index]
        head = self.model[src]
        return (z[..., None] if z.ndim == 2 else z) @ head.W_O

    def effect(self, src: str, dst: str, mode: str) -> float:
        change = self.change(src)
        if dst == "logits":
            return self.whole - self.metric(self.model(self.clean) + change @ self.model.W_U)
        bank, index = self.banks[dst]
        moved = change @ bank.reads[mode][index]

        def patch(x: torch.Tensor, hook: object) -> torch.Tensor:
            x = x.clone()
            x[:, :, index] += moved if x.ndim == 4 else moved[..., 0]
            return x

        name = bank.hook(mode.lower())
        return self.whole - self.metric(self.model.run_with_hooks(self.clean, fwd_hooks=[(name, patch)]))


@torch.no_grad()
def test_the_truth_is_what_exact_patches_say(circuit):
    """Every true edge takes at least a fifth of the behaviour away; no other edge takes a tenth.

    All of them in the models of a hundred edges, and in the larger ones all that touch the circuit.
    """
    patching = Patching(circuit)
    assert patching.whole > 5
    candidates = circuit.candidates()
    assert circuit.edges <= set(candidates)
    if len(candidates) > 200:
        ends = circuit.nodes | {"embed", "logits"}
        candidates = [edge for edge in candidates if ends.issuperset(edge[:2])]
    for edge in candidates:
        effect = abs(patching.effect(*edge)) / patching.whole
        assert effect > 0.2 if edge in circuit.edges else effect < 0.1, (edge, effect)


def test_the_default_method_finds_every_planted_circuit(circuit):
    heads = mia.causal.discover(circuit.model, circuit.task).frame
    assert auroc(dict(zip(heads["head"], heads["score"].abs(), strict=True)), circuit.nodes) >= 0.97
    edges = mia.causal.discover(circuit.model, circuit.task, units="edges", top_k=10**6).frame
    keys = edges[["src", "dst", "mode"]].itertuples(index=False, name=None)
    scores = dict(zip(keys, edges["score"].abs(), strict=True))
    assert set(scores) == set(circuit.candidates())
    assert auroc(scores, circuit.edges) >= 0.97


def test_auroc_counts_pairs():
    scores = {"a": 3.0, "b": 1.0, "c": 1.0, "d": 0.0}
    assert auroc(scores, {"a"}) == 1.0
    assert auroc(scores, {"b"}) == pytest.approx(0.5)  # behind a, level with c, before d
    assert auroc(scores, {"d"}) == 0.0
