"""Circuits as people write them, in YAML or as a mapping: read, brought into one form, and checked."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, NotRequired

from pydantic import Field, with_config
from typing_extensions import TypedDict

from mechinterp_attn.causal.cuts import EDGE
from mechinterp_attn.core.errors import MechInterpError, listing
from mechinterp_attn.core.fields import short, wrong_fields
from mechinterp_attn.core.reading import parse_yaml, read_text
from mechinterp_attn.detect.induction_circuit import ATTENDS

Spec = Mapping[str, Any] | str | Path

DEPENDS = 0.3  # share of what a head holds that depends on an edge, likewise
Role = Literal["previous_token", "current_token", "first_token", "duplicate_token", "induction", "member"]
Share = Annotated[float, Field(allow_inf_nan=False)]
_CLOSED = with_config(extra="forbid")  # no key beside those that are named
Text = Annotated[str, Field(min_length=1)]


@_CLOSED
class _Prompt(TypedDict):
    prompt: Text
    answer: Text


@_CLOSED
class Behaviour(TypedDict):
    """What a circuit does: the repeats in random tokens, texts, or the answers to prompts."""

    task: NotRequired[Literal["induction"]]
    texts: NotRequired[Annotated[list[Text], Field(min_length=1)]]
    prompts: NotRequired[Annotated[list[_Prompt], Field(min_length=1)]]
    carries: NotRequired[Share]
    needed: NotRequired[Share]


@_CLOSED
class _Form(TypedDict):
    """A spec with every default written out."""

    name: NotRequired[str]
    heads: Annotated[dict[str, dict[Role, Share]], Field(min_length=1)]
    edges: list[dict[str, Share]]
    behaviour: NotRequired[Behaviour]


@dataclass(frozen=True)
class Written:
    """A circuit that was read and is well-formed.

    Attributes:
        heads: for every label or pattern its roles, each with the least score.
        edges: ``L0H2 -K-> L1H3``, each with the least share.
        behaviour: None where the circuit names none.
    """

    heads: Mapping[str, Mapping[str, float]]
    edges: tuple[tuple[str, float], ...]
    behaviour: Behaviour | None


def read_spec(spec: Spec, *, shown: bool = False) -> Written:
    """A circuit as its author wrote it.

    Args:
        spec: a mapping, YAML text, or the path of a YAML file.
        shown: a task beside it shows the behaviour, so that the spec has no more than numbers for it.

    Raises:
        MechInterpError: with every mistake: unknown keys, keys that stand twice, values of the wrong type.
    """
    data: Any = read_text(spec) if isinstance(spec, Path) else spec
    if isinstance(data, str):
        try:
            data = parse_yaml(data)
        except ValueError as error:
            raise MechInterpError(f"the circuit is not YAML: {error}") from error
    if not isinstance(data, Mapping):
        raise MechInterpError(
            f"the circuit is {short(data)}; expected a mapping with heads, edges and behaviour, as YAML or "
            "dict, or the pathlib.Path of a YAML file"
        )
    whole = _whole(data)
    wrong = wrong_fields(_Form, whole)
    if not wrong:
        wrong = [
            f"edge {edge!r}, expected 'L0H2 -K-> L1H3' (or -Q-> or -V->)"
            for one in whole["edges"]
            for edge in one
            if not EDGE.fullmatch(edge)
        ]
    if not wrong and "behaviour" in whole:
        asked = [name for name in ("task", "texts", "prompts") if name in whole["behaviour"]]
        if shown and asked:
            wrong.append(f"behaviour has {' and '.join(asked)}, and a task was given too; leave one out")
        elif len(asked) != 1 and not shown:
            said = " and ".join(asked) or "nothing to look at"
            wrong.append(f"behaviour has {said}; expected task: induction, or texts, or prompts")
    if wrong:
        raise MechInterpError(listing("the circuit cannot be read", wrong))
    edges = ((" ".join(edge.split()), least) for one in whole["edges"] for edge, least in one.items())
    return Written(whole["heads"], tuple(edges), whole.get("behaviour"))


def _whole(data: Mapping[str, Any]) -> dict[str, Any]:
    """A spec with its short forms written out; what is neither form stays, to be refused."""
    whole = {str(key): value for key, value in data.items()}
    heads, edges = whole.get("heads"), whole.get("edges") or []
    if isinstance(heads, Mapping):
        whole["heads"] = {
            str(label): {role: ATTENDS} if isinstance(role, str) else role for label, role in heads.items()
        }
    whole["edges"] = edges
    if isinstance(edges, list | tuple):
        whole["edges"] = [{edge: DEPENDS} if isinstance(edge, str) else edge for edge in edges]
    if isinstance(whole.get("behaviour"), str):
        whole["behaviour"] = {"task": whole["behaviour"]}
    return whole
