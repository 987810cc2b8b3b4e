"""The report's story: its numbers against runs made here by hand, and its words against the numbers."""

import re
from dataclasses import replace

import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.view.report.arcs import kept
from mechinterp_attn.view.report.causes import Causes, Look
from mechinterp_attn.view.report.story import Helper, Story, find_story
from mechinterp_attn.view.report.telling import claims, percent, tell, through_patterns

PROMPT = "Mr. Dorling was a tall man. I had never seen Mr. Dor"
LONE = "The king was in his counting house, counting out his"  # no circuit, in the model of one layer


def plain(sentence):
    spans = sentence["spans"] if isinstance(sentence, dict) else sentence.spans
    return "".join(s if isinstance(s, str) else next(iter(s.values())) for s in spans)


def page_of(name, prompt=PROMPT, **options):
    options = {"sections": ["story"], "progress": False} | options
    return mia.report(mia.load(name), prompt, **options)


def blocks(report):
    return {b["id"]: b for b in report.data["sections"][0]["blocks"]}


@pytest.fixture(scope="module")
def gelu():
    return mia.load("gelu-2l")


@pytest.fixture(scope="module")
def report(gelu):
    return mia.report(gelu, PROMPT, sections=["story"], progress=False)


@pytest.fixture(scope="module")
def told(gelu):
    frozen = mia.paths.freeze(gelu, PROMPT)
    attribution = mia.paths.logit_attribution(frozen)
    direct = attribution.frame.set_index("head")["value"].to_dict()
    return find_story(Causes(frozen, attribution.target, attribution.position), direct)


def by_hand(model, prompt, target, hooks):
    with torch.no_grad():
        logits = model.run_with_hooks(prompt, fwd_hooks=hooks)
    return float(logits[0, -1].softmax(-1)[target])


def averaged(model, labels, at=slice(None)):
    """Hooks that put a head's mean over the prompt in its place."""

    def hook_of(index):
        def hook(z, hook):
            z = z.clone()
            z[:, at, index] = z[:, :, index].mean(1, keepdim=True)
            return z

        return hook

    found = (model.heads.find(label) for label in labels)
    return [(bank.hook("z"), hook_of(index)) for bank, index in found]


def test_the_demo_is_told(report):
    words = [plain(s) for s in blocks(report)["story-told"]["sentences"]]
    assert (
        words[0] == "After or, the model gives ling a probability p of 91.5 %, its first choice of 1,024."
    )
    assert words[1] == (
        "At or, L1H3 and L1H1 look back to ling (53 % and 75 % of their attention), because L0H2 marked it "
        "as following or."
    )
    assert words[2].startswith("Both copy it: with these looks taken away, p falls from 91.5 % to 0.00")
    assert words[3].startswith("Without L0H2 there, p falls from 91.5 % to 0.013 %")
    assert "acts through patterns" in words[3]
    assert "They are enough among attention heads: with the other 5 attention heads cut" in words[4]
    assert 4 <= len(words) <= 6


def test_its_numbers_are_those_of_runs_by_hand(gelu, told):
    """Cuts, held patterns and looks taken away, each made again with nothing but hooks."""
    ids = gelu.as_tokens(PROMPT)
    target = int(gelu(ids)[0, -1].argmax())
    helper = told.helpers[0]
    cut = averaged(gelu, [helper.head], helper.at)
    # float32 through two layers
    assert by_hand(gelu, ids, target, []) == pytest.approx(told.p, rel=1e-5)
    assert by_hand(gelu, ids, target, cut) == pytest.approx(helper.p, rel=1e-3)
    _, cache = gelu.run_with_cache(ids)
    names = [f"blocks.{i}.attn.hook_pattern" for i in range(2)]
    held = [(name, lambda x, hook, name=name: cache[name]) for name in names]
    assert by_hand(gelu, ids, target, [*cut, *held]) == pytest.approx(helper.p_held, rel=1e-3)
    rest = [f"L{i}H{j}" for i in range(2) for j in range(4) if f"L{i}H{j}" not in told.named]
    assert by_hand(gelu, ids, target, averaged(gelu, rest)) == pytest.approx(told.p_alone, rel=1e-3)

    def blind(x, hook):
        x = x.clone()
        x[:, [1, 3], 20, 5] = 0
        return x

    assert by_hand(gelu, ids, target, [(names[1], blind)]) == pytest.approx(told.p_blind, rel=1e-3)
    assert told.weights == pytest.approx([float(cache[names[1]][0, j, 20, 5]) for j in (3, 1)], rel=1e-5)


