"""What a report would cost, against the operations that it makes and the analyses that it asks for."""

import pytest
from torch.utils.flop_counter import FlopCounterMode

import mechinterp_attn as mia
from mechinterp_attn.cli import app
from mechinterp_attn.view.report.cost import NEEDS
from mechinterp_attn.view.report.presets import SECTIONS
from mechinterp_attn.view.report.study import Study
from tests.view.conftest import PROMPT


@pytest.mark.parametrize(
    ("options", "most"), [({}, 4), ({"sections": ["story"]}, 8)], ids=["overview", "story"]
)
def test_the_plan_bounds_the_operations(model, options, most):
    """Torch counts the matrix products that are made. The plan counts all that a search may take: random
    weights have no story, whose helpers would be searched for."""
    plan = mia.plan(mia.report, model, PROMPT, **options)
    with FlopCounterMode(display=False) as counted:
        mia.report(model, PROMPT, progress=False, **options)
    assert counted.get_total_flops() <= plan.flops <= most * counted.get_total_flops()


@pytest.mark.parametrize("section", SECTIONS)
def test_each_section_needs_what_it_says(model, monkeypatch, section):
    """An analysis that a section asks for and no plan knows would be missing from the cost."""
    asked, made = set(), Study._made
    monkeypatch.setattr(Study, "_made", lambda study, name: asked.add(name) or made(study, name))
    mia.report(model, PROMPT, sections=[section], progress=False)
    always = {"attribution", "scores", *(f"composition_{side}" for side in "KQV")}  # for the cards of heads
    assert asked - always == set(NEEDS.get(section, ()))


def test_a_second_model_costs_too(model):
    alone = mia.plan(mia.report, model, PROMPT, sections=["heads"])
    both = mia.plan(mia.report, model, PROMPT, sections=["heads"], compare=model)
    assert both.flops > alone.flops
    assert both.what == "a report of 2 sections on 13 tokens"


def test_a_model_without_heads_and_bad_input():
    assert mia.plan(mia.report, mia.load("bigram-0l"), PROMPT).flops > 0
    with pytest.raises(mia.MechInterpError, match="no section"):
        mia.plan(mia.report, mia.load("attn-1l"), PROMPT, sections=["nonsense"])


def test_the_command_line_says_it_and_writes_nothing(tmp_path, monkeypatch):
    from typer.testing import CliRunner

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["report", "attn-1l", PROMPT, "--plan", "--quiet"])
    assert done.exit_code == 0, done.output
    assert done.stdout.startswith("a report of 15 sections on 13 tokens: ")
    assert list(tmp_path.iterdir()) == []
