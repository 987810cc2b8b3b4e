"""The pattern of a head on a prompt, as a figure."""

from __future__ import annotations

from collections.abc import Sequence

import plotly.graph_objects as go
import torch
from jaxtyping import Float
from torch import Tensor

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.model.heads import Head
from mechinterp_attn.view.figures.style import SEQUENTIAL, figure, safe_text


@draws(Head)
@torch.no_grad()
def head_pattern(head: Head, prompt: str | list[int] | Tensor) -> go.Figure:
    """Where a head of any kind looks on a prompt; the last column is the bias token, where it is used."""
    assert head.model is not None
    ids = head.model.as_tokens(prompt)
    if len(ids) > 1:
        raise MechInterpError(f"a figure shows one prompt, got a batch of {len(ids)}")
    hooks = {part.bank.hook("pattern") for part in head.chain}
    _, cache = head.model.run_with_cache(ids, names_filter=lambda name: name in hooks)
    pattern = head.pattern(cache)
    tokens = [f"{safe_text(text)} ({i})" for i, text in enumerate(head.model.to_readable_tokens(ids[0]))]
    keys = [*tokens, "bias token"] if pattern[:, -1].any() else tokens
    return pattern_heatmap(f"Pattern of {head.label}", pattern[:, : len(keys)], tokens, keys)


def pattern_heatmap(
    title: str, pattern: Float[Tensor, "query key"], queries: Sequence[str], keys: Sequence[str]
) -> go.Figure:
    """Attention from every query to every key, from white at zero."""
    fig = figure(title=title, x="key", y="query", height=160 + 22 * len(queries))
    fig.add_trace(
        go.Heatmap(
            z=pattern.double().cpu().numpy(),
            x=list(keys),
            y=list(queries),
            colorscale=SEQUENTIAL,
            zmin=min(0.0, float(pattern.min())),  # a neuron's weight on itself may be negative
            hovertemplate="%{y} from %{x}: %{z:.4f}<extra></extra>",
        )
    )
    return fig.update_yaxes(autorange="reversed")
