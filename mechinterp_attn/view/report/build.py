"""``mia.report``: run the analyses, gather the sections; ``Report``: the page and its data."""

from __future__ import annotations

import html
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch

from mechinterp_attn.causal.task import Task
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.files import write_text
from mechinterp_attn.core.plan import Plan, plans
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.reading import read_json
from mechinterp_attn.core.results import Receipt
from mechinterp_attn.core.text import inert_json, shown
from mechinterp_attn.version import __version__
from mechinterp_attn.view.graph import with_pins
from mechinterp_attn.view.report.blocks import Block, receipt_block, section
from mechinterp_attn.view.report.cards import cards, named
from mechinterp_attn.view.report.inputs import Prompt, Subject, two_of
from mechinterp_attn.view.report.kinds import Asked, Made, Maker, of_prompt, of_task
from mechinterp_attn.view.report.page import page
from mechinterp_attn.view.report.sections_about import receipts_table

if TYPE_CHECKING:
    from mechinterp_attn.detect import CorpusScores
    from mechinterp_attn.model.attention_only import AttentionOnlyModel
    from mechinterp_attn.model.index import Heads


FORMAT = "mechinterp_attn.report"
VERSION = 4


@dataclass(frozen=True, eq=False)
class Report:
    """A finished report.

    Attributes:
        data: everything it shows, as JSON can hold it: ``title``, ``model``, ``subject``,
            ``prompt``, ``cards`` (of heads, by label), ``sections`` and more (docs/json.md).
    """

    data: dict[str, Any]

    def html(self) -> str:
        """The whole page; it needs nothing beside it and asks no host for anything."""
        return page(self.data)

    def save(self, path: str | os.PathLike[str], *, data: bool = False) -> Path:
        """Write the page to an HTML file, whole or not at all.

        Args:
            data: also write ``.data`` beside it, under the same name with the suffix ``.json``.

        Raises:
            MechInterpError: the folder is missing or cannot be written.
        """
        target = write_text(path, self.html())
        if data:
            write_text(target.with_suffix(".json"), inert_json(self.data))
        return target

    def pin(
        self, *, pinned: Sequence[str] = (), supernodes: Mapping[str, Sequence[str]] | None = None
    ) -> Report:
        """The same report, its attribution graph opening with these nodes pinned, in its data too.

        Args:
            pinned: ids of nodes of the graph, such as ``L1H3@20``.
            supernodes: groups of nodes that its figure draws as one: names, each with the ids of its nodes.

        Raises:
            MechInterpError: the report has no graph, or not these nodes, or a node is in two groups.
        """
        sections, graphs = [], 0
        for part in self.data["sections"]:
            blocks = []
            for block in part["blocks"]:
                if block["type"] == "graph":
                    graphs += 1
                    block = block | {"graph": with_pins(block["graph"], pinned, supernodes)}
                blocks.append(block)
            sections.append(part | {"blocks": blocks})
        if not graphs:
            raise MechInterpError("the report has no attribution graph to pin nodes in")
        return Report(self.data | {"sections": sections})

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Report:
        """Read the JSON that ``save(path, data=True)`` wrote.

        Raises:
            MechInterpError: the file cannot be read, or is not the data of a report of this version.
        """
        data = read_json(path)
        if not isinstance(data, dict) or data.get("format") != FORMAT:
            raise MechInterpError(f"{path} is not the data of a report; give the .json beside a report")
        if data.get("version") != VERSION:
            raise MechInterpError(
                f"{path} is report format {data.get('version')!r}, but this release reads {VERSION}"
            )
        return cls(data)

    def _repr_html_(self) -> str:
        """The page in a frame of its own: its styles and scripts stay apart from the notebook's."""
        return (
            f'<iframe srcdoc="{html.escape(self.html())}" sandbox="allow-scripts allow-downloads" '
            f'title="{html.escape(self.data["title"])}" '
            'style="width:100%;height:800px;border:1px solid #8884;border-radius:6px"></iframe>'
        )

    def __repr__(self) -> str:
        names = ", ".join(s["id"] for s in self.data["sections"])
        return f"Report({self.data['title']!r}: {names}); .save(path) writes the page"


def _plan(
    model: AttentionOnlyModel,
    prompt: Subject,
    target: str | int | None,
    position: int,
    preset: str | None,
    sections: Sequence[str] | None,
    heads: Heads,
    compare: AttentionOnlyModel | None,
    seed: int,
) -> Plan:
    """The prompt is frozen for it, and everything that stands on it is planned."""
    return _made(model, prompt, target, position, preset, sections, heads, compare, seed).plan()


