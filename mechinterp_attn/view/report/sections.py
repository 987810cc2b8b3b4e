"""The sections of a report: results in, blocks out. Nothing is computed here."""

from __future__ import annotations

import math
from typing import Any, cast

from mechinterp_attn import circuits
from mechinterp_attn.view.report.blocks import (
    Block,
    chart,
    column,
    facts,
    head,
    pattern,
    section,
    table,
    token,
)
from mechinterp_attn.view.report.study import CLEAR, SCORES, Study
from mechinterp_attn.view.text import number, shown, signed


def summary(study: Study) -> Block:
    """What the model predicts, why, and how far to trust it: one paragraph each."""
    attribution, frame = study.attribution, study.orders.frame
    target = study.token(attribution.target)
    probability = float(study.frozen.logits[attribution.position].double().softmax(-1)[attribution.target])
    n_mlp = study.model.n_heads - study.n_attention
    lead: list[list[Any]] = [
        [
            f"After {attribution.position + 1} tokens the model gives ",
            token(target),
            f" a probability of {probability:.1%} as the next token. ",
            f"Its {study.n_attention:,} attention heads and ",
            f"{n_mlp:,} MLP-derived heads are read here on one footing."
            if n_mlp
            else "no MLP-derived heads are read here.",
        ],
        ["Written straight to that logit, most of all: ", *_largest(study)],
        _heads_in_words(study),
    ]
    if len(study.frozen.tokens) > 1:
        lead.append(
            [
                f"With no head at all the loss on this prompt is {frame['loss'].iloc[0]:.2f} nats; "
                f"with paths through one head {frame['loss'].iloc[min(1, len(frame) - 1)]:.2f}; "
                "with all paths ",
                f"{frame['loss'].iloc[-1]:.2f}. Guessing blindly costs "
                f"{math.log(study.model.spec.d_vocab_out):.2f}.",
            ]
        )
    blocks = [
        facts(
            ("Next token", f"{shown(target)}", f"probability {probability:.1%}"),
            ("Loss on the prompt", _plain(frame["loss"].iloc[-1]), "nats a token, all paths"),
            (
                "Heads",
                f"{study.model.n_heads:,}",
                f"{study.n_attention:,} attention, {n_mlp:,} MLP-derived",
            ),
            ("Conversion error", _fidelity_headline(study), "of the largest logit"),
        ),
        table(
            "predictions",
            "The most likely next tokens",
            study.predictions,
            [
                column("token", "Token", "token"),
                column("token_id", "Id", "id"),
                column("probability", "Probability", "score"),
                column("logit", "Logit"),
            ],
        ),
    ]
    receipts = {"frozen model": study.frozen.receipt, "logit": attribution.receipt}
    return section("summary", "Summary", lead, blocks, receipts)


def _largest(study: Study) -> list[Any]:
    frame = study.attribution.frame
    top = frame[frame["kind"].isin(("attention", "mlp"))].nlargest(4, "value")
    spans: list[Any] = []
    for label, value in zip(top["head"], top["value"], strict=True):
        spans += [", " if spans else "", head(label), f" ({signed(value)})"]
    return [*spans, f", of {study.attribution.total:.2f} in all."]


def _heads_in_words(study: Study) -> list[Any]:
    spans: list[Any] = []
    for score in ("induction", "previous_token"):
        best = study.ranked(score).iloc[0]
        name = SCORES[score].replace(" ", "-")
        if best[score] >= CLEAR:
            spans += [f"The clearest {name} head is ", head(best["head"]), f" ({best[score]:.2f}). "]
        else:
            spans += [f"There is no clear {name} head: ", head(best["head"])]
            spans += [f" comes closest with {best[score]:.2f}. "]
    return spans


def _fidelity_headline(study: Study) -> str:
    card = study.model.provenance.get("fidelity")
    if not card:
        return "not measured"
    scale = card["logit_scale"] or 1.0
    return f"{card['max_logit_error'] / scale:.1e}"


def _plain(x: float) -> str:
    return "–" if math.isnan(x) else f"{x:.3f}"


def provenance(study: Study) -> Block:
    """What was analysed, and how."""
    model, spec, origin = study.model, study.model.spec, study.model.provenance
    versions = ", ".join(f"{name} {v}" for name, v in origin.get("versions", {}).items())
    mlp = f"{spec.d_mlp:,} {spec.act_fn} neurons a layer" if spec.d_mlp else "no MLPs"
    items = [
        ("Model", origin.get("name", "unnamed"), ""),
        ("Mode", model.mode, "how MLP neurons became heads"),
        ("Layers", spec.n_layers, f"{spec.n_heads} attention heads of {spec.d_head} a layer, {mlp}"),
        (
            "Residual stream",
            spec.d_model,
            f"norm {spec.norm or 'none'}, positions {spec.positions or 'none'}",
        ),
        ("Vocabulary", f"{spec.d_vocab:,}", f"context {spec.n_ctx:,} tokens"),
        ("Prompt", f"{len(study.frozen.tokens)} tokens", ""),
        ("Numbers", str(model.W_E.dtype).removeprefix("torch."), f"on {model.W_E.device.type}"),
        ("Seed", study.seed, "of the random tokens that heads are scored on"),
        ("Versions", versions or "unknown", ""),
    ]
    prompt = {
        "type": "prompt",
        "tokens": [shown(t) for t in study.names],
        "ids": study.frozen.tokens.tolist(),
    }
    return section("provenance", "What was analysed", [], [facts(*items), prompt], {})


