"""The circuit section: its evidence against detect.induction, its patterns against a run by hand."""

import base64
import zlib

import numpy as np
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.view.report.blocks import SCALE
from mechinterp_attn.view.report.diagram import diagram, rows_of

PROMPT = "Mr. Dorling was a tall man. I had never seen Mr. Dor"


def page_of(name):
    return mia.report(mia.load(name), PROMPT, sections=["circuit"], progress=False)


@pytest.fixture(scope="module")
def page():
    return page_of("gelu-2l")


def blocks(page):
    return {b["id"]: b for b in page.data["sections"][0]["blocks"]}


def test_the_evidence_is_that_of_detect_induction(page):
    found = mia.detect.induction(mia.load("gelu-2l"))
    shown = blocks(page)
    assert set(shown["induction-heads"]["data"]["head"]) == {*found.edges["src"], *found.edges["dst"]}
    pairs = shown["induction-pairs"]["data"]
    np.testing.assert_allclose(pairs["trace_z"], found.edges["trace_z"], rtol=1e-5)  # six digits kept
    np.testing.assert_allclose(pairs["attention_without"], found.edges["attention_without"], rtol=1e-5)
    drawn = {(e["from"], e["to"], e["mode"]) for e in shown["induction-circuit"]["edges"]}
    assert drawn == set(found.circuit().edges)
    assert ["L0H2"] in shown["induction-circuit"]["rows"]
    assert "3 of 3 views" in "".join(s for s in page.data["sections"][0]["finding"] if isinstance(s, str))


def test_patterns_without_the_earlier_head_are_those_of_a_run_without_it(page):
    model = mia.load("gelu-2l")

    def hook(z, hook):
        z = z.clone()
        z[:, :, 2] = z[:, :, 2].mean(1, keepdim=True)
        return z

    seen = {}

    def keep(pattern, hook):
        seen["pattern"] = pattern[0, 3].detach()

    hooks = [("blocks.0.attn.hook_z", hook), ("blocks.1.attn.hook_pattern", keep)]
    with torch.no_grad():
        model.run_with_hooks(PROMPT, fwd_hooks=hooks)
    group = next(g for g in blocks(page)["induction-patterns"]["groups"] if g["title"] == "Without L0H2")
    weights = next(h["weights"] for h in group["heads"] if h["head"] == "L1H3")
    codes = np.frombuffer(zlib.decompress(base64.b64decode(weights)), np.uint8)
    n = len(seen["pattern"])
    error = np.abs(codes.reshape(n, n + 1)[:, :-1] / SCALE - seen["pattern"].numpy())
    assert error.max() <= 0.5 / SCALE + 1e-6


def test_where_there_is_no_circuit_the_section_says_so():
    section = page_of("attn-1l").data["sections"][0]
    assert section["finding"] == ["No induction circuit: no pair of heads is named by two of three views"]
    assert "induction-circuit" not in {b["id"] for b in section["blocks"]}


def test_rows_stand_by_layer_and_edges_in_their_colours():
    edges = [("embed", "L0H1", "V"), ("L0H1", "L1H0", "K"), ("L1H0", "L1N*", ""), ("L1N*", "logits", "")]
    rows = rows_of(edges)
    assert rows == [["embed"], ["L0H1"], ["L1H0"], ["L1N*"], ["logits"]]
    drawn = [{"from": a, "to": b, "mode": m, "weight": 1.0, "title": "</script>"} for a, b, m in edges]
    svg = diagram({"rows": rows, "edges": drawn, "caption": "<b>"})
    assert "mode-K" in svg
    assert "mode-V" in svg
    assert "</script>" not in svg
    assert "<b>" not in svg


def test_chains_stand_before_single_paths_and_the_graph_says_what_it_holds():
    model = mia.load("gelu-2l")
    page = mia.report(model, PROMPT, sections=["paths", "graph"], progress=False)
    paths, graph = page.data["sections"]
    frozen = mia.paths.freeze(model, PROMPT)
    found = mia.paths.top_circuits(frozen, top_k=20, progress=False)
    assert paths["blocks"][0]["id"] == "top-circuits"
    shown = paths["blocks"][0]["data"]["contribution"]
    np.testing.assert_allclose(shown, found.frame["contribution"], rtol=1e-4)  # six digits of float32
    made = mia.paths.attribution_graph(frozen)
    words = graph["finding"][0]  # seen folded and unfolded, so said once
    assert f"{made.inside:.0%} of the target runs on paths inside the graph" in words
    assert f"{made.faithfulness:.0%} of the way" in words
