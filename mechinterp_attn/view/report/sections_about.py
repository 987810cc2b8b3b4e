"""The sections about the report itself: the numbers, what was analysed, how far to trust it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pandas as pd

from mechinterp_attn.core.results import Check, Receipt
from mechinterp_attn.core.text import shown, signed
from mechinterp_attn.view.report.blocks import Block, Spans, column, fact, facts, head, section, table
from mechinterp_attn.view.report.study import CLEAR, KIND_NAMES, SCORES, Study


def summary(study: Study) -> Block:
    """The prediction in numbers: direct effects, kinds of heads, loss, and how far to trust them."""
    attribution, frame = study.attribution, study.orders.frame
    target = study.token(attribution.target)
    probability = study.causes.probability
    n_mlp = len(study.model.heads.of("mlp"))
    counts = {kind: len(study.model.heads.of(kind)) for kind in KIND_NAMES}
    added = "".join(f", {n:,} {KIND_NAMES[k]}" for k, n in list(counts.items())[2:] if n)
    lead: list[list[Any]] = [
        [_what_is_read(study.n_attention, n_mlp, added) + " ", *_largest(study)],
        _heads_in_words(study),
    ]
    if study.has_loss:
        lead.append(_loss_in_words(study))
    card = fidelity_receipt(study)
    blocks = [
        facts(
            fact(
                study.output.capitalize(),
                shown(target),
                f"probability {probability:.1%}, logit {attribution.total:.2f}",
                receipt=study.frozen.receipt,
            ),
            fact(
                "Largest direct effect",
                *_largest_head(study),
                receipt=attribution.receipt,
            ),
            fact(
                "Loss on the prompt",
                _plain(frame["loss"].iloc[-1]),
                "nats a token, paths of all orders" if study.has_loss else "there is none",
                receipt=study.orders.receipt,
            ),
            fact(
                "Best induction head",
                *_best(study, "induction"),
                receipt=study.scores.receipt if study.n_attention else None,
            ),
            fact(
                "Heads",
                f"{study.model.n_heads:,}",
                f"{study.n_attention:,} attention, {n_mlp:,} MLP-derived{added}",
            ),
            fact("Conversion error", _fidelity_headline(study), "of the largest logit", receipt=card),
        ),
    ]
    receipts = {
        "frozen model": study.frozen.receipt,
        "logit": attribution.receipt,
        "loss by order": study.orders.receipt,
    }
    if study.n_attention:
        receipts["head scores"] = study.scores.receipt
    finding: Spans = [f"Logit {attribution.total:.2f}; ", *_sums(study)]
    return section("summary", "In numbers", lead, blocks, receipts, finding=finding)


def _plural(n: int, noun: str) -> str:
    return f"{n:,} {noun}" + ("" if n == 1 else "s")


def _what_is_read(n_attention: int, n_mlp: int, added: str) -> str:
    if n_attention and (n_mlp or added):
        heads = f"{n_attention:,} attention heads, {n_mlp:,} MLP-derived heads{added}"
        return f"Its heads are read on one footing: {heads}."
    if n_attention:
        return f"It has {_plural(n_attention, 'attention head')} and no MLPs."
    return (
        "It has no heads: the token alone decides." if not n_mlp else f"It has {n_mlp:,} MLP-derived heads."
    )


def _largest(study: Study) -> list[Any]:
    frame = study.attribution.frame
    own = frame[frame["kind"].isin(KIND_NAMES)]
    total = study.attribution.total
    if own.empty:
        return [f"The logit of {total:.2f} comes from the token's embedding and the biases alone."]
    spans: list[Any] = [f"Of its logit of {total:.2f}, heads write straight to it"]
    raising, lowering = (
        own[own["value"] > 0].nlargest(4, "value"),
        own[own["value"] < 0].nsmallest(1, "value"),
    )
    for words, frame in ((", most of all ", raising), ("; against it, most of all ", lowering)):
        for i, (label, value) in enumerate(_pairs(frame)):
            spans += [", " if i else words, head(label), f" ({signed(value)})"]
    return [*spans, ". In sum: ", *_sums(study), "."]


def _sums(study: Study) -> Spans:
    """What every kind of head writes to the logit in sum, and the rest."""
    frame = study.attribution.frame
    sums = {
        f"all {name}": frame.loc[frame["kind"] == kind, "value"].sum()
        for kind, name in KIND_NAMES.items()
        if (frame["kind"] == kind).any()
    }
    sums["embedding and biases"] = study.attribution.total - sum(sums.values())
    return [", ".join(f"{name} {signed(value)}" for name, value in sums.items())]


def _pairs(frame: pd.DataFrame) -> list[tuple[str, float]]:
    return list(zip(frame["head"], frame["value"], strict=True))


def _largest_head(study: Study) -> tuple[str, str]:
    frame = study.attribution.frame
    own = frame[frame["kind"].isin(KIND_NAMES)]
    if own.empty:
        return "none", "there are no heads"
    row = own.nlargest(1, "value").iloc[0]
    return str(row["head"]), f"writes {signed(row['value'])} of {study.attribution.total:.2f} logits"


def _best(study: Study, score: str) -> tuple[str, str]:
    best = study.best(score)
    if best is None:
        return "none", "no attention heads, or no room in the context"
    note = f"score {best[score]:.2f} of 1 on repeated random tokens"
    return (
        (str(best["head"]), note)
        if best[score] >= CLEAR
        else ("none", f"{best['head']} comes closest, {note}")
    )


def _heads_in_words(study: Study) -> list[Any]:
    if not study.n_attention:
        return ["Without attention no token can be looked at but the present one."]
    spans: list[Any] = []
    for score in ("induction", "previous_token"):
        name = SCORES[score].replace(" ", "-")
        best = study.best(score)
        if best is None:
            spans += [f"The context is too short to tell a {name} head. "]
            continue
        clear = study.scores.frame.query("kind == 'attention'")[score] >= CLEAR
        if best[score] >= CLEAR:
            spans += [f"The clearest {name} head is ", head(best["head"]), f" (score {best[score]:.2f}"]
            spans += [f"; {_plural(int(clear.sum()), 'head')} of {study.n_attention:,} reach {CLEAR}). "]
        else:
            spans += [f"There is no clear {name} head: ", head(best["head"])]
            spans += [f" comes closest with {best[score]:.2f}, below {CLEAR}. "]
    return [*spans, "These scores are shares of attention on repeated random tokens."]


def _loss_in_words(study: Study) -> list[Any]:
    loss, blind = study.orders.frame["loss"], math.log(study.model.spec.d_vocab_out)
    words = f"Guessing blindly would cost {blind:.2f} nats a token; paths through no head give "
    words += f"{loss.iloc[0]:.2f}"
    if len(loss) > 2:
        words += f", with those through one head {loss.iloc[1]:.2f}"
    words += f", all paths {loss.iloc[-1]:.2f}." if len(loss) > 1 else "."
    return [words]


def fidelity_receipt(study: Study) -> Receipt | None:
    """The card of the conversion as a receipt; None where it was not measured."""
    card = study.model.provenance.get("fidelity")
    if not card:
        return None
    check = Check(
        "logits of the source and of the attention-only model",
        card["max_logit_error"],
        card["tolerance"] * (card["logit_scale"] or 1.0),
    )
    notes = {"positions": f"{card['n_tokens']:,} of random tokens", "dtype": card["dtype"]}
    return Receipt((check,), notes)


def _fidelity_headline(study: Study) -> str:
    card = study.model.provenance.get("fidelity")
    if not card:
        return "not measured"
    return f"{card['max_logit_error'] / (card['logit_scale'] or 1.0):.1e}"


def _plain(x: float | None) -> str:
    return "–" if x is None or math.isnan(x) else f"{x:.3f}"


def provenance(study: Study) -> Block:
    """What was analysed, and how; the builder adds the table of all receipts."""
    model, spec, origin = study.model, study.model.spec, study.model.provenance
    versions = ", ".join(f"{name} {v}" for name, v in origin.get("versions", {}).items())
    mlp = f"{spec.d_mlp:,} {spec.act_fn} neurons a layer" if spec.d_mlp else "no MLPs"
    added = "" if model.tokenizer is None else f"; a text gets {model.added_text}"
    attention = f"{spec.n_heads} attention heads of {spec.d_head} a layer, {mlp}"
    items = facts(
        fact("Model", origin.get("name", "unnamed")),
        fact("Mode", model.mode, "how MLP neurons became heads"),
        fact("Layers", spec.n_layers, attention if spec.n_layers else "embedding and unembedding only"),
        fact(
            "Residual stream",
            spec.d_model,
            f"norm {spec.norm or 'none'}, positions {spec.positions or 'none'}",
        ),
        fact("Vocabulary", f"{spec.d_vocab:,}", f"context {spec.n_ctx:,} tokens{added}"),
        fact("Prompt", _plural(len(study.frozen.tokens), "token")),
        fact("Numbers", str(model.W_E.dtype).removeprefix("torch."), f"on {model.W_E.device.type}"),
        fact("Seed", study.seed, "of the random tokens that heads are scored on"),
        fact("Software", versions or "versions unknown", text=True),
        *([fact("Sections", "some", study.left_out)] if study.left_out else []),
    )
    prompt = {
        "type": "prompt",
        "tokens": [shown(t) for t in study.names],
        "ids": study.frozen.tokens.tolist(),
    }
    lead = [["Patterns, gates and the scales of the norms are held as this prompt makes them. The model is "
             "then linear, and what it says is a sum over paths."]]  # fmt: skip
    name = shown(str(origin.get("name", "unnamed")))
    finding: Spans = [
        f"{name}, {_plural(spec.n_layers, 'layer')}, {_plural(len(study.frozen.tokens), 'token')}"
    ]
    return section("provenance", "What was analysed", lead, [items, prompt], {}, finding=finding)


def receipts_table(parts: Sequence[Block]) -> Block | None:
    """Every check of every section in one table; None where nothing was checked."""
    rows = [
        (part["title"], receipt["of"], check["name"], check["error"], check["tolerance"], check["ok"])
        for part in parts
        for receipt in part["receipts"]
        for check in receipt["checks"]
    ]
    if not rows:
        return None
    frame = pd.DataFrame(rows, columns=["section", "result", "check", "error", "tolerance", "ok"])
    frame["ok"] = ["✓ passed" if ok else "✗ FAILED" for ok in frame["ok"]]
    frame = frame.drop_duplicates(["result", "check", "error"])
    columns = [
        column("section", "Section", "text"),
        column("result", "Result", "text"),
        column("check", "What was compared", "text"),
        column("error", "Error", "number", "in the unit of the quantity"),
        column("tolerance", "Limit"),
        column("ok", "Verdict", "text"),
    ]
    return table("receipts", "Receipts: every result with the check it passed", frame, columns, rows=15)


def fidelity(study: Study) -> Block:
    """The card of the conversion: does the attention-only model compute what its source does?"""
    card, receipt = study.model.provenance.get("fidelity"), fidelity_receipt(study)
    title = "Fidelity of the conversion"
    if not card or receipt is None:
        words = "The model was converted with check=False: nothing here says that it follows its source."
        return section(
            "fidelity",
            title,
            [[words, " mia.verify(model, source, tokens) measures it."]],
            [],
            {},
            finding=["Not measured"],
        )
    verdict = "equal within the tolerance" if card["ok"] else "NOT equal"
    lead = [
        [
            f"On {card['n_tokens']:,} positions of random tokens the logits of the attention-only "
            f"model and of its source are {verdict} ({card['tolerance']:.0e} of the largest logit, "
            f"{card['dtype']})."
        ]
    ]
    block = facts(
        fact(
            "Largest logit error",
            f"{card['max_logit_error']:.1e}",
            f"logit scale {card['logit_scale']:.1f}",
            receipt=receipt,
        ),
        fact("Mean logit error", f"{card['mean_logit_error']:.1e}"),
        fact("KL divergence", f"{card['kl']:.1e}", "nats, source to model"),
        fact("Same top token", f"{card['top1_agreement']:.1%}", "of positions"),
        fact("Loss of the source on random tokens", _plain(card["loss_source"]), "nats, not this prompt"),
        fact("Loss of the model on random tokens", _plain(card["loss_model"]), "nats, not this prompt"),
    )
    finding: Spans = [f"Logits {verdict}, largest error {card['max_logit_error']:.1e}"]
    return section("fidelity", title, lead, [block], {"conversion": receipt}, finding=finding)
