"""The circuits behind the prediction: induction, found three ways, and the prompt's strongest edges."""

from __future__ import annotations

import pandas as pd

from mechinterp_attn import causal, detect
from mechinterp_attn.causal.wires import edge_name
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.core.plan import Call, plan
from mechinterp_attn.core.text import number, shown
from mechinterp_attn.view.report.blocks import (
    Block,
    Spans,
    column,
    head,
    missing,
    patterns,
    section,
    table,
)
from mechinterp_attn.view.report.diagram import rows_of
from mechinterp_attn.view.report.study import Study

FLOPS = 4e12  # of the search for the induction circuit, and of the edges: some ten seconds
EDGES = 12  # drawn of the prompt's own
VIEWS = {"by_behaviour": "Behaviour", "by_weights": "Weights", "by_intervention": "Cutting"}


def circuit(study: Study) -> Block | None:
    """Diagram, evidence and patterns of the induction circuit; the strongest edges of the prediction."""
    if not study.n_attention:
        return None
    blocks, receipts, lead = [], {}, []
    finding: Spans
    found = _induction(study)
    if isinstance(found, str):
        finding = [found]
    elif not found.found:
        finding = ["No induction circuit: no pair of heads is named by two of three views"]
        receipts["induction circuit"] = found.receipt
    else:
        finding = _sentence(found)
        lead.append(
            [
                "Heads that find an earlier occurrence of the present token and copy what followed, and "
                "the heads that show them where. Three views: attention on repeated random tokens, weights "
                "alone, and cutting. Repetition is worth "
                f"{found.gain:.2f} nats a token to this model."
            ]
        )
        blocks += _evidence(study, found)
        receipts["induction circuit"] = found.receipt
    edges = _edges(study)
    if isinstance(edges, str):
        lead.append([edges])
    else:
        blocks += _strongest(edges)
        lead.append(
            [
                "The prompt's own edges are estimates from one backward pass: what the answer's "
                "log-probability would lose if the reader saw the source as its "
                f"{_average(study)}. All neurons of an MLP are one end (L0N*). An estimate is a slope: it "
                "misses what attention that is sure of itself hangs on, which cuts show."
            ]
        )
    return section("circuit", "Circuit", lead, blocks, receipts, finding=finding)


def _average(study: Study) -> str:
    return "average over the prompt" if study.causes.patch == "mean" else "absence"


def induction_call(study: Study) -> Call:
    """The search for the induction circuit."""
    return detect.induction, (study.model,), {"seed": study.seed}


def edges_call(study: Study) -> Call:
    """The edges of the prediction."""
    options = {"units": "edges", "patch": study.causes.patch, "pools": True}
    return causal.discover, (study.model, study.causes.task, "gradient"), options


def _induction(study: Study) -> detect.Induction | str:
    """The circuit, or why it was not looked for."""
    if study.model.spec.no_next_token is not None:
        return f"No search for an induction circuit: {study.model.spec.no_next_token}"
    function, args, options = induction_call(study)
    try:
        cost = plan(function, *args, **options)
        if cost.flops > FLOPS:
            return (
                f"No search for an induction circuit here ({cost}); mia.detect.induction(model) makes one"
            )
        return function(*args, **options)
    except MechInterpError as error:  # a context or vocabulary too small for repeated tokens
        return f"No search for an induction circuit: {shown(str(error))}"


def _edges(study: Study) -> causal.Discovery | str:
    """The edges of this prediction, or why they are left out."""
    function, args, options = edges_call(study)
    try:
        cost = plan(function, *args, **options)
        if cost.flops > FLOPS:
            return (
                f"The edges of this prediction are left out here ({cost}); mia.causal.discover finds them."
            )
        return function(*args, **options)
    except MechInterpError as error:
        return f"The edges of this prediction are not shown: {shown(str(error))}."


