"""Files that models come in: GGUF, shards, revisions of the hub."""

import importlib.util
import json
import weakref

import pytest
import torch
from safetensors.torch import load_file, save_file

import mechinterp_attn as mia
from mechinterp_attn.core.errors import CheckpointError
from mechinterp_attn.sources import huggingface

TOKENS = torch.tensor([[1, 4, 5, 6, 2, 3, 5, 5]])


@pytest.fixture(scope="module")
def llama():
    """A tiny Hugging Face Llama whose key heads are shared and whose norms have gains."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=8, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=64, rms_norm_eps=1e-5, bos_token_id=0,
        eos_token_id=1, rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write_gguf(model, path):
    """The model in a GGUF file, with llama.cpp's names and its order of rotary pairs."""
    gguf = pytest.importorskip("gguf")
    config, writer = model.config, gguf.GGUFWriter(path, "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(10000.0)
    writer.add_rope_dimension_count(4)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(["<s>", "</s>", "a", "b", "c", "ab", "bc", "d"])
    writer.add_token_types([3, 3, 1, 1, 1, 1, 1, 1])
    writer.add_token_merges(["a b", "b c"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    state = model.state_dict()
    ends = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    parts = {
        "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k", "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down", "input_layernorm": "attn_norm", "post_attention_layernorm": "ffn_norm",
    }  # fmt: skip
    names = ends | {
        f"model.layers.{i}.{hf}": f"blk.{i}.{own}"
        for i in range(config.num_hidden_layers)
        for hf, own in parts.items()
    }
    for hf, own in names.items():
        weight = state[f"{hf}.weight"]
        if own.endswith(("attn_q", "attn_k")):  # neighbours form a pair there, halves of a head here
            weight = weight.view(-1, 2, 2, 16).transpose(1, 2).reshape(weight.shape)
        writer.add_tensor(f"{own}.weight", weight.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_a_gguf_file_is_the_model_that_was_written(llama, tmp_path):
    path = tmp_path / "tiny-llama.F32.gguf"
    write_gguf(llama, path)
    model = mia.load(path)
    with torch.no_grad():
        expected = llama(TOKENS).logits
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-5)  # float32, logits of order one
    assert model.provenance["name"] == "tiny-llama.F32"
    assert model.to_str_tokens("abc", prepend_bos=False) == ["ab", "c"]


def test_a_gguf_file_without_its_package_says_what_to_install(llama, tmp_path, monkeypatch):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF")
    find = importlib.util.find_spec
    monkeypatch.setattr(
        huggingface.importlib.util, "find_spec", lambda name: None if name == "gguf" else find(name)
    )
    with pytest.raises(mia.MechInterpError, match=r"pip install 'mechinterp_attn\[gguf\]'"):
        mia.load(path)


def test_a_damaged_gguf_file_is_named(tmp_path):
    pytest.importorskip("gguf")
    path = tmp_path / "broken.gguf"
    path.write_bytes(b"GGUF\x03\x00\x00\x00nothing more")
    with pytest.raises(mia.MechInterpError, match=r"broken\.gguf' cannot be read"):
        mia.load(path)


def test_shards_of_a_hugging_face_folder_are_one_model(llama, tmp_path):
    llama.save_pretrained(tmp_path, max_shard_size="4KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 3
    with torch.no_grad():
        expected = llama(TOKENS).logits
    torch.testing.assert_close(mia.load(tmp_path)(TOKENS), expected, rtol=0, atol=1e-5)  # float32


def test_half_precision_is_held_to_its_own_rounding(llama, tmp_path):
    """Norms in float32 do not make a bfloat16 model a float32 one."""
    llama.save_pretrained(tmp_path)
    model = mia.load(tmp_path, dtype=torch.bfloat16)
    card = model.provenance["fidelity"]
    assert (card["dtype"], card["tolerance"]) == ("bfloat16", 5e-2)
    assert model.W_E.dtype == torch.bfloat16


@pytest.mark.parametrize(("dtype", "factor"), [(torch.bfloat16, 8), (torch.float16, 3)])
def test_half_precision_with_large_weights_is_loaded_and_analysed_in_float32(
    llama, tmp_path, dtype, factor
):
    """Large weights make attention sharp, so that rounding moves logits by more than 5 %."""
    with torch.no_grad():
        for weight in llama.parameters():
            weight *= factor if weight.ndim == 2 else 1
    llama.save_pretrained(tmp_path)
    model = mia.load(tmp_path, dtype=dtype)
    exact = mia.load(tmp_path)
    with torch.no_grad():
        for name, weight in exact.state_dict().items():
            weight.copy_(model.state_dict()[name].float())
    frozen = mia.paths.freeze(model, TOKENS[0])
    assert model.W_E.dtype == dtype  # the caller's model is left alone
    torch.testing.assert_close(
        frozen.logits, exact(TOKENS[:1])[0].detach(), rtol=1e-5, atol=1e-4
    )  # float32
    assert frozen.receipt.notes["weights"] == str(dtype).removeprefix("torch.")
    for result in (
        mia.paths.orders(frozen),
        mia.paths.logit_attribution(frozen),
        mia.paths.top_paths(frozen, max_expansions=5, progress=False),
        mia.paths.attribution_graph(frozen),
        mia.paths.term_importance(model, TOKENS[0], heads=2, progress=False),
        mia.detect.score_heads(model, tokens=TOKENS, draws=1),
    ):
        assert result.receipt.ok, result.receipt
    assert "patterns" in repr(mia.report(model, TOKENS[0], sections=["patterns"]))


@pytest.fixture
def sharded(tmp_path):
    """A bundled model's own folder, its tensors in two files with an index."""
    from mechinterp_attn.sources.zoo import bundled_folder

    source, folder = bundled_folder("relu-1l"), tmp_path / "sharded"
    folder.mkdir()
    (folder / "config.json").write_bytes((source / "config.json").read_bytes())
    tensors = sorted(load_file(source / "model.safetensors").items())
    where = {}
    for file, part in (("one.safetensors", tensors[::2]), ("two.safetensors", tensors[1::2])):
        save_file(dict(part), folder / file)
        where |= {name: file for name, _ in part}
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": where}), encoding="utf-8")
    return folder


def test_shards_of_a_checkpoint_are_one_model(sharded):
    tokens = torch.arange(20)[None]
    assert torch.equal(mia.load(sharded)(tokens), mia.load("relu-1l")(tokens))


@pytest.mark.parametrize(
    ("index", "message"),
    [
        ("{", "index.json cannot be read"),
        ('{"weight_map": 3}', "index.json has weight_map=3"),
        (
            '{"weight_map": {"a": "../one.safetensors"}}',
            "names '../one.safetensors', which is no safetensors file",
        ),
        (
            '{"weight_map": {"a": "gone.safetensors"}}',
            "names 'gone.safetensors', which is no safetensors file",
        ),
    ],
)
def test_an_index_that_leads_nowhere_is_refused(sharded, index, message):
    (sharded / "one.safetensors").rename(sharded.parent / "one.safetensors")
    (sharded / "model.safetensors.index.json").write_text(index, encoding="utf-8")
    with pytest.raises(CheckpointError, match=message):
        mia.load(sharded)


def test_a_revision_reaches_the_hub(monkeypatch):
    from transformers import AutoConfig

    asked = []

    def refuse(name, **options):
        asked.append((name, options))
        raise OSError("no network in this test")

    monkeypatch.setattr(AutoConfig, "from_pretrained", refuse)
    with pytest.raises(mia.MechInterpError, match="no network in this test"):
        mia.load("owner/name", revision="v2")
    assert asked == [("owner/name", {"revision": "v2", "trust_remote_code": False})]


def test_a_revision_of_something_local_is_refused(sharded):
    for source in ("relu-1l", sharded):
        with pytest.raises(mia.MechInterpError, match="revision='v2' is for models of the"):
            mia.load(source, revision="v2")


def test_a_source_is_gone_before_its_weights_are_folded(llama, tmp_path, monkeypatch):
    """``mia.load`` holds the weights once: the source is run, let go, and folded away matrix by matrix."""
    llama.save_pretrained(tmp_path)
    convert = importlib.import_module("mechinterp_attn.conversion.pipeline")
    sources, spent, checkpoints = [], [], []
    opened, fold = convert.open_source, convert.attention_only_weights

    def open_source(*args):
        bridge = opened(*args)
        sources.append(weakref.ref(bridge))
        return bridge

    def weights(spec, state, spend):
        assert sources[0]() is None
        checkpoints.append(dict(state))
        return fold(spec, state, spend=lambda name: (spend(name), spent.append((name, name in state))))

    monkeypatch.setattr(convert, "open_source", open_source)
    monkeypatch.setattr(convert, "attention_only_weights", weights)
    model = mia.load(tmp_path)
    assert [name for name, left in spent if left] == []
    assert {"blocks.0.attn.W_Q", "blocks.1.mlp.W_gate", "unembed.W_U"} <= {name for name, _ in spent}
    assert model.provenance["fidelity"]["ok"]


def test_the_widened_model_shares_its_blocks(llama, tmp_path):
    llama.save_pretrained(tmp_path)
    model = mia.load(tmp_path, dtype=torch.bfloat16)
    wide = mia.paths.freeze(model, TOKENS[0]).model
    own = dict(model.named_parameters())
    for name, weight in wide.named_parameters():
        inside = name.startswith("blocks.")
        assert (weight.data_ptr() == own[name].data_ptr()) == inside, name
        assert weight.dtype == (torch.bfloat16 if inside else torch.float32), name