def fidelity(study: Study) -> Block:
    """The card of the conversion: does the attention-only model compute what its source does?"""
    card = study.model.provenance.get("fidelity")
    if not card:
        return section(
            "fidelity",
            "Fidelity of the conversion",
            [["The model was converted with check=False: nothing here says that it follows its source."]],
            [],
            {},
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
        ("Largest logit error", f"{card['max_logit_error']:.1e}", f"logit scale {card['logit_scale']:.1f}"),
        ("Mean logit error", f"{card['mean_logit_error']:.1e}", ""),
        ("KL divergence", f"{card['kl']:.1e}", "nats, source to model"),
        ("Same top token", f"{card['top1_agreement']:.1%}", "of positions"),
        ("Loss of the source", _plain(card["loss_source"]), "nats, random tokens"),
        ("Loss of the model", _plain(card["loss_model"]), "nats, random tokens"),
    )
    return section("fidelity", "Fidelity of the conversion", lead, [block], {})


def loss(study: Study) -> Block:
    """Loss by path order."""
    frame = study.orders.frame
    first = frame["change"].astype(object).where(frame.index > 0, None)  # nothing comes before order 0
    lead = [
        [
            "Every logit is a sum over paths from a token through heads to the output. Order 0 "
            "passes through no head, order 1 through one, order 2 through two composed ones. "
            "MLP-derived heads count as heads."
        ]
    ]
    blocks = [
        table(
            "orders",
            "Loss with the paths up to each order",
            frame.assign(change=first),
            [
                column("order", "Order", "text"),
                column("loss", "Loss (nats)"),
                column("change", "Change"),
                column("logit_norm", "Logits, root mean square"),
            ],
        )
    ]
    if len(study.frozen.tokens) > 1:
        blank = math.log(study.model.spec.d_vocab_out)
        blocks.insert(
            0,
            chart(
                "loss-by-order",
                "Loss with the paths up to each order",
                "line",
                list(zip(frame["order"], frame["loss"], strict=True)),
                x="paths through at most this many heads",
                y="loss (nats)",
                reference={"label": "blind guess", "value": number(blank)},
            ),
        )
    else:
        lead.append(["A prompt of one token has no next token to be wrong about, so there is no loss."])
    return section("orders", "Loss by path order", lead, blocks, {"orders": study.orders.receipt})


def heads(study: Study) -> Block:
    """The table of all heads with their scores and their direct effect."""
    effect = study.attribution.frame.set_index("head")["value"]
    frame = study.scores.frame.assign(effect=study.scores.frame["head"].map(effect))
    lead = [
        [
            "Scores are mean attention on repeated random tokens, from 0 to 1. An MLP-derived head "
            "sees only its own token and the bias token, so its current-token score is its mean "
            "gate. Effect is what a head writes straight to the logit of ",
            token(study.token(study.attribution.target)),
            " on this prompt.",
        ]
    ]
    helps = {
        "induction": "attention to the token after an earlier occurrence of this one",
        "previous_token": "attention to the token just before",
        "duplicate_token": "attention to earlier occurrences of this token",
        "current_token": "attention to the token itself",
        "first_token": "attention to the first token",
    }
    columns = [
        column("head", "Head", "head"),
        column("kind", "Kind", "kind"),
        column("layer", "Layer", "layer"),
        *(column(s, words.capitalize(), "score", helps[s]) for s, words in SCORES.items()),
        column("effect", "Effect (logits)", "signed", "written straight to the predicted token's logit"),
    ]
    filters = ("head", "kind", "layer", "score")
    block = table("heads", "All heads", frame, columns, sort="induction", filters=filters)
    return section("heads", "Heads", lead, [block], {"scores": study.scores.receipt})


