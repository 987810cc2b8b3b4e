"""Which head does what."""

from mechinterp_attn.detect.ablation import Ablations, ablate
from mechinterp_attn.detect.probes import Probe, random_repeats
from mechinterp_attn.detect.scores import HeadScores, Matches, Offsets, match, offsets, score_heads

__all__ = [
    "Ablations",
    "HeadScores",
    "Matches",
    "Offsets",
    "Probe",
    "ablate",
    "match",
    "offsets",
    "random_repeats",
    "score_heads",
]
