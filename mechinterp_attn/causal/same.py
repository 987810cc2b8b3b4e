"""Whether two models differ in their weights only, so that their heads can be compared one by one."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.fields import short
from mechinterp_attn.model.attention_only import AttentionOnlyModel

SHOWN = 3  # tokens that an error names


def need_same(one: AttentionOnlyModel, two: AttentionOnlyModel) -> None:
    """Refuse two models that cannot be compared head by head.

    Args:
        one: the first model.
        two: the second one.

    Raises:
        MechInterpError: everything in which they differ: shapes, rules, dtype, device, tokens; or the model
            has no heads.
    """
    wrong = []
    for field in fields(one.spec):
        ours, theirs = (getattr(model.spec, field.name) for model in (one, two))
        if ours != theirs and field.name != "n_ctx":  # a longer context changes no head
            wrong.append(f"{field.name} is {short(ours)} and {short(theirs)}")
    for what, ours, theirs in (
        ("dtype", one.W_E.dtype, two.W_E.dtype),
        ("device", one.W_E.device, two.W_E.device),
    ):
        if ours != theirs:
            wrong.append(f"{what} is {ours} and {theirs}; move one with .to(...)")
    wrong += _tokens(one.tokenizer, two.tokenizer)
    if wrong:
        raise MechInterpError(listing("these two models cannot be compared head by head", wrong))
    one.heads.required()


def _tokens(one: Any, two: Any) -> list[str]:
    """In what two vocabularies differ; nothing where a model has none."""
    if one is None or two is None or one is two:
        return []
    ours, theirs = one.get_vocab(), two.get_vocab()
    if ours == theirs:
        return []
    other = [text for text in sorted(ours) if theirs.get(text) != ours[text]][:SHOWN]
    named = ", ".join(f"{text!a} is {ours[text]} and {theirs.get(text, 'nothing')}" for text in other)
    return [
        f"their tokenizers differ ({len(ours):,} and {len(theirs):,} tokens{'; ' if named else ''}{named})"
    ]
