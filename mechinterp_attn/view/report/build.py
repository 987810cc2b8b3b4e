"""``mia.report``: run the analyses, gather the sections; ``Report``: the page and its data."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from mechinterp_attn import paths
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.files import write_text
from mechinterp_attn.core.plan import MAX_BYTES, Plan, joined, plan, plans
from mechinterp_attn.core.progress import Progress
from mechinterp_attn.core.reading import read_json
from mechinterp_attn.core.results import Receipt
from mechinterp_attn.core.text import inert_json, shown
from mechinterp_attn.version import __version__
from mechinterp_attn.view.report.blocks import Block, receipt_block, section
from mechinterp_attn.view.report.cards import cards, named
from mechinterp_attn.view.report.cost import plan_second, plan_sections
from mechinterp_attn.view.report.page import page
from mechinterp_attn.view.report.presets import PRESETS, SECTIONS, preset_for
from mechinterp_attn.view.report.sections_about import receipts_table
from mechinterp_attn.view.report.sections_compare import comparison
from mechinterp_attn.view.report.study import Study, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from mechinterp_attn.detect import CorpusScores
    from mechinterp_attn.frozen.prompt import Frozen
    from mechinterp_attn.model.attention_only import AttentionOnlyModel
    from mechinterp_attn.model.index import Heads


FORMAT = "mechinterp_attn.report"
VERSION = 3


@dataclass(frozen=True, eq=False)
class Report:
    """A finished report.

    Attributes:
        data: everything it shows, as JSON can hold it: ``title``, ``model``, ``prompt``,
            ``cards`` (of heads, by label) and ``sections``.
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
    prompt: str | list[int] | Tensor,
    target: str | int | None,
    position: int,
    preset: str | None,
    sections: Sequence[str] | None,
    heads: Heads,
    compare: AttentionOnlyModel | None,
    seed: int,
) -> Plan:
    """The prompt is frozen for it, and everything that stands on it is planned."""
    study, names = _begin(model, prompt, target, position, preset, sections, heads, seed)
    parts = [plan(paths.freeze, model, study.frozen.tokens)]
    if compare is not None:
        names = [*names, "comparison"]
        parts += [plan(paths.freeze, compare, study.frozen.tokens), plan_second(_beside(study, compare))]
    made = plan_sections(study, names)
    return joined(made.what, [*parts, made])


@plans(_plan)
@torch.no_grad()
def report(
    model: AttentionOnlyModel,
    prompt: str | list[int] | Tensor,
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
    """Analyse a model on a prompt and gather what was found in one page.

    Args:
        prompt: a text, or token ids ``[pos]``.
        target: the next token to explain (text of one token, or id); by default the model's own.
        position: where the prediction is made; negative counts from the end.
        preset: "overview" (every section), "induction" (what heads do), "prediction" (where one prediction
            comes from) or "large" (what takes a few runs of the model). By default "overview", and "large"
            for a model of more than half a billion weights, which the page then says.
        sections: which sections, in this order, instead of a preset's.
        heads: labels of heads whose patterns and circuits to show, before those that the report picks.
        compare: a second model (or the same in another mode) to set beside this one on the prompt.
        corpus: a pass over a corpus, from ``mia.detect.over_corpus``: the cards of heads show the passages
            where each writes most.
        seed: of the random tokens that heads are scored on.
        progress: show a progress bar.

    Raises:
        MechInterpError: an empty prompt or one longer than the context, a target that is no single
            token, a position outside the prompt, an unknown preset, section or head, a second model
            with another vocabulary.
    """
    study, names = _begin(model, prompt, target, position, preset, sections, heads, seed)
    makers: dict[str, Callable[[], Block | None]] = {name: partial(SECTIONS[name], study) for name in names}
    if compare is not None:
        makers["comparison"] = partial(comparison, study, _beside(study, compare))
    parts = []
    bar = Progress(makers, desc="report", unit="section", show=progress, stops=True)
    for name in bar:
        bar.set_postfix_str(name, refresh=False)  # drawn with the bar: not on a log's own line
        try:
            part = makers[name]()
        except MechInterpError as error:  # one part that cannot be had does not take the rest away
            part = section(name, name.capitalize(), [[f"Not shown: {shown(str(error))}."]], [], {})
        if part is not None:
            parts.append(part)
    if bar.notes:  # Ctrl-C in the command line: the page has what was ready, and says so
        text = f"Stopped early. Not made: {', '.join(list(makers)[bar.done :])}."
        parts.append(section("stopped", "Stopped early", [[text]], [], {}))
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
            "prompt": [shown(t) for t in study.names],
            "checks": {"passed": sum(passed), "failed": len(passed) - sum(passed)},
            "claims": _claims(parts),
            "cards": own_cards,
            "sections": parts,
        }
    )


def _begin(
    model: AttentionOnlyModel,
    prompt: str | list[int] | Tensor,
    target: str | int | None,
    position: int,
    preset: str | None,
    sections: Sequence[str] | None,
    heads: Heads,
    seed: int,
) -> tuple[Study, list[str]]:
    """Everything that was asked for, checked: the study and the names of the sections."""
    n_weights = sum(weight.numel() for weight in model.parameters())
    automatic = preset is None and sections is None
    preset = preset_for(n_weights) if preset is None else preset
    if preset not in PRESETS:
        raise MechInterpError(f"no preset {preset!r}; there are {', '.join(PRESETS)}")
    names = list(PRESETS[preset] if sections is None else sections)
    unknown = [name for name in names if name not in SECTIONS]
    if unknown or not names:
        raise MechInterpError(f"no section {unknown}; there are {', '.join(SECTIONS)}")
    frozen = _freeze(model, tokens_of(model, prompt))
    chosen = tuple(model.heads.labels(heads)) if heads else ()
    study = Study(model, frozen, target=target, position=position, seed=seed, chosen=chosen)
    if automatic and preset != "overview":
        why = f"since the model has {n_weights:,} weights; preset='overview' makes them all"
        study.left_out = f"preset {preset!r}, {why}"
    study.attribution  # noqa: B018  (a bad target or position stops here, not in every section)
    return study, names


def _claims(parts: Sequence[Block]) -> dict[str, int]:
    """How many claims were tested by cutting, and how many held."""
    tables = [block for part in parts for block in part["blocks"] if block.get("id") == "claims"]
    verdicts = [verdict for block in tables for verdict in block["data"]["verdict"]]
    return {"tested": len(verdicts), "held": sum(verdict.startswith("✓") for verdict in verdicts)}


def _freeze(model: AttentionOnlyModel, tokens: Tensor) -> Frozen:
    """A prompt, frozen with whatever that takes: nothing of a report can be had without."""
    return paths.freeze(model, tokens, max_bytes=max(MAX_BYTES, plan(paths.freeze, model, tokens).bytes))


def _beside(study: Study, model: AttentionOnlyModel) -> Study:
    """A second model on the same tokens, explaining the same prediction."""
    for name in ("d_vocab", "d_vocab_out"):
        own, other = getattr(study.model.spec, name), getattr(model.spec, name)
        if own != other:
            raise MechInterpError(
                f"compare: the second model's {name} is {other:,}, the first one's {own:,}; only models "
                "with one vocabulary can be set side by side"
            )
    frozen = _freeze(model, study.frozen.tokens)
    attribution = study.attribution
    target, position = attribution.target, attribution.position
    own = set(model.heads)
    chosen = tuple(label for label in study.chosen if label in own)
    return Study(model, frozen, target=target, position=position, seed=study.seed, chosen=chosen)
