"""Huben & Morris 2023 as executable theorems: the paper's constructions, literally.

Read in this order: ``stream`` (the augmented sequence), ``masks``, ``heads`` (a masked softmax head,
a sublayer), ``activations``, ``neurons``, ``linear``, ``gated``, ``omega`` (masks in the weights),
``norms``, ``built`` (a trained model's banks as these heads), ``literal`` and ``whole`` (a whole
transformer; ``watched`` is its forward pass through hooks), ``costs``, ``regularisation``.
"""

from typing import TYPE_CHECKING

from mechinterp_attn.core.renamed import moved_names
from mechinterp_attn.theorems import masks
from mechinterp_attn.theorems.activations import (
    SoftmaxActivation as SoftmaxActivation,
    best_in_class,
    class_error,
    generalised_silu,
    relu_bound,
    softmax_activation,
)
from mechinterp_attn.theorems.cost_model import Costs as Costs, Shape, costs, public_costs
from mechinterp_attn.theorems.gated import (
    gated_mlp,
    glu_heads,
    product_heads,
    relu_squared_mlp,
    solu_heads,
)
from mechinterp_attn.theorems.heads import SoftmaxHeads, Sublayer, run
from mechinterp_attn.theorems.linear import (
    activation_heads,
    linear_heads,
    linear_sublayer,
    three_sublayers,
)
from mechinterp_attn.theorems.literal import LiteralModel as LiteralModel
from mechinterp_attn.theorems.neurons import bias_head, mlp_sublayer, neuron_heads
from mechinterp_attn.theorems.norms import PartialNorm as PartialNorm
from mechinterp_attn.theorems.omega import least_omega, mask_error_bound
from mechinterp_attn.theorems.regularisation import attention_dropout, decay
from mechinterp_attn.theorems.steps import Steps as Steps
from mechinterp_attn.theorems.stream import Layout
from mechinterp_attn.theorems.whole import (
    MaskSweep as MaskSweep,
    OmegaCalibration as OmegaCalibration,
    attention_only,
    calibrate_omega,
    mask_sweep,
)

# What one calls or builds; the types that calls give back can be imported for annotations.
__all__ = [
    "Layout",
    "Shape",
    "SoftmaxHeads",
    "Sublayer",
    "activation_heads",
    "attention_dropout",
    "attention_only",
    "best_in_class",
    "bias_head",
    "calibrate_omega",
    "class_error",
    "costs",
    "decay",
    "gated_mlp",
    "generalised_silu",
    "glu_heads",
    "least_omega",
    "linear_heads",
    "linear_sublayer",
    "mask_error_bound",
    "mask_sweep",
    "masks",
    "mlp_sublayer",
    "neuron_heads",
    "product_heads",
    "public_costs",
    "relu_bound",
    "relu_squared_mlp",
    "run",
    "softmax_activation",
    "solu_heads",
    "three_sublayers",
]

if not TYPE_CHECKING:  # a checker must not take every name for one of these
    __getattr__ = moved_names(
        __name__,
        {
            "check_omega": "mechinterp_attn.theorems.omega.check_omega",
            "clearing_head": "mechinterp_attn.theorems.linear.clearing_head",
            "inductive_steps": "mechinterp_attn.theorems.whole.inductive_steps",
            "log_leak": "mechinterp_attn.theorems.omega.log_leak",
        },
    )


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__
