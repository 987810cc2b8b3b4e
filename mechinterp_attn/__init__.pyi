from . import (
    causal as causal,
    circuits as circuits,
    detect as detect,
    explore as explore,
    paths as paths,
    theorems as theorems,
)
from .causal import tasks as tasks
from .causal.differences import diff as diff
from .causal.task import Task as Task
from .conversion.attach import attach as attach
from .conversion.dictionary import Dictionary as Dictionary
from .conversion.fidelity import Fidelity as Fidelity, verify as verify
from .conversion.modes import mixtures as mixtures
from .conversion.pipeline import convert as convert, load as load
from .core.comparison import compare as compare
from .core.errors import FailedCheckWarning as FailedCheckWarning, MechInterpError as MechInterpError
from .core.plan import Plan as Plan, plan as plan
from .core.stored import load_result as load_result
from .model.attention_only import AttentionOnlyModel as AttentionOnlyModel
from .model.heads import Head as Head
from .sources.checkpoint import Checkpoint as Checkpoint
from .sources.zoo import (
    bigram_counts as bigram_counts,
    card as card,
    held_out as held_out,
    models as models,
    source_model as source_model,
)
from .view.circuitsvis import show as show
from .view.report import Report as Report, report as report
