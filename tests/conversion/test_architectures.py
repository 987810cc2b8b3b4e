"""Every architecture of the table: exact against the Hugging Face model itself, or refused with reasons."""

import copy
import functools
import runpy
from pathlib import Path

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.conversion.reference import run_checkpoint
from mechinterp_attn.core.errors import UnsupportedModelError
from mechinterp_attn.frozen.sublayer import freeze_sublayer
from mechinterp_attn.sources.bridge import read_bridge
from mechinterp_attn.sources.huggingface import bridge_around
from tests.conversion.architectures import CASES, EXACT, REFUSED, build
from tests.conversion.families import VOCAB, tokenizer

LENGTH = 60  # past every window, original context and scaling point of the table
FLOAT64 = 1e-9  # of the scale: rounding of float64 over two layers
FLOAT32 = 1e-5  # of the scale: rounding of float32 over two layers


def tokens(batch: int = 2, pos: int = LENGTH) -> torch.Tensor:
    return torch.randint(3, VOCAB, (batch, pos), generator=torch.Generator().manual_seed(3))


@functools.cache
def bridge_of(name: str, dtype: torch.dtype):
    hf = build(name, dtype)
    return bridge_around(copy.deepcopy(hf), tokenizer(), place=f"tiny-{name}")


@functools.cache
def converted(name: str, dtype: torch.dtype = torch.float32):
    return mia.convert(bridge_of(name, dtype))


@torch.no_grad()
def run_hugging_face(hf, ids):
    """Logits, and the residual stream after every block, by plain torch hooks."""
    names = ("h", "layers", "layer", "blocks")
    stacks = [
        m
        for name, m in hf.named_modules()
        if isinstance(m, torch.nn.ModuleList) and name.split(".")[-1] in names
    ]
    streams = []

    def keep(_module, _inputs, output):
        out = output[0] if isinstance(output, (tuple, list)) else output
        streams.append(out.reshape(*ids.shape, -1))

    handles = [block.register_forward_hook(keep) for block in stacks[0]]
    logits = hf(ids).logits
    for handle in handles:
        handle.remove()
    return logits, streams


def close(got, expected, share):
    torch.testing.assert_close(got, expected, rtol=0, atol=share * float(expected.abs().max()))


@pytest.mark.parametrize("name", EXACT)
def test_exact_against_hugging_face(name):
    """In float32, and in float64 where the whole of the source runs in it."""
    for dtype in (torch.float32, torch.float64):
        model = converted(name, torch.float32)
        if dtype == torch.float64:
            if model.spec.float32_inside:
                continue
            model = converted(name, dtype)
        expected, streams = run_hugging_face(build(name, dtype), tokens())
        logits, cache = model.run_with_cache(tokens())
        share = FLOAT32 if dtype == torch.float32 else FLOAT64
        close(logits, expected, share)
        assert len(streams) == model.spec.n_layers
        for layer, stream in enumerate(streams):
            close(cache[f"blocks.{layer}.hook_resid_post"], stream, share)


@pytest.mark.parametrize("name", EXACT)
def test_streams_after_every_sublayer(name):
    """Against the bridge's hooks, and against a dense model that shares no code with the banks."""
    checkpoint, model = read_bridge(bridge_of(name, torch.float32)), converted(name)
    if not checkpoint.cfg.get("bridge_differs"):
        bridge_of(name, torch.float32)(
            tokens(1, 8)
        )  # dynamic tables: Hugging Face keeps those of longer runs
        card = mia.verify(model, bridge_of(name, torch.float32), tokens())
        assert (card.frame["relative"] < FLOAT32).all(), card.frame
        assert len(card.frame) == model.spec.n_layers * (1 if model.spec.parallel else 2)
    logits, streams = run_checkpoint(checkpoint, tokens())
    own, cache = model.run_with_cache(tokens())
    close(own, logits, FLOAT32)
    for hook, stream in streams.items():
        close(cache[hook], stream, FLOAT32)


@pytest.mark.parametrize("name", EXACT)
def test_frozen_scores_and_files(name, tmp_path):
    """The frozen form is the model, scores add up to the patterns, and a saved model is the same one."""
    model, ids = copy.deepcopy(converted(name)).double(), tokens(1, 40)
    frozen = mia.paths.freeze(model, ids)
    assert frozen.receipt.ok, frozen.receipt
    _, cache = model.run_with_cache(ids)
    one = {hook: tensor[0] for hook, tensor in cache.items()}
    for sublayer in model.sublayers():
        part = freeze_sublayer(sublayer, one)
        for bank, own in zip(part.banks, sublayer.banks, strict=True):
            total = bank.apply(part.stream) + bank.constant + bank.bias
            out = one[f"blocks.{own.layer}.hook_{'attn' if own.kind == 'attention' else 'mlp'}_out"]
            torch.testing.assert_close(total, out, rtol=0, atol=1e-9)  # float64
    for label in ("L1H0", "L1H1"):
        found = mia.paths.expand_score(frozen, label, 35, 33)
        assert found.receipt.ok, found.receipt
        assert found.frame["value"].sum() == pytest.approx(found.total, abs=1e-9)
    model.save(tmp_path / "saved")
    again = mia.load(tmp_path / "saved")
    assert again.spec == model.spec
    for key, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[key]), key
    torch.testing.assert_close(again(ids), model(ids), rtol=0, atol=1e-12)  # float64, other strides


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_every_reason(name):
    with pytest.raises(UnsupportedModelError) as error:
        converted(name)
    assert len(error.value.reasons) == len(REFUSED[name])
    for found, expected in zip(error.value.reasons, REFUSED[name], strict=True):
        assert found.startswith(expected)


def test_the_page_of_supported_models_is_current():
    docs = Path(__file__).parents[2] / "docs"
    page = runpy.run_path(str(docs / "make_supported.py"))["page"]()
    assert (docs / "supported.md").read_text(encoding="utf-8") == page, "run python docs/make_supported.py"


def test_every_case_has_a_verdict():
    assert set(REFUSED) <= set(CASES)
    assert len(EXACT) >= 60
