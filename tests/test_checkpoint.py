"""Checkpoints in TransformerLens's convention: what is accepted, what is refused and how."""

import json
import math

import pytest
import torch
from safetensors.torch import save_file

import mechinterp_attn as mia
from mechinterp_attn.conversion.reference import run_checkpoint
from mechinterp_attn.core.errors import CheckpointError, UnsupportedModelError
from mechinterp_attn.sources.bridge import read_bridge, to_bridge
from tests.conftest import tiny_bridge

CFG = dict(
    n_layers=1, n_heads=2, d_model=8, d_head=4, d_mlp=12, n_ctx=10, d_vocab=7,
    act_fn="relu", normalization_type="LN",
)  # fmt: skip


def tensors(*, seed: int = 0, dtype: torch.dtype = torch.float64, **shapes):
    generator = torch.Generator().manual_seed(seed)
    at = "blocks.0"
    shapes = {
        "embed.W_E": (7, 8), "pos_embed.W_pos": (10, 8), "unembed.W_U": (8, 7), "ln_final.w": (8,),
        f"{at}.attn.W_Q": (2, 8, 4), f"{at}.attn.W_K": (2, 8, 4), f"{at}.attn.W_V": (2, 8, 4),
        f"{at}.attn.W_O": (2, 4, 8), f"{at}.attn.b_V": (2, 4), f"{at}.ln1.w": (8,), f"{at}.ln1.b": (8,),
        f"{at}.mlp.W_in": (8, 12), f"{at}.mlp.W_out": (12, 8), f"{at}.mlp.b_out": (8,),
    } | shapes  # fmt: skip
    return {name: torch.randn(shape, generator=generator, dtype=dtype) for name, shape in shapes.items()}


def test_biases_and_gains_that_are_left_out_are_zero_and_one():
    given = tensors()
    full = {
        **given, "ln_final.b": torch.zeros(8).double(), "blocks.0.ln2.w": torch.ones(8).double(),
        "blocks.0.ln2.b": torch.zeros(8).double(), "blocks.0.mlp.b_in": torch.zeros(12).double(),
        "blocks.0.attn.b_O": torch.zeros(8).double(), "blocks.0.attn.b_Q": torch.zeros(2, 4).double(),
        "blocks.0.attn.b_K": torch.zeros(2, 4).double(), "unembed.b_U": torch.zeros(7).double(),
    }  # fmt: skip
    tokens = torch.tensor([[0, 6, 3, 3, 1]])
    sparse, dense = (mia.convert(mia.Checkpoint(CFG, sd)) for sd in (given, full))
    assert torch.equal(sparse(tokens), dense(tokens))


@pytest.mark.parametrize(
    "config",
    [
        dict(),
        dict(act_fn="silu", normalization_type="RMS"),
        dict(act_fn="gelu_new", positional_embedding_type="rotary", rotary_dim=2),
        dict(attn_only=True, normalization_type=None, attention_dir="bidirectional"),
        dict(act_fn="gelu", n_key_value_heads=2, d_vocab_out=5),
    ],
)
def test_the_reference_computes_what_a_bridge_computes(config):
    """The dense forward that checks checkpoints, against TransformerLens's own native model."""
    bridge = tiny_bridge(**config)
    checkpoint = read_bridge(bridge)
    tokens = torch.randint(13, (3, 11), generator=torch.Generator().manual_seed(0))
    logits, streams = run_checkpoint(checkpoint, tokens)
    expected, cache = bridge.run_with_cache(tokens)
    # float64; the native RMS norm is taken in float32
    atol = 1e-5 if config.get("normalization_type") == "RMS" else 1e-11
    torch.testing.assert_close(logits, expected, rtol=0, atol=atol)
    assert len(streams) == (2 if config.get("attn_only") else 4)
    for name, stream in streams.items():
        torch.testing.assert_close(stream, cache[name], rtol=0, atol=atol)


@pytest.mark.parametrize("config", [dict(), dict(positional_embedding_type="rotary"), dict(attn_only=True)])
def test_a_bridge_survives_the_round_trip(config):
    bridge = tiny_bridge(**config)
    again = to_bridge(read_bridge(bridge))
    tokens = torch.randint(13, (2, 9), generator=torch.Generator().manual_seed(0))
    assert torch.equal(again(tokens), bridge(tokens))


def test_a_bridge_that_cannot_be_made_says_why():
    checkpoint = mia.Checkpoint(
        CFG | dict(positional_embedding_type=None, use_attn_scale=False),
        {name: t for name, t in tensors().items() if name != "pos_embed.W_pos"},
        name="odd",
    )
    with pytest.raises(
        UnsupportedModelError, match=r"odd, made a native bridge,.*scale.*; it has no positions"
    ):
        to_bridge(checkpoint)


def test_every_wrong_tensor_is_named():
    sd = tensors()
    del sd["blocks.0.mlp.W_in"], sd["embed.W_E"]
    sd["blocks.0.attn.W_Q"] = torch.zeros(2, 8, 5).double()
    sd["blocks.0.ln1.w"][3] = math.nan
    sd["blocks.0.attn.W_O"][1, 2, 0] = -math.inf
    sd["blocks.0.mlp.W_gate"] = torch.zeros(8, 12).double()
    sd["unembed.W_U"] = torch.zeros(8, 7, dtype=torch.long)
    with pytest.raises(CheckpointError) as caught:
        mia.convert(mia.Checkpoint(CFG, sd, name="broken"))
    text = str(caught.value)
    assert text.startswith("broken is not a usable checkpoint: ")
    for part in (
        "missing tensor embed.W_E",
        "missing tensor blocks.0.mlp.W_in",
        "blocks.0.attn.W_Q has shape (2, 8, 5), expected (2, 8, 4)",
        "blocks.0.ln1.w is nan at index [3]",
        "blocks.0.attn.W_O is -inf at index [1, 2, 0]",
        "unknown tensor blocks.0.mlp.W_gate (8, 12)",
        "unembed.W_U has dtype torch.int64, expected floating point",
    ):
        assert part in text
    assert len(caught.value.reasons) == 7
    assert "\n" not in text


