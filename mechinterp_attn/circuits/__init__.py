"""What can be read from weights alone."""

from typing import TYPE_CHECKING

from mechinterp_attn.circuits.bigram import Bigrams as Bigrams, bigrams
from mechinterp_attn.circuits.bugs import FactoringBugs as FactoringBugs, factoring_bugs
from mechinterp_attn.circuits.chains import VirtualHeads as VirtualHeads, virtual_heads
from mechinterp_attn.circuits.circuit import (
    CircuitStatistics as CircuitStatistics,
    TokenBlock as TokenBlock,
    VocabularyCircuit as VocabularyCircuit,
    ov_circuit,
    qk_circuit,
)
from mechinterp_attn.circuits.composition_scores import CompositionScores as CompositionScores, composition
from mechinterp_attn.circuits.copying import CopyingScores as CopyingScores, copying_scores
from mechinterp_attn.circuits.positions import (
    PositionCircuit as PositionCircuit,
    TokenPositions as TokenPositions,
    position_circuit,
    token_positions,
)
from mechinterp_attn.circuits.rank_one import ReadsAndWrites as ReadsAndWrites, reads_and_writes
from mechinterp_attn.circuits.spectrum import SingularDirections as SingularDirections, singular_directions
from mechinterp_attn.circuits.token_pairs import TokenComposition as TokenComposition, token_composition
from mechinterp_attn.circuits.trigrams import SkipTrigrams as SkipTrigrams, skip_trigrams
from mechinterp_attn.circuits.vocabulary import TokenPairs as TokenPairs, ov_top, qk_top
from mechinterp_attn.core.renamed import moved_names
from mechinterp_attn.model.select import virtual_head
from mechinterp_attn.model.virtual import VirtualHead as VirtualHead

# What one calls or builds; the types that calls give back can be imported for annotations.
__all__ = [
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
    "singular_directions",
    "skip_trigrams",
    "token_composition",
    "token_positions",
    "virtual_head",
    "virtual_heads",
]

if not TYPE_CHECKING:  # a checker must not take every name for one of these
    __getattr__ = moved_names(
        __name__,
        {
            "Plan": "mechinterp_attn.core.plan.Plan",
            "resolve_head": "mechinterp_attn.model.select.resolve_head",
        },
    )


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__
