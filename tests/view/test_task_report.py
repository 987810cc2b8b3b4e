"""Reports of a behaviour, two prompts, two models: words and numbers against runs made here."""

import re
from dataclasses import replace

import pandas as pd
import pytest
import torch

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.view.report.task_study import ENOUGH, TaskStudy
from mechinterp_attn.view.report.telling_task import share, task_claims, tell_task


def plain(spans):
    return "".join(s if isinstance(s, str) else next(iter(s.values())) for s in spans)


def block(report, id):
    return next(b for s in report.data["sections"] for b in s["blocks"] if b.get("id") == id)


def words(report, id="story-told"):
    return [plain(s["spans"]) for s in block(report, id)["sentences"]]


@pytest.fixture(scope="module")
def model():
    return mia.load("attn-2l")


@pytest.fixture(scope="module")
def task(model):
    return mia.tasks.induction(model, n=12)


@pytest.fixture(scope="module")
def study(model, task):
    return TaskStudy(model, task, seed=0)


@pytest.fixture(scope="module")
def report(model, task):
    return mia.report(model, task, progress=False)


def alone(model, task, keep):
    """The metric with all heads but these given what they hold in the counterfactual."""
    _, cache = model.run_with_cache(torch.tensor(task.corrupt))

    def hook_of(bank):
        rest = [i for i, label in enumerate(bank.labels()) if label not in keep]

        def hook(z, hook):
            z = z.clone()
            z[:, :, rest] = cache[hook.name][:, :, rest]
            return z

        return bank.hook("z"), hook

    logits = model.run_with_hooks(
        torch.tensor(task.clean), fwd_hooks=[hook_of(bank) for bank in model.banks]
    )[:, -1]
    ids = task.bind(model)
    return (logits.gather(1, ids.answer) - logits.gather(1, ids.against)).mean()


def test_induction_is_told(report):
    found = words(report)
    assert re.match(
        r"On 6 prompts that nothing was found on, the logit difference is [\d.]+ on average", found[0]
    )
    assert "L1H0" in found[1]
    assert "L0H1" in found[1]
    assert found[1].split(" of 8 heads ")[1].startswith("carry it: alone")
    assert any(re.match(r"L0H1 acts on L1H0 through its keys", sentence) for sentence in found)


@torch.no_grad()
def test_the_circuit_carries_what_the_page_says(model, study, report):
    """Held-out prompts, everything outside set to the counterfactual by hooks of our own."""
    held_out = study.halves[1]
    ends = alone(model, held_out, []), alone(model, held_out, list(model.heads))
    carried = float((alone(model, held_out, study.circuit_heads) - ends[0]) / (ends[1] - ends[0]))
    assert carried == pytest.approx(float(study.at_size["faithfulness"]), abs=1e-4)  # float32 sums
    assert carried >= ENOUGH
    assert f"they bring back {share(carried)} of it" in words(report)[1]
    found = study.halves[0]
    smaller = study.circuit_heads[:-1]  # the size was chosen on the other half: one head less is not enough
    ends = alone(model, found, []), alone(model, found, list(model.heads))
    assert float((alone(model, found, smaller) - ends[0]) / (ends[1] - ends[0])) < ENOUGH


def test_the_halves_share_no_prompt(study, task):
    one, two = (set(map(tuple, half.clean)) for half in study.halves)
    assert not one & two
    assert len(one | two) == len(task)


def test_single_heads_are_those_of_effects(model, study, report):
    exact = mia.causal.effects(model, study.halves[1], heads="attention").frame.set_index("head")["effect"]
    data = block(report, "task-heads")["data"]
    measured = dict(zip(data["head"], data["effect"], strict=True))
    assert set(measured) == set(model.heads)
    for label, effect in measured.items():
        assert effect == pytest.approx(exact[label], abs=1e-3)  # numbers of a page have six digits
    first = max(measured, key=measured.get)
    told = next(sentence for sentence in words(report) if sentence.startswith("Alone, "))
    assert told.startswith(f"Alone, {first} is needed most: patched, it takes ")


