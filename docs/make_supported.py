"""Writes supported.md, the page of supported models, from the table that the tests run.

python docs/make_supported.py
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]

_HEAD = """\
# Supported models

Written by `docs/make_supported.py` from the table in `tests/conversion/architectures.py`; do not edit it.

One row for each architecture that TransformerLens {release} has an adapter for. **Exact** means: a tiny
model with random weights, every gain and bias far from trivial, converts to a model that gives Hugging
Face's own logits and residual streams, within 1e-5 of their scale in float32 (1e-9 in float64 where the
whole of the source runs in it), on prompts longer than every window and every length at which its positions
change. What is refused says why, and `mia.load` says the same, before anything is computed.

A model from a course, or one that is refused only because TransformerLens cannot boot it, can be given as
[weights under TransformerLens's names](own_model.md).

{counts}

| architecture | exact | refused |
|---|---|---|
"""
_OTHER = "reads or writes more than one text (images, sound, or an encoder and a decoder)"


def page() -> str:
    """The page's text."""
    if str(ROOT) not in sys.path:
        sys.path.insert(0, str(ROOT))
    import transformers
    from transformer_lens.factories.architecture_adapter_factory import SUPPORTED_ARCHITECTURES

    from tests.conversion.architectures import CASES, REFUSED

    rows, exact, refused, untried = [], 0, 0, 0
    for architecture in sorted(SUPPORTED_ARCHITECTURES, key=str.lower):
        own = [name for name, (kind, _) in CASES.items() if kind == architecture]
        good = [f"`{name}`" for name in own if name not in REFUSED]
        bad = [f"`{name}`: {_reasons(REFUSED[name])}" for name in own if name in REFUSED]
        if architecture == "TransformerLensNative":
            good = ["all that it can express"]
        elif not own:
            untried += 1
            if not hasattr(transformers, architecture):
                bad = ["not tried: its code is not part of transformers"]
            else:
                bad = ["not tried" if architecture.endswith("ForCausalLM") else _OTHER]
        exact += bool(good)
        refused += bool(own) and not good
        rows.append(f"| {architecture} | {', '.join(good)} | {'; '.join(bad)} |\n")
    counts = (
        f"{exact} architectures are exact in at least one usual form, {refused} are refused, and {untried} "
        "are no language models of one text, or were not tried."
    )
    return _HEAD.format(release="4.3", counts=counts) + "".join(rows)


def _reasons(reasons: list[str]) -> str:
    return "; ".join(reason.strip().removesuffix(" of") for reason in reasons).replace(
        "this kind", "this kind of it"
    )


if __name__ == "__main__":
    (ROOT / "docs" / "supported.md").write_text(page(), encoding="utf-8")