def patterns(study: Study) -> Block:
    """Attention heads and MLP-derived heads side by side."""
    lead = [
        [
            "Each row of a pattern is a token that looks, each column a token that is looked at. "
            "MLP-derived heads look at their own token (the diagonal) or at the bias token, the "
            "last column: a neuron that is off puts all its weight there. Point at a token, or walk "
            "with the arrow keys."
        ]
    ]
    groups = []
    for kind, title in (("attention", "Attention heads"), ("mlp", "MLP-derived heads")):
        own = [
            {"head": label, "why": why, "weights": pattern(study.pattern(label))}
            for label, why in study.picked(kind).items()
        ]
        if own:
            groups.append({"kind": kind, "title": title, "heads": own})
    block = {
        "type": "patterns",
        "id": "patterns",
        "tokens": [shown(t) for t in study.names],
        "groups": groups,
    }
    return section("patterns", "Attention patterns", lead, [block], {"scores": study.scores.receipt})


def vocabulary(study: Study) -> Block:
    """OV and QK circuits of the top induction and previous-token heads."""
    lead = [
        [
            "Read from the weights alone, over all pairs of tokens. OV: attending to the first "
            "token raises the logit of the second. QK: the first token, as a query, scores the "
            "second as a key. The norms' gains are folded in; positions and the layers between are "
            "left out."
        ]
    ]
    blocks, receipts, seen = [], {}, set()
    for score in ("induction", "previous_token"):
        best = study.ranked(score).iloc[0]
        label = str(best["head"])
        if label in seen:
            continue
        seen.add(label)
        for circuit, run, columns in (
            ("OV", circuits.ov_top, ("Attended token", "Output token")),
            ("QK", circuits.qk_top, ("Query token", "Key token")),
        ):
            size = study.model.spec.d_vocab * study.model.spec.d_vocab_out
            result = cast(circuits.TokenPairs, run(study.model, label, top_k=min(20, size)))
            blocks.append(
                table(
                    f"{circuit.lower()}-{label}",
                    f"{label} {circuit}: the strongest pairs "
                    f"(best {SCORES[score].replace(' ', '-')} head, {best[score]:.2f})",
                    result.frame,
                    [
                        column("rank", "Rank", "id"),
                        column("source", columns[0], "token"),
                        column("token", columns[1], "token"),
                        column("value", "Value"),
                    ],
                    rows=10,
                )
            )
            receipts[f"{label} {circuit}"] = result.receipt
    return section("vocabulary", "OV and QK circuits", lead, blocks, receipts)


def neurons(study: Study) -> Block | None:
    """The MLP-derived heads with the largest direct effect on the prediction."""
    frame = study.attribution.frame
    frame = frame[frame["kind"] == "mlp"]
    if frame.empty:
        return None
    order = frame["value"].abs().sort_values(ascending=False, kind="stable").index
    weights = study.own_weight.set_index("head")["weight"]
    top = frame.loc[order[:200]]
    top = top.assign(weight=top["head"].map(weights))
    lead = [
        [
            "What every neuron, read as a head, writes straight to the logit of ",
            token(study.token(study.attribution.target)),
            f" after token {study.attribution.position + 1}. All MLP-derived heads together: "
            f"{signed(frame['value'].sum())} of {study.attribution.total:.2f}.",
        ]
    ]
    bars = list(zip(top["head"][:15], top["value"][:15], strict=True))
    blocks = [
        chart("neuron-effects", "The 15 largest direct effects", "bars", bars, x="logits"),
        table(
            "neurons",
            f"The {len(top)} MLP-derived heads with the largest direct effect",
            top,
            [
                column("head", "Head", "head"),
                column("layer", "Layer", "layer"),
                column("value", "Effect (logits)", "signed"),
                column("share", "Share of the logit"),
                column(
                    "weight", "Mean weight on itself", "score", "over this prompt; the rest is on the bias"
                ),
            ],
            sort="value",
            filters=("head", "layer"),
        ),
    ]
    return section("neurons", "Neurons by effect", lead, blocks, {"attribution": study.attribution.receipt})


GLOSSARY = {
    "Attention head": "Looks from each token at earlier ones (its pattern) and moves what it reads there.",
    "MLP-derived head": "An MLP neuron read as a head of dimension one: it looks at its own token "
    "or at a bias "
    "token, and the weight on its own token is the neuron's gate (Huben & Morris 2023).",
    "Bias token": "A token whose value is zero: attention to it writes nothing.",
    "OV circuit": "What a head writes to the logits for each token it may attend to.",
    "QK circuit": "How strongly a head, at one token as query, scores another as key.",
    "Order": "How many heads a path from a token to the logits passes through (Elhage et al. 2021).",
    "Frozen": "Attention patterns, gates and the norms' scales are held as they were on this "
    "prompt: the model is "
    "then linear, and its logits are a sum over paths.",
    "Effect": "What a head writes straight to a logit, no later head in between (direct logit "
    "attribution).",
    "Induction": "Attention to the token after an earlier occurrence of the present one (Olsson et "
    "al. 2022).",
    "Receipt": "The checks that a shown number passed: compared with the same thing computed another way.",
}


def glossary(study: Study) -> Block:
    """The words of the page."""
    return section("glossary", "Glossary", [], [{"type": "words", "words": GLOSSARY}], {})
