"""What can be read from weights alone."""

from mechinterp_attn.circuits.circuit import VocabularyCircuit, ov_circuit, qk_circuit
from mechinterp_attn.circuits.composition import CompositionScores, composition
from mechinterp_attn.circuits.vocabulary import TokenPairs, ov_top, qk_top
from mechinterp_attn.virtual import VirtualHead, resolve_head, virtual_head

__all__ = [
    "CompositionScores",
    "TokenPairs",
    "VirtualHead",
    "VocabularyCircuit",
    "composition",
    "ov_circuit",
    "ov_top",
    "qk_circuit",
    "qk_top",
    "resolve_head",
    "virtual_head",
]
