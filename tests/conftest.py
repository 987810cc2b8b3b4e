"""Shared fixtures: tiny bridges with nothing trivial in them, and real models where they are."""

import os
from pathlib import Path

import jaxtyping
import pytest
import torch

ROOT = Path(__file__).resolve().parents[1]
# Real models and text that are not part of the project; tests that use them skip without them.
DATA = Path(os.environ.get("MECHINTERP_ATTN_DATA", ROOT.parent / "shared" / "data"))
SMOLLM2 = Path(os.environ.get("MECHINTERP_ATTN_SMOLLM2", ROOT / "real" / "smollm2-135m-instruct-q4"))


@pytest.fixture(scope="session")
def data() -> Path:
    if not DATA.is_dir():
        pytest.skip(f"no test data at {DATA}; set MECHINTERP_ATTN_DATA to run this test")
    return DATA


@pytest.fixture(scope="session")
def smollm2_folder() -> Path:
    """A real model as a Hugging Face folder: SmolLM2-135M-Instruct, its weights rounded to 4 bits."""
    if not (SMOLLM2 / "tokenizer.json").is_file():
        pytest.skip(f"no SmolLM2 at {SMOLLM2}; `make real` fetches it, MECHINTERP_ATTN_SMOLLM2 names it")
    return SMOLLM2


@pytest.fixture(scope="session")
def smollm2(smollm2_folder):
    """The same, converted; all tests share it and leave it as it is."""
    import mechinterp_attn as mia

    return mia.load(smollm2_folder)


@pytest.fixture
def as_users_run_it():
    """Without the runtime type checks of the test suite, which would speak before our own errors."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)


def tiny_bridge(dtype: torch.dtype = torch.float64, *, seed: int = 0, noise: float = 0.3, **config):
    """A small native TransformerBridge whose norm gains and biases are far from trivial."""
    from transformer_lens import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    defaults = dict(d_model=16, d_head=4, n_heads=4, n_layers=2, n_ctx=24, d_vocab=13, d_mlp=24)
    defaults |= dict(act_fn="gelu", normalization_type="LN", seed=seed)
    bridge = TransformerBridge.boot_native(TransformerBridgeConfig(**(defaults | config)))
    bridge = bridge.to(dtype).eval()
    jitter(bridge, seed=seed + 1, noise=noise)
    return bridge


@torch.no_grad()
def jitter(module: torch.nn.Module, *, seed: int, noise: float = 0.3) -> None:
    """Add noise to every parameter, so that no gain is one and no bias is zero."""
    generator = torch.Generator().manual_seed(seed)
    for parameter in module.parameters():
        parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * noise)


def random_tokens(model, batch: int = 2, pos: int = 12, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.spec.d_vocab, (batch, pos), generator=generator)
