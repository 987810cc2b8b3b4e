"""A head's OV circuit by singular directions, read as tokens in and tokens out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.circuits.circuit import token_texts
from mechinterp_attn.circuits.ends import CHUNK, LOGITS, as_read, average_unembedding, norms_note
from mechinterp_attn.circuits.groups import finite_head
from mechinterp_attn.circuits.listed import TOP, fewest, listed, listed_note, original
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.heads import Head
from mechinterp_attn.model.low_rank import LowRank

COMPONENTS = 5  # directions where no number is given


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class SingularDirections(Result):
    """The strongest directions of a head.

    Attributes:
        head: its label.
        frame: ``component`` (from 0), ``singular_value``, ``side`` ("in": tokens whose embedding lies
            along the direction that is read; "out": tokens whose logit the direction written
            raises), ``token, token_id, value, rank``. A direction and its negative act alike; each
            is turned so that its strongest input token is positive.
        singular_values: all of them, largest first.
    """

    title: ClassVar[str] = "Singular directions of an OV circuit"
    head: str
    singular_values: Float[Tensor, " rank"]


@torch.no_grad()
def singular_directions(
    model: AttentionOnlyModel,
    head: str | Head,
    *,
    components: int | None = None,
    top_k: int | None = None,
    special_tokens: bool = False,
) -> SingularDirections:
    """SVD of ``W_OV`` through its thin factors, each direction read through ``W_E`` and ``W_U``.

    Args:
        model: the converted model.
        head: a label or a head (virtual ones too).
        components: how many directions, strongest first; by default 5, or all where there are fewer.
        top_k: tokens per direction and side; by default 10, or all where there are fewer.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.

    Raises:
        MechInterpError: no such head, non-finite weights, or components or top_k out of range.
    """
    one = finite_head(model, head)
    write, average = one.bank.seen(one.W_O.double()), average_unembedding(model)[:, None]
    rank = min(one.W_V.shape)
    inputs, outputs = listed(model, special_tokens), listed(model, special_tokens, output=True)
    most = fewest(model, special_tokens)
    components = min(COMPONENTS, rank) if components is None else components
    top_k = min(TOP, most) if top_k is None else top_k
    if not 1 <= components <= rank or not 1 <= top_k <= most:
        raise MechInterpError(
            f"components={components}, top_k={top_k}; expected 1 to {rank} components and "
            f"1 to {most} tokens"
        )
    left = torch.linalg.qr(one.W_V.double())
    right = torch.linalg.qr(write.T)
    U, S, V = torch.linalg.svd(left.R @ right.R.T)
    read, written = left.Q @ U[:, :components], V[:components] @ right.Q.T
    tokens_in = torch.cat([as_read(model, x.double()) @ read for x in model.W_E.detach().split(CHUNK)]).T
    tokens_out = torch.cat(
        [written @ (x.double() - average) for x in model.W_U.detach().split(CHUNK, 1)], 1
    )
    seen = tokens_in if inputs is None else tokens_in[:, inputs]
    strongest = seen.gather(1, seen.abs().argmax(1, keepdim=True))
    sign = torch.where(strongest < 0, -1.0, 1.0).to(tokens_in)
    parts = []
    for side, table, some in (("in", tokens_in * sign, inputs), ("out", tokens_out * sign, outputs)):
        value, places = (table if some is None else table[:, some]).topk(top_k)
        ids = original(some, places)
        for c in range(components):
            parts.append(
                pd.DataFrame(
                    {
                        "component": c,
                        "singular_value": float(S[c]),
                        "side": side,
                        "token": token_texts(model, ids[c].tolist(), output=side == "out"),
                        "token_id": ids[c].tolist(),
                        "value": value[c].cpu().numpy(),
                        "rank": range(1, top_k + 1),
                    }
                )
            )
    norm = LowRank(one.W_V.double(), write).norm()
    error = abs(float(S.square().sum().sqrt()) - norm)
    check = Check("singular values give the norm of the circuit", error, 1e-9 * max(1.0, norm))
    notes = {"dtype": "float64", "norms": norms_note(model), "logits": LOGITS}
    notes |= listed_note(model, special_tokens)
    return SingularDirections(
        frame=pd.concat(parts, ignore_index=True),
        receipt=Receipt((check,), notes),
        head=one.label,
        singular_values=S,
    )