def _sentence(found: detect.Induction) -> Spans:
    spans: Spans = []
    for dst, group in found.edges.groupby("dst", sort=False):
        row = found.frame[found.frame["head"] == dst].iloc[0]
        spans += ["; "] if spans else []
        for i, src in enumerate(group["src"]):
            spans += [", "] if i else []
            spans.append(head(str(src)))
        spans += [" shows ", head(str(dst)), f" where to look ({row['views']} of 3 views)"]
    return spans


def picture(id: str, caption: str, edges: list[tuple[str, str, str]], weights: list[float]) -> Block:
    """A circuit as a diagram: its edges, the thicker the larger their weights."""
    largest = max(map(abs, weights), default=1.0) or 1.0
    return {
        "type": "circuit",
        "id": id,
        "caption": caption,
        "rows": rows_of(edges),
        "edges": [
            {
                "from": src,
                "to": dst,
                "mode": mode,
                "weight": number(abs(weight) / largest, 3),
                "title": edge_name(src, dst, mode),
            }
            for (src, dst, mode), weight in zip(edges, weights, strict=True)
        ],
    }


def _evidence(study: Study, found: detect.Induction) -> list[Block]:
    """Diagram, the three views of its heads, its edges, and patterns with and without the earlier head."""
    edges = list(found.circuit().edges)
    members = {*found.edges["src"], *found.edges["dst"]}
    frame = found.frame[found.frame["head"].isin(members)].copy()
    for view in VIEWS:
        frame[view] = frame[view].map({True: "✓", False: "✗"})
    numbers = ("induction", "previous_token", "trace_z", "copying_z", "loss_change", "loss_z")
    frame = frame.assign(role=frame["role"].str.replace("_", " ")).assign(
        **{name: missing(frame[name]) for name in numbers}
    )
    columns = [
        column("head", "Head", "head"),
        column("role", "Role", "badge"),
        *(column(view, name, "text") for view, name in VIEWS.items()),
        column("induction", "Attention: induction", "score"),
        column("previous_token", "Attention: previous token", "score"),
        column(
            "trace_z", "Weights: z of K-composition", "number", "above random heads in the earlier place"
        ),
        column("copying_z", "Weights: z of copying"),
        column("loss_change", "Cut: loss (nats)", "number", "rise of the loss on repeated random tokens"),
        column("loss_z", "Cut: z", "number", "above random directions of the same size"),
    ]
    pairs = [
        column("src", "Earlier", "head"),
        column("dst", "Later", "head"),
        column("trace_z", "z of K-composition"),
        column("attention", "Induction attention", "score"),
        column("attention_without", "Without the earlier head", "score"),
    ]
    groups = []
    whole = {str(dst): ("whole model", study.pattern(str(dst))) for dst in found.edges["dst"].unique()}
    groups.append(("attention", "As they are", whole))
    for src, group in found.edges.groupby("src", sort=False):
        without = study.causes.patterns_without(str(src))
        cut = {str(dst): (f"{src} cut", without[str(dst)]) for dst in group["dst"]}
        groups.append(("attention", f"Without {src}", cut))
    return [
        picture("induction-circuit", "The induction circuit", edges, [0.5] * len(edges)),
        table("induction-heads", "Its heads, seen three ways on random tokens", frame, columns),
        table("induction-pairs", "Its pairs", found.edges, pairs),
        patterns("induction-patterns", study.names, groups, caption="With and without the earlier head"),
    ]  # fmt: skip


def _strongest(found: causal.Discovery) -> list[Block]:
    """The edges with the largest estimates, as a diagram and as a table."""
    chosen = found.circuit(min(EDGES, len(found.frame)))
    names = [edge_name(*edge) for edge in chosen.edges]
    loses = [-score for score in chosen.scores]  # scores are of the loss
    frame = pd.DataFrame({"edge": names, "loses": loses})
    columns = [column("edge", "Edge", "text"), column("loses", "Worth (nats, estimated)", "signed")]
    return [
        picture(
            "prompt-circuit",
            f"The {len(names)} edges that matter most to this prediction, by estimate",
            list(chosen.edges),
            list(chosen.scores),
        ),
        table("prompt-edges", "The same edges", frame, columns),
    ]