def test_the_caller_sees_nothing_of_it(gelu, told):
    assert not any(point.has_hooks() for point in gelu.hook_dict.values())


def test_sentences_lead_to_what_backs_them(gelu):
    page = mia.report(gelu, PROMPT, progress=False)
    ids = {s["id"] for s in page.data["sections"]} | {
        b["id"] for s in page.data["sections"] for b in s["blocks"] if "id" in b
    }
    for sentence in blocks(page)["story-told"]["sentences"]:
        assert sentence["see"] in ids
        assert sentence["test"]


def test_without_a_circuit_it_says_so():
    report = page_of("attn-1l", LONE)
    words = " ".join(plain(s) for s in blocks(report)["story-told"]["sentences"])
    assert "No circuit was found" in words
    assert "look back" not in words
    assert blocks(report)["prompt-arcs"]["arcs"] == []
    model = mia.load("attn-1l")
    ids = model.as_tokens(LONE)
    target = int(model(ids)[0, -1].argmax())
    p = {label: by_hand(model, ids, target, averaged(model, [label])) for label in model.heads}
    label = min(p, key=p.get)
    assert f"matters most is {label}: without it, p is {percent(p[label])}" in words
    every = by_hand(model, ids, target, averaged(model, list(model.heads)))
    assert f"Without all 4 attention heads, p is still {percent(every)}" in words


def test_the_probability_is_that_of_the_position(gelu):
    report = page_of("gelu-2l", position=4, target="ling")
    ids = gelu.as_tokens(PROMPT)
    target = gelu.to_single_token("ling")
    p = float(gelu(ids)[0, 4].detach().softmax(-1)[target])
    words = plain(blocks(report)["story-told"]["sentences"][0])
    assert f"probability p of {percent(p)}" in words
    assert "its choice number" in words
    assert blocks(report)["prompt-arcs"]["p"] == percent(p)
    assert blocks(report)["prompt-arcs"]["position"] == 4


def test_claims_that_do_not_hold_are_counted():
    report = page_of("attn-2l", LONE)
    rows = blocks(report)["claims"]["data"]
    verdicts = rows["verdict"]
    assert "✗ did not hold" in verdicts
    held = sum(v == "✓ held" for v in verdicts)
    assert report.data["claims"] == {"tested": len(verdicts), "held": held}
    assert f"{held} of {len(verdicts)} claims held" in report.html()


STORY = Story(
    p=0.8,
    looks=(Look("L1H0", 7, 3),),
    weights=(0.6,),
    p_blind=0.1,
    copies=False,
    helpers=(Helper("L0H1", 3, 1, 0.7, (0.05,), 0.2, 0.7, -0.02),),
    p_alone=0.1,
    p_none=0.01,
    most=("L0H1", 0.05),
    neuron=("L0N3", 0.02, 24),
)
TOKENS = [f"t{i}" for i in range(8)]


def told_of(story):
    return [plain(s) for s in tell(story, TOKENS, 7, "x", 2, 50, 8)]


def test_words_follow_the_numbers():
    words = told_of(STORY)
    assert words == [
        "After t7, the model gives x a probability p of 80.0 %, its choice number 2 of 50.",
        "At t7, L1H0 looks back to t3 (60 % of its attention), because L0H1 there reads t1 (70 %).",
        "What is read there raises x: with this look taken away, p falls from 80.0 % to 10.0 %.",
        "Without L0H1 there, p falls from 80.0 % to 20.0 %; with all attention patterns held as they were, "
        "the same cut leaves 70.0 %: it acts through patterns, where its direct effect on the logit "
        "(−0.02) does not show.",
        "They are not all: with the other 6 attention heads cut, p falls to 10.0 %.",
        "The neuron that matters most, of 24 cut one by one, is L0N3: without it, p is 2.0 %.",
    ]


