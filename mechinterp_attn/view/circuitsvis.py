"""The attention view of a head in the notebook: CircuitsVis, offline.

CircuitsVis's own Python view asks the network for its script. Here the script travels with the
view, compressed, and runs in a sandboxed frame whose policy forbids every request: a saved notebook
stays viewable, and a token is never markup. Beside the frame stands the same as a table, for screen
readers and for places that run no scripts.
"""

from __future__ import annotations

import base64
import gzip
import html
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch

from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.files import write_text
from mechinterp_attn.core.palette import NEGATIVE, POSITIVE
from mechinterp_attn.core.pictures import draws
from mechinterp_attn.core.table import html_table, text_table
from mechinterp_attn.core.text import inert_json, number, shown
from mechinterp_attn.model.heads import Head

if TYPE_CHECKING:
    from torch import Tensor

    from mechinterp_attn.model.attention_only import AttentionOnlyModel

MAX_TOKENS = 64  # CircuitsVis holds the browser up on more
BIAS = "⟨bias⟩"  # as in the report


@dataclass(frozen=True, eq=False)
class AttentionView:
    """Patterns of chosen heads on a prompt, for notebooks and files.

    Attributes:
        heads: their labels.
        tokens: the tokens shown, as ``text.shown`` writes them.
        patterns: one ``[query, key]`` per head. Where one of them has a bias token (a neuron does),
            it stands last in all: what a neuron that is off attends to.
        frame: one row per head and token: ``head, position, token``, the key it attends to most
            (``to``, and ``to_position``, missing for the bias token) and that ``weight``.
    """

    heads: tuple[str, ...]
    tokens: tuple[str, ...]
    patterns: tuple[Tensor, ...] = field(repr=False)
    frame: pd.DataFrame = field(repr=False)

    def page(self) -> str:
        """A whole HTML page that needs nothing but itself."""
        low = min(0.0, *(float(p.nan_to_num().min()) for p in self.patterns))
        high = max(1.0, *(float(p.nan_to_num().max()) for p in self.patterns))
        props = {
            "attention": [[[number(x, 3) for x in row] for row in p.tolist()] for p in self.patterns],
            "attentionHeadNames": list(self.heads),
            "tokens": [token.replace(" ", "·") for token in self.tokens],  # its axes drop spaces
            "minValue": low,
            "maxValue": high,
            "negativeColor": NEGATIVE,
            "positiveColor": POSITIVE,
            "maskUpperTri": False,
        }
        title = html.escape(", ".join(self.heads))
        return (
            '<!doctype html><html lang="en"><head><meta charset="utf-8">'
            f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}"><title>{title}</title>'
            "<style>body{margin:0;background:#fff;color:#111;font-family:system-ui,sans-serif}</style></head>"
            '<body><div id="view"></div>'
            f'<script type="application/json" id="props">{inert_json(props)}</script>'
            f'<script type="text/plain" id="bundle">{_compressed()}</script>'
            f"<script>{_START}</script></body></html>"
        )

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write the page to a file, whole or not at all."""
        return write_text(path, self.page())

    def _repr_html_(self) -> str:
        names = html.escape(", ".join(self.heads))
        height = 420 + 9 * len(self.tokens)
        style = f"width:100%;height:{height}px;border:1px solid rgba(128,128,128,.4);border-radius:6px"
        return (
            f'<iframe srcdoc="{html.escape(self.page())}" sandbox="allow-scripts" style="{style}" '
            f'title="Attention of {names}"></iframe>'
            f"<details><summary>Attention of {names} as a table: where each token looks most</summary>"
            f"{html_table(self.frame)}</details>"
        )

    def __repr__(self) -> str:
        return f"Attention of {', '.join(self.heads)}\n{text_table(self.frame)}"


@torch.no_grad()
def show(
    model: AttentionOnlyModel,
    heads: str | Head | Sequence[str | Head],
    prompt: str | list[int] | Tensor,
    *,
    positions: slice = slice(None),
) -> AttentionView:
    """The attention of chosen heads on a prompt, in CircuitsVis; works offline and when saved.

    Args:
        model: the converted model.
        heads: labels or heads of any kind, virtual ones (``L0H2 > L1H3``) included.
        prompt: a text, or token ids ``[pos]``.
        positions: which tokens to show, as queries and as keys, such as ``slice(-40, None)``. The
            model sees the whole prompt.

    Raises:
        MechInterpError: no such head, an unusable prompt, or more than 64 tokens to show.
    """
    found = model.heads.select(heads)
    ids = model.as_tokens(prompt)
    if len(ids) > 1:
        raise MechInterpError(f"show takes one prompt, got a batch of {len(ids)}")
    places = range(ids.shape[1])[positions]
    if not 1 <= len(places) <= MAX_TOKENS or places.step != 1:
        raise MechInterpError(
            f"{len(places)} of {ids.shape[1]} tokens to show; expected 1 to {MAX_TOKENS} in a row: choose "
            f"them with positions=, such as positions=slice(-{MAX_TOKENS}, None)"
        )
    parts = [part for head in found for part in head.chain]
    hooks = {part.bank.hook("pattern") for part in parts}
    _, cached = model.run_with_cache(ids, names_filter=lambda name: name in hooks)
    at = slice(places.start, places.stop)
    tokens = [shown(text) for text in model.to_readable_tokens(ids[0])[at]]
    full = [head.pattern(cached).float().cpu() for head in found]
    biased = any(bool(pattern[at, -1].any()) for pattern in full)
    patterns = tuple(_square(pattern[at], at, biased) for pattern in full)
    names = (*tokens, BIAS) if biased else tuple(tokens)
    labels = tuple(head.label for head in found)
    frames = [_strongest(label, own, names, places) for label, own in zip(labels, patterns, strict=True)]
    return AttentionView(labels, names, patterns, pd.concat(frames, ignore_index=True))


@draws(Head, form="page")
def _head_page(head: Head, prompt: str | list[int] | Tensor, *, positions: slice) -> AttentionView:
    assert head.model is not None  # Head.show says what to do about a head of no model
    return show(head.model, head, prompt, positions=positions)


def _square(pattern: Tensor, at: slice, biased: bool) -> Tensor:
    """Rows of chosen queries over the same keys; where wanted with the bias token, which sees itself."""
    keys = pattern[:, at]
    if not biased:
        return keys
    own = torch.zeros(1, keys.shape[1] + 1)
    own[0, -1] = 1
    return torch.cat([torch.cat([keys, pattern[:, -1:]], 1), own])


def _strongest(head: str, pattern: Tensor, names: Sequence[str], places: range) -> pd.DataFrame:
    """Where each token looks most."""
    weight, to = pattern[: len(places)].nan_to_num(-1).max(1)
    return pd.DataFrame(
        {
            "head": head,
            "position": places,
            "token": names[: len(places)],
            "to": [names[k] for k in to.tolist()],
            "to_position": pd.array(
                [places[k] if k < len(places) else None for k in to.tolist()], dtype="Int64"
            ),
            "weight": weight.tolist(),
        }
    )


@cache
def bundle() -> str:
    """CircuitsVis's script as it ships with its Python package; nothing in it can end a script block."""
    text = (files("circuitsvis") / "dist" / "cdn" / "iife.js").read_text(encoding="utf-8")
    return text.replace("</script", "<\\/script").replace("<!--", "<\\!--")


@cache
def _compressed() -> str:
    return base64.b64encode(gzip.compress(bundle().encode("utf-8"), mtime=0)).decode("ascii")


# The frame is sandboxed without allow-same-origin, and its policy lets nothing but its own inline
# scripts and styles in.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"
_START = """
(async () => {
  const text = (id) => document.getElementById(id).textContent;
  const packed = Uint8Array.from(atob(text("bundle")), (c) => c.charCodeAt(0));
  const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
  const script = document.createElement("script");
  script.textContent = await new Response(stream).text();
  document.body.append(script);
  CircuitsVis.render("view", CircuitsVis.AttentionHeads, JSON.parse(text("props")));
  document.documentElement.dataset.ready = "";
})();
"""
