"""Everything that draws: importing this module registers it (see ``core/pictures.py``)."""

from mechinterp_attn.view import circuitsvis as circuitsvis
from mechinterp_attn.view import graph as graph
from mechinterp_attn.view.figures import causal as causal
from mechinterp_attn.view.figures import circuits as circuits
from mechinterp_attn.view.figures import detect as detect
from mechinterp_attn.view.figures import detectors as detectors
from mechinterp_attn.view.figures import heads as heads
from mechinterp_attn.view.figures import paths as paths
from mechinterp_attn.view.figures import ranked as ranked
from mechinterp_attn.view.figures import theorems as theorems
