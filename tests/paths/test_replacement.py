"""Replacement and completeness scores against circuit-tracer's definition on dense matrices."""

import pytest
import torch

import mechinterp_attn as mia
from tests.conftest import random_tokens, tiny_bridge
from tests.conversion.test_dictionary import described, transcoder

CASES = {
    "sequential": {},
    "RMSNorm, gated": dict(normalization_type="RMS", gated_mlp=True, act_fn="silu"),
    "parallel": dict(parallel_attn_mlp=True),
}


def dense_scores(model, plain, tokens, dictionaries):
    """Both scores, by the definition: one dense map per sublayer, ``(I - A)^-1`` for the influence.

    Everything comes from the source's run and the dictionaries' own tensors; the model with features gives
    nothing but its attention heads' weights.
    """
    logits, cache = plain.run_with_cache(tokens[None], return_cache_object=False)
    logits, cache = logits[0, -1], {name: x[0] for name, x in cache.items()}
    pos, d = len(tokens), plain.spec.d_model
    names, written = [], []  # nodes in order: (kind, layer), and what each writes as [pos, d]

    def node(kind, p, vector):
        names.append(kind)
        written.append(torch.zeros(pos, d, dtype=vector.dtype).index_put((torch.tensor(p),), vector))

    def centred(x, norm):
        x = x - x.mean(-1, keepdim=True) if plain.spec.norm == "LN" else x
        return x / cache[f"{norm}.hook_scale"]

    def attention(x, layer):
        bank, norm = plain.blocks[layer].attn, f"blocks.{layer}.ln1"
        v = torch.einsum("npd,hde->nphe", centred(x, norm), bank.stacked("V"))
        pattern = cache[f"blocks.{layer}.attn.hook_pattern"]
        mixed = torch.einsum("hqk,nkhe->nqhe", pattern, v)
        return torch.einsum("nqhe,hed->nqd", mixed, bank.stacked("O"))

    rows = []
    for p in range(pos):
        node("token", p, cache["blocks.0.hook_resid_pre"][p])
    x = torch.stack(written)
    for layer in range(plain.spec.n_layers):
        dictionary = dictionaries[layer]
        norm = f"blocks.{layer}.{'ln1' if plain.spec.parallel else 'ln2'}"
        mid = x if plain.spec.parallel else x + attention(x, layer)
        read = cache[f"{norm}.hook_normalized"]
        act, out = described(dictionary, read)
        error = cache[f"blocks.{layer}.hook_mlp_out"] - out
        before = len(names)
        seen = centred(mid, norm)
        for p in range(1, pos):
            for f in act[p].nonzero()[:, 0].tolist():
                node("feature", p, act[p, f] * dictionary.W_dec[f])
                rows.append(((seen[:, p] @ dictionary.W_enc[:, f]), len(names) - 1))
        for p in range(1, pos):
            node("error", p, error[p])
        new = torch.stack(written[before:])
        linear = 0 if dictionary.W_skip is None else seen @ dictionary.W_skip
        both = attention(x, layer) if plain.spec.parallel else 0
        x = torch.cat([mid + linear + both, new])
    p = logits.softmax(-1)
    order = p.argsort(descending=True)
    chosen = order[: int((p[order].cumsum(0) < 0.95).sum()) + 1][:10]
    n = len(names) + len(chosen)
    A = torch.zeros(n, n, dtype=torch.float64)
    for effect, i in rows:
        A[i, : len(effect)] = effect.abs()
    end = centred(x, "ln_final")[:, -1]
    W_U = plain.W_U - plain.W_U.mean(-1, keepdim=True)
    A[len(names) :, : len(names)] = (end @ W_U[:, chosen]).T.abs()
    A = A / A.sum(-1, keepdim=True).clamp_min(1e-10)
    w = torch.zeros(n, dtype=torch.float64)
    w[len(names) :] = p[chosen]
    eye = torch.eye(n, dtype=torch.float64)
    influence = w @ (torch.linalg.inv(eye - A) - eye)
    kinds = [*names, *["logit"] * len(chosen)]
    is_error = torch.tensor([kind == "error" for kind in kinds])
    is_token = torch.tensor([kind == "token" for kind in kinds])
    replacement = influence[is_token].sum() / influence[is_token | is_error].sum()
    through = influence + w
    completeness = (through * (1 - A[:, is_error].sum(-1))).sum() / through.sum()
    return float(replacement), float(completeness)


@pytest.mark.parametrize("kind", ["jumprelu", "topk"])
@pytest.mark.parametrize("case", CASES)
def test_the_scores_are_circuit_tracers(case, kind):
    plain = mia.convert(tiny_bridge(**CASES[case]))
    skip = kind == "topk"
    dictionaries = [transcoder(16, 20, kind=kind, skip=skip, seed=layer) for layer in range(2)]
    model = plain
    for layer, dictionary in enumerate(dictionaries):
        model = mia.attach(model, dictionary, layer=layer)
    tokens = random_tokens(plain)[0]
    found = mia.paths.replacement_scores(model, tokens)
    replacement, completeness = dense_scores(model, plain, tokens, dictionaries)
    assert found.receipt.ok
    assert found.replacement == pytest.approx(replacement, abs=1e-9)  # float64
    assert found.completeness == pytest.approx(completeness, abs=1e-9)
    assert 0.05 < found.replacement < 0.95  # neither end, where mistakes would not show
    held = found.frame.groupby("kind")["influence"].sum()
    assert held["error"] > 0
    assert held["token"] / (held["token"] + held["error"]) == pytest.approx(replacement, abs=1e-9)


def test_neurons_leave_nothing_out():
    plain = mia.convert(tiny_bridge())
    tokens = random_tokens(plain)[0]
    found = mia.paths.replacement_scores(plain, tokens, patch="zero")
    assert (found.replacement, found.completeness) == (1.0, 1.0)
    assert found.faithfulness == pytest.approx(1.0, abs=1e-12)
    one = mia.attach(plain, transcoder(16), layer=1)
    found = mia.paths.replacement_scores(one, tokens)
    assert set(found.frame["kind"]) == {"token", "mlp", "feature", "error"}
    assert 0 < found.replacement < 1
    assert 0 < found.completeness < 1


def test_faithfulness_is_the_model_without_its_errors():
    """The third score is measured, not traced: the model run with the errors at zero."""
    plain = mia.convert(tiny_bridge())
    model = mia.attach(plain, transcoder(16), layer=0)
    tokens = random_tokens(plain)[0]
    found = mia.paths.replacement_scores(model, tokens, target=3, against=5, patch="zero")

    def silent(names):
        hooks = [(name, lambda z, hook: torch.zeros_like(z)) for name in names]
        logits = model.run_with_hooks(tokens[None], fwd_hooks=hooks)[0, -1]
        return float(logits[3] - logits[5])

    whole, kept = silent([]), silent(["blocks.0.error.hook_act"])
    none = silent([bank.hook("z") for bank in model.banks])
    assert found.faithfulness == pytest.approx((kept - none) / (whole - none), abs=1e-9)
    assert mia.paths.replacement_scores(model, tokens, patch=None).runs is None
    with pytest.raises(mia.MechInterpError, match="max_bytes"):
        mia.paths.replacement_scores(model, tokens, max_bytes=1000)
