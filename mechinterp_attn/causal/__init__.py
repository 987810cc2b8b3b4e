"""Behaviours and causes: what does it, proven by intervention."""

from mechinterp_attn.causal import tasks
from mechinterp_attn.causal.again import Overlap, overlap
from mechinterp_attn.causal.by_prompt import (
    PromptCircuits,
    PromptClusters,
    Stability,
    prompt_circuits,
)
from mechinterp_attn.causal.circuit import Circuit
from mechinterp_attn.causal.differences import Diff, diff
from mechinterp_attn.causal.discovery import Discovery, discover
from mechinterp_attn.causal.evaluation import Faithfulness, faithfulness
from mechinterp_attn.causal.head_effects import Effects, effects
from mechinterp_attn.causal.intervention import Edit, Intervention, intervene
from mechinterp_attn.causal.loadings import HeadLoadings, head_loadings
from mechinterp_attn.causal.minimal import Minimality, minimality
from mechinterp_attn.causal.path import PathEffects, path_patch
from mechinterp_attn.causal.rules import Rules
from mechinterp_attn.causal.task import Task

__all__ = [
    "Circuit",
    "Diff",
    "Discovery",
    "Edit",
    "Effects",
    "Faithfulness",
    "HeadLoadings",
    "Intervention",
    "Minimality",
    "Overlap",
    "PathEffects",
    "PromptCircuits",
    "PromptClusters",
    "Rules",
    "Stability",
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
