"""One prompt, patterns frozen: where every logit comes from."""

from mechinterp_attn.frozen.freezing import freeze
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.paths.by_order import Orders, orders
from mechinterp_attn.paths.circuits import TopCircuits, top_circuits
from mechinterp_attn.paths.graph import AttributionGraph, attribution_graph
from mechinterp_attn.paths.importance import TermImportance, term_importance
from mechinterp_attn.paths.logits import LogitAttribution, logit_attribution
from mechinterp_attn.paths.replacement import ReplacementScores, replacement_scores
from mechinterp_attn.paths.score import ScoreExpansion, expand_score
from mechinterp_attn.paths.search import TopPaths, top_paths
from mechinterp_attn.paths.virtual import VirtualTerm, virtual_head

__all__ = [
    "AttributionGraph",
    "Frozen",
    "LogitAttribution",
    "Orders",
    "ReplacementScores",
    "ScoreExpansion",
    "TermImportance",
    "TopCircuits",
    "TopPaths",
    "VirtualTerm",
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