def test_claims_say_which_held(study, report):
    tested = task_claims(study)
    verdicts = block(report, "claims")["data"]["verdict"]
    assert [v.startswith("✓") for v in verdicts] == [claim.holds for claim in tested]
    assert report.data["claims"] == {"tested": len(tested), "held": sum(c.holds for c in tested)}
    assert not all(claim.holds for claim in tested)  # L0H3 is ranked third and does nothing here
    for claim in tested:
        if "is needed" in claim.words:
            assert claim.holds == (claim.low > 0)


def test_prompts_stand_with_what_the_model_says(model, task, study, report):
    data = pd.DataFrame(block(report, "task-prompts")["data"])
    assert len(data) == len(task)
    assert list(data["half"].value_counts()) == [6, 6]
    held_out = study.halves[1]
    scores = held_out.score(model)
    assert data["metric"][:6].tolist() == pytest.approx(scores.tolist(), rel=1e-4)
    said = model(torch.tensor(held_out.clean))[:, -1].argmax(-1)
    texts = model.output_texts(said.tolist())
    assert list(data["said"][:6]) == [mia.core.text.shown(t) for t in texts]
    assert data["alone"][6:].isna().all()


def test_cards_and_patterns_are_of_the_example(model, study, report):
    example = study.halves[1].clean[0]
    names = model.to_str_tokens(torch.tensor(example))
    assert report.data["prompt"] == [mia.core.text.shown(t) for t in names]
    assert report.data["which_prompt"] == "the first prompt for testing"
    card = report.data["cards"]["L1H0"]
    _, cache = model.run_with_cache(torch.tensor(example)[None])
    key, weight, _ = card["looks"][0]
    pattern = cache["blocks.1.attn.hook_pattern"][0, 0, -1]
    assert weight == pytest.approx(float(pattern[key]), abs=1e-4)


def test_a_behaviour_that_is_absent_is_not_explained_away(model):
    """Answers at random: the page says that the model does not do this."""
    task = mia.tasks.induction(model, n=12)
    other = mia.Task(task.clean, corrupt=task.corrupt, answer=task.against, against=task.answer)
    told = [plain(s.spans) for s in tell_task(TaskStudy(model, other, seed=0))]
    assert len(told) == 2
    assert "hardly has this behaviour" in told[1]


def test_what_is_not_sure_is_not_told(study):
    """Effects that differ between prompts as much as they are large name no head, and no edge."""
    noise = torch.tensor([1.0, -1.0] * 3)
    unsure = replace(study.effects, effects=study.effects.effects + 100 * noise)
    loose = replace(study.paths, effects=study.paths.effects + 100 * noise)
    other = TaskStudy(study.model, study.task, seed=0)
    vars(other).update(vars(study) | {"effects": unsure, "paths": loose})
    vars(other).pop("needed", None)
    told = " ".join(plain(s.spans) for s in tell_task(other))
    assert "Of no single head that was patched is it sure" in told
    assert "acts on" not in told


def test_without_counterfactuals_heads_are_averaged(model, task):
    lone = mia.Task(task.clean, answer=task.answer, against=task.against)
    page = mia.report(model, lone, progress=False)
    assert [s["id"] for s in page.data["sections"]][:3] == ["story", "circuit", "heads"]
    assert "Without counterfactuals no circuit can be run alone" in words(page)[1]
    assert page.data["checks"]["failed"] == 0


def test_two_prompts(model, task):
    first, second = task.clean[0], task.corrupt[0]
    page = mia.report(model, [first, second], progress=False)
    said = [int(model(torch.tensor([row]))[0, -1].argmax()) for row in (first, second)]
    differ = block(page, "prompts-differ")["data"]["position"]
    assert differ == [i for i, (a, b) in enumerate(zip(first, second, strict=True)) if a != b]
    logits = model(torch.tensor([first]))[0, -1]
    found = words(page)
    assert f"the logit difference is {float(logits[said[0]] - logits[said[1]]):.3g} on average" in found[0]
    assert "held-out" not in " ".join(s["test"] for s in block(page, "story-told")["sentences"])
    finding = plain(next(s for s in page.data["sections"] if s["id"] == "comparison")["finding"])
    p = [float(model(torch.tensor([row]))[0, -1].softmax(-1)[said[0]]) for row in (first, second)]
    assert f"{100 * p[0]:.1f} %" in finding


