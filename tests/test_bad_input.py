"""Whatever a user may hand over by mistake as a text, as ids or as heads: each public call that takes some
says what it was given and what it expected, and none takes it for something else.
"""

from pathlib import Path

import numpy as np
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from tests.folders import write_folder

IDS = [[3, 5, 3, 5, 3], [7, 8, 7, 8, 7]]
C, P, D, K, T = mia.circuits, mia.paths, mia.detect, mia.causal, mia.theorems


class Given:
    """What the calls below are about."""

    def __init__(self, model):
        self.model = model
        self.frozen = P.freeze(model, torch.tensor(IDS[0]))
        self.task = mia.Task(IDS, corrupt=[[3, 5, 3, 6, 3], [7, 8, 7, 9, 7]], answer=[5, 8], against=[6, 9])


@pytest.fixture(scope="module")
def given(tmp_path_factory):
    folder = tmp_path_factory.mktemp("gpt2")
    write_folder("gpt2", folder)
    return Given(mia.load(folder))


# Calls that take a text, texts or token ids.
PROMPTS = {
    "model": lambda g, x: g.model(x),
    "loss": lambda g, x: g.model(x, return_type="loss"),
    "run_with_cache": lambda g, x: g.model.run_with_cache(x),
    "as_tokens": lambda g, x: g.model.as_tokens(x),
    "to_batch": lambda g, x: g.model.to_batch(x),
    "generate": lambda g, x: g.model.generate(x, max_new_tokens=1),
    "head.plot": lambda g, x: g.model["L0H0"].plot(x),
    "show": lambda g, x: mia.show(g.model, "L0H0", x),
    "report": lambda g, x: mia.report(g.model, x, sections=["fidelity"], progress=False),
    "verify": lambda g, x: mia.verify(g.model, g.model, x),
    "diff": lambda g, x: mia.diff(g.model, g.model, x),
    "Task": lambda g, x: mia.Task(x, answer=5).score(g.model),
    "corrupt": lambda g, x: mia.Task(IDS, corrupt=x, answer=5).score(g.model),
    "head_loadings": lambda g, x: K.head_loadings(g.model, x, "L1H1"),
    "freeze": lambda g, x: P.freeze(g.model, x),
    "term_importance": lambda g, x: P.term_importance(g.model, x, progress=False),
    "orders": lambda g, x: P.orders(g.model, x),
    "logit_attribution": lambda g, x: P.logit_attribution(g.model, x),
    "attribution_graph": lambda g, x: P.attribution_graph(g.model, x),
    "top_paths": lambda g, x: P.top_paths(g.model, x, progress=False),
    "ablate": lambda g, x: D.ablate(g.model, x, ["L0H0"]),
    "reference": lambda g, x: D.ablate(g.model, IDS, ["L0H0"], replace="mean", reference=x),
    "in_context_learning": lambda g, x: D.in_context_learning(g.model, x),
    "match": lambda g, x: D.match(g.model, x, "previous_token"),
    "offsets": lambda g, x: D.offsets(g.model, tokens=x),
    "score_heads": lambda g, x: D.score_heads(g.model, tokens=x),
    "over_corpus": lambda g, x: D.over_corpus(g.model, x),
    "a document": lambda g, x: D.over_corpus(g.model, [x]),
    "bigrams": lambda g, x: C.bigrams(g.model, text=x),
    "factoring_bugs": lambda g, x: C.factoring_bugs(g.model, "L0H0", text=x),
    "calibrate_omega": lambda g, x: T.calibrate_omega(g.model, x, 1e-3),
}
BAD_PROMPTS = {
    "None": None, "bytes": b"man", "a surrogate": "a\ud800", "texts with one": ["man", "a\udc80"],
    "an empty text": "", "no texts": [], "no tokens": torch.zeros(0, dtype=torch.long),
    "beyond the vocabulary": [[1, 2, 10**6]], "beyond 64 bits": [[1, 2, 2**70]], "below 0": [[1, -1]],
    "fractions": [[1.0, 2.0]], "a tensor of them": torch.rand(1, 3), "nan": float("nan"), "True": True,
    "truth values": [[True, False]], "a mapping": {"a": 1},
    "three axes": torch.ones(1, 2, 3, dtype=torch.long),
    "text and id": ["a", 1], "a row of None": [None], "text and None": ["a", None], "an object": object(),
    "a path": Path("x"), "a function": print, "texts as bytes": [b"a"], "nested texts": [["a", "b"], ["c"]],
    "complex numbers": [[1j]],
}  # fmt: skip
# Calls for which None stands for a default.
WITHOUT = {"corrupt", "ablate", "reference", "offsets", "score_heads", "bigrams", "factoring_bugs"}

