"""What heads of inner dimension 1 read and write, as tokens: all MLP-derived heads, and any like them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import pandas as pd
import torch
from torch import Tensor

from mechinterp_attn.circuits.circuit import token_texts
from mechinterp_attn.circuits.ends import LOGITS, as_read, average_unembedding, norms_note
from mechinterp_attn.circuits.listed import fewest, listed, listed_note, original
from mechinterp_attn.circuits.streaming import top_of_rows
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.results import Check, Receipt, Result
from mechinterp_attn.model.attention_only import AttentionOnlyModel
from mechinterp_attn.model.index import Heads

PER_SIDE = 8  # tokens of a side where no number is given


@dataclass(frozen=True, kw_only=True, eq=False, repr=False)
class ReadsAndWrites(Result):
    """Tokens at either end of heads of inner dimension 1.

    Attributes:
        frame: ``head, side, token, token_id, value, rank``. Sides: "query" (tokens whose embedding
            scores highest: they make a neuron fire), "value" (tokens whose embedding gives the
            largest value; only where that is another reading than the query's, as in a gated
            MLP), "raises" and "lowers" (tokens whose logit a value of 1 raises and lowers most).
    """

    title: ClassVar[str] = "What heads read and write"

    def tokens(self, head: str, side: str) -> list[str]:
        """The tokens of one head and side, strongest first; none where the side is left out.

        Args:
            head: its label.
            side: "read", "write" or another side of the frame.
        """
        frame = self.frame
        return frame.loc[(frame["head"] == head) & (frame["side"] == side), "token"].tolist()


@torch.no_grad()
def reads_and_writes(
    model: AttentionOnlyModel, heads: Heads, *, top_k: int | None = None, special_tokens: bool = False
) -> ReadsAndWrites:
    """Which tokens make heads fire, and whose logits they move (Huben & Morris 2023).

    From the weights alone: embeddings go in as they are, positions and the layers between are left
    out. Ungated neurons read the same direction as query and value, up to a factor.

    Args:
        model: the converted model.
        heads: labels or heads of inner dimension 1 (every MLP-derived head is one).
        top_k: tokens of each side; by default 8, or all where there are fewer.
        special_tokens: list special tokens and ids that no text stands for (padding rows of the
            vocabulary), which are left out by default.

    Raises:
        MechInterpError: no heads, no such head, one of a larger inner dimension, or top_k out of range.
    """
    chosen = model.heads.select(heads)
    wide = [head.label for head in chosen if head.W_Q.shape[1] != 1 or head.W_V.shape[1] != 1]
    inputs, outputs = listed(model, special_tokens), listed(model, special_tokens, output=True)
    most = fewest(model, special_tokens)
    top_k = min(PER_SIDE, most) if top_k is None else top_k
    if wide or not 1 <= top_k <= most:
        given = wide or [head.label for head in chosen]
        raise MechInterpError(
            f"heads={given}, top_k={top_k}; expected some heads, all of inner dimension "
            f"1 (ov_top and qk_top read the others), and top_k from 1 to {most}"
        )
    dtype = torch.promote_types(model.W_E.dtype, torch.float32)
    average = average_unembedding(model)[:, None]
    W_E, W_U = as_read(model, model.W_E.detach().to(dtype), bias=True), model.W_U.detach().to(dtype)
    W_U = W_U - average.to(dtype)
    W_E = W_E if inputs is None else W_E[inputs]
    W_U = W_U if outputs is None else W_U[:, outputs]
    query = torch.stack([head.W_Q[:, 0] for head in chosen]).to(dtype)  # [head, d_model]
    value = torch.stack([head.W_V[:, 0] for head in chosen]).to(dtype)
    output = torch.stack([head.bank.seen(head.W_O[0].to(dtype)) for head in chosen])
    other = ~(_unit(query) * _unit(value)).sum(-1).isclose(query.new_ones(()))
    none = query.new_zeros(len(chosen))
    sides = (
        ("query", query, W_E.T, torch.cat([head.b_Q for head in chosen]).to(dtype), 1),
        ("value", value, W_E.T, torch.cat([head.b_V for head in chosen]).to(dtype), 1),
        ("raises", output, W_U, none, 1),
        ("lowers", output, W_U, none, -1),
    )
    parts, error, scale = [], 0.0, 1.0
    for side, directions, table, bias, sign in sides:
        found = top_of_rows(directions, table, top_k, sign=sign)
        exact = (directions[found.row].double() * table.T[found.column].double()).sum(-1)
        error = max(error, float((exact - found.value).abs().max()))
        scale = max(scale, float(exact.abs().max()))
        ids = original(outputs if table is W_U else inputs, found.column).tolist()
        frame = pd.DataFrame(
            {
                "head": [chosen[i].label for i in found.row.tolist()],
                "side": side,
                "token": token_texts(model, ids, output=table is W_U),
                "token_id": ids,
                "value": (exact + bias.double()[found.row]).cpu().numpy(),
                "rank": [i % top_k + 1 for i in range(len(found.row))],
            }
        )
        parts.append(frame if side != "value" else frame[other[found.row].cpu().numpy()])
    check = Check("tokens found against the same entries in float64", error, 1e-4 * scale)
    notes = {"dtype": f"values float64, search {str(dtype).removeprefix('torch.')}"}
    notes |= {"norms": norms_note(model), "logits": LOGITS, **listed_note(model, special_tokens)}
    return ReadsAndWrites(frame=pd.concat(parts, ignore_index=True), receipt=Receipt((check,), notes))


def _unit(x: Tensor) -> Tensor:
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-30)
