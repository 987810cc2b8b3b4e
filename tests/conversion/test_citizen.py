"""The converted model inside TransformerLens: its tools, training, other dtypes, other doors."""

import json
import types

import pytest
import torch
from transformer_lens import patching
from transformer_lens.head_detector import detect_head

import mechinterp_attn as mia
from mechinterp_attn.core.errors import CheckpointError, ConversionError
from tests.conversion.families import bridge_of, some_tokens, tokenizer


@pytest.fixture(scope="module")
def bridge():
    """GPT-2 through Hugging Face, folded: float64."""
    bridge = bridge_of("gpt2")
    bridge.enable_compatibility_mode(disable_warnings=True)
    return bridge


@pytest.fixture(scope="module")
def model(bridge):
    return mia.convert(bridge)


SHARED = [
    f"blocks.{layer}.{name}"
    for layer in range(2)
    for name in (
        "hook_resid_pre", "hook_resid_mid", "hook_resid_post", "hook_attn_out", "hook_mlp_out",
        "attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_z", "attn.hook_pattern",
        "mlp.hook_pre", "mlp.hook_post", "ln1.hook_scale", "ln2.hook_scale",
    )
]  # fmt: skip


def test_hooks_hold_what_the_bridges_hold(model, bridge):
    tokens = some_tokens()
    _, ours = model.run_with_cache(tokens)
    _, theirs = bridge.run_with_cache(tokens)
    for name in SHARED:
        torch.testing.assert_close(
            ours[name], theirs[name], rtol=0, atol=1e-6, msg=name
        )  # folded in float32


@pytest.mark.parametrize(("label", "kind"), [("L1N7", "mlp"), ("L1H2", "attention"), ("L0H0", "attention")])
def test_ablating_a_head_is_ablating_it_in_the_source(model, bridge, label, kind):
    head = model[label]

    def zero(z, hook):
        z = z.clone()
        z[..., head.index] = 0 if kind == "mlp" else z[..., head.index]
        if kind == "attention":
            z[:, :, head.index] = 0
        return z

    tokens = some_tokens()
    ours = model.run_with_hooks(tokens, fwd_hooks=[(head.bank.hook("z"), zero)])
    name = f"blocks.{head.layer}." + ("mlp.hook_post" if kind == "mlp" else "attn.hook_z")
    theirs = bridge.run_with_hooks(tokens, fwd_hooks=[(name, zero)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert float((ours - model(tokens)).detach().abs().max()) > 1e-3


def test_patching_a_head_is_patching_it_in_the_source(model, bridge):
    tokens, others = some_tokens(seed=3), some_tokens(seed=4)
    _, cache = model.run_with_cache(others)

    def patch(z, hook):
        z = z.clone()
        z[:, :, 2] = cache["blocks.1.attn.hook_z"][:, :, 2]
        return z

    ours = model.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", patch)])
    theirs = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.1.attn.hook_z", patch)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)


def test_editing_the_middle_of_a_block_is_editing_what_attention_wrote(model, bridge):
    """In a bridge an edit of hook_resid_mid misses the skip path; of hook_attn_out it does not."""
    tokens = some_tokens()
    push = torch.randn(16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))

    def edit(x, hook):
        return x + push

    ours = model.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_resid_mid", edit)])
    theirs = bridge.run_with_hooks(tokens, fwd_hooks=[("blocks.0.hook_attn_out", edit)])
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-9)


def test_activation_patching_gives_the_bridges_numbers(model, bridge):
    clean, corrupted = some_tokens(1, seed=3), some_tokens(1, seed=4)

    def metric(logits):
        return logits[0, -1, 5] - logits[0, -1, 6]

    for name in ("resid_pre", "attn_out", "mlp_out", "attn_head_out_all_pos", "attn_head_v_all_pos"):
        function = getattr(patching, f"get_act_patch_{name}")
        results = []
        for each in (model, bridge):
            _, cache = each.run_with_cache(clean)
            results.append(function(each, corrupted, cache, metric).double())
        torch.testing.assert_close(*results, rtol=0, atol=1e-5, msg=name)  # results are kept in float32


