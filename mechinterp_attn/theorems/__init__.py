"""Huben & Morris 2023 as executable theorems: the paper's constructions, literally.

Read in this order: ``stream`` (the augmented sequence), ``masks``, ``heads`` (a masked softmax head,
a sublayer), ``activations``, ``neurons``, ``linear``, ``gated``, ``omega`` (masks in the weights),
``norms``, ``built`` (a trained model's banks as these heads), ``literal`` and ``whole`` (a whole
transformer; ``watched`` is its forward pass through hooks), ``costs``, ``regularisation``.
"""

from mechinterp_attn.theorems import masks
from mechinterp_attn.theorems.activations import (
    SoftmaxActivation,
    best_in_class,
    class_error,
    generalised_silu,
    relu_bound,
    softmax_activation,
)
from mechinterp_attn.theorems.cost_model import Costs, Shape, costs, public_costs
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
    clearing_head,
    linear_heads,
    linear_sublayer,
    three_sublayers,
)
from mechinterp_attn.theorems.literal import LiteralModel
from mechinterp_attn.theorems.neurons import bias_head, mlp_sublayer, neuron_heads
from mechinterp_attn.theorems.norms import PartialNorm
from mechinterp_attn.theorems.omega import check_omega, least_omega, log_leak, mask_error_bound
from mechinterp_attn.theorems.regularisation import attention_dropout, decay
from mechinterp_attn.theorems.steps import Steps
from mechinterp_attn.theorems.stream import Layout
from mechinterp_attn.theorems.whole import (
    MaskSweep,
    OmegaCalibration,
    attention_only,
    calibrate_omega,
    inductive_steps,
    mask_sweep,
)

__all__ = [
    "Costs",
    "Layout",
    "LiteralModel",
    "MaskSweep",
    "OmegaCalibration",
    "PartialNorm",
    "Shape",
    "SoftmaxActivation",
    "SoftmaxHeads",
    "Steps",
    "Sublayer",
    "activation_heads",
    "attention_dropout",
    "attention_only",
    "best_in_class",
    "bias_head",
    "calibrate_omega",
    "check_omega",
    "class_error",
    "clearing_head",
    "costs",
    "decay",
    "gated_mlp",
    "generalised_silu",
    "glu_heads",
    "inductive_steps",
    "least_omega",
    "linear_heads",
    "linear_sublayer",
    "log_leak",
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