def test_every_wrong_config_field_is_named():
    cfg = CFG | dict(d_head=0, n_ctx="ten")
    del cfg["d_model"]
    with pytest.raises(CheckpointError) as caught:
        mia.convert(mia.Checkpoint(cfg, tensors()))
    assert set(caught.value.reasons) == {
        "config has no 'd_model'",
        "config has d_head=0, expected a positive integer",
        "config has n_ctx='ten', expected a positive integer",
    }


def test_a_conversion_that_is_wrong_is_an_error_that_names_the_sublayer(monkeypatch):
    """Break one bank's weights on purpose: the check inside ``convert`` finds it."""
    from mechinterp_attn.conversion import pipeline as module

    right = module.attention_only_weights

    def wrong(spec, source, **options):
        weights = right(spec, source, **options)
        weights["blocks.1.neurons.b_in"] = weights["blocks.1.neurons.b_in"] + 0.01
        return weights

    monkeypatch.setattr(module, "attention_only_weights", wrong)
    with pytest.raises(mia.MechInterpError, match=r"first part after blocks\.1\.neurons"):
        mia.convert(tiny_bridge())
    broken = mia.convert(tiny_bridge(), check=False)
    fidelity = mia.verify(broken, tiny_bridge(), torch.tensor([[1, 2, 3, 4]]))
    assert not fidelity.ok
    assert fidelity.first_difference == "blocks.1.neurons"
    assert list(fidelity.per_layer["sublayer"]) == [
        f"blocks.{layer}.{part}" for layer in (0, 1) for part in ("attn", "neurons")
    ]


def test_fidelity_agrees_with_the_numbers_computed_directly():
    bridge = tiny_bridge(torch.float32)
    model = mia.convert(bridge)
    with torch.no_grad():
        model.unembed.b_U[2] += 0.5
    tokens = torch.randint(13, (3, 9), generator=torch.Generator().manual_seed(1))
    fidelity = mia.verify(model, bridge, tokens)
    logits, expected = model(tokens).detach().double(), bridge(tokens).detach().double()
    p, q = expected.softmax(-1), logits.softmax(-1)
    assert fidelity.max_logit_error == pytest.approx(float((logits - expected).abs().max()))
    assert fidelity.kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-6)
    loss = torch.nn.functional.cross_entropy(expected[:, :-1].flatten(0, 1), tokens[:, 1:].flatten())
    assert fidelity.loss_source == pytest.approx(float(loss), rel=1e-6)
    assert fidelity.n_tokens == 27
    assert not fidelity.ok
    assert fidelity.first_difference is None  # the streams agree: it is the unembedding


def write(folder, cfg, sd):
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(cfg))
    save_file(sd, folder / "model.safetensors")
    return folder


def test_a_checkpoint_folder_is_loaded_and_checked(tmp_path):
    sd = tensors()
    model = mia.load(write(tmp_path / "mine", CFG, sd))
    assert model.provenance["name"] == "mine"
    assert model.provenance["fidelity"]["ok"]
    tokens = torch.tensor([[1, 2, 3]])
    assert torch.equal(model(tokens), mia.convert(mia.Checkpoint(CFG, sd))(tokens))


def test_half_precision_storage_is_widened(tmp_path):
    folder = write(tmp_path / "half", CFG, tensors(dtype=torch.float16))
    assert mia.load(folder).W_E.dtype == torch.float32
    assert mia.load(folder, dtype=torch.float64).W_E.dtype == torch.float64


def test_what_is_no_model_is_refused(tmp_path):
    with pytest.raises(mia.MechInterpError, match=r"neither a bundled model .* nor a"):
        mia.load("gpt-17-does-not-exist")
    empty = tmp_path / "empty"
    empty.mkdir()
    with pytest.raises(CheckpointError, match=r"it has no config\.json"):
        mia.load(empty)
    (empty / "config.json").write_text("[1, 2")
    with pytest.raises(CheckpointError, match=r"config\.json is not JSON"):
        mia.load(empty)
    (empty / "config.json").write_text(json.dumps(CFG))
    with pytest.raises(CheckpointError, match=r"no model\.safetensors and no .*\(pickles are not read\)"):
        mia.load(empty)
    (empty / "model.safetensors").write_bytes(b"\x80\x04 not safetensors")
    with pytest.raises(CheckpointError, match="damaged or not safetensors"):
        mia.load(empty)


@pytest.mark.usefixtures("as_users_run_it")
def test_an_unknown_mode_is_refused():
    with pytest.raises(mia.MechInterpError, match="mlp='magic' is not a conversion mode"):
        mia.convert(mia.Checkpoint(CFG, tensors()), mlp="magic")


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [("gpt2", "gpt2"), ("pythia-70m", "EleutherAI/pythia-70m"), ("who/what", "who/what")],
)
def test_names_of_hugging_face_go_to_the_bridge(name, hub_id, monkeypatch):
    """No hub is asked: the door behind the name stands still."""
    asked = []

    def stop(source, dtype=None, revision=None):
        asked.append(source)
        raise mia.MechInterpError("stopped at the door")

    monkeypatch.setattr("mechinterp_attn.sources.doors.boot", stop)
    with pytest.raises(mia.MechInterpError, match="stopped at the door"):
        mia.load(name)
    assert asked == [hub_id]
