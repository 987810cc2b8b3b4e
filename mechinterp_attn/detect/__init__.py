"""Which head does what: by its pattern, by its weights, by cutting it out, over a corpus."""

from mechinterp_attn.detect.ablation import Ablations as Ablations, ablate
from mechinterp_attn.detect.circuit import CircuitCheck as CircuitCheck, assert_circuit, check_circuit
from mechinterp_attn.detect.corpus import CorpusScores as CorpusScores, over_corpus
from mechinterp_attn.detect.dictionary_quality import Reconstruction as Reconstruction, reconstruction
from mechinterp_attn.detect.induction_circuit import Induction as Induction, induction
from mechinterp_attn.detect.losses import InContextLearning as InContextLearning, in_context_learning
from mechinterp_attn.detect.probes import Probe as Probe, random_repeats
from mechinterp_attn.detect.scores import (
    HeadScores as HeadScores,
    Matches as Matches,
    Offsets as Offsets,
    match,
    offsets,
    score_heads,
)
from mechinterp_attn.detect.weights import WeightScores as WeightScores, score_weights

# What one calls or builds; the types that calls give back can be imported for annotations.
__all__ = [
    "ablate",
    "assert_circuit",
    "check_circuit",
    "in_context_learning",
    "induction",
    "match",
    "offsets",
    "over_corpus",
    "random_repeats",
    "reconstruction",
    "score_heads",
    "score_weights",
]


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__
