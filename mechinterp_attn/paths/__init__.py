"""One prompt, patterns frozen: where every logit comes from."""

from mechinterp_attn.frozen.freezing import freeze
from mechinterp_attn.frozen.prompt import Frozen as Frozen
from mechinterp_attn.paths.by_order import Orders as Orders, orders
from mechinterp_attn.paths.circuits import TopCircuits as TopCircuits, top_circuits
from mechinterp_attn.paths.graph import AttributionGraph as AttributionGraph, attribution_graph
from mechinterp_attn.paths.importance import TermImportance as TermImportance, term_importance
from mechinterp_attn.paths.logits import LogitAttribution as LogitAttribution, logit_attribution
from mechinterp_attn.paths.replacement import ReplacementScores as ReplacementScores, replacement_scores
from mechinterp_attn.paths.score import ScoreExpansion as ScoreExpansion, expand_score
from mechinterp_attn.paths.search import TopPaths as TopPaths, top_paths
from mechinterp_attn.paths.virtual import VirtualTerm as VirtualTerm, virtual_head

# What one calls or builds; the types that calls give back can be imported for annotations.
__all__ = [
    "attribution_graph",
    "expand_score",
    "freeze",
    "logit_attribution",
    "orders",
    "replacement_scores",
    "term_importance",
    "top_circuits",
    "top_paths",
    "virtual_head",
]


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__
