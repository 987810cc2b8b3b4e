"""How far apart rounding may leave two computations of the same logits."""

import torch

# Largest logit error, as a share of the largest logit, that rounding explains in each dtype: two
# different orders of summation over a few thousand terms and a few dozen sublayers.
TOLERANCE = {
    torch.float64: 1e-10, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2,
}  # fmt: skip
