"""The generalised SiLU class: the paper's parameters and their errors, and what is outside it."""

import pytest
import torch
import torch.nn.functional as F

from mechinterp_attn import MechInterpError
from mechinterp_attn.theorems import best_in_class, class_error, relu_bound, softmax_activation


def test_the_papers_parameters_err_as_published():
    error, at = class_error("gelu", softmax_activation("gelu"))
    assert error == pytest.approx(0.020335, abs=1e-6)
    assert at == pytest.approx(2.270, abs=2e-3)
    error, _ = class_error("gelu_new", softmax_activation("gelu_new"))
    assert error == pytest.approx(0.020660, abs=1e-6)
    for k in (1.0, 10.0, 1000.0):
        error, at = class_error("relu", softmax_activation("relu", sharpness=k), radius=30 / k)
        assert error == pytest.approx(0.27846 / k, rel=1e-3)
        assert error < relu_bound(k)
        assert abs(at) == pytest.approx(1.278 / k, rel=1e-2)


def test_members_of_the_class_are_exact():
    z = torch.linspace(-8, 8, 1001, dtype=torch.float64)
    assert torch.allclose(softmax_activation("silu")(z), F.silu(z), atol=1e-15)
    assert torch.allclose(softmax_activation("swish")(z), F.silu(z), atol=1e-15)
    quick = z * torch.sigmoid(1.702 * z)
    assert torch.allclose(softmax_activation("quick_gelu")(z), quick, atol=1e-15)


def test_the_best_member_for_gelu_beats_the_papers():
    a1, a2, error = best_in_class(F.gelu)
    assert a1 * a2 == pytest.approx(1.0, abs=1e-3)
    assert error == pytest.approx(1.392e-2, abs=2e-5)  # against 2.03e-2 of 1.702


@pytest.mark.parametrize("name", ["tanh", "relu2"])
def test_outside_the_class_says_the_best_and_its_error(name):
    with pytest.raises(MechInterpError, match=f"{name!r} is outside.*is off by .*generalised_silu"):
        softmax_activation(name)


def test_the_best_approximation_is_no_worse_than_a_dense_search():
    _, _, error = best_in_class(torch.tanh, radius=3.0)
    z = torch.linspace(-3, 3, 601, dtype=torch.float64)
    best = min(
        float((torch.tanh(z) - c * z * torch.sigmoid(a * z)).abs().max())
        for a in torch.linspace(-5, 5, 101).tolist()
        for c in torch.linspace(-2, 2, 81).tolist()
    )
    assert error <= best + 1e-9


def test_unknown_names_and_bad_sharpness():
    with pytest.raises(MechInterpError, match="'gleu' is not known; use one of silu"):
        softmax_activation("gleu")
    with pytest.raises(MechInterpError, match="sharpness=0"):
        softmax_activation("relu", sharpness=0.0)
