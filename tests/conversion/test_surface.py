"""TransformerLens's surface: its names, shapes and numbers, held against its own bridge."""

import subprocess
import sys

import pytest
import torch

import mechinterp_attn as mia
from tests.conversion.families import bridge_of, some_tokens

# Both sides fold in float64 here; what is left is rounding.
CLOSE = dict(rtol=0, atol=1e-9)


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def bridge(request):
    """A folded bridge in float64: GPT-2's shape, and Llama's with shared keys and values."""
    bridge = bridge_of(request.param)
    bridge.enable_compatibility_mode(
        disable_warnings=True, fold_value_biases=False, center_writing_weights=False, center_unembed=False
    )
    return bridge


@pytest.fixture(scope="module")
def model(bridge):
    return mia.convert(bridge)


@pytest.fixture
def last(model):
    return model.spec.n_layers - 1


@pytest.mark.parametrize("name", ["W_Q", "W_K", "W_V", "W_O", "W_in", "W_out", "W_gate", "W_E", "W_U"])
def test_stacked_weights_are_the_bridges(model, bridge, name):
    ours, theirs = getattr(model, name), getattr(bridge, name)
    if theirs is None:
        assert ours is None
        return
    assert ours.shape == theirs.shape
    torch.testing.assert_close(
        ours.double(), theirs.detach().double(), rtol=0, atol=1e-6
    )  # folded in float32


def test_circuits_are_factored(model):
    """Every ``OV`` and ``QK`` of the stack is the product that the head itself gives."""
    for layer, head in [(0, 1), (1, 3)]:
        own = model[f"L{layer}H{head}"]
        torch.testing.assert_close(model.OV[layer, head].AB, own.OV.dense(), **CLOSE)
        torch.testing.assert_close(model.QK[layer, head].AB, own.QK.dense(), **CLOSE)


@pytest.mark.parametrize("mode", ["Q", "K", "V"])
def test_composition_is_the_bridges(model, bridge, mode):
    ours, theirs = model.all_composition_scores(mode), bridge.all_composition_scores(mode)
    assert (ours.head_labels, ours.layer_indices) == (theirs.head_labels, theirs.layer_indices)
    torch.testing.assert_close(ours.scores, theirs.scores.to(ours.scores.dtype), rtol=0, atol=1e-6)
    assert float(ours.scores[0, :, 1].min()) > 0
    assert float(ours.scores[-1].abs().max()) == 0


def test_stopping_and_starting_at_a_layer(model, last):
    tokens = some_tokens()
    logits, cache = model.run_with_cache(tokens)
    middle = model(tokens, stop_at_layer=1)
    torch.testing.assert_close(middle, cache["blocks.1.hook_resid_pre"], **CLOSE)
    torch.testing.assert_close(model(tokens, stop_at_layer=-last), middle, **CLOSE)
    torch.testing.assert_close(model(middle, start_at_layer=1), logits, **CLOSE)
    end = cache[f"blocks.{last}.hook_resid_post"]
    torch.testing.assert_close(model(middle, start_at_layer=1, stop_at_layer=last + 1), end, **CLOSE)
    with pytest.raises(mia.MechInterpError, match=f"this model has {last + 1} layers"):
        model(tokens, stop_at_layer=last + 2)
    with pytest.raises(mia.MechInterpError, match="a loss needs tokens"):
        model(middle, return_type="loss", start_at_layer=1)
    with pytest.raises(mia.MechInterpError, match=r"residual stream \[batch, pos, 16\]"):
        model(tokens, start_at_layer=1)


def test_a_tokenizers_batch_and_labels(model):
    """``model(**batch)`` as with a Hugging Face model; the labelled loss is Hugging Face's."""
    tokens = some_tokens()
    mask = torch.ones_like(tokens)
    mask[0, -3:] = 0
    torch.testing.assert_close(
        model(input_ids=tokens, attention_mask=mask), model(tokens, attention_mask=mask)
    )
    labels = tokens.masked_fill(mask == 0, -100)
    out = model(input_ids=tokens, attention_mask=mask, labels=labels)
    logp = out.logits[:, :-1].float().log_softmax(-1)
    wanted = [-logp[b, i, labels[b, i + 1]] for b in range(len(tokens)) for i in range(tokens.shape[1] - 1)
              if labels[b, i + 1] >= 0]  # fmt: skip
    torch.testing.assert_close(out.loss, torch.stack(wanted).mean())
    with pytest.raises(mia.MechInterpError, match="give tokens or text once"):
        model(tokens, input_ids=tokens)


def test_head_results_are_what_the_heads_write(model):
    tokens = some_tokens()
    with pytest.raises(mia.MechInterpError, match=r"set_use_attn_result\(True\)"):
        model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_result", lambda x, hook: x)])
    plain = model(tokens)
    model.set_use_attn_result(True)
    try:
        logits, cache = model.run_with_cache(tokens)
    finally:
        model.set_use_attn_result(False)
    torch.testing.assert_close(logits, plain, **CLOSE)
    z = cache["z", 1]
    for head in range(model.spec.n_heads):
        written = z[:, :, head] @ model[f"L1H{head}"].W_O
        torch.testing.assert_close(cache["result", 1][:, :, head], written, **CLOSE)
    assert "blocks.1.attn.hook_result" not in model.run_with_cache(tokens)[1]


