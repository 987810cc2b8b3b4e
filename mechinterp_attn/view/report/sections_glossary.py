"""The words of the page, each with its meaning, its page of the documentation and its source."""

from __future__ import annotations

from importlib import metadata

from mechinterp_attn.view.report.blocks import Block, Spans, section
from mechinterp_attn.view.report.study import Study

# Word: meaning, the page of the documentation, the source.
HUBEN = ("Huben & Morris 2023", "https://arxiv.org/abs/2309.08593")
ELHAGE = ("Elhage et al. 2021", "https://transformer-circuits.pub/2021/framework/index.html")
OLSSON = ("Olsson et al. 2022", "https://arxiv.org/abs/2209.11895")
GLOSSARY: dict[str, tuple[str, str, tuple[str, str] | None]] = {
    "Attention head": (
        "Looks from each token at earlier ones (its pattern) and moves what it reads there.",
        "idea",
        ELHAGE,
    ),
    "MLP-derived head": (
        "An MLP neuron read as a head of dimension one: it looks at its own token or at a bias token, and "
        "the weight on its own token is the neuron's gate.",
        "idea",
        HUBEN,
    ),
    "Bias token": ("A token whose value is zero: attention to it writes nothing.", "theorems", HUBEN),
    "Mode": (
        "How neurons became heads: exact (the activation's own gate), silu (the paper's softmax) or "
        "mixture (several softmaxes a neuron).",
        "modes",
        None,
    ),
    "OV circuit": ("What a head writes to the logits for each token it may attend to.", "circuits", ELHAGE),
    "QK circuit": (
        "How strongly a head, at one token as query, scores another as key.",
        "circuits",
        ELHAGE,
    ),
    "Composition": (
        "How much of what one head writes a later head reads with its queries (Q), keys (K) or values (V).",
        "circuits",
        ELHAGE,
    ),
    "Frozen": (
        "Attention patterns, gates and the norms' scales are held as they were on this prompt: the model "
        "is then linear, and its logits are a sum over paths.",
        "paths",
        ELHAGE,
    ),
    "Path": ("A way from a token or a bias through heads to a logit.", "paths", ELHAGE),
    "Order": ("How many heads a path from a token to the logits passes through.", "paths", ELHAGE),
    "Term importance": ("What the paths of one order change in the loss.", "paths", ELHAGE),
    "Effect": (
        "What a head writes straight to a logit, no later head in between (direct logit attribution).",
        "paths",
        None,
    ),
    "Cut": (
        "A head that is cut holds its average over the prompt in place of what it holds; all behind it "
        "follows. What the prediction loses then is its effect when cut.",
        "detect",
        None,
    ),
    "Influence": (
        "Share of the target that runs through a node of the graph over all paths, signs aside.",
        "paths",
        None,
    ),
    "Induction": (
        "Attention to the token after an earlier occurrence of the present one.",
        "detect",
        OLSSON,
    ),
    "Receipt": (
        "The checks that a shown number passed: compared with the same thing computed another way.",
        "report",
        None,
    ),
}


def glossary(study: Study) -> Block:
    """The words of the page, each with its page of the documentation and its source."""
    site = documentation()
    words = {
        word: {
            "meaning": meaning,
            "links": [{"text": f"docs: {page}", "url": f"{site}/{page}.html" if site else None}]
            + ([{"text": source[0], "url": source[1]}] if source else []),
        }
        for word, (meaning, page, source) in GLOSSARY.items()
    }
    finding: Spans = ["What the words of this page mean"]
    block = {"type": "words", "words": words}
    return section("glossary", "Glossary", [], [block], {}, finding=finding)


def documentation() -> str | None:
    """Where the documentation of this installation is published, if its metadata says so."""
    for entry in metadata.metadata("mechinterp_attn").get_all("Project-URL") or ():
        name, _, url = entry.partition(",")
        if name.strip().lower() == "documentation" and url.strip().startswith("https://"):
            return url.strip().rstrip("/")
    return None
