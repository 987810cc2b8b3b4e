"""Costs: against published parameter counts, against a count of the model's own tensors, by hand."""

import pytest
import torch
import transformers
from torch.utils.flop_counter import FlopCounterMode

import mechinterp_attn as mia
from mechinterp_attn import MechInterpError
from mechinterp_attn.theorems import Shape, costs, public_costs
from mechinterp_attn.theorems.cost_model import PUBLIC
from tests.conftest import tiny_bridge
from tests.conversion.families import bridge_of, hugging_face


@pytest.mark.parametrize("shape", PUBLIC, ids=lambda s: s.name)
def test_parameters_are_the_published_ones(shape):
    found = costs(shape)
    if shape.n_parameters is None:
        assert 174e9 < found.frame["parameters"].iloc[0] < 176e9  # GPT-3's "175 billion"
    else:
        assert found.receipt.ok, found.receipt


def test_heads_and_shares_of_gpt2_small_and_gpt3():
    frame = public_costs().set_index(["model", "form"])
    small = frame.loc["GPT-2 small", "two-key"]
    assert (small["attention_heads"], small["mlp_heads"]) == (144, 36_864)
    assert small["mlp_share"] == pytest.approx(2 * small["attention_share"], rel=2e-3)
    assert small["mlp_head_share"] > 0.99
    large = frame.loc["GPT-3", "two-key"]
    assert large["mlp_heads"] == 512 * large["attention_heads"]
    assert len(frame) == 3 * len(PUBLIC)


def test_forms_differ_as_the_paper_says():
    frame = costs("gpt-2 small", n_tokens=100).frame.set_index("form")
    original, two_key, dense = (frame.loc[form] for form in ("original", "two-key", "dense"))
    assert two_key["flops"] == original["flops"]
    assert dense["mlp_flops"] == pytest.approx((1 + 100 / 768) * original["mlp_flops"])
    assert dense["pattern_bytes"] == 4 * (144 + 36_864) * 100**2
    assert two_key["pattern_bytes"] == 4 * (144 * 100**2 + 36_864 * 100)
    assert original["attention_flops"] == 12 * (2 * 4 * 768**2 + 4 * 100 * 768)


@pytest.mark.parametrize("config", [dict(act_fn="silu"), dict(attn_only=True)], ids=str)
def test_a_models_parameters_are_those_of_its_source(config):
    bridge = tiny_bridge(**config)
    frame = costs(mia.convert(bridge)).frame
    assert frame["parameters"].iloc[0] == sum(p.numel() for p in bridge.parameters())
    assert frame["mlp_heads"].iloc[2] == (0 if "attn_only" in config else 48)


@pytest.mark.parametrize("family", ["gpt2", "gpt_neox_serial", "llama", "llama3", "mistral", "qwen2"])
def test_parameters_of_other_families_are_hugging_faces(family):
    """Shared keys, gates, RMS norms, and biases on all, some or none of the matrices."""
    hf = hugging_face(family)
    frame = costs(mia.convert(bridge_of(family), check=False)).frame
    shared = hf.get_input_embeddings().weight is hf.get_output_embeddings().weight
    tied = hf.get_input_embeddings().weight.numel() if shared else 0  # told apart after folding
    assert frame["parameters"].iloc[0] == sum(p.numel() for p in hf.parameters()) + tied


def test_a_mixture_has_several_heads_a_neuron():
    model = mia.convert(tiny_bridge(), mlp="mixture", components=4)
    frame = costs(model, n_tokens=10).frame.set_index("form")
    assert frame.loc["two-key", "mlp_heads"] == sum(bank.n_heads for bank in model.banks[1::2])
    assert frame.loc["dense", "pattern_bytes"] == 4 * (8 + 4 * 48) * 100


HUGGING_FACE = {
    "GPT-2 small": ("GPT2", dict(n_layer=12, n_embd=768, n_head=12)),
    "GPT-2 medium": ("GPT2", dict(n_layer=24, n_embd=1024, n_head=16)),
    "GPT-2 large": ("GPT2", dict(n_layer=36, n_embd=1280, n_head=20)),
    "GPT-2 XL": ("GPT2", dict(n_layer=48, n_embd=1600, n_head=25)),
    "GPT-3": ("GPT2", dict(n_layer=96, n_embd=12288, n_head=96, n_positions=2048)),
    "Llama-3-8B": (
        "Llama",
        dict(num_hidden_layers=32, hidden_size=4096, num_attention_heads=32, num_key_value_heads=8,
             intermediate_size=14336, vocab_size=128256, max_position_embeddings=8192),
    ),
    "Pythia-70m": (
        "GPTNeoX",
        dict(num_hidden_layers=6, hidden_size=512, num_attention_heads=8, intermediate_size=2048,
             vocab_size=50304, max_position_embeddings=2048),
    ),
    "Pythia-1b": (
        "GPTNeoX",
        dict(num_hidden_layers=16, hidden_size=2048, num_attention_heads=8, intermediate_size=8192,
             vocab_size=50304, max_position_embeddings=2048),
    ),
    "Pythia-12b": (
        "GPTNeoX",
        dict(num_hidden_layers=36, hidden_size=5120, num_attention_heads=40, intermediate_size=20480,
             vocab_size=50688, max_position_embeddings=2048),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", HUGGING_FACE)
def test_parameters_and_flops_are_those_of_the_model_itself(name):
    """Hugging Face's model of that config without numbers in it: its tensors, and the matrix products
    that PyTorch counts in a forward pass over 24 tokens."""
    family, options = HUGGING_FACE[name]
    config = getattr(transformers, f"{family}Config")(**options, attn_implementation="eager")
    with torch.device("meta"):
        kind = "LMHeadModel" if family == "GPT2" else "ForCausalLM"
        model = getattr(transformers, family + kind)(config)
        tokens, mask = torch.zeros(1, 24, dtype=torch.long), torch.zeros(1, 1, 24, 24)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            model(tokens, attention_mask=mask, position_ids=torch.arange(24)[None], use_cache=False)
    original = costs(name, n_tokens=24).frame.iloc[0]
    counted = {name: p.numel() for name, p in model.named_parameters()}
    attention = sum(n for name, n in counted.items() if "attn." in name or "attention." in name)
    assert original["parameters"] == sum(counted.values())
    assert original["attention_share"] == attention / original["parameters"]
    mlp = sum(n for name, n in counted.items() if ".mlp." in name)
    assert original["mlp_share"] == mlp / original["parameters"]
    assert 24 * original["flops"] == counter.get_total_flops()


def test_unknown_models_and_lengths():
    with pytest.raises(MechInterpError, match="no public config 'gpt-5'; there are GPT-2 small"):
        costs("gpt-5")
    with pytest.raises(MechInterpError, match="n_tokens=0"):
        costs(Shape(name="x", n_layers=1, d_model=4, n_heads=1, d_mlp=4, d_vocab=5, n_ctx=6), n_tokens=0)
