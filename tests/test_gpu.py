"""What runs on a GPU, against the processor: `make gpu` collects these, and they skip without one."""

import pytest
import torch

import mechinterp_attn as mia

pytestmark = pytest.mark.gpu
DEVICE = "cuda"


@pytest.fixture(scope="module", autouse=True)
def needs_a_gpu():
    if DEVICE == "cuda" and not torch.cuda.is_available():
        pytest.skip("torch finds no GPU (torch.cuda.is_available() is False)")


@pytest.fixture(scope="module")
def both():
    return mia.load("gelu-2l"), mia.load("gelu-2l", device=DEVICE)


@pytest.fixture(scope="module")
def tokens(both):
    return torch.randint(2, both[0].spec.d_vocab, (2, 24), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logits_are_the_processors(both, tokens, dtype):
    own, moved = both
    half = mia.load("gelu-2l", dtype=dtype, device=DEVICE)
    assert {weight.device.type for weight in half.parameters()} == {DEVICE}
    expected = own(tokens)
    scale = float(expected.abs().max())
    off = float((half(tokens).float().cpu() - expected).abs().max())
    assert off <= {torch.float32: 1e-5, torch.bfloat16: 5e-2}[dtype] * scale  # as conversions are held to
    back = moved.to("cpu").to(DEVICE)
    torch.testing.assert_close(back(tokens).cpu(), expected, rtol=0, atol=1e-5 * scale)  # float32


def test_a_search_lists_the_same_pairs(both):
    """Also with TF32 allowed by the caller: a list is that of full float32, and says so where it is not."""
    own, moved = both
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32"
    try:
        found = mia.circuits.composition(moved, "V", src="attention", top_k=20)
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"  # the caller's setting is left as it was
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    expected = mia.circuits.composition(own, "V", src="attention", top_k=20)
    assert found.receipt.ok
    assert found.frame["src"].tolist() == expected.frame["src"].tolist()
    assert found.frame["dst"].tolist() == expected.frame["dst"].tolist()
    assert found.frame["score"].to_numpy() == pytest.approx(expected.frame["score"].to_numpy(), rel=1e-4)


def test_a_prompt_is_traced_to_the_same_heads(both, tokens):
    graphs = [mia.paths.attribution_graph(mia.paths.freeze(m, tokens[0].to(m.W_E.device))) for m in both]
    assert all(graph.receipt.ok for graph in graphs)
    direct = [mia.paths.logit_attribution(mia.paths.freeze(m, tokens[0])).frame for m in both]
    assert set(direct[0]["head"][:10]) == set(direct[1]["head"][:10])


def test_a_report_is_made(both, tokens):
    page = mia.report(
        both[1], tokens[0], sections=["heads", "patterns", "graph", "fidelity"], progress=False
    )
    assert page.data["checks"]["failed"] == 0
