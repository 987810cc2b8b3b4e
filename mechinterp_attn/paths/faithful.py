"""How much of a prediction the nodes of a graph make by themselves, in the running model.

The other half of an attribution graph's score: the frozen pass says what runs along the paths inside
the graph; here the model itself runs, its patterns, gates and norms free to follow, with everything
outside the graph patched (faithfulness, as in Wang et al. 2022, section 4, and Marks et al. 2024,
section 3.3: the share of the way from the wholly patched model to the whole one).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.frozen.goals import Goal
from mechinterp_attn.frozen.prompt import Frozen
from mechinterp_attn.model.heads import HeadBank
from mechinterp_attn.paths.flow import Nodes

Patch = Literal["mean", "zero"]
Hook = tuple[str, Callable[..., Any]]


class Faithfulness(NamedTuple):
    """The target in three runs of the model.

    Attributes:
        whole: nothing patched;  kept: all but the graph's nodes patched;  none: every node patched.
        about: what patched heads hold, in words.
    """

    whole: float
    kept: float
    none: float
    about: str

    @property
    def share(self) -> float:
        """Of the way from ``none`` to ``whole``; NaN where patching everything changes nothing."""
        way = self.whole - self.none
        return (self.kept - self.none) / way if way else float("nan")


@torch.no_grad()
def faithfulness(
    frozen: Frozen, goal: Goal, nodes: Nodes, patch: Patch, corrupt: str | Tensor | None
) -> Faithfulness:
    """Run the model with every head and neuron patched that is in no node, and with all of them patched.

    Args:
        patch: what a patched head holds: "zero", or the "mean" of what it holds over the prompt.
        corrupt: a prompt of as many tokens; what is patched holds what it holds there instead.

    Raises:
        MechInterpError: ``patch`` is neither, or the other prompt has another length.
    """
    about, patches = _patches(frozen, patch, corrupt)
    model, pos = frozen.model, len(frozen.tokens)

    def run(chosen: Nodes) -> float:
        hooks = [
            _patched(bank, chosen.covered(i, bank.n_heads, pos), patches[i])
            for i, bank in enumerate(model.banks)
        ]
        return goal.measure(model.run_with_hooks(frozen.tokens[None], fwd_hooks=hooks)[0])

    nothing = nodes.select(torch.zeros(0, dtype=torch.long, device=frozen.tokens.device))
    return Faithfulness(goal.total, run(nodes), run(nothing), about)


def _patched(bank: HeadBank, covered: Bool[Tensor, "pos head"], patch: Tensor) -> Hook:
    """A hook that replaces what the heads of a bank hold wherever they are in no node."""

    def replace(z: Tensor, hook: Any) -> Tensor:
        return torch.where(covered[..., None], bank.by_head(z), patch).reshape(z.shape)

    return bank.hook("z"), replace


def _patches(
    frozen: Frozen, patch: Patch, corrupt: str | Tensor | None
) -> tuple[str, list[Float[Tensor, "*pos head d_head"]]]:
    """What patched heads hold: in words, and bank by bank. It is taken from unpatched runs."""
    if patch not in ("mean", "zero"):
        raise MechInterpError(f"patch={patch!r}; expected 'mean' or 'zero'")
    if corrupt is not None:
        return "what they hold on the other prompt", _held(frozen, corrupt)
    held = [z for sublayer in frozen.sublayers for z in sublayer.held]
    if patch == "zero":
        return "zero", [torch.zeros_like(z[0]) for z in held]
    return "their mean over the prompt", [z.mean(0) for z in held]


def _held(frozen: Frozen, corrupt: str | Tensor) -> list[Float[Tensor, "pos head d_head"]]:
    """What every head holds on another prompt, bank by bank."""
    model = frozen.model
    tokens = model.as_tokens(corrupt)
    if tokens.shape != (1, len(frozen.tokens)):
        n, pos = tokens.shape
        raise MechInterpError(
            f"corrupt is {n} prompt{'s' if n != 1 else ''} of {pos} tokens; expected 1 of "
            f"{len(frozen.tokens)}, as in the prompt itself, so that positions correspond"
        )
    names = [bank.hook("z") for bank in model.banks]
    _, cache = model.run_with_cache(tokens, names_filter=names, return_cache_object=False)
    return [bank.by_head(cache[name])[0] for bank, name in zip(model.banks, names, strict=True)]
