"""Behaviours and causes: what does it, proven by intervention."""

from mechinterp_attn.causal import tasks
from mechinterp_attn.causal.again import Overlap as Overlap, overlap
from mechinterp_attn.causal.by_prompt import (
    PromptCircuits as PromptCircuits,
    PromptClusters as PromptClusters,
    Stability as Stability,
    prompt_circuits,
)
from mechinterp_attn.causal.circuit import Circuit
from mechinterp_attn.causal.differences import Diff as Diff, diff
from mechinterp_attn.causal.discovery import Discovery as Discovery, discover
from mechinterp_attn.causal.evaluation import Faithfulness as Faithfulness, faithfulness
from mechinterp_attn.causal.head_effects import Effects as Effects, effects
from mechinterp_attn.causal.intervention import Edit, Intervention as Intervention, intervene
from mechinterp_attn.causal.loadings import HeadLoadings as HeadLoadings, head_loadings
from mechinterp_attn.causal.minimal import Minimality as Minimality, minimality
from mechinterp_attn.causal.path import PathEffects as PathEffects, path_patch
from mechinterp_attn.causal.rules import Rules
from mechinterp_attn.causal.task import Task

# What one calls or builds; the types that calls give back can be imported for annotations.
__all__ = [
    "Circuit",
    "Edit",
    "Rules",
    "Task",
    "diff",
    "discover",
    "effects",
    "faithfulness",
    "head_loadings",
    "intervene",
    "minimality",
    "overlap",
    "path_patch",
    "prompt_circuits",
    "tasks",
]


def __dir__() -> list[str]:
    """What completion offers."""
    return __all__
