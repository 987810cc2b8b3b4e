"""Which head does what: by its pattern, by its weights, by cutting it out, over a corpus."""

from mechinterp_attn.detect.ablation import Ablations, ablate
from mechinterp_attn.detect.circuit import CircuitCheck, assert_circuit, check_circuit
from mechinterp_attn.detect.corpus import CorpusScores, over_corpus
from mechinterp_attn.detect.dictionary_quality import Reconstruction, reconstruction
from mechinterp_attn.detect.induction_circuit import Induction, induction
from mechinterp_attn.detect.losses import InContextLearning, in_context_learning
from mechinterp_attn.detect.probes import Probe, random_repeats
from mechinterp_attn.detect.scores import HeadScores, Matches, Offsets, match, offsets, score_heads
from mechinterp_attn.detect.weights import WeightScores, score_weights

__all__ = [
    "Ablations",
    "CircuitCheck",
    "CorpusScores",
    "HeadScores",
    "InContextLearning",
    "Induction",
    "Matches",
    "Offsets",
    "Probe",
    "Reconstruction",
    "WeightScores",
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
