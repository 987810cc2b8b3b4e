"""One model and what a page asks of it. One question at a time: edits are hooks on the one model."""

from __future__ import annotations

import secrets
from collections import OrderedDict
from threading import Lock
from typing import TYPE_CHECKING, Any

import torch

from mechinterp_attn import causal, paths
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.text import shown
from mechinterp_attn.explore.asked import Asked, AskedEdits
from mechinterp_attn.view.report.build import report

if TYPE_CHECKING:
    from mechinterp_attn.model.attention_only import AttentionOnlyModel

STORIES = 8  # pages that are kept
AT_ONCE = 5 * 10**7  # weights; up to here a story takes seconds and is written unasked
STORY = ("story", "circuit", "heads", "patterns")
HEADS = 24  # that are offered before there is a story
TOP = 6  # rows of a prediction
KINDS = ("attention", "mlp", "feature")


class Session:
    """A model behind a page.

    Args:
        model: it needs a tokenizer, since prompts are typed.
        name: as the page calls it.

    Raises:
        MechInterpError: the model has no tokenizer.
    """

    def __init__(self, model: AttentionOnlyModel, name: str):
        if model.tokenizer is None:
            raise MechInterpError(
                f"{name} has no tokenizer, and the explorer's prompts are typed; set model.tokenizer first"
            )
        self.model, self.name = model, name
        self.at_once = sum(weight.numel() for weight in model.parameters()) <= AT_ONCE
        self._stories: OrderedDict[str, str] = OrderedDict()
        self._lock = Lock()

    def predict(self, asked: Asked) -> dict[str, Any]:
        """Tokens of the prompt, what the model says next, and the heads that write most of it."""
        with self._lock, torch.no_grad():
            frozen = paths.freeze(self.model, asked.prompt)
            terms = paths.logit_attribution(frozen, position=asked.position)
            logits = frozen.logits[terms.position].double()
            top = logits.topk(min(TOP, len(logits)))
        heads = terms.frame[terms.frame["kind"].isin(KINDS)]
        order = heads["value"].abs().sort_values(ascending=False, kind="stable").index[:HEADS]
        return {
            "tokens": [shown(token) for token in frozen.str_tokens],
            "position": terms.position,
            "rows": [
                {"token": shown(token), "before": float(p)}
                for token, p in zip(
                    self.model.output_texts(top.indices), logits.softmax(-1)[top.indices], strict=True
                )
            ],
            "heads": heads.loc[order, ["head", "kind", "value"]].to_dict(orient="records"),
            "at_once": self.at_once,
        }

    def edit(self, asked: AskedEdits) -> dict[str, Any]:
        """The prediction before and after, and what was checked."""
        edits = [
            causal.Edit(
                [part.strip() for part in one.heads.split(",")], one.scale, one.source, one.position
            )
            for one in asked.edits
        ]
        with self._lock:
            found = causal.intervene(self.model, asked.prompt, edits, position=asked.position, top_k=TOP)
        return {
            "rows": found.frame.assign(token=found.frame["token"].map(shown)).to_dict(orient="records"),
            "receipt": str(found.receipt),
            "ok": bool(found.receipt.ok),
        }

    def write_story(self, asked: Asked) -> dict[str, str]:
        """Write the report of a prompt; the id of its page."""
        with self._lock:
            page = report(
                self.model, asked.prompt, position=asked.position, sections=STORY, progress=False
            ).html()
            key = secrets.token_urlsafe(8)
            self._stories[key] = page
            while len(self._stories) > STORIES:
                self._stories.popitem(last=False)
        return {"id": key}

    def story(self, key: str) -> str | None:
        """A page that was written, if it is still kept."""
        return self._stories.get(key)
