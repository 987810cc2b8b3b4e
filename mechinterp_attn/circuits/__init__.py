"""What can be read from weights alone."""

from mechinterp_attn.circuits.bigram import Bigrams, bigrams
from mechinterp_attn.circuits.bugs import FactoringBugs, factoring_bugs
from mechinterp_attn.circuits.chains import VirtualHeads, virtual_heads
from mechinterp_attn.circuits.circuit import (
    CircuitStatistics,
    TokenBlock,
    VocabularyCircuit,
    ov_circuit,
    qk_circuit,
)
from mechinterp_attn.circuits.composition_scores import CompositionScores, composition
from mechinterp_attn.circuits.copying import CopyingScores, copying_scores
from mechinterp_attn.circuits.positions import (
    PositionCircuit,
    TokenPositions,
    position_circuit,
    token_positions,
)
from mechinterp_attn.circuits.rank_one import ReadsAndWrites, reads_and_writes
from mechinterp_attn.circuits.spectrum import SingularDirections, singular_directions
from mechinterp_attn.circuits.token_pairs import TokenComposition, token_composition
from mechinterp_attn.circuits.trigrams import SkipTrigrams, skip_trigrams
from mechinterp_attn.circuits.vocabulary import TokenPairs, ov_top, qk_top
from mechinterp_attn.core.plan import Plan
from mechinterp_attn.model.select import resolve_head, virtual_head
from mechinterp_attn.model.virtual import VirtualHead

__all__ = [
    "Bigrams",
    "CircuitStatistics",
    "CompositionScores",
    "CopyingScores",
    "FactoringBugs",
    "Plan",
    "PositionCircuit",
    "ReadsAndWrites",
    "SingularDirections",
    "SkipTrigrams",
    "TokenBlock",
    "TokenComposition",
    "TokenPairs",
    "TokenPositions",
    "VirtualHead",
    "VirtualHeads",
    "VocabularyCircuit",
    "bigrams",
    "composition",
    "copying_scores",
    "factoring_bugs",
    "ov_circuit",
    "ov_top",
    "position_circuit",
    "qk_circuit",
    "qk_top",
    "reads_and_writes",
    "resolve_head",
    "singular_directions",
    "skip_trigrams",
    "token_composition",
    "token_positions",
    "virtual_head",
    "virtual_heads",
]