# Calls that take the id or the text of a token, ids, a position, a mask.
SINGLE = {
    "target": lambda g, x: P.logit_attribution(g.frozen, target=x),
    "against": lambda g, x: P.logit_attribution(g.frozen, target=3, against=x),
    "target of a graph": lambda g, x: P.attribution_graph(g.frozen, target=x),
    "target of paths": lambda g, x: P.top_paths(g.frozen, target=x, progress=False),
    "position": lambda g, x: P.logit_attribution(g.frozen, target=3, position=x),
    "query": lambda g, x: P.expand_score(g.frozen, "L0H0", x),
    "key": lambda g, x: P.expand_score(g.frozen, "L0H0", 2, x),
    "answer": lambda g, x: mia.Task(IDS, answer=[5, x]).score(g.model),
    "task against": lambda g, x: mia.Task(IDS, answer=[5, 8], against=[6, x]).score(g.model),
    "task position": lambda g, x: mia.Task(IDS, answer=[5, 8], position=x).score(g.model),
    "sources": lambda g, x: C.ov_top(g.model, "L0H0", top_k=2, sources=[x]),
    "align": lambda g, x: C.copying_scores(g.model, ["L0H0"], align=x),
    "mask": lambda g, x: g.model(IDS[0], attention_mask=x),
    "task mask": lambda g, x: mia.Task(IDS, answer=[5, 8], attention_mask=x),
    "where": lambda g, x: D.ablate(g.model, IDS, ["L0H0"], where=x),
    "pairs": lambda g, x: D.match(g.model, IDS, x),
    "to_single_str_token": lambda g, x: g.model.to_single_str_token(x),
    "get_token_position": lambda g, x: g.model.get_token_position(x, IDS[0]),
    "typed": lambda g, x: g.model.typed(x),
    "heads": lambda g, x: C.copying_scores(g.model, x),
    "ablated heads": lambda g, x: D.ablate(g.model, IDS, x),
    "effects of heads": lambda g, x: K.effects(g.model, g.task, x),
    "head": lambda g, x: C.ov_top(g.model, x, top_k=2),
}
BAD_SINGLE = {
    "bytes": b"man", "beyond": 10**9, "beyond 64 bits": 2**70, "fraction": 1.5, "nan": float("nan"),
    "mapping": {"a": 1}, "set": {1, 2}, "object": object(), "path": Path("x"), "function": print,
    "no tensor": torch.zeros(0, dtype=torch.long), "tensor of fractions": torch.rand(3),
    "nested": [[1], [2, 3]], "complex": 1j, "texts": np.array([["a"]]),
}  # fmt: skip
# What a call does take: weights by token, an id that no text stands for, none of something.
FINE = {
    ("target", "mapping"),
    ("target of a graph", "mapping"),
    ("target of paths", "mapping"),
    ("to_single_str_token", "beyond"),
    ("typed", "beyond"),
    ("typed", "no tensor"),
    ("ablated heads", "no tensor"),
    ("effects of heads", "no tensor"),
}


def refused(call, given, bad, fine):
    """Each error is one line that a person can use, and there is one for every input."""
    wrong = []
    for what, input in bad.items():
        if what in fine:
            continue
        try:
            call(given, input)
        except MechInterpError as error:
            if len(str(error)) < 20 or "\n" in str(error):
                wrong.append(f"{what}: says only {error!s}")
        except Exception as error:
            wrong.append(f"{what}: {type(error).__name__} {error}")
        else:
            wrong.append(f"{what}: taken")
    assert not wrong, "\n".join(wrong)


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", PROMPTS)
def test_what_is_no_prompt_is_refused(given, name):
    refused(PROMPTS[name], given, BAD_PROMPTS, {"None"} if name in WITHOUT else ())


@pytest.mark.usefixtures("as_users_run_it")
@pytest.mark.parametrize("name", SINGLE)
def test_what_is_no_id_no_mask_and_no_head_is_refused(given, name):
    refused(SINGLE[name], given, BAD_SINGLE, {what for call, what in FINE if call == name})


@pytest.mark.usefixtures("as_users_run_it")
def test_what_is_a_prompt_is_taken(given):
    """The refusals above refuse no more than they should."""
    ids = torch.tensor(IDS[:1])
    for one in (IDS[0], IDS[:1], ids, ids.numpy(), tuple(IDS[0]), "a tall man", ["a tall man"]):
        assert given.model(one).shape[0] == 1
        assert len(mia.Task(one, answer=5)) == 1
    assert P.logit_attribution(given.frozen, target=torch.tensor(3)).about == (
        P.logit_attribution(given.frozen, target=np.int64(3)).about
    )