def test_two_prompts_of_different_lengths_stand_side_by_side(model, task):
    page = mia.report(model, [task.clean[0], task.clean[1][2:]], sections=["story"], progress=False)
    assert [s["id"] for s in page.data["sections"]] == ["story", "comparison"]
    assert all(b.get("id") != "prompts-differ" for b in page.data["sections"][1]["blocks"])
    assert "Heads are patched from one into the other" in page.data["sections"][1]["lead"][0][0]


def test_two_models(model, task):
    """The second model's L1H0 writes nothing: this head alone is what differs."""
    other = mia.load("attn-2l")
    bank, index = other.heads.find("L1H0")
    with torch.no_grad():
        bank.W_O[index] = 0
    page = mia.report(model, task, sections=["prompts"], compare=other, progress=False)
    found = words(page, "difference-told")
    scores = [float(task.score(m).mean()) for m in (model, other)]
    assert found[0].startswith(
        f"The logit difference is {scores[0]:.3g} in the first model and {scores[1]:.3g}"
    )
    assert found[1].startswith("1 of 8 heads changed at all, the most L1H0")
    assert found[2].startswith("L1H0 of the second model, put into the first, brings 100 % of that change")
    data = block(page, "difference-heads")["data"]
    assert data["gained"][data["head"].index("L1H0")] == pytest.approx(scores[1] - scores[0], rel=1e-3)
    same = mia.report(model, task, sections=["prompts"], compare=mia.load("attn-2l"), progress=False)
    assert "None of 8 heads changed." in words(same, "difference-told")
    another = mia.report(model, task, sections=["prompts"], compare=mia.load("attn-1l"), progress=False)
    lead = plain(next(s for s in another.data["sections"] if s["id"] == "difference")["lead"][0])
    assert "not compared one by one" in lead


def test_what_cannot_be_asked_is_said(model, task):
    for options, text in (
        (dict(target="a"), "leave out target"),
        (dict(preset="induction"), "one prompt"),
        (dict(sections=["paths"]), "no section .'paths'"),
    ):
        with pytest.raises(MechInterpError, match=text):
            mia.report(model, task, **options)
    with pytest.raises(MechInterpError, match="the same"):
        mia.report(model, [task.clean[0], task.clean[0]])
    with pytest.raises(MechInterpError, match="3 were given"):
        mia.report(model, ["a", "b", "c"])


def test_from_the_command_line(tmp_path, model, task):
    from typer.testing import CliRunner

    from mechinterp_attn.cli import app

    file = task.save(tmp_path / "task.jsonl")
    out = tmp_path / "page.html"
    arguments = [
        "report",
        "attn-2l",
        "--task",
        str(file),
        "--section",
        "prompts",
        "--out",
        str(out),
        "--data",
    ]
    result = CliRunner().invoke(app, [*arguments, "--quiet"])
    assert result.exit_code == 0, result.output
    assert "12 prompts" in mia.Report.load(tmp_path / "page.json").data["subject"]
    wrong = CliRunner().invoke(app, ["report", "attn-2l", "text", "--task", str(file)])
    assert wrong.exit_code != 0


def test_the_page_in_a_browser(report, watched, tmp_path):
    """On a phone nothing sticks out, tokens are in one piece, and names of heads open their cards."""
    watched.page.set_viewport_size({"width": 390, "height": 800})
    page = watched.open(report.save(tmp_path / "page.html"))
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    pieces = "Array.from(document.querySelectorAll('.piece'), n => n.getClientRects().length)"
    assert set(page.evaluate(pieces)) == {1}
    page.locator("#story .story .head").first.click()
    watched.wait_until(lambda: page.locator("dialog .card-picture svg").count() == 1)
    assert "Its pattern on the first prompt for testing" in page.locator("dialog").inner_text()
    page.keyboard.press("Escape")
    page.locator(".circuit-box text[data-head]").first.click()
    assert page.locator("dialog").is_visible()
    page.keyboard.press("Escape")
    assert page.locator("[data-chart=faithfulness-curve] svg").is_visible()
    page.locator(".story a.how").nth(1).click()
    watched.wait_until(lambda: page.evaluate("location.hash") == "#faithfulness")
    watched.assert_quiet()
