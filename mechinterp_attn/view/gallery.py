"""Everything that draws: importing this module registers it (see ``core/pictures.py``)."""

from mechinterp_attn.view import circuitsvis as circuitsvis, graph as graph
from mechinterp_attn.view.figures import (
    causal as causal,
    circuits as circuits,
    detect as detect,
    detectors as detectors,
    heads as heads,
    paths as paths,
    ranked as ranked,
    theorems as theorems,
)