@plans(_plan)
@torch.no_grad()
def report(
    model: AttentionOnlyModel,
    prompt: Subject,
    *,
    target: str | int | None = None,
    position: int = -1,
    preset: str | None = None,
    sections: Sequence[str] | None = None,
    heads: Heads = (),
    compare: AttentionOnlyModel | None = None,
    corpus: CorpusScores | None = None,
    seed: int = 0,
    progress: bool = True,
) -> Report:
    """Analyse a model on a prompt, on two prompts or on a behaviour, and gather what was found in one page.

    Args:
        prompt: a text, or token ids ``[pos]``. Two of them, in a list, are compared: the second is the
            first one's counterfactual. A behaviour (``mia.Task``): what carries it is found on half of its
            prompts and tested on the others.
        target: the next token to explain (text of one token, or id); by default the model's own.
        position: where the prediction is made; negative counts from the end.
        preset: "overview" (every section), "induction" (what heads do), "prediction" (where one prediction
            comes from) or "large" (what takes a few runs of the model). By default "overview", and "large"
            for a model of more than half a billion weights, which the page then says. For one prompt only.
        sections: which sections, in this order, instead of a preset's.
        heads: labels of heads whose patterns and circuits to show, before those that the report picks.
        compare: a second model (or the same in another mode) to set beside this one: what differs, with
            heads of one put into the other where both have the same shape.
        corpus: a pass over a corpus, from ``mia.detect.over_corpus``: the cards of heads show the passages
            where each writes most.
        seed: of the random tokens that heads are scored on, and of a behaviour's split into two halves.
        progress: show a progress bar.

    Raises:
        MechInterpError: an empty prompt or one longer than the context, a target that is no single
            token, a position outside the prompt, an unknown preset, section or head, a second model
            with another vocabulary; the same prompt twice; a behaviour that does not fit the model, or one
            with target, position or preset, which it has itself.
    """
    made = _made(model, prompt, target, position, preset, sections, heads, compare, seed)
    parts = _gathered(made.makers, progress)
    study = made.study()
    own_cards, added_up = (
        cards(study, named(parts, model.heads), corpus) if model.n_heads else ({}, Receipt())
    )
    if added_up.checks:
        parts[0]["receipts"].append(receipt_block("head cards", added_up))
    for part in parts:
        if part["id"] == "provenance" and (receipts := receipts_table(parts)) is not None:
            part["blocks"].append(receipts)
    passed = [check["ok"] for part in parts for receipt in part["receipts"] for check in receipt["checks"]]
    origin = str(model.provenance.get("name", "unnamed"))
    return Report(
        {
            "format": FORMAT,
            "version": VERSION,
            "software": f"mechinterp_attn {__version__}",
            "title": f"Circuit report: {shown(origin)}",
            "model": shown(origin),
            "subject": made.subject,
            "prompt": [shown(t) for t in study.names],
            "which_prompt": made.which,
            "checks": {"passed": sum(passed), "failed": len(passed) - sum(passed)},
            "claims": _claims(parts),
            "cards": own_cards,
            "sections": parts,
        }
    )


def _made(
    model: AttentionOnlyModel,
    prompt: Subject,
    target: str | int | None,
    position: int,
    preset: str | None,
    sections: Sequence[str] | None,
    heads: Heads,
    compare: AttentionOnlyModel | None,
    seed: int,
) -> Made:
    """Everything that was asked for, checked: the kind of report and its sections."""
    asked = Asked(target, position, preset, sections, tuple(model.heads.labels(heads)) if heads else ())
    if isinstance(prompt, Task) or two_of(prompt) is not None:
        return of_task(model, prompt, asked, compare, seed)
    return of_prompt(model, cast(Prompt, prompt), asked, compare, seed)


def _gathered(makers: Mapping[str, Maker], progress: bool) -> list[Block]:
    """The sections, each made by itself: one that cannot be had does not take the rest away."""
    parts = []
    bar = Progress(makers, desc="report", unit="section", show=progress, stops=True)
    for name in bar:
        bar.set_postfix_str(name, refresh=False)  # drawn with the bar: not on a log's own line
        try:
            part = makers[name]()
        except MechInterpError as error:
            part = section(name, name.capitalize(), [[f"Not shown: {shown(str(error))}."]], [], {})
        if part is not None:
            parts.append(part)
    if bar.notes:  # Ctrl-C in the command line: the page has what was ready, and says so
        text = f"Stopped early. Not made: {', '.join(list(makers)[bar.done :])}."
        parts.append(section("stopped", "Stopped early", [[text]], [], {}))
    return parts


def _claims(parts: Sequence[Block]) -> dict[str, int]:
    """How many claims were tested by interventions, and how many held."""
    tables = [b for part in parts for b in part["blocks"] if str(b.get("id", "")).endswith("claims")]
    verdicts = [verdict for block in tables for verdict in block["data"]["verdict"]]
    return {"tested": len(verdicts), "held": sum(verdict.startswith("✓") for verdict in verdicts)}