def test_cache_methods_add_up(model):
    tokens = some_tokens()
    logits, cache = model.run_with_cache(tokens)
    last = cache["blocks.1.hook_resid_post"]
    close = dict(rtol=0, atol=1e-9)
    torch.testing.assert_close(cache.decompose_resid(layer=2).sum(0), last, **close)
    torch.testing.assert_close(cache.accumulated_resid(layer=2, incl_mid=True)[-1], last, **close)
    heads = cache.stack_head_results(layer=2).sum(0)
    neurons = cache.stack_neuron_results(layer=2).sum(0)
    start = cache["hook_embed"] + cache["hook_pos_embed"]
    biases = sum(bank.b_O for bank in model.banks)
    torch.testing.assert_close(start + heads + neurons + biases, last, **close)
    parts = cache.decompose_resid(layer=2)
    normed = cache.apply_ln_to_stack(parts, layer=2).sum(0)
    torch.testing.assert_close(normed @ model.W_U + model.b_U, logits, **close)
    answers = tokens[:, -1]
    there = cache.decompose_resid(layer=2, pos_slice=-1)
    attributed = cache.logit_attrs(there, tokens=answers, pos_slice=-1).sum(0)
    expected = logits[range(len(tokens)), -1, answers] - model.b_U[answers]
    torch.testing.assert_close(attributed.flatten(), expected, **close)


def test_detect_head_finds_what_it_finds_in_the_bridge(model, bridge):
    text = "w5 w6 w7 w5 w6 w7"
    ours, theirs = (detect_head(each, text, "previous_token_head") for each in (model, bridge))
    torch.testing.assert_close(ours.double(), theirs.double(), rtol=0, atol=1e-5)


def test_one_step_of_training_reaches_every_bank_and_no_source():
    from transformer_lens.tools.training import TrainConfig, train

    bridge = bridge_of("llama", torch.float32)
    before = {name: p.clone() for name, p in bridge.original_model.named_parameters()}
    model = mia.convert(bridge)
    start = {name: p.clone() for name, p in model.named_parameters()}
    dataset = [{"tokens": row} for row in some_tokens(4)]
    config = TrainConfig(num_epochs=1, batch_size=4, lr=1e-2, device="cpu", print_every=None)
    train(model, config, dataset)
    for bank in model.banks:
        moved = [
            name for name, p in bank.named_parameters() if not torch.equal(p, start[f"{bank.path}.{name}"])
        ]
        assert {"W_O", "W_V"} <= set(moved) or {"W_in", "W_out", "W_gate"} <= set(moved)
    for name, parameter in bridge.original_model.named_parameters():
        assert torch.equal(parameter, before[name]), name


@pytest.mark.parametrize(("dtype", "atol"), [(torch.bfloat16, 0.1), (torch.float16, 0.02)])
def test_half_precision_is_as_close_as_it_can_be(dtype, atol):
    """Against float32; the dtype keeps 8 or 11 bits and logits are of size 3."""
    model = mia.convert(bridge_of("llama3", torch.float32))
    tokens = some_tokens()
    wide = model(tokens)
    half = model.to(dtype)
    assert half.cfg.dtype == dtype
    logits = half(tokens)
    assert logits.dtype == dtype
    torch.testing.assert_close(logits.float(), wide, rtol=0, atol=atol)
    _, cache = half.run_with_cache(tokens)
    assert cache["blocks.0.attn.hook_pattern"].dtype == dtype


def test_no_weights_are_copied_that_no_norm_touches(bridge):
    """Exact mode shares them with the source until training."""
    raw = bridge_of("opt", torch.float32)
    model = mia.convert(raw, check=False)
    hf = raw.original_model.model.decoder
    assert model.W_E.data_ptr() == hf.embed_tokens.weight.data_ptr()
    for layer, block in enumerate(hf.layers):
        assert model.blocks[layer].neurons.W_out.data_ptr() == block.fc2.weight.data_ptr()
        assert model.blocks[layer].attn.W_O.data_ptr() == block.self_attn.out_proj.weight.data_ptr()
    model.train()
    assert model.W_E.data_ptr() != hf.embed_tokens.weight.data_ptr()


