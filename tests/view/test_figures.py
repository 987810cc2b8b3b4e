"""Figures hold the numbers of their results, and no text in them is markup."""

import numpy as np
import pytest

import mechinterp_attn as mia
from mechinterp_attn.core.errors import MechInterpError
from mechinterp_attn.view.figures.detect import score_heatmap
from mechinterp_attn.view.figures.style import safe_text


def test_score_heatmap_is_the_score_of_every_attention_head(model):
    scores = mia.detect.score_heads(model)
    (heat,) = score_heatmap(scores, "previous_token").data
    own = scores.frame.query("kind == 'attention'").set_index(["layer", "index"])["previous_token"]
    np.testing.assert_array_equal(heat.z, own.unstack().to_numpy())
    assert heat.customdata[1][2] == "L1H2"
    assert (heat.zmin, heat.zmax) == (0, 1)


def test_score_heatmap_names_the_scores(model):
    with pytest.raises(MechInterpError, match=r"no score .charm.; there are .*induction"):
        score_heatmap(mia.detect.score_heads(model), "charm")


def test_text_in_a_figure_is_not_markup():
    assert safe_text("<b>\u202e&") == "&lt;b&gt;⟨U+202E⟩&amp;"


def test_every_drawing_is_found_by_type_and_no_analysis_names_the_roof():
    """A picture is looked up in one registry; what has no drawing of its own is a ranking."""
    from pathlib import Path

    import mechinterp_attn
    from mechinterp_attn.core.pictures import draw, draws

    root = Path(mechinterp_attn.__file__).parent
    above = ("view", "explore", "cli")
    below = [f for f in root.rglob("*.py") if f.relative_to(root).parts[0] not in above]
    naming = [f.name for f in below if "mechinterp_attn.view" in f.read_text()]
    assert naming == ["pictures.py"]  # the name of the module to load, once
    with pytest.raises(MechInterpError, match="no page of a int"):
        draw(3, form="page")

    class Base: ...

    class Own(Base): ...

    draws(Base)(lambda subject: "base")
    assert draw(Own()) == "base"
    draws(Own)(lambda subject: "own")
    assert (draw(Own()), draw(Base())) == ("own", "base")
