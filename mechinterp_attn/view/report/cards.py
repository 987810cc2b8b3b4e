"""Head cards: what one head does on this prompt, for every head that the page names.

A card stands on the prompt itself: where the head looks, what each of these tokens brings to the answer,
what the head's own output there does to the vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch

from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.core.text import number, shown
from mechinterp_attn.frozen.bank import FrozenBank
from mechinterp_attn.frozen.goals import resolve_goal
from mechinterp_attn.frozen.prompt import sum_tolerance
from mechinterp_attn.view.report.blocks import Block, pattern
from mechinterp_attn.view.report.study import CLEAR, KIND_NAMES, PATTERN_CELLS, SCORES, Study

if TYPE_CHECKING:
    from torch import Tensor

    from mechinterp_attn.detect import CorpusScores

MOST = 300  # heads with a card of their own; those behind show their row of the table of heads
LISTED = 6  # tokens of each list
PARTNERS = 3  # composing heads of each kind and side
PASSAGES = 5
LEAST = 5e-3  # weight of a token that is listed as looked at
ROWS = 64  # heads whose output is read over the whole vocabulary at once
GRAPH_HEADS = 60  # of an attribution graph, the most influential ones


def named(parts: Sequence[Block], heads: Iterable[str]) -> list[str]:
    """The heads that the page names, those that stand at its front first.

    Args:
        parts: its sections.
        heads: all labels of the model.
    """
    known = set(heads)
    found: dict[str, None] = {}
    for part in parts:
        names = [*_in_spans(part["finding"] or []), *(n for p in part["lead"] for n in _in_spans(p))]
        for block in part["blocks"]:
            names += _in_block(block)
        found |= dict.fromkeys(name for name in names if name in known)
    return list(found)


def _in_spans(spans: Iterable[Any]) -> Iterator[str]:
    return (span["head"] for span in spans if isinstance(span, dict) and "head" in span)


def _in_block(block: Block) -> list[str]:
    """The heads that a block names before anybody turns a page of it."""
    if block["type"] == "story":
        return [name for sentence in block["sentences"] for name in _in_spans(sentence["spans"])]
    if block["type"] == "patterns":
        return [head["head"] for group in block["groups"] for head in group["heads"]]
    if block["type"] == "circuit":
        return [name for row in block["rows"] for name in row]
    if block["type"] == "graph":
        heads = [n for n in block["graph"]["nodes"] if n["kind"] in KIND_NAMES and n["members"] == 1]
        heads.sort(key=lambda node: -node["influence"])
        return [node["label"] for node in heads[:GRAPH_HEADS]]
    if block["type"] == "table":
        keys = [c["key"] for c in block["columns"] if c["kind"] == "head"]
        order = list(range(len(block["data"][block["columns"][0]["key"]])))
        if block["sort"] is not None:
            values = block["data"][block["sort"]]
            order = sorted(order, key=lambda i: -values[i] if isinstance(values[i], float | int) else 1e300)
        return [block["data"][key][i] for i in order[: block["rows"]] for key in keys]
    return []


def cards(
    study: Study, labels: Sequence[str], corpus: CorpusScores | None = None
) -> tuple[dict[str, Block], Receipt]:
    """The cards of heads, by label, and the check that their parts add up.

    Args:
        labels: heads that the page names, the most important first.
        corpus: a pass over a corpus; its passages stand in the cards.
    """
    labels = labels[:MOST]
    n = len(study.names)
    drawn = set(labels[: max(8, PATTERN_CELLS // n**2)])  # long prompts: fewer with the whole pattern
    outputs = _outputs(study, labels)
    errors: list[float] = []
    causes = study.causes.frame.reindex(list(labels))
    partners = _partners(study)
    scores = study.scores.frame.set_index("head")
    found = {}
    for label in labels:
        bank, _ = study.model.heads.find(label)
        row = causes.loc[label]
        cut: float | str | None = None if pd.isna(row["cut"]) else number(row["cut"])
        card: Block = {
            "kind": bank.kind,
            "layer": bank.layer,
            "effect": number(study.direct[label]),
            "cut": cut,
            "p": None if cut is None else number(row["p"]),
            "estimate": number(row["estimate"]),
            "way": study.ways.get(label, ""),
            **outputs[label],
        }
        errors.append(card.pop("error"))
        if label in drawn:
            weights = study.pattern(label)
            card["weights"] = pattern(weights if bank.kind == "attention" else weights.diagonal())
        if bank.kind == "attention":
            scored = scores.loc[label]
            card["scores"] = [
                [words, number(scored[s], 3)] for s, words in SCORES.items() if scored[s] >= CLEAR
            ]
        if label in partners:
            card["partners"] = partners[label]
        if corpus is not None:
            card["passages"] = _passages(corpus, label)
        found[label] = card
    checks = []
    if errors:
        words = "what tokens bring through each head adds up to its direct effect"
        checks.append(Check(words, max(errors), sum_tolerance(study.frozen)))
    return found, Receipt(tuple(checks))


def _outputs(study: Study, labels: Sequence[str]) -> dict[str, Block]:
    """What heads hold and write where the prediction is made."""
    frozen, position = study.frozen, study.attribution.position
    goal = resolve_goal(frozen, target=study.attribution.target, against=None, position=position)
    end, n = goal.field(frozen), len(frozen.sublayers)
    groups: dict[tuple[int, int], list[str]] = {}
    for label in labels:
        place = frozen.locate(label)
        groups.setdefault((place.depth, place.bank), []).append(label)
    found: dict[str, Block] = {}
    for (depth, which), group in groups.items():
        bank = frozen.sublayers[depth].banks[which]
        index = torch.tensor([frozen.locate(label).head for label in group], device=frozen.end.device)
        held = frozen.sublayers[depth].held[which]
        stream = frozen.sublayers[depth].stream
        direct = frozen.carry_back(end, depth, n)
        bias = (bank.z_bias * bank.unwrite(direct)).sum(-1)[position, index]
        brought = _brought(bank, index, direct[position], stream, position)
        for start in range(0, len(group), ROWS):
            own = index[start : start + ROWS]
            at = torch.full_like(own, position)
            written = bank.write_at(held[position, own], own, at)
            for behind, sublayer in enumerate(frozen.sublayers[depth:]):
                written = sublayer.carry_at(sublayer.kept(written) if behind else written, at)
            logits = frozen.read_out_at(written, position)
            for i, label in enumerate(group[start : start + ROWS]):
                whole = float(brought[start + i].sum() + bias[start + i])
                found[label] = _output(study, label, logits[i], brought[start + i])
                found[label]["error"] = abs(whole - study.direct[label])
    return found


def _brought(bank: FrozenBank, index: Tensor, direction: Tensor, stream: Tensor, position: int) -> Tensor:
    """What the stream at each position adds to a direction through single heads, ``[n, pos]``."""
    at = direction.new_zeros(len(index), len(stream))
    at[:, position] = 1
    pull = bank.pull(direction.expand(len(index), -1), index)
    return bank.spread(at, index) * (pull @ stream.T)


def _output(study: Study, label: str, logits: Tensor, brought: Tensor) -> Block:
    """Lists of one head: where it looks and what that brings; which outputs it raises and lowers."""
    position, target = study.attribution.position, study.attribution.target
    weights = torch.from_numpy(study.pattern(label)[position])
    seen = weights[:-1].topk(min(LISTED, len(weights) - 1)).indices.tolist()
    looks = [[k, number(weights[k], 4), number(brought[k], 4)] for k in seen if weights[k] >= LEAST]
    centred = logits.double() - logits.double().mean()  # a shift of all logits changes nothing
    most = min(LISTED, len(centred))
    raised, lowered = centred.topk(most), (-centred).topk(most)
    return {
        "rank": int((logits > logits[target]).sum()) + 1,
        "looks": looks,
        "raises": _tokens(study, raised.indices.tolist(), raised.values.tolist()),
        "lowers": _tokens(study, lowered.indices.tolist(), (-lowered.values).tolist()),
    }


def _tokens(study: Study, ids: list[int], values: list[float]) -> list[list[Any]]:
    texts = study.model.output_texts(ids)
    return [[shown(text), number(value, 4)] for text, value in zip(texts, values, strict=True)]


def _partners(study: Study) -> dict[str, list[list[Any]]]:
    """By head: ``[kind, "reads" | "is read by", other head, z]``, those furthest above their baseline."""
    found: dict[str, list[list[Any]]] = {}
    for kind, result in study.compositions.items():
        frame = result.frame.dropna(subset=["z"])
        for own, other, side in (("dst", "src", "reads"), ("src", "dst", "is read by")):
            top = frame.sort_values("z", ascending=False).groupby(own, sort=False).head(PARTNERS)
            for row in top[[own, other, "z"]].itertuples(index=False):
                if row[2] > 0:
                    found.setdefault(str(row[0]), []).append([kind, side, str(row[1]), number(row[2], 3)])
    return found


def _passages(corpus: CorpusScores, label: str) -> list[Block]:
    frame = corpus.passages(label).head(PASSAGES)
    names = ["before", "token", "after"]
    return [{name: shown(row[name]) for name in names} for row in frame[names].to_dict("records")]