def test_split_inputs_reach_one_head_one_side(model):
    """An edit of a head's key input is the edit of its keys alone, computed from the folded weights."""
    tokens, head = some_tokens(), 2
    push = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    kv = head // (model.spec.n_heads // model.spec.n_kv_heads)
    _, cache = model.run_with_cache(tokens)
    edited = model.blocks[1].ln1.plain(cache["blocks.1.hook_resid_pre"] + push)
    attn = model.blocks[1].attn
    keys = edited @ attn.W_K[kv] + attn.b_K[kv]

    def set_keys(k, hook):
        k = k.clone()
        k[:, :, kv] = keys
        return k

    def push_input(x, hook):
        x = x.clone()
        x[:, :, kv] += push
        return x

    wanted = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_k", set_keys)])
    plain = model(tokens)
    model.set_use_split_qkv_input(True)
    try:
        torch.testing.assert_close(model(tokens), plain, **CLOSE)
        got = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.hook_k_input", push_input)])
        with pytest.raises(mia.MechInterpError, match="exclude each other"):
            model.set_use_attn_in(True)
    finally:
        model.set_use_split_qkv_input(False)
    torch.testing.assert_close(got, wanted, **CLOSE)
    assert float((got - plain).detach().abs().max()) > 1e-4


def test_mlp_input_reaches_the_neurons_alone(model):
    tokens = some_tokens()
    push = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    _, cache = model.run_with_cache(tokens)
    read = model.blocks[0].ln2.plain(cache["blocks.0.hook_resid_mid"] + push)
    wanted = model.blocks[0].mlp(read)
    model.set_use_hook_mlp_in(True)
    try:
        got = model.run_with_hooks(
            tokens,
            fwd_hooks=[
                ("blocks.0.hook_mlp_in", lambda x, hook: x + push),
                ("blocks.0.hook_mlp_out", lambda x, hook: torch.testing.assert_close(x, wanted, **CLOSE)),
            ],
        )
    finally:
        model.set_use_hook_mlp_in(False)
    assert float((got - model(tokens)).abs().max()) > 1e-4


@pytest.mark.parametrize("hook", ["hook_resid_pre", "hook_attn_in", "hook_mlp_in"])
def test_forks_equal_the_bridges(hook):
    """The same edit through the same hook, ours and the bridge's."""
    bridge = bridge_of("gpt2")
    bridge.enable_compatibility_mode(disable_warnings=True)
    model = mia.convert(bridge)
    for each in (model, bridge):
        each.set_use_attn_in(True)
        each.set_use_hook_mlp_in(True)
    tokens = some_tokens()

    def double(x, hook):
        return x * 1.5 + 0.1 * torch.arange(x.shape[-1], dtype=x.dtype)

    results = [
        each.run_with_hooks(tokens, fwd_hooks=[(f"blocks.1.{hook}", double)]) for each in (model, bridge)
    ]
    torch.testing.assert_close(*results, rtol=0, atol=1e-8)
    assert float((results[0] - model(tokens)).abs().max()) > 1e-3


def test_filters_for_attention_take_no_neuron(model):
    """ARENA's and TransformerLens's own filters; and ``pos_slice`` cuts positions, of neurons too."""
    tokens = some_tokens()
    for end in ("q", "k", "v", "z", "pattern", "result", "pre", "post", "out", "scale", "normalized"):
        _, cache = model.run_with_cache(tokens, names_filter=lambda name, end=end: name.endswith(end))
        assert not [name for name in cache if ".neurons." in name], end
    whole, cut = (model.run_with_cache(tokens, pos_slice=part)[1] for part in (None, (2, 5)))
    for name in ("hook_score", "hook_read", "hook_weight", "hook_act"):
        name = f"blocks.1.neurons.{name}"
        torch.testing.assert_close(cut[name], whole[name][:, 2:5], rtol=0, atol=0)


def test_the_old_names_of_neuron_hooks_go_on_for_a_version(model):
    tokens, old, new = some_tokens(), "blocks.0.neurons.hook_z", "blocks.0.neurons.hook_act"
    _, cache = model.run_with_cache(tokens)
    zero = [(new, lambda z, hook: z * 0)]
    wanted = model.run_with_hooks(tokens, fwd_hooks=zero)
    with pytest.warns(FutureWarning, match="hook_act now"):
        assert torch.equal(cache[old], cache[new])
    with pytest.warns(FutureWarning, match="hook_act now"):
        assert torch.equal(model.run_with_hooks(tokens, fwd_hooks=[(old, zero[0][1])]), wanted)
    with pytest.warns(FutureWarning, match="hook_act now"):
        _, few = model.run_with_cache(tokens, names_filter=[old])
    assert list(few) == [new]
    with pytest.raises(KeyError):
        model.hook_dict["blocks.0.neurons.hook_k"]


def test_key_value_cache(model):
    from mechinterp_attn.model.step import KeyValueCache

    tokens = some_tokens()
    cache = KeyValueCache()
    model(tokens[:, :-2], past_kv_cache=cache)
    torch.testing.assert_close(
        model(tokens[:, -2:], past_kv_cache=cache)[:, -1], model(tokens)[:, -1], **CLOSE
    )


def test_compiles_without_a_graph_break():
    """In a fresh interpreter: the tests' own type checks cannot be compiled."""
    code = """
import torch, mechinterp_attn as mia
model = mia.load("gelu-2l")
tokens = torch.arange(12)[None] + 5
compiled = torch.compile(model, backend="eager", fullgraph=True)
with torch.no_grad():
    torch.testing.assert_close(compiled(tokens), model(tokens), rtol=0, atol=1e-4)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
