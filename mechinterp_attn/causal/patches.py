"""What a head is given in place of what it holds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from mechinterp_attn.causal.batches import Batch
from mechinterp_attn.causal.bound import Bound
from mechinterp_attn.causal.cuts import mean_z
from mechinterp_attn.causal.runs import hold, rows_at_once
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.model.attention_only import AttentionOnlyModel

Patch = Literal["corrupt", "zero", "mean", "resample"]
PATCHES = ("corrupt", "zero", "mean", "resample")
ValueBias = Literal["cut", "kept"]
INSTEAD = ", or patch='mean' (or 'zero'), with which a ranking needs method='gradient'"


@dataclass(frozen=True, eq=False)
class Fill:
    """Patches of a whole task.

    Attributes:
        base: the prompts that are run and patched.
        other: prompts whose heads' ``z`` is put in, position by position; None where it is constant.
        constant: ``[head, ...]`` by path, the same everywhere; None where ``other`` says it.
    """

    base: Batch
    other: Batch | None
    constant: dict[str, Tensor] | None

    @torch.no_grad()
    def of(self, model: AttentionOnlyModel, rows: slice, part: Bound) -> dict[str, Tensor]:
        """What is put in for some prompts, by path."""
        if self.constant is not None:
            return self.constant
        assert self.other is not None
        return hold(model, part, some(self.other, rows, part))[0]


def some(batch: Batch, rows: slice, part: Bound) -> Batch:
    """The rows of a batch that stand where a part of a task does."""
    width = part.clean.tokens.shape[1]
    return Batch(batch.tokens[rows, :width], batch.real[rows, :width])


@torch.no_grad()
def fill_of(
    model: AttentionOnlyModel,
    bound: Bound,
    patch: str,
    *,
    direction: str = "noising",
    value_bias: str = "cut",
    seed: int = 0,
    max_bytes: int,
) -> Fill:
    """What to run and what to put in.

    Args:
        patch: "corrupt": what the head holds in the counterfactual; "zero"; "mean": its mean over the
            prompts and their positions; "resample": what it holds in another of the prompts.
        direction: "noising" patches the clean run; "denoising" the counterfactual run, with the clean
            values.
        value_bias: of "zero": whether an attention head loses its own value bias too ("cut": it writes
            nothing), or keeps it ("kept": as in a model whose value biases are folded into b_O).

    Raises:
        MechInterpError: all that is wrong with the choices.
    """
    for given, known, what in (
        (patch, PATCHES, "patch"),
        (direction, ("noising", "denoising"), "direction"),
        (value_bias, ("cut", "kept"), "value_bias"),
    ):
        if given not in known:
            raise MechInterpError(f"{what}={given!r}; expected one of {', '.join(known)}")
    if direction == "denoising":
        if patch != "corrupt":
            raise MechInterpError(
                f"direction='denoising' puts clean values into the counterfactual run; it has no use for "
                f"patch={patch!r}"
            )
        return Fill(bound.counterfactual("denoising"), bound.clean, None)
    if patch == "corrupt":
        return Fill(bound.clean, bound.counterfactual("patch='corrupt'", INSTEAD), None)
    if patch == "resample":
        return Fill(bound.clean, _others(bound, seed), None)
    if patch == "mean":
        rows = rows_at_once(model, bound, max_bytes)
        return Fill(bound.clean, None, mean_z(model, bound.clean.split(rows)))
    return Fill(bound.clean, None, {b.path: _nothing(b.z_constant, value_bias) for b in model.banks})


def value_bias_note(patch: str, value_bias: str) -> dict[str, str]:
    """For a receipt: what zero means for an attention head that has a value bias."""
    if patch != "zero":
        return {}
    said = "cut with the head" if value_bias == "cut" else "kept: the head goes on writing it"
    return {"value bias": said}


def _nothing(constant: Tensor, value_bias: str) -> Tensor:
    return constant if value_bias == "kept" else torch.zeros_like(constant)


def _others(bound: Bound, seed: int) -> Batch:
    """For every prompt another one of the same length."""
    lengths = bound.clean.real.sum(1)
    order = torch.arange(len(bound))
    generator = torch.Generator().manual_seed(seed)
    for length in lengths.unique():
        own = (lengths == length).nonzero()[:, 0].cpu()
        if len(own) < 2:
            raise MechInterpError(
                f"patch='resample' takes values from another prompt of the same length, and only one has "
                f"{int(length)} tokens; give prompts of equal lengths, or patch='mean'"
            )
        drawn = own[torch.randperm(len(own), generator=generator)]
        order[drawn] = drawn.roll(1)  # nobody is left with itself
    return Batch(bound.clean.tokens[order], bound.clean.real[order])