def hooked(source: mia.Checkpoint, **cfg):
    """An object with HookedTransformer's cfg and state_dict() that computes what the checkpoint does."""
    from mechinterp_attn.conversion.reference import run_checkpoint

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.cfg = types.SimpleNamespace(**(dict(source.cfg) | cfg))
            self.bias = torch.nn.Parameter(torch.zeros(1))

        def state_dict(self, *args, **kwargs):
            mask = {
                "blocks.0.attn.mask": torch.ones(3, 3).bool(),
                "blocks.0.attn.IGNORE": torch.tensor(-1e5),
            }
            return dict(source.state_dict) | mask

        def forward(self, tokens):
            return run_checkpoint(source, tokens)[0]

    return Model()


def test_any_object_with_hooked_transformers_names_converts():
    from tests.conversion.test_modes import TOKENS, checkpoint

    source = checkpoint("gelu_new")
    model = mia.convert(hooked(source))
    torch.testing.assert_close(model(TOKENS), hooked(source)(TOKENS), rtol=0, atol=1e-12)
    course = hooked(source)  # course models leave the activation out of their config
    del course.cfg.act_fn
    assert mia.convert(course).provenance["fidelity"]["ok"]


def test_an_object_that_computes_something_else_is_caught():
    from tests.conversion.test_modes import checkpoint

    with pytest.raises(ConversionError, match="does not compute what its source computes"):
        mia.convert(hooked(checkpoint("gelu"), act_fn="relu"))


def test_what_is_no_model_is_refused():
    with pytest.raises(mia.MechInterpError, match="cannot convert a Linear; give a TransformerBridge"):
        mia.convert(torch.nn.Linear(2, 2))


def test_a_bidirectional_classifier_without_final_norm(tmp_path):
    from safetensors.torch import save_file

    from tests.conversion.test_modes import TOKENS, checkpoint

    source = checkpoint("relu", d_vocab_out=3, attention_dir="bidirectional", final_norm=False)
    state = dict(source.state_dict)
    del state["ln_final.w"]
    state["unembed.W_U"], state["unembed.b_U"] = (
        state["unembed.W_U"][:, :3].contiguous(),
        torch.zeros(3).double(),
    )
    save_file(state, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text(json.dumps(dict(source.cfg)))
    model = mia.load(tmp_path)
    assert model(TOKENS).shape == (2, 6, 3)
    assert model.provenance["fidelity"]["ok"]
    with pytest.raises(mia.MechInterpError, match="bidirectional"):
        model.generate(TOKENS, 2)


def test_a_converted_model_is_not_converted_again(model):
    with pytest.raises(mia.MechInterpError, match=r"already converted \(mode 'exact'\)"):
        mia.convert(model)


def test_saved_models_come_back_bit_for_bit_and_know_where_they_come_from(model, tmp_path):
    model.save(tmp_path / "saved")
    again = mia.load(tmp_path / "saved")
    assert again.spec == model.spec
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert again.provenance == model.provenance
    assert {"name", "mlp", "versions", "fidelity"} <= set(again.provenance)
    assert again.provenance["source"] == "TransformerBridge (GPT2LMHeadModel)"
    assert again.to_str_tokens("w5 w6") == model.to_str_tokens("w5 w6")


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "tokenizer.json"])
def test_damaged_files_are_refused_by_name(model, tmp_path, file):
    folder = tmp_path / "saved"
    model.save(folder)
    content = (folder / file).read_bytes()
    (folder / file).write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=file):
        mia.load(folder)


def test_one_flipped_bit_is_noticed(model, tmp_path):
    folder = tmp_path / "saved"
    model.save(folder)
    content = bytearray((folder / "model.safetensors").read_bytes())
    content[-5] ^= 1
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(CheckpointError, match="checksum"):
        mia.load(folder)


def test_the_fidelity_card(model, bridge):
    card = mia.verify(model, bridge, some_tokens())
    assert card.ok
    assert card.n_tokens == 24
    page = card._repr_html_()
    for word in ("equal within", "max logit error", "KL", "blocks.1.neurons"):
        assert word in page
    assert tokenizer().bos_token_id == model.bos_token_id