def test_what_does_not_hold_is_not_said():
    helper = STORY.helpers[0]
    words = told_of(replace(STORY, helpers=(replace(helper, p_held=0.25),)))
    assert not any("acts through patterns" in w for w in words)
    assert any("patterns are not all" in w for w in words)
    words = told_of(replace(STORY, helpers=()))
    assert not any("because" in w or "there, p falls" in w for w in words)
    words = told_of(replace(STORY, p_alone=0.7, copies=True))
    assert "It copies it" in words[2]
    assert any("are enough among attention heads" in w and "70.0 %" in w for w in words)
    words = told_of(Story(p=0.5))
    assert len(words) == 2
    assert "no heads" in words[1]
    assert "no attention heads" in told_of(Story(p=0.5, neuron=("L0N1", 0.4, 3)))[1]


def test_claims_hold_or_do_not():
    found = {
        c.words: c
        for c in claims(STORY, {"L0H1": -0.2, "L1H0": 2.0}, {"L0H1": (1.0, 0.3), "L1H0": (0.5, 0.5)})
    }
    assert not next(c for w, c in found.items() if "lowers the answer" in w).holds  # it raises it when cut
    assert next(c for w, c in found.items() if "raises the answer" in w).holds
    assert not next(c for w, c in found.items() if "are enough" in w).holds
    assert next(c for w, c in found.items() if "acts through attention patterns" in w).holds


def test_through_patterns_is_half_of_the_loss():
    assert through_patterns(0.8, 0.2, 0.5)
    assert not through_patterns(0.8, 0.2, 0.3)


@pytest.mark.parametrize(
    ("p", "text"),
    [(0.915, "91.5 %"), (1.0, "100.0 %"), (0.0123, "1.2 %"), (0.00123, "0.12 %"), (9.1e-5, "0.0091 %"),
     (1e-9, "under 0.0001 %"), (0.0, "0 %")],
)  # fmt: skip
def test_probabilities_as_people_read_them(p, text):
    assert percent(p) == text


def test_the_table_of_heads_has_both_effects_and_says_where_they_disagree(gelu):
    page = mia.report(gelu, PROMPT, sections=["heads"], progress=False)
    rows = blocks(page)["heads"]["data"]
    at = rows["head"].index("L0H2")
    ids = gelu.as_tokens(PROMPT)
    target = int(gelu(ids)[0, -1].argmax())
    p = by_hand(gelu, ids, target, averaged(gelu, ["L0H2"]))
    assert rows["p"][at] == pytest.approx(p, rel=1e-3)
    assert rows["way"][at] == "patterns"
    assert abs(rows["effect"][at]) < 0.3 < rows["cut"][at]
    assert all(
        c is not None for c, kind in zip(rows["cut"], rows["kind"], strict=True) if kind == "attention"
    )
    assert (
        sum(c is not None for c, kind in zip(rows["cut"], rows["kind"], strict=True) if kind == "mlp") == 24
    )
    assert rows["way"][rows["head"].index("L1H3")] == ""


def test_short_prompts_are_cut_to_nothing(gelu):
    report = mia.report(gelu, [5, 6], sections=["story"], progress=False)
    assert "holds nothing in place" in blocks(report)["claims"]["caption"]


def test_no_head_is_named_for_and_against():
    page = page_of("attn-1l", sections=["summary"])
    lead = plain({"spans": page.data["sections"][0]["lead"][0]})
    named = re.findall(r"(L\d+H\d+) \(([+−])", lead)
    assert len({label for label, _ in named}) == len(named)


def test_only_what_fits_is_drawn():
    tokens = ["word"] * 100
    places = kept(tokens, [3, 50, 99], 300.0)
    assert {3, 50, 99} <= set(places)
    assert len(places) < 12
    assert places == sorted(places)
    assert kept(tokens[:4], [1], 300.0) == [0, 1, 2, 3]
